//! Reading retained checkpoints back.

use checkpoint::MACHINE_LIMIT;

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

    /// Reads a retained checkpoint: its memory goes to `into`.
    pub(crate) fn materialise(&mut self, mark: Mark, into: &mut Image) -> Result<Found, LogError> {
        self.guard(|log| {
            // The base image must stand still meanwhile.
            log.settle()?;
            if !log.retained().any(|e| e.commit.mark == mark) {
                return Err(LogError::NotRetained(mark));
            }
            let machine = log.load(Some(mark), into)?;
            let mut undo = Vec::new();
            let newer = log.entries.iter().rev();
            for entry in newer.take_while(|e| e.commit.mark != mark) {
                undo.push(entry.payloads(&log.frames, Kind::Undo)?.concat());
            }
            Ok(Found { machine, undo })
        })
    }

    /// Brings `into` to the checkpoint `mark`, the newest if `None`; its machine state.
    pub(crate) fn load(&self, mark: Option<Mark>, into: &mut Image) -> Result<Vec<u8>, LogError> {
        self.base.load(into)?;
        let mut machine = Vec::new();
        for (n, entry) in self.entries.iter().enumerate() {
            machine.clear();
            // The first one's memory is the base image.
            apply(&self.frames, entry, n > 0, into, &mut machine)?;
            if mark == Some(entry.commit.mark) {
                break;
            }
        }
        Ok(machine)
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
