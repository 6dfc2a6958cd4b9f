//! Small things about file descriptors.

use std::os::fd::RawFd;

/// Reads an eventfd back to zero. Must be non-blocking or readable; another kind of descriptor loses 8 bytes.
pub fn clear(fd: RawFd) {
    let mut count = [0u8; 8];
    // SAFETY: the buffer is 8 bytes, live and ours; a bad descriptor only makes the call fail.
    unsafe {
        libc::read(fd, count.as_mut_ptr().cast(), count.len());
    }
}
