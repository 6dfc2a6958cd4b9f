//! One TCP connection that several threads send frames on.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use checkpoint::HostId;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::queue::{Queue, TOLD_MAX, Turn};
use crate::wire::{Frame, Header, Payload};

/// A peer that takes nothing for this long is lost, unless it is fed: see [`FEED_TIMEOUT`].
const WRITE_TIMEOUT: Duration = Duration::from_secs(3);
/// The same for one that checkpoints are sent to. It is the last resort only: a slow replica's storage may take seconds for
/// the end of a large checkpoint, and nobody waits for the first one. Who waits for a commit asks the replicas whether they
/// are well ([`crate::probe()`]), and a configuration without one that is not ends the connection to it.
pub const FEED_TIMEOUT: Duration = Duration::from_secs(60);
/// Socket buffers: about one epoch of a busy VM.
const BUFFER: usize = 4 << 20;

/// Payload of [`wire::Kind::NotReady`], [`wire::Kind::Declined`] and [`wire::Kind::Broken`]: the replica concerned, and what about it.
pub type Trouble = (HostId, String);

/// Longest encoded [`crate::greet::Hello`], [`Trouble`] or [`checkpoint::CheckpointEnd`].
pub const HELLO_LIMIT: usize = 4096;

/// The sending half.
#[derive(Debug)]
pub struct Link {
    queue: Arc<Queue>,
    /// The same socket, for looking.
    socket: TcpStream,
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
            queue: Queue::new(stream.try_clone()?),
            socket: stream.try_clone()?,
        })
    }

    /// For one that is fed: [`FEED_TIMEOUT`].
    ///
    /// # Errors
    /// The socket's.
    pub fn be_patient(&self) -> io::Result<()> {
        self.socket.set_write_timeout(Some(FEED_TIMEOUT))
    }

    /// Connects to `addr`.
    ///
    /// # Errors
    /// The connection's.
    pub fn connect(addr: SocketAddr, timeout: Duration) -> io::Result<(Self, TcpStream)> {
        let stream = TcpStream::connect_timeout(&addr, timeout)?;
        Ok((Self::new(&stream)?, stream))
    }

    /// Sends one frame, waiting until the kernel has it. Not for whoever holds a lock.
    ///
    /// # Errors
    /// The connection's; it is of no use afterwards.
    pub fn send(&self, frame: &Frame, payload: &[u8]) -> io::Result<()> {
        self.put(frame, payload, Turn::Ahead, usize::MAX)?;
        self.queue.wait_sent()
    }

    /// Sends a frame on as it was received, waiting as [`Link::send`] does.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub fn forward(&self, frame: &Frame, payload: &Payload) -> io::Result<()> {
        self.pass(frame, payload, Turn::Ahead)?;
        self.queue.wait_sent()
    }

    /// Tells a peer something, without waiting for it.
    ///
    /// # Errors
    /// The connection's, which is over then; also if the peer does not read what it is told.
    pub fn post(&self, frame: &Frame, payload: &[u8]) -> io::Result<()> {
        self.put(frame, payload, Turn::Behind, TOLD_MAX)
    }

    /// Sends a frame on as it was received, without waiting: whoever feeds the sender is to be held up instead, by
    /// [`Link::wait_for_room`].
    ///
    /// # Errors
    /// The connection's.
    pub fn post_on(&self, frame: &Frame, payload: &Payload) -> io::Result<()> {
        self.pass(frame, payload, Turn::Behind)
    }

    /// Sends the next replica a frame of this one's own, in its place among those that it passes on.
    ///
    /// # Errors
    /// The connection's.
    pub fn post_down(&self, frame: &Frame, payload: &[u8]) -> io::Result<()> {
        self.put(frame, payload, Turn::Behind, usize::MAX)
    }

    fn put(&self, frame: &Frame, payload: &[u8], turn: Turn, most: usize) -> io::Result<()> {
        let header = Header::new(frame, payload.len(), crc32c::crc32c(payload))?;
        let content = || {
            let mut content = Payload::default();
            content.fill(payload);
            content
        };
        self.queue.post(header, payload, content, turn, most)
    }

    fn pass(&self, frame: &Frame, payload: &Payload, turn: Turn) -> io::Result<()> {
        let header = Header::new(frame, payload.len(), payload.crc())?;
        self.queue
            .post(header, payload, || payload.clone(), turn, usize::MAX)
    }

    /// Waits until so little waits to be sent ([`crate::queue::QUEUE_MAX`]) that more may come. A peer that takes nothing
    /// for `patience` meanwhile is dropped.
    pub fn wait_for_room(&self, patience: Duration) {
        self.queue.wait_for_room(patience);
    }

    /// From here on what is posted waits, and what is sent goes ahead of it.
    pub fn hold(&self) {
        self.queue.hold();
    }

    /// What has been posted since [`Link::hold`] is sent.
    ///
    /// # Errors
    /// The connection's.
    pub fn release(&self) -> io::Result<()> {
        self.queue.release()
    }

    /// Sends a frame without payload if that needs no waiting; if other traffic is under way it is not needed.
    ///
    /// # Errors
    /// The connection's.
    pub fn send_if_idle(&self, frame: &Frame) -> io::Result<()> {
        self.queue.send_if_idle(Header::new(frame, 0, 0)?)
    }

    /// Ends the connection in both directions; what waits to be sent is not sent.
    pub fn close(&self) {
        self.queue.end();
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
        // A thread that sends for it may live a little longer; the peer is not to wait for that.
        self.close();
    }
}
