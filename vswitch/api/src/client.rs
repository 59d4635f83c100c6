//! A blocking client, for the CNI plugin, `switchctl` and tests.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Answer, ApiError, PROTOCOL_VERSION, Request, RequestLine, ResponseLine, ResponseResult};

/// An answer may be as long as a full table.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot reach vswitchd at {path}: {source}; {}", remedy(source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to vswitchd broke: {0}")]
    Io(#[from] io::Error),
    /// The answer is not of this protocol.
    #[error("vswitchd answered something unknown ({0}): use tools of the daemon's version")]
    Protocol(#[from] serde_json::Error),
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "only root may talk to it",
        _ => "is the daemon running? (`systemctl status vswitchd`)",
    }
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; every request then has `timeout` to be answered.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Client, ClientError> {
        let failed = |source| ClientError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    ///
    /// The daemon's, or those of the connection.
    pub fn call(&mut self, request: Request) -> Result<Answer, ClientError> {
        let mut line = serde_json::to_vec(&RequestLine { version: PROTOCOL_VERSION, request })?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut answer = String::new();
        (&mut self.stream).take(MAX_ANSWER_BYTES).read_line(&mut answer)?;
        if answer.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match serde_json::from_str::<ResponseLine>(&answer)?.result {
            ResponseResult::Ok(answer) => Ok(answer),
            ResponseResult::Error(error) => Err(error.into()),
        }
    }
}
