//! Opening a log: what a crash left half done is completed or cut off, what is damaged is said to be.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use checkpoint::{PageBitmap, RamRange, VmId};
use diskbuf::layer::FileLayer;

use super::base::Base;
use super::entry::{Entry, walk};
use super::error::LogError;
use super::fold::{Folder, Journal};
use super::manifest::{Manifest, ManifestFile, Phase};
use super::segment::{self, FIRST, Frames, Place, Segment};
use super::{Log, Options, shape_of};

impl Log {
    /// Opens the log in `dir`, made if need be. `fresh`: nothing in it counts; otherwise it is brought to the newest
    /// complete checkpoint.
    pub(crate) fn open(
        layer: Arc<dyn FileLayer>,
        dir: &Path,
        vm: VmId,
        ram: &[RamRange],
        options: Options,
        fresh: bool,
    ) -> Result<Self, LogError> {
        layer.create_dir(dir).map_err(LogError::io("making", dir))?;
        let manifest = ManifestFile::open(&*layer, dir, fresh)?;
        let base = Base::open(&*layer, dir, ram)?;
        let journal = Journal::open(&*layer, dir)?;
        let synced = layer.sync_dir(dir);
        synced.map_err(LogError::io("syncing", dir))?;
        let folder = Folder::new(options.stepped);
        let mut log = Self {
            dir: dir.into(),
            vm,
            shape: shape_of(ram),
            options,
            manifest: Arc::new(manifest),
            base,
            journal,
            frames: Frames {
                dir: dir.into(),
                salt: 0,
                segments: Vec::new(),
                no_crc: options.mutants.no_crc,
            },
            entries: VecDeque::new(),
            open: None,
            filled: PageBitmap::new(ram),
            unsynced: 0,
            folder: folder.map_err(LogError::io("starting a thread for", dir))?,
            folding: 0,
            poisoned: None,
            readers: Arc::default(),
            layer,
        };
        let found = log.manifest.latest().filter(|_| !fresh);
        // The manifest is there before the first segment.
        if found.is_none() && !fresh && !segment::list(&*log.layer, dir)?.is_empty() {
            return Err(LogError::damaged(dir, "the manifest is missing"));
        }
        if let Some(found) = found.filter(|m| m.phase != Phase::Void) {
            log.recover(found)?;
        }
        Ok(log)
    }

    fn recover(&mut self, mut manifest: Manifest) -> Result<(), LogError> {
        if manifest.vm != self.vm || manifest.shape != self.shape {
            let found = match manifest.vm {
                vm if vm == self.vm => "a VM with other memory".into(),
                vm => format!("VM {vm}"),
            };
            return Err(LogError::Other {
                path: self.dir.clone(),
                found,
            });
        }
        self.base.check()?;
        if manifest.phase == Phase::Folding {
            manifest = self.journal.redo(&self.base, &self.manifest)?;
        }
        self.frames.salt = manifest.salt;
        self.open_segments(manifest.start.segment)?;
        let (mut lsn, mut at) = (manifest.base, manifest.start);
        let broken = loop {
            let sloppy = self.options.mutants.torn_is_whole;
            match walk(&self.frames, lsn, at, sloppy, &mut |_, _| Ok(()))? {
                Ok(entry) => {
                    self.take(entry)?;
                    (lsn, at) = (lsn + 1, entry.end);
                }
                Err(why) => break why,
            }
        };
        // What is broken is a torn tail, unless something says that it was durable.
        let mut vouched = 0;
        self.frames
            .scan(at, &mut |head, _| vouched = vouched.max(head.durable))?;
        if vouched >= lsn || self.entries.is_empty() {
            let path = segment::path(&self.dir, at.segment);
            let what = format!("checkpoint number {lsn} of this filling: {broken}");
            return Err(LogError::damaged(&path, what));
        }
        self.renew(at)
    }

    fn take(&mut self, entry: Entry) -> Result<(), LogError> {
        let fits = match self.entries.back() {
            Some(last) => entry.commit.prev == Some(last.commit.mark),
            None => true,
        };
        if !fits {
            let what = "it does not belong on top of the one before it";
            return Err(entry.damaged(&self.frames, what));
        }
        self.entries.push_back(entry);
        Ok(())
    }

