//! A wake-up another thread waits for with poll or epoll.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// An eventfd used as a flag: readable once signalled, until its eight bytes are read.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    /// A flag that is not raised.
    pub(crate) fn new() -> io::Result<Wake> {
        // SAFETY: eventfd takes no pointers; the result is checked before use.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd was just returned by eventfd and nobody else owns it.
        Ok(Wake(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Raises the flag. Cannot fail: an eventfd whose counter is full is raised already.
    pub(crate) fn raise(&self) {
        let one = 1u64.to_ne_bytes();
        loop {
            // SAFETY: `one` is eight readable bytes, what an eventfd takes.
            let n = unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
            if n >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }

    /// The descriptor to wait on.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
