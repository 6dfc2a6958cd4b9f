//! Reading the disks of a replica as they are at the newest checkpoint, some of whose writes are not in the mirrors
//! yet; and what a checkpoint's writes are about to replace, so that they can be taken back.

use checkpoint::{DISK_HEADER, DiskOp, DiskRecord, disk_records};

use crate::batch::{check, check_all};
use crate::error::DiskbufError;
use crate::replica::{ReplicaDisks, State};

/// Ranges are read in pieces of at most so many bytes.
const PIECE: u64 = 64 << 10;

/// A stretch of a disk and its content.
struct Piece {
    disk: u16,
    offset: u64,
    data: Vec<u8>,
}

impl ReplicaDisks {
    /// Fills `buf` with what disk `disk` has at byte `offset` at the newest checkpoint processed.
    ///
    /// # Errors
    /// [`DiskbufError::OutOfRange`], [`DiskbufError::State`] unless the disks are at a checkpoint; what the files say.
    pub fn read(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), DiskbufError> {
        let mut pieces = Vec::new();
        let mut cut = (offset, buf.len() as u64);
        split(disk, &mut cut, u64::MAX, &mut pieces);
        self.fill(&mut pieces)?;
        for piece in pieces {
            let at = (piece.offset - offset) as usize;
            buf[at..at + piece.data.len()].copy_from_slice(&piece.data);
        }
        Ok(())
    }

    /// Encoded disk records that put back what the disks have now, at the newest checkpoint processed, wherever
    /// `writes` (buffers of encoded disk records) change them. `None` if that is more than `limit` bytes.
    ///
    /// # Errors
    /// As [`ReplicaDisks::read`], and [`DiskbufError::Malformed`].
    pub fn pre_images(
        &self,
        writes: &[Vec<u8>],
        limit: u64,
    ) -> Result<Option<Vec<u8>>, DiskbufError> {
        let mut pieces = Vec::new();
        let mut left = limit;
        for write in writes {
            check_all(&self.mirrors, write)?;
            for record in disk_records(write) {
                let record = record?;
                let mut range = (record.offset, u64::from(record.len));
                let Some(rest) = split(record.disk, &mut range, left, &mut pieces) else {
                    return Ok(None);
                };
                left = rest;
            }
        }
        self.fill(&mut pieces)?;
        let mut out = Vec::new();
        for piece in &pieces {
            let zero = piece.data.iter().all(|b| *b == 0);
            DiskRecord {
                disk: piece.disk,
                op: if zero {
                    DiskOp::WriteZeroes
                } else {
                    DiskOp::Write
                },
                offset: piece.offset,
                len: piece.data.len() as u32,
                data: &piece.data,
            }
            .encode(&mut out);
        }
        Ok(Some(out))
    }

    /// Reads `pieces`: the mirrors, and over them what is on its way there. A batch under way may write the mirror
    /// while it is read; whatever it writes is put over what was read.
    fn fill(&self, pieces: &mut [Piece]) -> Result<(), DiskbufError> {
        if self.state != State::Replica {
            return Err(DiskbufError::State(
                "only a filled replica's disks can be read",
            ));
        }
        pieces.sort_by_key(|p| (p.disk, p.offset));
        for piece in pieces.iter_mut() {
            let whole = DiskRecord {
                disk: piece.disk,
                op: DiskOp::Discard,
                offset: piece.offset,
                len: piece.data.len() as u32,
                data: &[],
            };
            let mirror = check(&self.mirrors, &whole)?;
            mirror
                .read_at(piece.offset, &mut piece.data)
                .map_err(|e| DiskbufError::mirror(mirror, e))?;
        }
        for entry in self.flying.iter().chain(&self.pending) {
            for record in disk_records(entry.payload()) {
                overlay(pieces, &record?);
            }
        }
        Ok(())
    }
}

/// Adds pieces for a range; what is left of `limit` after that, `None` if it is not enough.
fn split(disk: u16, range: &mut (u64, u64), limit: u64, pieces: &mut Vec<Piece>) -> Option<u64> {
    let mut left = limit;
    while range.1 > 0 {
        let len = range.1.min(PIECE);
        left = left.checked_sub(len + DISK_HEADER as u64)?;
        pieces.push(Piece {
            disk,
            offset: range.0,
            data: vec![0; len as usize],
        });
        *range = (range.0 + len, range.1 - len);
    }
    Some(left)
}

