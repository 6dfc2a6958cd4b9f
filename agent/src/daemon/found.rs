//! VM processes that outlived their agent, found by the next one.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use checkpoint::{HostId, VmId};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::child::proto::{FromChild, Owns};
use crate::ipc;

/// How long a process may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// One of them.
#[derive(Debug)]
pub(super) struct Found {
    pub owns: Owns,
    pub socket: UnixStream,
    pub pid: u32,
    pub pidfd: OwnedFd,
    /// It has been said that the master does not know it.
    pub said: bool,
}

impl Found {
    /// Ends it.
    pub fn kill(&self) {
        super::child::kill(&self.pidfd);
    }
}

/// Looks for all of them. What is left of processes that have ended goes.
pub(super) fn scan(dir: &Path, host: &HostId) -> BTreeMap<VmId, Found> {
    let mut found = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(dir) else {
        return found;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        match meet(&path) {
            Ok(process) if process.owns.host == *host => {
                found.insert(process.owns.vm, process);
            }
            Ok(process) => tracing::error!(
                "{}: the VM's process there belongs to host {}, not to {host}: left alone",
                path.display(),
                process.owns.host
            ),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(&path);
            }
            Err(e) => tracing::warn!("{}: {e}", path.display()),
        }
    }
    found
}

fn meet(path: &Path) -> io::Result<Found> {
    let socket = UnixStream::connect(path)?;
    let pid = getsockopt(&socket, PeerCredentials)?.pid();
    // SAFETY: no memory is passed; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
    socket.set_read_timeout(Some(PATIENCE))?;
    let (message, _) = ipc::recv::<FromChild>(&socket).map_err(io::Error::other)?;
    let FromChild::Owns(owns) = message else {
        return Err(io::Error::other("it does not say who it is"));
    };
    socket.set_read_timeout(None)?;
    Ok(Found {
        owns: *owns,
        socket,
        pid: pid.unsigned_abs(),
        pidfd,
        said: false,
    })
}
