//! What a replica keeps of a VM, as the server sees it; [`VmStore`] is the one that VMs are resumed from.

mod choose;
mod copy;
mod durable;
mod log;
mod memory;
mod out;
mod query;
#[cfg(test)]
mod tests;
mod vm;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use checkpoint::{CheckpointEnd, Epoch, Generation, StageError};

use crate::image::ImageError;
use crate::mark::Mark;
pub use choose::{StoreOptions, create, reopen};
pub(crate) use copy::{CUT_PAGES, Changes, Cut, Source};
pub use durable::DurableStore;
pub use log::LogError;
pub use memory::MemoryStore;
pub use out::{CopiedOut, Found};
pub use query::{Files, History, Past, Retention, Rewound};
pub(crate) use query::{files, find};
pub use vm::VmStore;

/// Why a replica cannot go on with a VM.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The memory image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The checkpoint.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The mirrors.
    #[error("mirrors: {0}")]
    Disks(String),
    /// A disk record outside the VM's disks.
    #[error("a write to disk {disk} at {offset}+{len}, which the VM does not have")]
    DiskRange {
        /// The disk.
        disk: u16,
        /// Where.
        offset: u64,
        /// How long.
        len: u32,
    },
    /// There is no checkpoint to resume from.
    #[error("this replica holds no complete checkpoint")]
    Empty,
    /// The machine state does not decode.
    #[error("checkpoint {epoch}: {source}")]
    Machine {
        /// The epoch.
        epoch: Epoch,
        /// Why.
        source: checkpoint::MachineError,
    },
    /// The operating system.
    #[error("duplicating a descriptor: {0}")]
    Descriptor(#[from] std::io::Error),
    /// The end marker does not decode.
    #[error("a checkpoint's end marker: {0}")]
    End(checkpoint::CodecError),
    /// Messages out of order.
    #[error("no checkpoint is open")]
    NotOpen,
    /// A checkpoint that is not kept, or not any more.
    #[error("checkpoint {0} is not kept here; ask which are")]
    NotRetained(Mark),
    /// No checkpoint of that epoch is kept.
    #[error(
        "checkpoint {epoch} is not kept here; {}", kept_text(*kept)
    )]
    NoPast {
        /// As asked for.
        epoch: Epoch,
        /// The oldest and the newest that are.
        kept: Option<(Epoch, Epoch)>,
    },
    /// A checkpoint could not be copied out.
    #[error("copying a disk to {path}: {source}")]
    CopyOut {
        /// Where to.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another checkpoint is being copied out.
    #[error("another checkpoint is being copied out of this replica: wait until that is done")]
    CopyBusy,
    /// A joining replica cannot be filled.
    #[error(
        "the guest writes to its disks faster than the joining replica takes it: it cannot be filled at this time"
    )]
    CopyTooSlow,
    /// What was being copied out is gone.
    #[error(
        "the copy was interrupted: this replica has been filled anew, has left the chain or has taken the VM over; try again, \
         on a host that is a backup now"
    )]
    CopyInterrupted,
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
}

fn kept_text(kept: Option<(Epoch, Epoch)>) -> String {
    match kept {
        Some((first, last)) => format!(
            "{first} to {last} are (`understudy points` lists them, `protect.retain` says how many are kept)"
        ),
        None => "none is".into(),
    }
}

impl StoreError {
    /// Whether the last complete checkpoint is lost with it. Otherwise only what was being received is of no use.
    #[must_use]
    pub fn damages(&self) -> bool {
        match self {
            // A page that cannot be given back leaves an image that is neither old nor new.
            Self::Image(error) => matches!(error, ImageError::Memory { .. }),
            Self::Log(error) => !matches!(error, LogError::NotRetained(_) | LogError::TooLong(_)),
            Self::Disks(_) | Self::Empty | Self::Descriptor(_) => true,
            Self::Stage(_)
            | Self::DiskRange { .. }
            | Self::Machine { .. }
            | Self::End(_)
            | Self::NotOpen
            | Self::NotRetained(_)
            | Self::NoPast { .. }
            | Self::CopyOut { .. }
            | Self::CopyBusy
            | Self::CopyTooSlow
            | Self::CopyInterrupted => false,
        }
    }
}

/// A VM's state, taken out of a store to be run from.
#[derive(Debug)]
pub struct Taken {
    /// The checkpoint.
    pub mark: Mark,
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// The mirrors' files.
    pub disks: Vec<PathBuf>,
    /// The image's files; the standby has them already.
    pub ram: Vec<OwnedFd>,
}

/// A copy that has begun: what it is read from. Opaque to whoever implements a store over [`VmStore`].
#[derive(Debug)]
pub struct Copying(pub(crate) Source);

/// A piece of a copy of a store's content.
#[derive(Debug)]
pub enum Piece {
    /// Encoded page records.
    Pages(Vec<u8>),
    /// Encoded disk records.
    Disk(Vec<u8>),
}

