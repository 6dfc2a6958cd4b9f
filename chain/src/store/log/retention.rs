//! Which checkpoints stay in the log, and when older ones are folded into the base image.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Log;
use super::error::LogError;
use super::fold::Fold;
use super::manifest::{Manifest, Phase};
use super::segment;

impl Log {
    /// After each checkpoint: goes on with what is being folded, or begins to fold what is too old.
    pub(crate) fn retain(&mut self) -> Result<(), LogError> {
        self.guard(|log| {
            if let Some(manifest) = log.folder.poll()? {
                log.folded(&manifest)?;
            }
            if log.folder.busy() && log.bytes() > log.options.retention.bytes.saturating_mul(2) {
                // The disk has fallen behind: space is bounded, so the checkpoint waits.
                log.settle()?;
            }
            if log.folder.busy() || Arc::strong_count(&log.readers) > 1 {
                return Ok(());
            }
            let target = log.target();
            let Some(latest) = log.manifest.latest().filter(|_| target > 0) else {
                return Ok(());
            };
            let entries: Vec<_> = log.entries.range(1..=target).copied().collect();
            let Some(last) = entries.last() else {
                return Ok(());
            };
            log.folding = last.lsn;
            let fold = Fold {
                frames: log.frames.clone(),
                base: log.base.clone(),
                journal: log.journal.clone(),
                file: log.manifest.clone(),
                manifest: Manifest {
                    phase: Phase::Folding,
                    target: last.lsn,
                    next: last.start,
                    ..latest
                },
                entries,
                pages: BTreeMap::new(),
                stage: 0,
                no_journal: log.options.mutants.no_journal,
                stop: log.folder.stop.clone(),
            };
            log.folder.submit(fold)
        })
    }

    /// How many checkpoints to fold now.
    fn target(&self) -> usize {
        let Some(first) = self.entries.front() else {
            return 0;
        };
        let (keep, bytes) = (
            self.options.retention.checkpoints,
            self.options.retention.bytes,
        );
        // Only whole segments can be given back: less is not worth the writing.
        let mut target = self.entries.len().saturating_sub(keep.max(1));
        if self
            .entries
            .get(target)
            .is_none_or(|e| e.start.segment == first.start.segment)
        {
            target = 0;
        }
        let total = self.bytes();
        if total > bytes {
            let kept = |from: u64| -> u64 {
                let segments = self.frames.segments.iter().filter(|s| s.number >= from);
                segments.map(|s| s.len).sum()
            };
            let enough = |e: &super::Entry| kept(e.start.segment) <= bytes / 4 * 3;
            let newest = self.entries.len() - 1;
            target = target.max(self.entries.iter().position(enough).unwrap_or(newest));
        }
        let mut pages = 0u64;
        let fits = self.entries.range(1..=target).take_while(|e| {
            let first = pages == 0;
            pages = pages.saturating_add(e.commit.pages);
            first || pages <= self.options.fold_pages
        });
        fits.count()
    }

    /// Waits for what is being folded.
    pub(super) fn settle(&mut self) -> Result<(), LogError> {
        match self.folder.wait()? {
            Some(manifest) => self.folded(&manifest),
            None => Ok(()),
        }
    }

    /// The base image has moved on: what is before it goes.
    fn folded(&mut self, manifest: &Manifest) -> Result<(), LogError> {
        while self.entries.front().is_some_and(|e| e.lsn < manifest.base) {
            self.entries.pop_front();
        }
        let gone = |s: &segment::Segment| s.number < manifest.start.segment;
        while self.frames.segments.first().is_some_and(gone) {
            let segment = self.frames.segments.remove(0);
            let path = segment::path(&self.dir, segment.number);
            // Not waited for: one that comes back after a crash is known by its number.
            let removed = self.layer.remove(&path);
            removed.map_err(LogError::io("removing", &path))?;
        }
        Ok(())
    }
}
