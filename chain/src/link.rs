//! One TCP connection that several threads send frames on.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use checkpoint::HostId;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::queue::Queue;
use crate::wire::{self, Frame, Payload};

/// A peer that takes nothing for this long is lost.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(3);
/// Socket buffers: about one epoch of a busy VM.
const BUFFER: usize = 4 << 20;

/// Payload of [`wire::Kind::NotReady`], [`wire::Kind::Declined`] and [`wire::Kind::Broken`]: the replica concerned, and what about it.
pub type Trouble = (HostId, String);

/// Longest encoded [`crate::greet::Hello`], [`Trouble`] or [`checkpoint::CheckpointEnd`].
pub const HELLO_LIMIT: usize = 4096;

/// The sending half.
#[derive(Debug)]
pub struct Link {
    stream: Arc<Mutex<TcpStream>>,
    /// The same socket, for what needs no turn: looking and shutting down.
    socket: TcpStream,
    /// Set: frames wait here, not the sender.
    queue: OnceLock<Arc<Queue>>,
}

impl Link {
    /// Wraps a connection.
    ///
    /// # Errors
    /// When the socket's options cannot be set or its descriptor not be duplicated.
    pub fn new(stream: &TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        // Without the privilege the kernel grants what its limits allow; that is no reason to fail.
        let _ = setsockopt(stream, sockopt::SndBuf, &BUFFER);
        let _ = setsockopt(stream, sockopt::RcvBuf, &BUFFER);
        Ok(Self {
            stream: Arc::new(Mutex::new(stream.try_clone()?)),
            socket: stream.try_clone()?,
            queue: OnceLock::new(),
        })
    }

    /// Connects to `addr`.
    ///
    /// # Errors
    /// The connection's.
    pub fn connect(addr: SocketAddr, timeout: Duration) -> io::Result<(Self, TcpStream)> {
        let stream = TcpStream::connect_timeout(&addr, timeout)?;
        Ok((Self::new(&stream)?, stream))
    }

    /// From here on sending does not wait for the peer, but for room in a queue of [`crate::queue::QUEUE_MAX`] bytes: for a peer that
    /// nobody waits for.
    ///
    /// # Errors
    /// Starting a thread.
    pub fn set_queued(&self) -> io::Result<()> {
        if self.queue.get().is_none() {
            let queue = Arc::<Queue>::default();
            let (stream, waiting) = (self.stream.clone(), queue.clone());
            std::thread::Builder::new()
                .name("chain-queue".into())
                .spawn(move || waiting.drain(&stream))?;
            // Whoever was faster has a queue of its own; this one's thread ends with it.
            if let Err(queue) = self.queue.set(queue) {
                queue.end();
            }
        }
        Ok(())
    }

    /// Sends one frame, waiting for room.
    ///
    /// # Errors
    /// The connection's; it is of no use afterwards.
    pub fn send(&self, frame: &Frame, payload: &[u8]) -> io::Result<()> {
        if let Some(queue) = self.queue.get() {
            let mut copy = Payload::default();
            copy.fill(payload);
            return queue.push(*frame, copy);
        }
        self.with(|stream| wire::write(stream, frame, payload))
    }

    /// Sends a frame on as it was received.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub fn forward(&self, frame: &Frame, payload: &Payload) -> io::Result<()> {
        if let Some(queue) = self.queue.get() {
            return queue.push(*frame, payload.clone());
        }
        self.with(|stream| wire::forward(stream, frame, payload))
    }

    fn with(&self, write: impl FnOnce(&mut TcpStream) -> io::Result<()>) -> io::Result<()> {
        with(&self.stream, write)
    }

    /// Sends a frame without payload if that needs no waiting; if other traffic is under way it is not needed.
    ///
    /// # Errors
    /// The connection's.
    pub fn send_if_idle(&self, frame: &Frame) -> io::Result<()> {
        let mut stream = match self.stream.try_lock() {
            Ok(stream) => stream,
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut fds, PollTimeout::ZERO)? == 0 {
            return Ok(());
        }
        let result = wire::write(&mut *stream, frame, &[]);
        if result.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        result
    }

    /// Ends the connection in both directions; what waits to be sent is not sent.
    pub fn close(&self) {
        if let Some(queue) = self.queue.get() {
            queue.end();
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Whether something has arrived that nobody has read yet.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        let mut byte = [0u8; 1];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        matches!(recv(self.socket.as_raw_fd(), &mut byte, flags), Ok(1))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.get() {
            queue.end();
        }
    }
}

/// Writes to a connection that several threads write to.
pub(crate) fn with(
    stream: &Mutex<TcpStream>,
    write: impl FnOnce(&mut TcpStream) -> io::Result<()>,
) -> io::Result<()> {
    let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    let result = write(&mut stream);
    if result.is_err() {
        // Part of a frame may be out: nothing that follows could be understood.
        let _ = stream.shutdown(Shutdown::Both);
    }
    result
}
