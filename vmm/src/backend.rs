//! What the devices stand on: frames in and out, and blocks of a disk.
//!
//! The traits are the whole coupling between the machine and the world: the owner plugs in a gated tap and a
//! mirrored image here, a plain VM a tap and a file.

use std::io;
use std::os::fd::RawFd;

pub use netbuf::SendOutcome;

/// Bytes of the `virtio_net_hdr` in front of every frame (virtio 1.2, 5.1.6: 12 bytes under `VERSION_1`).
pub const NET_HEADER: usize = 12;
/// Largest Ethernet frame a device sends or takes, without the header, bytes: 64 KiB of payload and 14 of header.
pub const MAX_FRAME: usize = 65_550;
/// Bytes per sector: the unit of virtio-blk offsets, whatever the disk's own block size is.
pub const SECTOR: u64 = 512;

/// The far end of a network device.
///
/// Every frame, in both directions, begins with a 12-byte `virtio_net_hdr_v1` (zero: no offloads are negotiated).
pub trait NetBackend: Send {
    /// Sends one frame. [`SendOutcome::Full`] means it was not taken: the device keeps the descriptor and stops
    /// sending until [`NetBackend::room_fd`] is readable.
    ///
    /// # Errors
    /// The backend's own failure; the device drops the frame, as a wire would.
    fn send(&mut self, frame: &[u8]) -> io::Result<SendOutcome>;

    /// Takes the next frame, its 12-byte header included, into `buf`; `None` when there is none now.
    ///
    /// # Errors
    /// The backend's own failure; the device stops reading until the next resume.
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>>;

    /// The frame just taken is longer than the guest's buffer, and dropped: to be counted.
    fn too_long(&self) {}

    /// Readable while [`NetBackend::recv`] has a frame (level-triggered).
    fn rx_fd(&self) -> RawFd;

    /// An eventfd signalled when there is room again after [`SendOutcome::Full`]; `None` if that never happens.
    /// The device reads it (8 bytes) to clear it.
    fn room_fd(&self) -> Option<RawFd>;
}

/// One disk. Requests may come from several threads; offsets and lengths are in bytes, multiples of 512.
pub trait BlockBackend: Send + Sync {
    /// Bytes of the disk, a multiple of 512.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Any failure, beyond-the-end included; the guest sees an I/O error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// As [`BlockBackend::read_at`].
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// A failed sync.
    fn flush(&self) -> io::Result<()>;

    /// Gives `len` bytes at `offset` back; what is read there afterwards is unspecified.
    ///
    /// # Errors
    /// As [`BlockBackend::write_at`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes `len` bytes at `offset` read as zero.
    ///
    /// # Errors
    /// As [`BlockBackend::write_at`].
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The serial number `GET_ID` answers with, padded with NUL.
    fn id(&self) -> [u8; 20];
}
