//! The daemon's side of a VM process: starting it, talking to it, ending it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use crate::child::proto::{FromChild, Start, ToChild};
use crate::ipc::{self, IpcError};

/// A running VM process.
#[derive(Debug)]
pub struct ChildHandle {
    pid: u32,
    socket: Mutex<UnixStream>,
    process: Mutex<Child>,
}

impl ChildHandle {
    /// Starts a VM process and tells it what to be; `fds` are a standby's RAM files. Every report of it, and `None`
    /// when it has ended, goes to `report`.
    ///
    /// # Errors
    /// When the process cannot be started or does not take the message.
    pub fn start(
        start: &Start,
        fds: &[RawFd],
        report: impl Fn(Option<FromChild>) + Send + 'static,
    ) -> Result<Arc<Self>, IpcError> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["vmm", "--child-fd", &fd.to_string()])
            .stdin(Stdio::null());
        // SAFETY: only async-signal-safe calls (fcntl) between fork and exec; `fd` stays open until after the spawn.
        unsafe {
            command.pre_exec(move || {
                if libc::fcntl(fd, libc::F_SETFD, 0) == -1 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let process = command.spawn()?;
        drop(theirs);
        ipc::send(&ours, start, fds)?;
        let reader = ours.try_clone()?;
        std::thread::Builder::new()
            .name("vm-reports".into())
            .spawn(move || {
                while let Ok((message, _)) = ipc::recv::<FromChild>(&reader) {
                    report(Some(message));
                }
                report(None);
            })?;
        Ok(Arc::new(Self {
            pid: process.id(),
            socket: Mutex::new(ours),
            process: Mutex::new(process),
        }))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Tells it something.
    ///
    /// # Errors
    /// When it is gone.
    pub fn send(&self, message: &ToChild) -> Result<(), IpcError> {
        ipc::send(
            &self.socket.lock().unwrap_or_else(PoisonError::into_inner),
            message,
            &[],
        )
    }

    /// Ends it at once and waits for it: afterwards its descriptors (taps, images) are free again.
    pub fn kill(&self) {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = process.kill();
        let _ = process.wait();
    }
}

impl Drop for ChildHandle {
    fn drop(&mut self) {
        self.kill();
    }
}
