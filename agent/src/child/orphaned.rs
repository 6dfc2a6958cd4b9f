//! A VM's process whose agent is gone: it runs on, and waits where the next one looks for it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

/// Where an agent finds the process.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Opens the door at `path`, for this process's user only.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.into(),
        })
    }

    /// Waits for an agent; `None` if none comes within `patience`.
    ///
    /// # Errors
    /// The socket's.
    pub fn wait(&self, patience: Duration) -> io::Result<Option<UnixStream>> {
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        };
        stream.set_nonblocking(false)?;
        let peer = getsockopt(&stream, PeerCredentials)?;
        if peer.uid() != geteuid().as_raw() && peer.uid() != 0 {
            tracing::warn!("a process of user {} wanted to be the agent", peer.uid());
            return Ok(None);
        }
        Ok(Some(stream))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_comes_is_let_in_and_a_stale_socket_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        drop(UnixListener::bind(&path).unwrap());
        let door = Door::open(&path).unwrap();
        assert!(door.wait(Duration::ZERO).unwrap().is_none());
        let _agent = UnixStream::connect(&path).unwrap();
        assert!(door.wait(Duration::from_secs(10)).unwrap().is_some());
        drop(door);
        assert!(!path.exists());
    }
}
