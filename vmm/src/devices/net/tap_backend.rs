//! Network backends over `netbuf`: a bare tap for a machine nobody protects, a gate for one that is.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use netbuf::{Gate, Port, Tap};

use crate::backend::{NetBackend, SendOutcome};

/// A tap without a gate: what the guest sends leaves at once. A full tap drops, as a wire would.
pub struct TapBackend(Tap);

impl TapBackend {
    /// Uses `tap`, with or without its own virtio header.
    pub fn new(tap: Tap) -> TapBackend {
        TapBackend(tap)
    }
}

impl NetBackend for TapBackend {
    fn send(&mut self, frame: &[u8]) -> io::Result<SendOutcome> {
        self.0.send(frame).map(|()| SendOutcome::Sent)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.0.recv(buf)
    }

    fn rx_fd(&self) -> RawFd {
        self.0.fd()
    }

    fn room_fd(&self) -> Option<RawFd> {
        None
    }
}

/// A gate: what the guest sends is held while the gate holds. The other handles seal and release it.
impl NetBackend for Arc<Gate> {
    fn send(&mut self, frame: &[u8]) -> io::Result<SendOutcome> {
        Gate::send(self, frame)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        Gate::recv(self, buf)
    }

    fn too_long(&self) {
        Gate::too_long(self);
    }

    fn rx_fd(&self) -> RawFd {
        Gate::rx_fd(self)
    }

    fn room_fd(&self) -> Option<RawFd> {
        Some(Gate::room_fd(self))
    }
}
