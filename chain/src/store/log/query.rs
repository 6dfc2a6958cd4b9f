//! Reading retained checkpoints back.

use std::sync::Arc;

use checkpoint::MACHINE_LIMIT;

use super::base::Base;
use super::entry::Entry;
use super::error::LogError;
use super::frame::Kind;
use super::{Frames, Log};
use crate::image::Image;
use crate::mark::Mark;

/// A checkpoint read back, apart from its memory.
pub(crate) struct Found {
    pub machine: Vec<u8>,
    /// For each newer checkpoint, newest first: disk records that take its disk writes back.
    pub undo: Vec<Vec<u8>>,
}

impl Log {
    /// The checkpoints that can be asked for, oldest first.
    pub(crate) fn range(&self) -> Vec<Mark> {
        self.retained().map(|e| e.commit.mark).collect()
    }

    fn retained(&self) -> impl Iterator<Item = &Entry> {
        let keep = self.options.retention.checkpoints.max(1);
        let by_count = self.entries.len().saturating_sub(keep);
        // Before a checkpoint that cannot be taken back there is no way.
        let cliff = self.entries.iter().rposition(|e| !e.commit.undo);
        // What is being folded is as good as gone.
        let going = self.entries.iter().position(|e| e.lsn >= self.folding);
        let oldest = by_count.max(cliff.unwrap_or(0)).max(going.unwrap_or(0));
        self.entries.range(oldest..)
    }

    /// Reads a retained checkpoint, apart from the log: which goes on, and folds nothing as long as there is a reader.
    pub(crate) fn reader(&mut self, mark: Mark) -> Result<Reader, LogError> {
        self.guard(|log| {
            // The base image must stand still meanwhile.
            log.settle()?;
            if !log.retained().any(|e| e.commit.mark == mark) {
                return Err(LogError::NotRetained(mark));
            }
            Ok(Reader {
                base: log.base.clone(),
                frames: log.frames.clone(),
                entries: log.entries.iter().copied().collect(),
                mark,
                _readers: log.readers.clone(),
            })
        })
    }

    /// Brings `into` to the newest checkpoint; its machine state.
    pub(crate) fn load(&self, into: &mut Image) -> Result<Vec<u8>, LogError> {
        load(&self.base, &self.frames, self.entries.iter(), into)
    }

    /// The newest checkpoints' disk writes, of those after the disks' epoch, oldest first.
    pub(crate) fn disk_writes(
        &self,
        after: checkpoint::Epoch,
    ) -> impl Iterator<Item = Result<(Mark, Vec<Vec<u8>>), LogError>> {
        let missing = self
            .entries
            .iter()
            .filter(move |e| e.commit.mark.epoch > after);
        missing.map(|e| Ok((e.commit.mark, e.payloads(&self.frames, Kind::Disk)?)))
    }
}

/// Reads one checkpoint back.
pub(crate) struct Reader {
    base: Base,
    frames: Frames,
    entries: Vec<Entry>,
    mark: Mark,
    _readers: Arc<()>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("mark", &self.mark)
            .finish_non_exhaustive()
    }
}

impl Reader {
    /// Its memory goes to `into`.
    pub(crate) fn read(&self, into: &mut Image) -> Result<Found, LogError> {
        let wanted = |e: &&Entry| e.commit.mark == self.mark;
        let count = self.entries.iter().take_while(|e| !wanted(e)).count();
        let (upto, newer) = self.entries.split_at((count + 1).min(self.entries.len()));
        let machine = load(&self.base, &self.frames, upto.iter(), into)?;
        let undo = newer.iter().rev().map(|entry| {
            let payloads = entry.payloads(&self.frames, Kind::Undo)?;
            Ok(payloads.concat())
        });
        Ok(Found {
            machine,
            undo: undo.collect::<Result<_, LogError>>()?,
        })
    }
}

/// Brings `into` to the last of these checkpoints, which begin with the base image's; its machine state.
fn load<'a>(
    base: &Base,
    frames: &Frames,
    entries: impl Iterator<Item = &'a Entry>,
    into: &mut Image,
) -> Result<Vec<u8>, LogError> {
    base.load(into)?;
    let mut machine = Vec::new();
    for (n, entry) in entries.enumerate() {
        machine.clear();
        // The first one's memory is the base image.
        apply(frames, entry, n > 0, into, &mut machine)?;
    }
    Ok(machine)
}

/// Brings `into` from the checkpoint before to that of `entry`.
fn apply(
    frames: &Frames,
    entry: &Entry,
    memory: bool,
    into: &mut Image,
    machine: &mut Vec<u8>,
) -> Result<(), LogError> {
    entry.read(frames, &mut |kind, payload| {
        match kind {
            Kind::Pages if memory => {
                let staged = into.stage(payload);
                staged.map_err(|e| entry.damaged(frames, &e.to_string()))?;
            }
            Kind::Machine if machine.len() + payload.len() > MACHINE_LIMIT => {
                return Err(entry.damaged(frames, "its machine state is too long"));
            }
            Kind::Machine => machine.extend_from_slice(payload),
            _ => {}
        }
        Ok(())
    })?;
    into.apply();
    Ok(())
}
