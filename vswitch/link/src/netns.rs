//! Network namespaces, by path.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::{io, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::LinkError;

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Opens a namespace, as `/run/netns/blue` or `/proc/1234/ns/net`.
    ///
    /// # Errors
    ///
    /// [`LinkError::Netns`].
    pub fn open(path: &Path) -> Result<Netns, LinkError> {
        let file = File::open(path).map_err(|source| failed(path, source))?;
        Ok(Netns { file, path: path.to_owned() })
    }

    /// Runs `work` on a thread of its own inside the namespace.
    ///
    /// # Errors
    ///
    /// [`LinkError::Netns`] if it cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LinkError> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| -> io::Result<T> {
                move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            match inside.join() {
                Ok(result) => result.map_err(|source| failed(&self.path, source)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// True if this is the namespace of the calling thread.
    pub fn is_current(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let inode = |path: &Path| std::fs::metadata(path).map(|data| (data.dev(), data.ino())).ok();
        let here = inode(Path::new("/proc/thread-self/ns/net"));
        here.is_some() && here == self.file.metadata().map(|data| (data.dev(), data.ino())).ok()
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn failed(path: &Path, source: io::Error) -> LinkError {
    LinkError::Netns { path: path.display().to_string(), source }
}