/// Does to the pieces (sorted) what `record` does to the disk.
fn overlay(pieces: &mut [Piece], record: &DiskRecord<'_>) {
    let end = record.offset + u64::from(record.len);
    let from = record.offset.saturating_sub(PIECE);
    let first = pieces.partition_point(|p| (p.disk, p.offset) < (record.disk, from));
    for piece in &mut pieces[first..] {
        if piece.disk != record.disk || piece.offset >= end {
            break;
        }
        let (a, b) = (
            record.offset.max(piece.offset),
            end.min(piece.offset + piece.data.len() as u64),
        );
        if a >= b {
            continue;
        }
        let into = (a - piece.offset) as usize..(b - piece.offset) as usize;
        match record.op {
            DiskOp::Write => piece.data[into].copy_from_slice(
                &record.data[(a - record.offset) as usize..(b - record.offset) as usize],
            ),
            DiskOp::Discard | DiskOp::WriteZeroes => piece.data[into].fill(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use checkpoint::{Epoch, Generation, VmId};
    use proptest::prelude::*;

    use super::*;
    use crate::faulty::MemDisk;
    use crate::replica::Durability;

    const SIZES: [u64; 2] = [256 << 10, 16 << 10];

    fn write(disk: u16, sector: u64, sectors: u64, byte: u8) -> Vec<u8> {
        let (offset, len) = (sector * 512, sectors * 512);
        let data = vec![byte; len as usize];
        let op = match byte {
            0 => DiskOp::Discard,
            1 => DiskOp::WriteZeroes,
            _ => DiskOp::Write,
        };
        let mut out = Vec::new();
        DiskRecord {
            disk,
            op,
            offset,
            len: len as u32,
            data: if op == DiskOp::Write { &data } else { &[] },
        }
        .encode(&mut out);
        out
    }

    fn play(model: &mut [Vec<u8>], writes: &[u8]) {
        for record in disk_records(writes) {
            let record = record.unwrap();
            let at = record.offset as usize..(record.offset + u64::from(record.len)) as usize;
            let disk = &mut model[usize::from(record.disk)];
            match record.op {
                DiskOp::Write => disk[at].copy_from_slice(record.data),
                _ => disk[at].fill(0),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Whatever the stage of the batches: reading shows the newest checkpoint, pre-images lead back to any earlier.
        #[test]
        fn reading_and_taking_back_are_exact(
            epochs in proptest::collection::vec(
                proptest::collection::vec((0u16..2, 0u64..32, 1u64..150, any::<u8>()), 0..5), 1..14),
        ) {
            let layer = Arc::new(MemDisk::default());
            let dir = std::path::Path::new("/vm");
            let mut disks =
                ReplicaDisks::open_stepped(layer, dir, VmId(1), &SIZES, Durability::Disk).unwrap();
            disks.begin_full(Generation(1)).unwrap();
            disks.process(Epoch(1), Generation(1), &[]).unwrap();
            let mut model = SIZES.map(|s| vec![0; s as usize]);
            let mut past = Vec::new();
            for (n, list) in epochs.iter().enumerate() {
                let writes: Vec<Vec<u8>> = list
                    .iter()
                    .map(|&(disk, at, len, byte)| {
                        let len = if disk == 1 { len.min(32 - at) } else { len };
                        write(disk, at, len, byte)
                    })
                    .collect();
                let back = disks.pre_images(&writes, 1 << 30).unwrap().unwrap();
                past.push((model.clone(), back));
                disks.process(Epoch(n as u64 + 2), Generation(1), &writes).unwrap();
                for write in &writes { play(&mut model, write); }
                for (n, want) in model.iter().enumerate() {
                    let mut found = vec![7; want.len()];
                    disks.read(n as u16, 0, &mut found).unwrap();
                    prop_assert!(found == *want);
                }
            }
            for (want, back) in past.iter().rev() {
                play(&mut model, back);
                prop_assert!(model == *want);
            }
        }
    }

    #[test]
    fn what_is_too_much_to_take_back_is_said_before_it_is_read() {
        let layer = Arc::new(MemDisk::default());
        let dir = std::path::Path::new("/vm");
        let mut disks =
            ReplicaDisks::open_stepped(layer, dir, VmId(1), &SIZES, Durability::Disk).unwrap();
        disks.begin_full(Generation(1)).unwrap();
        assert!(matches!(
            disks.read(0, 0, &mut [0; 8]),
            Err(DiskbufError::State(_))
        ));
        disks.process(Epoch(1), Generation(1), &[]).unwrap();
        let wipe = [write(0, 0, 512, 0)];
        assert_eq!(disks.pre_images(&wipe, 100 << 10).unwrap(), None);
        assert!(disks.pre_images(&wipe, 300 << 10).unwrap().is_some());
        assert!(matches!(
            disks.pre_images(&[write(1, 30, 3, 9)], 1 << 20),
            Err(DiskbufError::OutOfRange { .. })
        ));
    }
}
