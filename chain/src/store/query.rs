//! What a replica can be asked about a VM's checkpoints: the newest, one by its epoch, which there are, and any of
//! them as memory, machine state and disks, for a clone to be started from.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use checkpoint::Epoch;

use super::log::Reader;
use super::{ReplicaStore, StoreError};
use crate::mark::Mark;

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

/// How a retained checkpoint is made.
#[derive(Debug)]
pub struct Past {
    /// Which one.
    pub(super) mark: Mark,
    pub(super) memory: Memory,
}

#[derive(Debug)]
pub(super) enum Memory {
    /// From a copy of the newest checkpoint, as it was when this was asked for.
    Newest(Back),
    /// Its memory is read from a log; its disks come from a copy of the newest ones.
    Log(Reader),
}

/// What leads back from the newest checkpoint.
#[derive(Debug)]
pub(super) struct Back {
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// Page records, one buffer for each newer checkpoint, newest first.
    pub pages: Vec<Vec<u8>>,
    /// Disk records, likewise.
    pub disk: Vec<Vec<u8>>,
}

/// Where the disks of a copy go: empty files of the disks' sizes, and their paths for messages.
pub type Files = Vec<(PathBuf, File)>;

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

    /// How a retained checkpoint is made. It stays so until the answer is dropped.
    ///
    /// # Errors
    /// [`StoreError::NotRetained`]; what the files say, which then is final for the replica as well.
    fn past(&mut self, mark: Mark) -> Result<Past, StoreError>;

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

/// The checkpoint of that epoch.
///
/// # Errors
/// [`StoreError::NoPast`] saying which checkpoints there are.
pub(crate) fn find(store: &mut dyn ReplicaStore, epoch: Epoch) -> Result<Mark, StoreError> {
    let history = store.history().ok_or(StoreError::Empty)?;
    history.by_epoch(epoch).ok_or_else(|| {
        let range = history.range();
        let ends = range.first().zip(range.last());
        StoreError::NoPast {
            epoch,
            kept: ends.map(|(first, last)| (first.epoch, last.epoch)),
        }
    })
}

/// Empty files for disks of these sizes in `dir`.
///
/// # Errors
/// [`StoreError::CopyOut`].
pub(crate) fn files(sizes: &[u64], dir: &Path) -> Result<Files, StoreError> {
    let file = |(n, size): (usize, &u64)| {
        let path = dir.join(format!("disk{n}.img"));
        let mut options = File::options();
        let made = options.write(true).create_new(true).open(&path);
        match made.and_then(|file| file.set_len(*size).map(|()| file)) {
            Ok(file) => Ok((path, file)),
            Err(source) => Err(StoreError::CopyOut { path, source }),
        }
    };
    sizes.iter().enumerate().map(file).collect()
}
