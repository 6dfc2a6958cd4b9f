//! Assembling one checkpoint at a replica: collected as it arrives, handed on only when it is whole.

use serde::{Deserialize, Serialize};

use crate::disk::{DiskRecordError, disk_records};
use crate::ids::Epoch;
use crate::machine::MACHINE_LIMIT;
use crate::page::{PageError, records};

/// What the sender says of a complete checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEnd {
    /// Page records.
    pub pages: u64,
    /// Disk records.
    pub disk_records: u64,
    /// Bytes of all payloads.
    pub bytes: u64,
    /// CRC32C over all payloads in the order sent.
    pub digest: u32,
}

/// Counts and digest of a checkpoint under way; both ends keep one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally(CheckpointEnd);

impl Tally {
    /// Accounts for one payload with that many page and disk records in it.
    pub fn add(&mut self, payload: &[u8], pages: u64, disk_records: u64) {
        self.0.pages += pages;
        self.0.disk_records += disk_records;
        self.0.bytes += payload.len() as u64;
        self.0.digest = crc32c::crc32c_append(self.0.digest, payload);
    }

    /// The figures so far.
    #[must_use]
    pub fn end(&self) -> CheckpointEnd {
        self.0
    }
}

/// Bounds of one staged checkpoint, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct StageLimits {
    /// Page records.
    pub pages: u64,
    /// Disk records.
    pub disk: u64,
}

/// A complete checkpoint.
#[derive(Debug)]
pub struct Whole {
    /// Its epoch.
    pub epoch: Epoch,
    /// Page records, as received.
    pub pages: Vec<Vec<u8>>,
    /// Disk records, as received.
    pub disk: Vec<Vec<u8>>,
    /// The encoded machine state.
    pub machine: Vec<u8>,
    /// What was counted.
    pub end: CheckpointEnd,
}

/// Why a checkpoint is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// A page record.
    #[error(transparent)]
    Page(#[from] PageError),
    /// A disk record.
    #[error(transparent)]
    Disk(#[from] DiskRecordError),
    /// More than the bound.
    #[error("checkpoint {epoch}: more than {limit} bytes of {what}")]
    TooLarge {
        /// The epoch.
        epoch: Epoch,
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// Counts or digest differ from the sender's.
    #[error(
        "checkpoint {epoch} is not whole: the sender counted {sent:?}, here arrived {arrived:?}"
    )]
    NotWhole {
        /// The epoch.
        epoch: Epoch,
        /// The sender's.
        sent: CheckpointEnd,
        /// Ours.
        arrived: CheckpointEnd,
    },
    /// No machine state came.
    #[error("checkpoint {0} has no machine state")]
    NoMachine(Epoch),
}

/// A checkpoint under way.
#[derive(Debug)]
pub struct Stage {
    epoch: Epoch,
    limits: StageLimits,
    tally: Tally,
    page_bytes: u64,
    disk_bytes: u64,
    pages: Vec<Vec<u8>>,
    disk: Vec<Vec<u8>>,
    machine: Vec<u8>,
}

impl Stage {
    /// Nothing of `epoch` yet.
    #[must_use]
    pub fn new(epoch: Epoch, limits: StageLimits) -> Self {
        Self {
            epoch,
            limits,
            tally: Tally::default(),
            page_bytes: 0,
            disk_bytes: 0,
            pages: Vec::new(),
            disk: Vec::new(),
            machine: Vec::new(),
        }
    }

    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Takes page records.
    ///
    /// # Errors
    /// [`StageError`] if they are malformed or too many; the checkpoint is then of no use.
    pub fn add_pages(&mut self, payload: Vec<u8>) -> Result<(), StageError> {
        // Before it is counted: what is refused has not arrived, whatever the caller does next.
        let bytes = self.page_bytes.saturating_add(payload.len() as u64);
        if bytes > self.limits.pages {
            return Err(self.too_large("pages", self.limits.pages));
        }
        self.count_pages(&payload)?;
        self.page_bytes = bytes;
        // Any number of payloads without bytes passes the bound.
        if !payload.is_empty() {
            self.pages.push(payload);
        }
        Ok(())
    }

