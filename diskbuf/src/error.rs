//! Why the disks of a replica are not as asked for.

use std::io;
use std::path::PathBuf;

use checkpoint::{DiskRecordError, Epoch, Generation, VmId};

use crate::journal::PAYLOAD_MAX;
use crate::mirror::{Mirror, MirrorError};
use crate::record::RecordError;

/// Why the disks of a replica are not as asked for.
#[derive(Debug, thiserror::Error)]
pub enum DiskbufError {
    /// A mirror.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// The activation record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// What was to be written is no disk record.
    #[error(transparent)]
    Malformed(#[from] DiskRecordError),
    /// The journal cannot be read or written.
    #[error("disk journal: {0}")]
    Journal(#[source] io::Error),
    /// The directory cannot be made.
    #[error("directory {} for disk mirrors: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another program works in it.
    #[error("directory {} for disk mirrors is in use by another program", .0.display())]
    InUse(PathBuf),
    /// Something durable is not there any more, or not as it was. Only filling anew helps.
    #[error(
        "the disk mirrors in {} are damaged ({what}); remove the directory, and this host is filled anew", path.display()
    )]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// The directory belongs to another VM.
    #[error("directory {} holds the disks of VM {found}, not of VM {wanted}", path.display())]
    OtherVm {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        found: VmId,
        /// Who asked.
        wanted: VmId,
    },
    /// A mirror is there with another size than the VM's disk.
    #[error(
        "disk mirror {} has {found} bytes, the VM's disk has {wanted}; remove the directory to fill it anew",
        path.display()
    )]
    OtherSize {
        /// The mirror.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The disk's size in bytes.
        wanted: u64,
    },
    /// A write outside the VM's disks. Nothing was done.
    #[error(
        "disk write of {len} bytes at {offset} lies outside of disk {disk}, or there is no such disk"
    )]
    OutOfRange {
        /// The disk's number.
        disk: u16,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
    },
    /// An epoch with more writes than a journal entry takes. Nothing was done.
    #[error(
        "epoch {epoch} wrote {bytes} bytes to its disks, at most {PAYLOAD_MAX} can be taken at once"
    )]
    TooLarge {
        /// The epoch.
        epoch: Epoch,
        /// Its writes in bytes.
        bytes: u64,
    },
    /// A message of an earlier generation. Nothing was done.
    #[error("generation {got} is over, the disks are at generation {at}")]
    OldGeneration {
        /// The message's.
        got: Generation,
        /// Ours.
        at: Generation,
    },
    /// The epoch is not the one that fits. Nothing was done.
    #[error("epoch {got} does not fit: the disks are at epoch {at}")]
    WrongEpoch {
        /// As asked for.
        got: Epoch,
        /// Ours.
        at: Epoch,
    },
    /// Not possible in this state. Nothing was done.
    #[error("{0}")]
    State(&'static str),
    /// Something failed earlier, and what is on the disk is not known since.
    #[error("the disks failed earlier and take nothing any more: {0}")]
    Poisoned(String),
}

impl DiskbufError {
    pub(crate) fn mirror(mirror: &Mirror, source: io::Error) -> Self {
        Self::Mirror(MirrorError::Io {
            path: mirror.path().into(),
            source,
        })
    }

    /// Whether the state on disk is untouched by the failed call.
    pub(crate) fn harmless(&self) -> bool {
        matches!(
            self,
            Self::Malformed(_)
                | Self::OutOfRange { .. }
                | Self::TooLarge { .. }
                | Self::OldGeneration { .. }
                | Self::WrongEpoch { .. }
                | Self::State(_)
                | Self::Poisoned(_)
                // The VM that ran on the mirrors may still be about to end.
                | Self::Mirror(MirrorError::InUse(_))
        )
    }
}
