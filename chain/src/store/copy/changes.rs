//! What a store notes for a copy under way, at each commit and in time that does not depend on the VM's size.

use std::collections::{BTreeSet, HashMap};

use checkpoint::{PAGE_SIZE, PageBitmap, RamRange, disk_records};

use crate::blocks::BLOCK;
use crate::image::{Image, ImageError};

/// Disk writes noted as they came, at most, in bytes. Beyond that only the blocks are known that they touch.
const WRITES_MAX: u64 = 16 << 20;
/// The same in later rounds: a cut needs them all.
const ROUND_WRITES_MAX: u64 = 256 << 20;

/// What has been committed since a copy, or its last round, began.
#[derive(Debug)]
pub(crate) struct Changes {
    pub(super) pages: PageBitmap,
    /// The same pages, in the order in which they changed first.
    pub(crate) gfns: Vec<u64>,
    /// Disk blocks touched.
    pub(crate) blocks: BTreeSet<(u16, u64)>,
    /// All disk writes, encoded, in order; `None`: they are too many.
    pub(crate) writes: Option<Vec<Vec<u8>>>,
    write_bytes: u64,
    writes_max: u64,
}

impl Changes {
    /// None yet. Made before it is needed under a lock: it allocates a bit for each page.
    pub(crate) fn new(ram: &[RamRange]) -> Self {
        Self {
            pages: PageBitmap::new(ram),
            gfns: Vec::new(),
            blocks: BTreeSet::new(),
            writes: Some(Vec::new()),
            write_bytes: 0,
            writes_max: WRITES_MAX,
        }
    }

    /// For a round that may be the last one before the cut.
    pub(crate) fn round(ram: &[RamRange]) -> Self {
        Self {
            writes_max: ROUND_WRITES_MAX,
            ..Self::new(ram)
        }
    }

    pub(super) fn page(&mut self, gfn: u64) {
        if !self.pages.test(gfn) && self.pages.set(gfn) {
            self.gfns.push(gfn);
        }
    }

    pub(super) fn disk(&mut self, writes: Vec<Vec<u8>>) {
        for record in writes.iter().flat_map(|w| disk_records(w)).flatten() {
            if record.len > 0 {
                let last = (record.offset + u64::from(record.len) - 1) / BLOCK;
                let blocks = record.offset / BLOCK..=last;
                self.blocks.extend(blocks.map(|block| (record.disk, block)));
            }
        }
        self.write_bytes += writes.iter().map(|w| w.len() as u64).sum::<u64>();
        if self.write_bytes > self.writes_max {
            self.writes = None;
        }
        if let Some(noted) = &mut self.writes {
            noted.extend(writes);
        }
    }

    /// Upper bound of what would have to be sent, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let disk = match self.writes {
            Some(_) => self.write_bytes,
            None => self.blocks.len() as u64 * BLOCK,
        };
        self.gfns.len() as u64 * PAGE_SIZE as u64 + disk
    }
}

/// The pages of a cut that have not been read yet, as they were then.
#[derive(Debug)]
pub(in crate::store) struct Kept {
    pages: PageBitmap,
    /// Those of them that have been read or put aside.
    done: PageBitmap,
    aside: HashMap<u64, Box<[u8; PAGE_SIZE]>>,
}

impl Kept {
    pub(super) fn new(pages: PageBitmap, done: PageBitmap) -> Self {
        Self {
            pages,
            done,
            aside: HashMap::new(),
        }
    }

    /// The page is about to be replaced.
    pub(super) fn put_aside(&mut self, gfn: u64, image: &Image) {
        if self.pages.test(gfn)
            && !self.done.test(gfn)
            && let Ok(page) = image.page(gfn)
        {
            self.done.set(gfn);
            self.aside.insert(gfn, Box::new(*page));
        }
    }

    /// The page as it was at the cut. It is not asked for again.
    pub(super) fn take(&mut self, gfn: u64, image: &Image) -> Result<[u8; PAGE_SIZE], ImageError> {
        if let Some(page) = self.aside.remove(&gfn) {
            return Ok(*page);
        }
        self.done.set(gfn);
        Ok(*image.page(gfn)?)
    }
}
