//! The far side of a gate: something that takes and gives whole frames.

use std::io;
use std::os::fd::RawFd;

/// Bytes of the `virtio_net_hdr` in front of every frame (virtio 1.2, 5.1.6: 12 bytes under `VERSION_1`).
pub const NET_HEADER: usize = 12;
/// Largest frame taken, header included, bytes: 12 of virtio header, 14 of Ethernet header, 4 of VLAN tag, 64 KiB.
pub const MAX_FRAME: usize = NET_HEADER + 14 + 4 + 65_536;

/// What became of a frame handed over for sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// Taken: sent or held (or dropped, as a full NIC queue would); the caller is done with it.
    Sent,
    /// Not taken: no room until `room_fd` is readable.
    Full,
}

/// Where frames go and come from. Every frame begins with a 12-byte `virtio_net_hdr_v1`; no offload is ever used, so
/// what the header says is ignored on the way out and is zero (`num_buffers` 1) on the way in.
pub trait Port: Send + Sync {
    /// Sends one frame without blocking.
    ///
    /// # Errors
    /// `WouldBlock` or `ENOBUFS` when the device has no room now, anything else when the frame cannot be sent.
    fn send(&self, frame: &[u8]) -> io::Result<()>;

    /// Takes the next frame into `buf` without blocking; `None` when there is none. A frame longer than `buf` is cut.
    ///
    /// # Errors
    /// The device's own failure, or `InvalidInput` if `buf` has no room for the header.
    fn recv(&self, buf: &mut [u8]) -> io::Result<Option<usize>>;

    /// Readable while there is a frame to take, writable while there is room to send one.
    fn fd(&self) -> RawFd;

    /// Deaf: what comes is dropped before it could be taken, and wakes nobody.
    ///
    /// # Errors
    /// The device's refusal; frames then wait to be taken, as many as the device keeps.
    fn set_deaf(&self, _deaf: bool) -> io::Result<()> {
        Ok(())
    }
}
