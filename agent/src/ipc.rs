//! Framed messages with file descriptors over a Unix stream socket: agent <-> VM process, command line <-> agent.
//!
//! ```text
//! | length u32 LE | bincode payload (length bytes) |     descriptors ride on the length's first byte (SCM_RIGHTS)
//! ```

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use checkpoint::codec;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};

/// Longest message. The largest is a machine state on activation.
pub const LIMIT: usize = 80 << 20;
/// Most descriptors with one message.
pub const MAX_FDS: usize = 16;

/// Why a message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The other side closed the socket between messages.
    #[error("the other process closed the connection")]
    Closed,
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The message was not of the expected form (a different version of the program?).
    #[error("malformed message (is the other process of the same version?): {0}")]
    Codec(#[from] codec::CodecError),
    /// A message longer than [`LIMIT`].
    #[error("message of {0} bytes is over the limit of {LIMIT}")]
    TooLong(usize),
}

/// Sends one message with `fds`. The receiver gets duplicates; the caller keeps its own.
///
/// # Errors
/// [`IpcError`] when the socket failed or the message is too long.
pub fn send<T: Serialize>(socket: &UnixStream, message: &T, fds: &[RawFd]) -> Result<(), IpcError> {
    let payload = codec::to_bytes(message, LIMIT)?;
    let length = u32::try_from(payload.len())
        .map_err(|_| IpcError::TooLong(payload.len()))?
        .to_le_bytes();
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let sent = retry(|| {
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&length)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(io::Error::from)
    })?;
    let mut socket = socket;
    socket.write_all(&length[sent..])?;
    socket.write_all(&payload)?;
    Ok(())
}

/// Receives one message and the descriptors that came with it.
///
/// # Errors
/// [`IpcError::Closed`] at a clean end; otherwise what went wrong.
pub fn recv<T: DeserializeOwned>(socket: &UnixStream) -> Result<(T, Vec<OwnedFd>), IpcError> {
    let mut length = [0u8; 4];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let got = {
        let mut iov = [IoSliceMut::new(&mut length)];
        let message = retry(|| {
            recvmsg::<()>(
                socket.as_raw_fd(),
                &mut iov,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )
            .map(|m| {
                let mut received = Vec::new();
                if let Ok(cmsgs) = m.cmsgs() {
                    for cmsg in cmsgs {
                        if let ControlMessageOwned::ScmRights(raw) = cmsg {
                            received.extend(raw);
                        }
                    }
                }
                (m.bytes, received)
            })
            .map_err(io::Error::from)
        })?;
        for raw in message.1 {
            // SAFETY: the kernel has just installed this descriptor for us and nobody else knows it.
            fds.push(unsafe { OwnedFd::from_raw_fd(raw) });
        }
        message.0
    };
    if got == 0 {
        return Err(IpcError::Closed);
    }
    let mut socket = socket;
    socket.read_exact(&mut length[got..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LIMIT {
        return Err(IpcError::TooLong(length));
    }
    let mut payload = vec![0u8; length];
    socket.read_exact(&mut payload)?;
    Ok((codec::from_bytes(&payload, LIMIT)?, fds))
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_and_its_descriptors_arrive_together() {
        let (a, b) = UnixStream::pair().unwrap();
        let (pipe_read, pipe_write) = nix::unistd::pipe().unwrap();
        send(&a, &("hello".to_string(), 7u64), &[pipe_write.as_raw_fd()]).unwrap();
        drop(pipe_write);
        let ((text, number), fds) = recv::<(String, u64)>(&b).unwrap();
        assert_eq!((text.as_str(), number, fds.len()), ("hello", 7, 1));
        std::fs::File::from(fds.into_iter().next().unwrap())
            .write_all(b"x")
            .unwrap();
        let mut byte = [0u8];
        std::fs::File::from(pipe_read)
            .read_exact(&mut byte)
            .unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn an_oversized_or_closed_connection_is_an_error() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(recv::<u8>(&b), Err(IpcError::TooLong(_))));
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert!(matches!(recv::<u8>(&b), Err(IpcError::Closed)));
    }
}
