//! A copy of a store's whole content for a replica that joins, made while checkpoints go on being committed: first
//! everything that is not zero, then in rounds what has been committed since, until nothing is left at some instant.

use std::collections::BTreeSet;

use checkpoint::{EncoderOptions, PAGE_SIZE, PageBitmap, PageEncoder, RamRange, disk_records};
use diskbuf::ReplicaDisks;

use super::{Filled, Piece, StoreError};
use crate::blocks::{self, BLOCK, Digest};
use crate::image::Image;

/// How far it is.
#[derive(Debug)]
pub(super) struct Copy {
    encoder: PageEncoder,
    /// Everything goes out for the first time: what is zero need not, a joining replica begins with that.
    first: bool,
    /// Pages and blocks of this round, last one first.
    pages: Vec<u64>,
    blocks: Vec<(u16, u64)>,
    /// What has been committed since this round began.
    changed_pages: PageBitmap,
    changed_blocks: BTreeSet<(u16, u64)>,
    /// What the joining replica holds, by its own account, of each block of each disk; `None`: unknown, or sent meanwhile.
    theirs: Vec<Vec<Option<Digest>>>,
    filled: Filled,
}

impl Copy {
    pub(super) fn new(ram: &[RamRange], disks: &[u64]) -> Self {
        let page = PAGE_SIZE as u64;
        let pages = ram
            .iter()
            .flat_map(|range| range.start / page..(range.start + range.len) / page)
            .rev()
            .collect();
        let mut blocks: Vec<_> = (0u16..)
            .zip(disks)
            .flat_map(|(disk, size)| (0..size.div_ceil(BLOCK)).map(move |block| (disk, block)))
            .collect();
        blocks.reverse();
        let unknown = |size: &u64| vec![None; usize::try_from(size.div_ceil(BLOCK)).unwrap_or(0)];
        Self {
            theirs: disks.iter().map(unknown).collect(),
            filled: Filled::default(),
            encoder: PageEncoder::new(EncoderOptions { lz4: true }),
            first: true,
            pages,
            blocks,
            changed_pages: PageBitmap::new(ram),
            changed_blocks: BTreeSet::new(),
        }
    }

    /// The joining replica says what it holds; false if that cannot be.
    pub(super) fn compare(&mut self, disk: u16, first: u64, digests: &[Digest]) -> bool {
        let blocks = self.theirs.get_mut(usize::from(disk));
        let range = usize::try_from(first)
            .ok()
            .and_then(|first| Some(first..first.checked_add(digests.len())?));
        let Some(known) = blocks
            .zip(range)
            .and_then(|(blocks, range)| blocks.get_mut(range))
        else {
            return false;
        };
        for (known, digest) in known.iter_mut().zip(digests) {
            *known = Some(*digest);
        }
        true
    }

    pub(super) fn filled(&self) -> Filled {
        Filled {
            left: self.left(),
            ..self.filled
        }
    }

    pub(super) fn page_changed(&mut self, gfn: u64) {
        self.changed_pages.set(gfn);
    }

    /// Notes the blocks that encoded disk records touch.
    pub(super) fn disk_changed(&mut self, writes: &[Vec<u8>]) {
        for record in writes.iter().flat_map(|w| disk_records(w)).flatten() {
            if record.len > 0 {
                let last = (record.offset + u64::from(record.len) - 1) / BLOCK;
                let blocks = record.offset / BLOCK..=last;
                self.changed_blocks
                    .extend(blocks.map(|block| (record.disk, block)));
            }
        }
    }

    pub(super) fn left(&self) -> u64 {
        let pages = self.pages.len() as u64 + self.changed_pages.count();
        let blocks = self.blocks.len() + self.changed_blocks.len();
        pages * PAGE_SIZE as u64 + blocks as u64 * BLOCK
    }

    fn next_round(&mut self, disks: &mut ReplicaDisks) -> Result<(), StoreError> {
        self.first = false;
        if !self.changed_blocks.is_empty() {
            // What has been processed may still be in the journal only.
            disks
                .flush()
                .map_err(|e| StoreError::Disks(e.to_string()))?;
        }
        self.pages = self.changed_pages.iter().collect();
        self.pages.reverse();
        self.changed_pages.clear();
        self.blocks = std::mem::take(&mut self.changed_blocks)
            .into_iter()
            .rev()
            .collect();
        Ok(())
    }

    pub(super) fn next(
        &mut self,
        limit: usize,
        image: &Image,
        disks: &mut ReplicaDisks,
    ) -> Result<Option<Piece>, StoreError> {
        loop {
            let mut out = Vec::new();
            while out.len() < limit
                && let Some((disk, block)) = self.blocks.pop()
            {
                self.block(disk, block, disks, &mut out)?;
            }
            if !out.is_empty() {
                return Ok(Some(Piece::Disk(out)));
            }
            while out.len() < limit
                && let Some(gfn) = self.pages.pop()
            {
                let page = image.page(gfn)?;
                if !self.first || page.iter().any(|byte| *byte != 0) {
                    self.encoder.encode(gfn, page, None, &mut out);
                    self.filled.pages_sent += 1;
                }
            }
            if !out.is_empty() {
                return Ok(Some(Piece::Pages(out)));
            }
            if self.changed_pages.is_empty() && self.changed_blocks.is_empty() {
                return Ok(None);
            }
            self.next_round(disks)?;
        }
    }

    fn block(
        &mut self,
        disk: u16,
        block: u64,
        disks: &ReplicaDisks,
        out: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        let failed = |e: std::io::Error| StoreError::Disks(e.to_string());
        let Some(mirror) = disks.mirrors().get(usize::from(disk)) else {
            return Ok(());
        };
        let mut data = Vec::new();
        let record = blocks::record(mirror, disk, block, &mut data).map_err(failed)?;
        let theirs = usize::try_from(block)
            .ok()
            .and_then(|block| self.theirs.get_mut(usize::from(disk))?.get_mut(block));
        if let Some(theirs) = theirs {
            // Zeros are a record without data, whose digest is that of zeros.
            if theirs.is_some_and(|theirs| theirs == blocks::digest(record.data)) {
                self.filled.blocks_equal += 1;
                return Ok(());
            }
            // It is about to be sent: what the other one held before says nothing any more.
            *theirs = None;
        }
        self.filled.blocks_sent += 1;
        record.encode(out);
        Ok(())
    }
}