    /// Accounts for page records that the caller has put to use itself (a full checkpoint's, straight into an image
    /// that is not valid yet).
    ///
    /// # Errors
    /// As [`Stage::add_pages`].
    pub fn count_pages(&mut self, payload: &[u8]) -> Result<(), StageError> {
        let mut count = 0;
        for record in records(payload) {
            record?;
            count += 1;
        }
        self.tally.add(payload, count, 0);
        Ok(())
    }

    /// Takes disk records.
    ///
    /// # Errors
    /// As [`Stage::add_pages`].
    pub fn add_disk(&mut self, payload: Vec<u8>) -> Result<(), StageError> {
        // Before it is counted: what is refused has not arrived, whatever the caller does next.
        let bytes = self.disk_bytes.saturating_add(payload.len() as u64);
        if bytes > self.limits.disk {
            return Err(self.too_large("disk writes", self.limits.disk));
        }
        self.count_disk(&payload)?;
        self.disk_bytes = bytes;
        // Any number of payloads without bytes passes the bound.
        if !payload.is_empty() {
            self.disk.push(payload);
        }
        Ok(())
    }

    /// Accounts for disk records that the caller has put to use itself.
    ///
    /// # Errors
    /// As [`Stage::add_pages`].
    pub fn count_disk(&mut self, payload: &[u8]) -> Result<(), StageError> {
        let mut count = 0;
        for record in disk_records(payload) {
            record?;
            count += 1;
        }
        self.tally.add(payload, 0, count);
        Ok(())
    }

    /// Takes a piece of the machine state.
    ///
    /// # Errors
    /// [`StageError::TooLarge`].
    pub fn add_machine(&mut self, payload: &[u8]) -> Result<(), StageError> {
        if self.machine.len() + payload.len() > MACHINE_LIMIT {
            return Err(self.too_large("machine state", MACHINE_LIMIT as u64));
        }
        self.tally.add(payload, 0, 0);
        self.machine.extend_from_slice(payload);
        Ok(())
    }

    /// The sender says that this was all.
    ///
    /// # Errors
    /// [`StageError::NotWhole`] if it was not.
    pub fn finish(self, sent: &CheckpointEnd) -> Result<Whole, StageError> {
        let arrived = self.tally.end();
        if arrived != *sent {
            return Err(StageError::NotWhole {
                epoch: self.epoch,
                sent: *sent,
                arrived,
            });
        }
        if self.machine.is_empty() {
            return Err(StageError::NoMachine(self.epoch));
        }
        Ok(Whole {
            epoch: self.epoch,
            pages: self.pages,
            disk: self.disk,
            machine: self.machine,
            end: arrived,
        })
    }

    fn too_large(&self, what: &'static str, limit: u64) -> StageError {
        StageError::TooLarge {
            epoch: self.epoch,
            what,
            limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{EncoderOptions, PageEncoder};

    fn pages() -> Vec<u8> {
        let mut out = Vec::new();
        PageEncoder::new(EncoderOptions { lz4: false }).encode(3, &[5; 4096], None, &mut out);
        out
    }

    fn stage(limit: u64) -> Stage {
        Stage::new(
            Epoch(4),
            StageLimits {
                pages: limit,
                disk: limit,
            },
        )
    }

    #[test]
    fn i3_only_a_whole_checkpoint_is_handed_on() {
        let mut sent = Tally::default();
        sent.add(&pages(), 1, 0);
        sent.add(b"machine", 0, 0);
        let mut whole = stage(1 << 20);
        whole.add_pages(pages()).unwrap();
        whole.add_machine(b"machine").unwrap();
        assert_eq!(whole.finish(&sent.end()).unwrap().machine, b"machine");

        let mut without_a_page = stage(1 << 20);
        without_a_page.add_machine(b"machine").unwrap();
        assert!(matches!(
            without_a_page.finish(&sent.end()),
            Err(StageError::NotWhole { .. })
        ));

        let mut other_order = stage(1 << 20);
        other_order.add_machine(b"machine").unwrap();
        other_order.add_pages(pages()).unwrap();
        assert!(matches!(
            other_order.finish(&sent.end()),
            Err(StageError::NotWhole { .. })
        ));
    }

    #[test]
    fn bounds_hold() {
        let mut small = stage(100);
        assert!(matches!(
            small.add_pages(pages()),
            Err(StageError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_checkpoint_without_machine_state_is_refused() {
        assert_eq!(
            stage(1).finish(&CheckpointEnd::default()).unwrap_err(),
            StageError::NoMachine(Epoch(4))
        );
    }
}
