//! A copy of a store's whole content for a replica that joins, made while checkpoints go on being committed, and not felt by
//! them whatever the VM's size.
//!
//! Most of it is read beside the store, without its owner's lock ([`Source`]): first everything that is not zero, then in
//! rounds what has been committed meanwhile, of which the store notes no more than that it has changed ([`Changes`]). What
//! is read while it is replaced may be torn; it has changed, so a later round sends it again. The last round is of one
//! moment, the [`Cut`]: what has changed until then is read as it was then. A page that a later checkpoint replaces before
//! it has been read is put aside first.
//!
//! Under the lock nothing is read but pages of the cut, [`CUT_PAGES`] at a time, and nothing is waited for.

mod changes;
mod source;

use checkpoint::{PAGE_SIZE, PageBitmap, RamRange};

use super::StoreError;
use crate::image::Image;
use crate::mark::Mark;
pub(crate) use changes::Changes;
use changes::Kept;
pub(crate) use source::Source;

/// Pages of a cut that are copied under the lock at a time: 256 KiB.
pub(crate) const CUT_PAGES: usize = 64;

/// A copy under way, as part of a store.
#[derive(Debug)]
pub(super) enum Copy {
    /// What is committed is noted.
    Noting(Changes),
    /// What is committed does not belong to the copy any more, and must not replace what does.
    Cut(Kept),
}

/// What is left to be copied, at a moment between two checkpoints.
#[derive(Debug)]
pub(crate) struct Cut {
    /// The checkpoint.
    pub(crate) mark: Mark,
    /// Its encoded machine state.
    pub(crate) machine: Vec<u8>,
    /// Pages that have changed since the last round began.
    pub(crate) gfns: Vec<u64>,
    /// Disk writes since then: buffers of encoded records, in order.
    pub(crate) writes: Vec<Vec<u8>>,
}

impl Copy {
    pub(super) fn new(ram: &[RamRange]) -> Self {
        Self::Noting(Changes::new(ram))
    }

    /// This page is about to be replaced.
    pub(super) fn before_page(&mut self, gfn: u64, image: &Image) {
        match self {
            Self::Noting(changes) => changes.page(gfn),
            Self::Cut(kept) => kept.put_aside(gfn, image),
        }
    }

    /// These disk writes have been processed.
    pub(super) fn disk_changed(&mut self, writes: Vec<Vec<u8>>) {
        if let Self::Noting(changes) = self {
            changes.disk(writes);
        }
    }

    /// What has changed since the last round began; from here on `fresh` takes it.
    pub(super) fn changes(&mut self, fresh: Changes) -> Result<Changes, StoreError> {
        match self {
            Self::Noting(changes) => Ok(std::mem::replace(changes, fresh)),
            Self::Cut(_) => Err(StoreError::NotOpen),
        }
    }

    /// Cuts: the pages and writes that are left. `spare` is an empty set over the same RAM.
    pub(super) fn cut(
        &mut self,
        spare: PageBitmap,
    ) -> Result<(Vec<u64>, Vec<Vec<u8>>), StoreError> {
        let Self::Noting(changes) = self else {
            return Err(StoreError::NotOpen);
        };
        let gfns = std::mem::take(&mut changes.gfns);
        let writes = changes.writes.take();
        let writes = writes.ok_or(StoreError::CopyTooSlow)?;
        let pages = std::mem::replace(&mut changes.pages, PageBitmap::new(&[]));
        *self = Self::Cut(Kept::new(pages, spare));
        Ok((gfns, writes))
    }

    /// Reads pages of the cut, as they were then; at most [`CUT_PAGES`] of them.
    pub(super) fn cut_pages(
        &mut self,
        gfns: &[u64],
        image: &Image,
        out: &mut Vec<[u8; PAGE_SIZE]>,
    ) -> Result<(), StoreError> {
        let Self::Cut(kept) = self else {
            return Err(StoreError::NotOpen);
        };
        out.clear();
        for gfn in gfns.iter().take(CUT_PAGES) {
            out.push(kept.take(*gfn, image)?);
        }
        Ok(())
    }
}
