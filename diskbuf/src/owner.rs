//! The disk of a running VM: its mirror, and a tap for the stream of writes to the chain.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{DISK_RECORD_MAX, DiskOp, DiskRecord};

use crate::mirror::Mirror;

/// Longest discard or zeroing of one record, in bytes: whole sectors in a u32.
const RANGE_MAX: u64 = u32::MAX as u64 / 512 * 512;

/// Where an owner's writes go besides its mirror.
pub trait DiskSink: Send + Sync {
    /// Takes one write, which has just been done to the mirror. It belongs to the epoch that is open now. May block:
    /// that is the back-pressure on a guest that writes faster than the chain takes it.
    fn disk_write(&self, record: &DiskRecord<'_>);
}

/// One disk of a running VM.
pub struct OwnerDisk {
    index: u16,
    mirror: Arc<Mirror>,
    sink: Arc<dyn DiskSink>,
    /// Writes that overlap must reach mirror and stream in the same order.
    order: Mutex<()>,
}

impl std::fmt::Debug for OwnerDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnerDisk")
            .field("index", &self.index)
            .field("mirror", &self.mirror)
            .finish_non_exhaustive()
    }
}

impl OwnerDisk {
    /// The VM's disk number `index`.
    #[must_use]
    pub fn new(index: u16, mirror: Arc<Mirror>, sink: Arc<dyn DiskSink>) -> Self {
        Self {
            index,
            mirror,
            sink,
            order: Mutex::new(()),
        }
    }

    /// The image underneath.
    #[must_use]
    pub fn mirror(&self) -> &Arc<Mirror> {
        &self.mirror
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.mirror.size()
    }

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// [`Mirror::read_at`]'s.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.mirror.read_at(offset, buf)
    }

    /// Writes `data` at byte `offset`, in records of at most [`DISK_RECORD_MAX`] bytes.
    ///
    /// # Errors
    /// [`Mirror::write_at`]'s; what failed is not streamed.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if !self.mirror.contains(offset, data.len() as u64) {
            return self.mirror.write_at(offset, data); // its error
        }
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = offset;
        for part in data.chunks(DISK_RECORD_MAX as usize) {
            self.mirror.write_at(at, part)?;
            self.sink.disk_write(&DiskRecord {
                disk: self.index,
                op: DiskOp::Write,
                offset: at,
                len: part.len() as u32,
                data: part,
            });
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes everything written durable on this host. (On the others it is the commit of its epoch that does.)
    ///
    /// # Errors
    /// [`Mirror::flush`]'s.
    pub fn flush(&self) -> io::Result<()> {
        self.mirror.flush()
    }

    /// The range is of no interest any more.
    ///
    /// # Errors
    /// [`Mirror::discard`]'s.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.range(DiskOp::Discard, offset, len)
    }

    /// The range reads as zero.
    ///
    /// # Errors
    /// [`Mirror::write_zeroes`]'s.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.range(DiskOp::WriteZeroes, offset, len)
    }

    fn range(&self, op: DiskOp, offset: u64, len: u64) -> io::Result<()> {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match op {
            DiskOp::Discard => self.mirror.discard(offset, len)?,
            _ => self.mirror.write_zeroes(offset, len)?,
        }
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let part = left.min(RANGE_MAX);
            self.sink.disk_write(&DiskRecord {
                disk: self.index,
                op,
                offset: at,
                len: part as u32,
                data: &[],
            });
            at += part;
            left -= part;
        }
        Ok(())
    }
}
