//! The control socket: lines in, lines out.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use vswitch_api::{Answer, ApiError, ErrorCode, MAX_LINE_BYTES, PROTOCOL_VERSION, Request, RequestLine, ResponseLine};

/// Listens where only root may connect. A socket that a dead daemon left is replaced.
///
/// # Errors
///
/// Those of the file system and of `bind(2)`.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves one connection until it ends, or until its first line that is no request.
pub(crate) async fn serve(
    stream: UnixStream,
    mut handle: impl AsyncFnMut(Request) -> Result<Answer, ApiError>,
) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        (&mut read).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Ok(());
        }
        let parsed = parse(&line);
        let is_bad = parsed.is_err();
        let result = match parsed {
            Ok(request) => handle(request).await,
            Err(error) => Err(error),
        };
        let mut answer = serde_json::to_vec(&ResponseLine::from(result))?;
        answer.push(b'\n');
        write.write_all(&answer).await?;
        if is_bad {
            write.shutdown().await?;
            drain(read).await;
            return Ok(());
        }
    }
}

/// Reads on for a moment, so that closing does not reset the connection before the answer is read.
async fn drain(mut read: impl AsyncReadExt + Unpin) {
    const MOST: usize = 16 << 20;
    let mut rest = vec![0; 64 << 10];
    let mut seen = 0;
    let reading = async {
        while seen < MOST
            && let Ok(count @ 1..) = read.read(&mut rest).await
        {
            seen += count;
        }
    };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), reading).await;
}

fn parse(line: &[u8]) -> Result<Request, ApiError> {
    let bad = |message: String| ApiError::new(ErrorCode::BadRequest, message);
    if line.last() != Some(&b'\n') {
        return Err(if line.len() >= MAX_LINE_BYTES {
            bad(format!("the line is longer than {MAX_LINE_BYTES} bytes: send one request a line"))
        } else {
            bad("the line has no end: close it with a newline".to_owned())
        });
    }
    let line: RequestLine = serde_json::from_slice(line)
        .map_err(|error| bad(format!("this is no request: {error}; send one JSON object a line, as {{\"version\":1,\"request\":{{\"op\":\"status\"}}}}")))?;
    if line.version != PROTOCOL_VERSION {
        return Err(bad(format!(
            "protocol version {} is not spoken here, {PROTOCOL_VERSION} is: use tools of the daemon's version",
            line.version
        )));
    }
    Ok(line.request)
}