    /// Opens the segments from `first` on.
    fn open_segments(&mut self, first: u64) -> Result<(), LogError> {
        let numbers = segment::list(&*self.layer, &self.dir)?;
        let (old, numbers): (Vec<u64>, Vec<u64>) = numbers.iter().partition(|n| **n < first);
        for number in old {
            // Given back before, or about to be.
            let path = segment::path(&self.dir, number);
            let removed = self.layer.remove(&path);
            removed.map_err(LogError::io("removing", &path))?;
        }
        let count = numbers.len();
        for (i, number) in numbers.into_iter().enumerate() {
            let path = segment::path(&self.dir, number);
            if number != first + i as u64 {
                let what = format!("segment {} is missing", first + i as u64);
                return Err(LogError::damaged(&self.dir, what));
            }
            let opened = Segment::open(&*self.layer, &self.dir, self.vm, self.frames.salt, number)?;
            match opened {
                Some(segment) => self.frames.segments.push(segment),
                // A segment has no frames before its header is durable.
                None if i + 1 == count && i > 0 && !self.has_frames(number)? => {
                    let removed = self.layer.remove(&path);
                    removed.map_err(LogError::io("removing", &path))?;
                    let synced = self.layer.sync_dir(&self.dir);
                    synced.map_err(LogError::io("syncing", &self.dir))?;
                }
                None => return Err(LogError::damaged(&path, "its header is broken")),
            }
        }
        if self.frames.segments.is_empty() {
            let what = format!("segment {first} is missing");
            return Err(LogError::damaged(&self.dir, what));
        }
        Ok(())
    }

    fn has_frames(&self, number: u64) -> Result<bool, LogError> {
        let path = segment::path(&self.dir, number);
        let io = |what| LogError::io(what, &path);
        let file = self.layer.open(&path, false).map_err(io("opening"))?;
        let len = file.len().map_err(io("reading"))?;
        let mut alone = self.frames.clone();
        alone.segments = vec![Segment { number, file, len }];
        let (mut found, from) = (
            false,
            Place {
                segment: number,
                offset: FIRST,
            },
        );
        alone.scan(from, &mut |_, _| found = true)?;
        Ok(found)
    }

    /// Cuts off what comes after `end`, and makes the newest checkpoint durable: it may have been read from the page
    /// cache only. Written again, as a sync alone does nothing for pages that an earlier, failed one left marked as
    /// clean. Those before it are durable, or it would not have been begun.
    fn renew(&mut self, end: Place) -> Result<(), LogError> {
        let last = self.frames.segments.last();
        if last.is_some_and(|s| s.number > end.segment || s.len > end.offset) {
            tracing::info!(dir = %self.dir.display(), "what followed the newest checkpoint in the log is cut off");
        }
        self.cut(end)?;
        if let Some(last) = self.frames.segments.last_mut() {
            // The padding of the last frame may be missing.
            last.len = end.offset;
        }
        let Some(newest) = self.entries.back().copied() else {
            return Ok(());
        };
        // From the end of the one before: the voucher in between was not synced either.
        let before = self.entries.iter().rev().nth(1);
        let start = before.map_or(newest.start, |e| e.end);
        let touched = start.segment..=newest.end.segment;
        for segment in &self.frames.segments {
            if !touched.contains(&segment.number) {
                continue;
            }
            let path = segment::path(&self.dir, segment.number);
            rewrite(segment, 0, FIRST, &path)?;
            let from = match segment.number == start.segment {
                true => start.offset,
                false => FIRST,
            };
            rewrite(segment, from, segment.len, &path)?;
            let synced = segment.file.sync();
            synced.map_err(LogError::io("syncing", &path))?;
        }
        self.vouch(newest.lsn)
    }
}

fn rewrite(segment: &Segment, from: u64, to: u64, path: &Path) -> Result<(), LogError> {
    let mut buf = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let piece = &mut buf[..(to - at).min(1 << 20) as usize];
        let read = segment.file.read_at(at, piece);
        read.map_err(LogError::io("reading", path))?;
        let written = segment.file.write_at(at, piece);
        written.map_err(LogError::io("writing", path))?;
        at += piece.len() as u64;
    }
    Ok(())
}
