//! Copies a checkpoint of the past out of a replica that goes on meanwhile, for a clone of the VM.
//!
//! What is copied is the newest checkpoint as it is when the copy begins, piece by piece, and before a later one replaces
//! something that has not been copied yet, that is copied first. What leads from there back to the checkpoint that is
//! wanted is done to the copy at its end, apart from the replica.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{DiskOp, PAGE_SIZE, PageBitmap, RamRange, disk_records};
use diskbuf::ReplicaDisks;

use super::StoreError;
use super::query::{Files, Memory, Past};
use crate::blocks::BLOCK;
use crate::image::Image;
use crate::mark::Mark;

/// A copy under way, as part of a store.
#[derive(Debug)]
pub(super) struct CopyOut {
    past: Past,
    image: Image,
    files: Files,
    sizes: Vec<u64>,
    /// Pages to look at, last one first; none if its memory comes from a log.
    pages: Vec<u64>,
    /// Those that have been copied, or need not be.
    done: PageBitmap,
    /// The next block to look at, and for each disk and block whether it has been copied.
    next: (usize, u64),
    copied: Vec<Vec<bool>>,
    /// False once what the store holds has nothing to do with this copy any more.
    alive: Arc<AtomicBool>,
    failed: Option<StoreError>,
}

/// A copy that is complete, but for what leads back from the newest checkpoint.
#[derive(Debug)]
pub struct CopiedOut {
    past: Past,
    image: Image,
    files: Files,
    alive: Arc<AtomicBool>,
}

impl CopyOut {
    /// Of a store with that memory and disks of these sizes, into as many empty files, of the same sizes.
    pub(super) fn new(
        past: Past,
        ram: &[RamRange],
        sizes: &[u64],
        files: Files,
        alive: Arc<AtomicBool>,
    ) -> Result<Self, StoreError> {
        if files.len() != sizes.len() {
            return Err(StoreError::NotOpen);
        }
        let mut done = PageBitmap::new(ram);
        let page = PAGE_SIZE as u64;
        let gfns = ram
            .iter()
            .flat_map(|r| r.start / page..(r.start + r.len) / page);
        let mut pages: Vec<u64> = gfns.rev().collect();
        if matches!(past.memory, Memory::Log(_)) {
            pages.drain(..).for_each(|gfn| {
                done.set(gfn);
            });
        }
        let blocks = |size: &u64| vec![false; usize::try_from(size.div_ceil(BLOCK)).unwrap_or(0)];
        Ok(Self {
            image: Image::new(ram)?,
            past,
            files,
            copied: sizes.iter().map(blocks).collect(),
            sizes: sizes.to_vec(),
            pages,
            done,
            next: (0, 0),
            alive,
            failed: None,
        })
    }

    /// These pages are about to be replaced.
    pub(super) fn before_pages(&mut self, gfns: impl Iterator<Item = u64>, from: &Image) {
        for gfn in gfns {
            let copied = self.page(gfn, from);
            self.note(copied);
        }
    }

    /// What these encoded disk records write to is about to be replaced.
    pub(super) fn before_disk(&mut self, writes: &[Vec<u8>], disks: &ReplicaDisks) {
        for record in writes.iter().flat_map(|w| disk_records(w)).flatten() {
            if record.len == 0 {
                continue;
            }
            let last = (record.offset + u64::from(record.len) - 1) / BLOCK;
            for block in record.offset / BLOCK..=last {
                let copied = self.block(usize::from(record.disk), block, disks);
                self.note(copied);
            }
        }
    }

    /// A failure is the copy's, not the store's.
    fn note(&mut self, result: Result<(), StoreError>) {
        if let Err(e) = result {
            self.failed.get_or_insert(e);
        }
    }

    fn page(&mut self, gfn: u64, from: &Image) -> Result<(), StoreError> {
        if self.done.test(gfn) {
            return Ok(());
        }
        self.done.set(gfn);
        let page = from.page(gfn)?;
        if page.iter().any(|byte| *byte != 0) {
            self.image.put(gfn, page)?;
        }
        Ok(())
    }

    fn block(&mut self, disk: usize, block: u64, disks: &ReplicaDisks) -> Result<(), StoreError> {
        let blocks = self.copied.get_mut(disk);
        let at = usize::try_from(block).ok();
        let Some(copied) = blocks.and_then(|blocks| blocks.get_mut(at?)) else {
            return Ok(());
        };
        if std::mem::replace(copied, true) {
            return Ok(());
        }
        let offset = block * BLOCK;
        let mut data = vec![0; BLOCK.min(self.sizes[disk] - offset) as usize];
        disks
            .read(disk as u16, offset, &mut data)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        if data.iter().any(|byte| *byte != 0) {
            write(&self.files[disk], &data, offset)?;
        }
        Ok(())
    }

    /// Copies about so many bytes more; true when nothing is left.
    pub(super) fn next(
        &mut self,
        limit: usize,
        from: &Image,
        disks: &ReplicaDisks,
    ) -> Result<bool, StoreError> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        let mut left = limit;
        while left > 0
            && let Some(size) = self.sizes.get(self.next.0)
        {
            let (disk, block) = self.next;
            if block * BLOCK >= *size {
                self.next = (disk + 1, 0);
                continue;
            }
            self.block(disk, block, disks)?;
            self.next.1 += 1;
            left = left.saturating_sub(BLOCK as usize);
        }
        while left > 0
            && let Some(gfn) = self.pages.pop()
        {
            self.page(gfn, from)?;
            left = left.saturating_sub(PAGE_SIZE);
        }
        Ok(self.pages.is_empty() && self.next.0 >= self.sizes.len())
    }

    pub(super) fn end(self) -> CopiedOut {
        CopiedOut {
            past: self.past,
            image: self.image,
            files: self.files,
            alive: self.alive,
        }
    }
}

fn write((path, file): &(PathBuf, File), data: &[u8], offset: u64) -> Result<(), StoreError> {
    let written = file.write_all_at(data, offset);
    written.map_err(|source| StoreError::CopyOut {
        path: path.clone(),
        source,
    })
}

/// A checkpoint of the past, whole.
#[derive(Debug)]
pub struct Found {
    /// Which one.
    pub mark: Mark,
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// Its memory.
    pub image: Image,
}

impl CopiedOut {
    /// Goes back from the newest checkpoint to the one that is wanted. Needs no lock on the store.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::CopyInterrupted`] if what the copy rests on is gone.
    pub fn finish(mut self) -> Result<Found, StoreError> {
        match self.go_back() {
            Err(_) if !self.alive.load(Ordering::Acquire) => Err(StoreError::CopyInterrupted),
            Err(e) => Err(e),
            Ok(machine) => Ok(Found {
                mark: self.past.mark,
                machine,
                image: self.image,
            }),
        }
    }

    fn go_back(&mut self) -> Result<Vec<u8>, StoreError> {
        let (machine, undo) = match &self.past.memory {
            Memory::Newest(newest) => {
                for pages in &newest.pages {
                    self.image.write(pages)?;
                }
                (newest.machine.clone(), newest.disk.clone())
            }
            Memory::Log(reader) => {
                let found = reader.read(&mut self.image)?;
                (found.machine, found.undo)
            }
        };
        for record in undo.iter().flat_map(|records| disk_records(records)) {
            let record = record.map_err(checkpoint::StageError::from)?;
            let disk = usize::from(record.disk);
            let Some(file) = self.files.get(disk) else {
                continue;
            };
            match record.op {
                DiskOp::Write => write(file, record.data, record.offset)?,
                _ => write(file, &vec![0; record.len as usize], record.offset)?,
            }
        }
        Ok(machine)
    }
}