/// How far a copy for a joining replica is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages of memory sent, those that changed meanwhile more than once.
    pub pages_sent: u64,
    /// Disk blocks (of 64 KiB) that it holds already.
    pub blocks_equal: u64,
    /// Disk blocks sent.
    pub blocks_sent: u64,
    /// Bytes of memory and disks that have been looked at for it.
    pub looked: u64,
    /// Upper bound of what is left to be looked at, in bytes.
    pub left: u64,
}

/// A replica's store. Calls come in the order of a checkpoint's frames: `begin`, any number of `pages`, `disk` and
/// `machine`, then `prepare` and `commit`. A `begin` in between drops what was half received.
///
/// Until `prepare` returns `Ok` the store is at the previous checkpoint; for a full one, at none from `begin` on. Any
/// error means that the replica has failed; [`StoreError::damages`] tells whether the previous checkpoint is lost too.
pub trait ReplicaStore: Send {
    /// The image and mirrors that this store keeps a VM in, if it keeps any.
    fn base(&self) -> Option<&VmStore> {
        None
    }

    /// The same, to be changed.
    fn base_mut(&mut self) -> Option<&mut VmStore> {
        None
    }

    /// Begins a checkpoint; `full`: it replaces everything.
    ///
    /// # Errors
    /// [`StoreError`].
    fn begin(&mut self, generation: Generation, epoch: Epoch, full: bool)
    -> Result<(), StoreError>;

    /// As a full checkpoint, but disks keep what they hold: whoever fills them leaves out what is equal
    /// ([`ReplicaStore::disk_digests`]), and sends everything else, zeros too. Or begins to take another replica's whole
    /// content, at the end of which it becomes known which checkpoint that is.
    ///
    /// # Errors
    /// [`StoreError`].
    fn begin_install(&mut self, generation: Generation, epoch: Epoch) -> Result<(), StoreError> {
        self.begin(generation, epoch, true)
    }

    /// Takes page records.
    ///
    /// # Errors
    /// [`StoreError`].
    fn pages(&mut self, payload: &[u8]) -> Result<(), StoreError>;

    /// Takes disk records.
    ///
    /// # Errors
    /// [`StoreError`].
    fn disk(&mut self, payload: &[u8]) -> Result<(), StoreError>;

    /// Takes a piece of the machine state.
    ///
    /// # Errors
    /// [`StoreError`].
    fn machine(&mut self, payload: &[u8]) -> Result<(), StoreError>;

    /// The checkpoint is complete, says the sender: verifies that it is whole and makes it durable to the degree
    /// configured. Afterwards [`ReplicaStore::commit`] cannot fail. It is `mark` then: of the epoch it was
    /// begun with, except for what fills a joining replica, of which that becomes known at the end only.
    ///
    /// # Errors
    /// [`StoreError`].
    fn prepare(
        &mut self,
        generation: Generation,
        mark: Mark,
        end: &CheckpointEnd,
    ) -> Result<(), StoreError>;

    /// Puts the prepared checkpoint into the image; the store is at `mark` then.
    fn commit(&mut self, mark: Mark);

    /// Begins a copy of everything for a replica that joins, and what it is read from. What is committed from here on is
    /// noted for it, until [`ReplicaStore::copy_end`]. Replaces a copy under way.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Empty`] without a complete checkpoint.
    fn copy_begin(&mut self) -> Result<Copying, StoreError> {
        self.base_mut().ok_or(StoreError::Empty)?.begin_copy()
    }

    /// The copy is over: commits need not be noted for it any more.
    fn copy_end(&mut self) {
        if let Some(base) = self.base_mut() {
            base.end_copy();
        }
    }

    /// The newest committed checkpoint; a store just opened holds one only if it was on the disk.
    fn holds(&self) -> Option<Mark>;

    /// Encoded machine state of the newest committed checkpoint.
    fn machine_state(&self) -> Option<&[u8]>;

    /// Queries of the checkpoints kept; `None` if this store answers none.
    fn history(&mut self) -> Option<&mut dyn History> {
        None
    }

    /// Begins to copy a retained checkpoint out, its disks into `files`, which are empty and of the disks' sizes. Checkpoints
    /// go on being committed meanwhile.
    ///
    /// # Errors
    /// [`StoreError::NotRetained`], [`StoreError::CopyBusy`]; [`StoreError::Empty`] if this store keeps no past.
    fn out_begin(&mut self, mark: Mark, files: Files) -> Result<(), StoreError> {
        let _ = (mark, files);
        Err(StoreError::Empty)
    }

    /// Copies about `limit` bytes more; true when nothing is left.
    ///
    /// # Errors
    /// [`StoreError::CopyInterrupted`] if none is under way any more; what reading and writing say. The copy is over then.
    fn out_next(&mut self, limit: usize) -> Result<bool, StoreError> {
        self.base_mut()
            .ok_or(StoreError::CopyInterrupted)?
            .out_next(limit)
    }

    /// Ends the copy under way: complete, or to be dropped.
    fn out_end(&mut self) -> Option<CopiedOut> {
        self.base_mut()?.out_end()
    }

    /// Makes everything ready to be run from, as the owner's of `generation`.
    ///
    /// # Errors
    /// [`StoreError::Empty`] without a complete checkpoint.
    fn hand_over(self: Box<Self>, generation: Generation) -> Result<Taken, StoreError>;
}
