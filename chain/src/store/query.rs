//! What a replica can be asked about a VM's checkpoints: the newest, one by its epoch, which there are, and any of
//! them as memory, machine state and disks, for a clone to be started from.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use checkpoint::{DiskOp, Epoch, disk_records};

use super::{ReplicaStore, StoreError};
use crate::image::Image;
use crate::mark::Mark;
use crate::view::VmShape;

/// How much of a VM's past is kept. At least the newest checkpoint always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Checkpoints that can be asked for, the newest included; at least 1.
    pub checkpoints: usize,
    /// Bytes that keeping them may take: of log on the disk, or of records in memory. The newest checkpoint is kept
    /// even if it alone is larger.
    pub bytes: u64,
}

impl Retention {
    /// Only the newest checkpoint, which costs nothing beyond holding it.
    pub const NEWEST: Self = Self {
        checkpoints: 1,
        bytes: 256 << 20,
    };

    /// Whether anything but the newest checkpoint is kept.
    #[must_use]
    pub fn keeps_past(&self) -> bool {
        self.checkpoints > 1
    }
}

/// A retained checkpoint, apart from its memory.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Which one.
    pub mark: Mark,
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// Buffers of encoded disk records: done in this order to the disks as they are at [`History::latest`], they make
    /// the disks of this checkpoint.
    pub undo: Vec<Vec<u8>>,
}

/// Queries, answered by a store that keeps a past.
pub trait History {
    /// The checkpoints that can be asked for, oldest first.
    fn range(&self) -> Vec<Mark>;

    /// The newest checkpoint.
    fn latest(&self) -> Option<Mark> {
        self.range().last().copied()
    }

    /// The checkpoint of `epoch`, if it is retained.
    fn by_epoch(&self, epoch: Epoch) -> Option<Mark> {
        self.range().into_iter().rev().find(|m| m.epoch == epoch)
    }

    /// Makes a retained checkpoint: its memory in `into` (an image of the VM's layout), the rest is returned.
    ///
    /// # Errors
    /// [`StoreError::NotRetained`]; what the files say, which then is final for the replica as well.
    fn materialise(&mut self, mark: Mark, into: &mut Image) -> Result<Snapshot, StoreError>;

    /// Fills `buf` with what disk `disk` has at byte `offset` at the newest checkpoint.
    ///
    /// # Errors
    /// [`StoreError::Disks`].
    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), StoreError>;
}

/// A checkpoint of the past, copied out of a replica that goes on.
#[derive(Debug)]
pub struct Rewound {
    /// Which one.
    pub mark: Mark,
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// Its memory, one file per range of RAM.
    pub ram: Vec<OwnedFd>,
    /// Its disks, in order.
    pub disks: Vec<PathBuf>,
}

/// Copies the checkpoint of `epoch` out of a store: memory into files of its own, disks into `dir`. The store takes no
/// other checkpoint meanwhile.
///
/// # Errors
/// [`StoreError::NoPast`] saying which checkpoints there are; reading the mirrors or the log, writing the files.
pub(crate) fn copy_out(
    store: &mut dyn ReplicaStore,
    shape: &VmShape,
    epoch: Epoch,
    dir: &Path,
) -> Result<Rewound, StoreError> {
    let history = store.history().ok_or(StoreError::Empty)?;
    let Some(mark) = history.by_epoch(epoch) else {
        let range = history.range();
        let ends = range.first().zip(range.last());
        return Err(StoreError::NoPast {
            epoch,
            kept: ends.map(|(first, last)| (first.epoch, last.epoch)),
        });
    };
    let mut image = Image::new(&shape.ram)?;
    let snapshot = history.materialise(mark, &mut image)?;
    let mut disks = Vec::new();
    for (n, size) in shape.disks.iter().enumerate() {
        let path = dir.join(format!("disk{n}.img"));
        let failed = |source| StoreError::CopyOut {
            path: path.clone(),
            source,
        };
        let mut options = File::options();
        let file = options.write(true).create_new(true).open(&path);
        let disk = u16::try_from(n).map_err(|_| StoreError::NotOpen)?;
        let copied = snapshot.copy_disk(history, disk, *size, &file.map_err(failed)?);
        copied.map_err(|e| match e {
            StoreError::Descriptor(source) => failed(source),
            other => other,
        })?;
        disks.push(path);
    }
    let ram = image.fds().into_iter().map(|fd| fd.try_clone_to_owned());
    Ok(Rewound {
        mark,
        machine: snapshot.machine,
        ram: ram.collect::<Result<_, _>>()?,
        disks,
    })
}

impl Snapshot {
    /// Writes disk `disk` of `size` bytes, as it was at this checkpoint, to `out` (an empty file; stays sparse). To be
    /// called before the store takes another checkpoint.
    ///
    /// # Errors
    /// [`StoreError`]: reading the mirror, or writing the file.
    pub fn copy_disk(
        &self,
        from: &dyn History,
        disk: u16,
        size: u64,
        out: &File,
    ) -> Result<(), StoreError> {
        const PIECE: u64 = 1 << 20;
        out.set_len(size)?;
        let mut buf = vec![0; PIECE as usize];
        let mut at = 0;
        while at < size {
            let piece = &mut buf[..PIECE.min(size - at) as usize];
            from.read_disk(disk, at, piece)?;
            if piece.iter().any(|b| *b != 0) {
                out.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
        for records in &self.undo {
            for record in disk_records(records) {
                let record = record.map_err(checkpoint::StageError::from)?;
                if record.disk != disk {
                    continue;
                }
                if record.op == DiskOp::Write {
                    out.write_all_at(record.data, record.offset)?;
                } else {
                    out.write_all_at(&vec![0; record.len as usize], record.offset)?;
                }
            }
        }
        Ok(())
    }
}
