//! Writes that a replica has received and not yet processed, by epoch. No I/O.

use std::collections::BTreeMap;

use checkpoint::{DISK_HEADER, DiskOp, DiskRecord, Epoch};

/// Records are collected into buffers of about this size, in bytes.
const BUFFER: usize = 256 << 10;

/// Why a write was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeldError {
    /// Taking it would exceed the bound. Nothing was changed.
    #[error("held disk writes would exceed {limit} bytes ({held} are held, {new} more came)")]
    Full {
        /// The bound in bytes.
        limit: u64,
        /// Bytes held.
        held: u64,
        /// Bytes of the write.
        new: u64,
    },
    /// Its epoch was taken already.
    #[error("disk write for epoch {epoch} came after epoch {taken} was taken")]
    Late {
        /// The write's epoch.
        epoch: Epoch,
        /// The newest epoch taken.
        taken: Epoch,
    },
}

/// Writes held per epoch, in the order of their coming, as encoded disk records.
#[derive(Debug)]
pub struct HeldWrites {
    limit: u64,
    bytes: u64,
    taken: Option<Epoch>,
    epochs: BTreeMap<Epoch, Vec<Vec<u8>>>,
}

impl HeldWrites {
    /// Holds at most `limit` bytes (headers included).
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            bytes: 0,
            taken: None,
            epochs: BTreeMap::new(),
        }
    }

    /// Takes one write of `epoch`.
    ///
    /// # Errors
    /// [`HeldError`]; nothing is changed then.
    pub fn add(&mut self, epoch: Epoch, record: &DiskRecord<'_>) -> Result<(), HeldError> {
        let data = if record.op == DiskOp::Write {
            record.data.len()
        } else {
            0
        };
        let new = (DISK_HEADER + data) as u64;
        if let Some(taken) = self.taken.filter(|t| epoch <= *t) {
            return Err(HeldError::Late { epoch, taken });
        }
        if self.bytes + new > self.limit {
            return Err(HeldError::Full {
                limit: self.limit,
                held: self.bytes,
                new,
            });
        }
        let buffers = self.epochs.entry(epoch).or_default();
        if buffers
            .last()
            .is_none_or(|b| b.len() + new as usize > BUFFER)
        {
            buffers.push(Vec::new());
        }
        if let Some(buffer) = buffers.last_mut() {
            record.encode(buffer);
        }
        self.bytes += new;
        Ok(())
    }

    /// The writes of `epoch` in order, for [`crate::ReplicaDisks::process`]; empty if there are none. Writes of
    /// earlier epochs stay, but no more are accepted for `epoch` or any before it.
    pub fn take(&mut self, epoch: Epoch) -> Vec<Vec<u8>> {
        self.taken = self.taken.max(Some(epoch));
        let buffers = self.epochs.remove(&epoch).unwrap_or_default();
        self.bytes -= size(&buffers);
        buffers
    }

    /// Forgets the writes of all epochs after `epoch` (they are not acknowledged, and a new owner begins there), and
    /// accepts such epochs anew. Returns how many bytes were dropped.
    pub fn drop_after(&mut self, epoch: Epoch) -> u64 {
        let dropped: u64 = self
            .epochs
            .split_off(&epoch.next())
            .values()
            .map(|buffers| size(buffers))
            .sum();
        self.bytes -= dropped;
        self.taken = self.taken.min(Some(epoch));
        dropped
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn size(buffers: &[Vec<u8>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::disk_records;

    fn write(offset: u64, data: &[u8]) -> DiskRecord<'_> {
        DiskRecord {
            disk: 0,
            op: DiskOp::Write,
            offset,
            len: data.len() as u32,
            data,
        }
    }

    #[test]
    fn writes_come_out_by_epoch_and_in_order() {
        let mut held = HeldWrites::new(1 << 20);
        let block = [1; 100 << 10];
        for offset in [5, 3, 9, 7] {
            held.add(Epoch(2), &write(offset, &block)).unwrap();
        }
        held.add(Epoch(3), &write(0, &[2; 8])).unwrap();
        let buffers = held.take(Epoch(2));
        let offsets: Vec<u64> = buffers
            .iter()
            .flat_map(|b| disk_records(b))
            .map(|r| r.unwrap().offset)
            .collect();
        assert_eq!(offsets, [5, 3, 9, 7]);
        assert_eq!(held.bytes(), 32);
        assert!(matches!(
            held.add(Epoch(2), &write(0, &[])),
            Err(HeldError::Late { .. })
        ));
        assert_eq!(held.drop_after(Epoch(2)), 32);
        assert_eq!(held.bytes(), 0);
        assert!(held.take(Epoch(3)).is_empty());
    }

    #[test]
    fn the_bound_holds_and_a_refused_write_changes_nothing() {
        let mut held = HeldWrites::new(100);
        held.add(Epoch(1), &write(0, &[0; 76])).unwrap();
        assert!(matches!(
            held.add(Epoch(1), &write(0, &[])),
            Err(HeldError::Full { held: 100, .. })
        ));
        assert_eq!(held.take(Epoch(1)).concat().len(), 100);
    }
}
