//! The log of a VM's checkpoints on the disk: appended and synced before a checkpoint counts, folded into a base image
//! when it is old. Layout, order of writes and why recovery is right: `docs/store-format.md`.
//!
//! * [`frame`], [`segment`]: the log itself. * [`base`]: the image. * [`manifest`]: which parts of them count.
//! * [`entry`]: one checkpoint in the log. * [`recovery`]: opening. * [`fold`], [`retention`]: what becomes of old
//!   checkpoints. * [`query`]: what is retained.

mod base;
mod entry;
mod error;
mod fold;
mod frame;
mod manifest;
mod query;
mod recovery;
mod retention;
mod segment;
mod writer;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{PageBitmap, RamRange, VmId};
use diskbuf::layer::FileLayer;

use super::Retention;
use crate::mark::Mark;
use base::Base;
use entry::Entry;
pub use error::LogError;
use fold::Folder;
use frame::Kind;
use manifest::ManifestFile;
pub(crate) use query::Reader;
use segment::Frames;
use writer::Open;
pub(crate) use writer::gfns;

/// Switches that break the mechanism, to see the tests notice.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mutants {
    /// A checkpoint counts without having been synced.
    pub no_sync: bool,
    /// Payloads are believed without looking at their checksums.
    pub no_crc: bool,
    /// A new segment's name is not made durable.
    pub no_dir_sync: bool,
    /// Pages are folded in place without a journal.
    pub no_journal: bool,
    /// A checkpoint whose end is there is taken for whole.
    pub torn_is_whole: bool,
}

/// How the log is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub retention: Retention,
    /// A new segment is begun when the newest has so many bytes.
    pub segment_bytes: u64,
    /// So many pages are folded at a time (one checkpoint at least): memory that folding takes.
    pub fold_pages: u64,
    /// Longest record, in bytes, of what one checkpoint's disk writes replaced.
    pub undo_bytes: u64,
    /// For tests: no thread, folding goes one step at each checkpoint.
    pub stepped: bool,
    pub mutants: Mutants,
}

impl Options {
    pub(crate) fn new(retention: Retention) -> Self {
        Self {
            retention,
            // Only whole segments can be given back.
            segment_bytes: (retention.bytes / 8).clamp(1 << 20, 64 << 20),
            fold_pages: 16 << 10,
            undo_bytes: 64 << 20,
            stepped: false,
            mutants: Mutants::default(),
        }
    }
}

/// The log of one VM.
pub(crate) struct Log {
    layer: Arc<dyn FileLayer>,
    dir: PathBuf,
    vm: VmId,
    /// Digest of the memory layout.
    shape: u32,
    options: Options,
    manifest: Arc<ManifestFile>,
    base: Base,
    journal: fold::Journal,
    frames: Frames,
    /// From that of the base image on; none: the log is worth nothing.
    entries: VecDeque<Entry>,
    open: Option<Open>,
    /// Pages that the full checkpoint under way has brought.
    filled: PageBitmap,
    /// Those of them that are not synced yet.
    unsynced: u64,
    folder: Folder,
    /// Checkpoint that the base image is being brought to, or was.
    folding: u64,
    poisoned: Option<String>,
    /// Shared with those who read the base image and old segments.
    readers: Arc<()>,
}

impl Log {
    /// The newest checkpoint.
    pub(crate) fn latest(&self) -> Option<Mark> {
        self.entries.back().map(|e| e.commit.mark)
    }

    /// Bytes of the segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.frames.segments.iter().map(|s| s.len).sum()
    }

    /// The log is of no use any more: a fold under way stops at its next step, and nobody waits for it.
    pub(crate) fn abandon(self) {
        self.folder.stop();
        if let Err(e) = std::thread::Builder::new()
            .name("log-end".into())
            .spawn(move || drop(self))
        {
            tracing::warn!("ending a checkpoint log: {e}");
        }
    }

    /// After a failure that leaves the disk in doubt nothing is done any more.
    fn guard<T>(
        &mut self,
        what: impl FnOnce(&mut Self) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        if let Some(why) = &self.poisoned {
            return Err(LogError::Poisoned(why.clone()));
        }
        let result = what(self);
        if let Err(e) = &result
            && !matches!(e, LogError::NotRetained(_) | LogError::TooLong(_))
        {
            self.poisoned = Some(e.to_string());
        }
        result
    }
}

/// Digest of a memory layout.
fn shape_of(ram: &[RamRange]) -> u32 {
    ram.iter().fold(0, |crc, r| {
        let crc = crc32c::crc32c_append(crc, &r.start.to_le_bytes());
        crc32c::crc32c_append(crc, &r.len.to_le_bytes())
    })
}
