//! The daemon's side of a VM process: starting it, talking to it, ending it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::child::proto::{FromChild, Start, ToChild};
use crate::ipc::{self, IpcError};

/// Between looks whether a killed process is gone: at first, and at most.
const POLL: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(50));
/// How long the last holder of a handle waits for its process to be gone.
const REAP: Duration = Duration::from_secs(2);

/// A running VM process.
#[derive(Debug)]
pub struct ChildHandle {
    pid: u32,
    socket: Mutex<UnixStream>,
    process: Mutex<Process>,
}

#[derive(Debug)]
enum Process {
    /// This agent's own child.
    Child(Child),
    /// One that an agent before has left running.
    Found(OwnedFd),
}

impl Process {
    fn kill(&mut self) {
        match self {
            Self::Child(child) => {
                let _ = child.kill();
            }
            Self::Found(pidfd) => kill(pidfd),
        }
    }

    fn is_gone(&mut self) -> bool {
        match self {
            Self::Child(child) => !matches!(child.try_wait(), Ok(None)),
            Self::Found(pidfd) => {
                // Readable once the process has ended.
                let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
            }
        }
    }
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
        listen(&ours, report)?;
        Ok(Arc::new(Self {
            pid: process.id(),
            socket: Mutex::new(ours),
            process: Mutex::new(Process::Child(process)),
        }))
    }

    /// Takes over a process that is reached by `socket` already; `pidfd` is its.
    ///
    /// # Errors
    /// When there is no thread to listen to it.
    pub fn adopt(
        socket: UnixStream,
        pid: u32,
        pidfd: OwnedFd,
        report: impl Fn(Option<FromChild>) + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        listen(&socket, report)?;
        Ok(Arc::new(Self {
            pid,
            socket: Mutex::new(socket),
            process: Mutex::new(Process::Found(pidfd)),
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

    /// Ends it at once, without waiting: a process in the middle of a disk's I/O may take its time.
    pub fn kill(&self) {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.kill();
    }

    /// Waits, after [`ChildHandle::kill`], until it is gone: its descriptors (taps, images) are free again then. False if it
    /// is not within `patience`.
    #[must_use]
    pub fn wait_gone(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut pause = POLL.0;
        loop {
            let gone = {
                let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
                process.is_gone()
            };
            if gone {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = POLL.1.min(pause * 2);
        }
    }
}

impl Drop for ChildHandle {
    fn drop(&mut self) {
        self.kill();
        // Reaped, unless it hangs: then this process's end does so.
        let _ = self.wait_gone(REAP);
    }
}

/// Ends a process, at once.
pub(super) fn kill(pidfd: &OwnedFd) {
    // SAFETY: the descriptor is a process's and stays open during the call; no signal information is passed.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

/// Passes on what the process says, to its end.
fn listen(
    socket: &UnixStream,
    report: impl Fn(Option<FromChild>) + Send + 'static,
) -> io::Result<()> {
    let reader = socket.try_clone()?;
    std::thread::Builder::new()
        .name("vm-reports".into())
        .spawn(move || {
            while let Ok((message, _)) = ipc::recv::<FromChild>(&reader) {
                report(Some(message));
            }
            report(None);
        })
        .map(drop)
}
