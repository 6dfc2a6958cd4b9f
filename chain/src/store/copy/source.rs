//! What a copy is read from, beside the store and without a lock on it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use checkpoint::{EncoderOptions, PAGE_SIZE, PageBitmap, PageEncoder, RamRange};
use diskbuf::Mirror;

use super::{CUT_PAGES, Changes};
use crate::blocks::{self, BLOCK, Digest};
use crate::image::{ImageError, Reader};
use crate::store::{Filled, Piece, StoreError};

/// Bytes looked at for one piece, about: a copy that is over is given up after so much.
const LOOK: u64 = 1 << 20;
/// Bytes in one piece, about.
const PIECE: usize = 256 << 10;

/// Memory and mirrors of a store, and what is left of the round.
#[derive(Debug)]
pub(crate) struct Source {
    ram: Vec<RamRange>,
    memory: Reader,
    mirrors: Arc<Vec<Mirror>>,
    encoder: PageEncoder,
    /// What the joining replica's disks hold by its own account, one list of blocks and digests for each disk, ascending. What
    /// is not in it is zero.
    theirs: Vec<Vec<(u64, Digest)>>,
    round: Round,
    filled: Filled,
    pages: Vec<[u8; PAGE_SIZE]>,
    data: Vec<u8>,
}

/// What is left of a round.
#[derive(Debug)]
enum Round {
    /// Everything that is not zero here or there, from this block of this disk on, and then from this page on.
    First {
        disk: usize,
        block: u64,
        next: usize,
        gfn: u64,
    },
    /// What has changed, last one first: disk writes, or blocks if there were too many writes; pages.
    Changed {
        writes: Vec<Vec<u8>>,
        blocks: Vec<(u16, u64)>,
        gfns: Vec<u64>,
    },
}

fn disks(error: io::Error) -> StoreError {
    StoreError::Disks(error.to_string())
}

fn memory(error: io::Error) -> StoreError {
    ImageError::Read(error).into()
}

impl Source {
    pub(crate) fn new(ram: &[RamRange], memory: Reader, mirrors: Arc<Vec<Mirror>>) -> Self {
        Self {
            ram: ram.to_vec(),
            memory,
            theirs: mirrors.iter().map(|_| Vec::new()).collect(),
            mirrors,
            encoder: PageEncoder::new(EncoderOptions { lz4: true }),
            round: Round::First {
                disk: 0,
                block: 0,
                next: 0,
                gfn: 0,
            },
            filled: Filled::default(),
            pages: vec![[0; PAGE_SIZE]; CUT_PAGES],
            data: Vec::new(),
        }
    }

    /// An empty set of changes for a round, made without a lock.
    pub(crate) fn fresh(&self) -> Changes {
        Changes::round(&self.ram)
    }

    /// An empty set of pages.
    pub(crate) fn spare(&self) -> PageBitmap {
        PageBitmap::new(&self.ram)
    }

    /// How far it is.
    pub(crate) fn filled(&self) -> Filled {
        Filled {
            left: self.left(),
            ..self.filled
        }
    }

    /// Upper bound of what is left of the round, in bytes.
    fn left(&self) -> u64 {
        match &self.round {
            Round::First {
                disk, block, gfn, ..
            } => {
                let sizes = self.mirrors.iter().skip(*disk).map(Mirror::size);
                let disks = sizes.sum::<u64>().saturating_sub(block * BLOCK);
                let ends = self.ram.iter().map(|r| r.start + r.len);
                let at = gfn * PAGE_SIZE as u64;
                let ram = ends
                    .zip(&self.ram)
                    .map(|(end, r)| end - at.clamp(r.start, end));
                disks + ram.sum::<u64>()
            }
            Round::Changed {
                writes,
                blocks,
                gfns,
            } => {
                let writes: u64 = writes.iter().map(|w| w.len() as u64).sum();
                writes + blocks.len() as u64 * BLOCK + (gfns.len() * PAGE_SIZE) as u64
            }
        }
    }

    /// The joining replica says what it holds, block after block; false if that cannot be.
    pub(crate) fn compare(&mut self, disk: u16, first: u64, digests: &[Digest]) -> bool {
        let disk = usize::from(disk);
        let (Some(known), Some(mirror)) = (self.theirs.get_mut(disk), self.mirrors.get(disk))
        else {
            return false;
        };
        let end = first.checked_add(digests.len() as u64);
        let ascends = known.last().is_none_or(|(last, _)| *last < first);
        if !ascends || end.is_none_or(|end| end > mirror.size().div_ceil(BLOCK)) {
            return false;
        }
        let not_zero = (first..)
            .zip(digests)
            .filter(|(_, digest)| **digest != Digest::default());
        known.extend(not_zero.map(|(block, digest)| (block, *digest)));
        true
    }

    /// Begins a round of what has changed.
    pub(crate) fn begin(&mut self, changes: Changes) {
        let Changes {
            mut gfns,
            blocks,
            writes,
            ..
        } = changes;
        gfns.sort_unstable_by(|a, b| b.cmp(a));
        let all = |blocks: BTreeSet<_>| blocks.into_iter().rev().collect();
        let (writes, blocks) = match writes {
            Some(mut writes) => {
                writes.reverse();
                (writes, Vec::new())
            }
            None => (Vec::new(), all(blocks)),
        };
        self.round = Round::Changed {
            writes,
            blocks,
            gfns,
        };
    }

    /// The next piece of the round. `Some(None)`: so much was looked at, and nothing of it has to be sent; `None`: that was all.
    pub(crate) fn next(&mut self) -> Result<Option<Option<Piece>>, StoreError> {
        let Self { round, .. } = self;
        match round {
            Round::First { .. } => self.next_first(),
            Round::Changed {
                writes,
                blocks,
                gfns,
            } => {
                if let Some(write) = writes.pop() {
                    return Ok(Some(Some(Piece::Disk(write))));
                }
                if let Some((disk, block)) = blocks.pop() {
                    let mut out = Vec::new();
                    self.block(usize::from(disk), block, &mut out)?;
                    return Ok(Some(Some(Piece::Disk(out))));
                }
                let from = gfns.len().saturating_sub(CUT_PAGES);
                let some = gfns.split_off(from);
                if some.is_empty() {
                    return Ok(None);
                }
                let mut out = Vec::new();
                for gfn in some.iter().rev() {
                    self.memory
                        .read(*gfn, &mut self.pages[..1])
                        .map_err(memory)?;
                    self.filled.looked += PAGE_SIZE as u64;
                    self.encoder.encode(*gfn, &self.pages[0], None, &mut out);
                }
                self.filled.pages_sent += some.len() as u64;
                Ok(Some(Some(Piece::Pages(out))))
            }
        }
    }

    fn next_first(&mut self) -> Result<Option<Option<Piece>>, StoreError> {
        let until = self.filled.looked + LOOK;
        let mut out = Vec::new();
        while out.len() < PIECE && self.filled.looked < until {
            let Some((disk, block)) = self.next_block()? else {
                break;
            };
            self.compared(disk, block, &mut out)?;
        }
        if !out.is_empty() {
            return Ok(Some(Some(Piece::Disk(out))));
        }
        let mut any = false;
        while out.len() < PIECE && self.filled.looked < until {
            let Some(gfn) = self.next_page()? else {
                self.pages_done();
                break;
            };
            any = true;
            let n = self.memory.read(gfn, &mut self.pages).map_err(memory)?;
            self.filled.looked += (n * PAGE_SIZE) as u64;
            for (gfn, page) in (gfn..).zip(&self.pages[..n]) {
                // The joining replica begins with all zero.
                if page.iter().any(|byte| *byte != 0) {
                    self.encoder.encode(gfn, page, None, &mut out);
                    self.filled.pages_sent += 1;
                }
            }
            if let Round::First { gfn: next, .. } = &mut self.round {
                *next = gfn + n as u64;
            }
        }
        if !out.is_empty() {
            return Ok(Some(Some(Piece::Pages(out))));
        }
        Ok((any || self.filled.looked >= until).then_some(None))
    }

    /// The next block of the first round that is not zero, here or there.
    fn next_block(&mut self) -> Result<Option<(usize, u64)>, StoreError> {
        let Round::First {
            disk, block, next, ..
        } = &mut self.round
        else {
            return Ok(None);
        };
        while let Some(mirror) = self.mirrors.get(*disk) {
            let ours = blocks::next_data(mirror, *block).map_err(disks)?;
            let theirs = self.theirs[*disk].get(*next).map(|(block, _)| *block);
            let Some(found) = ours.into_iter().chain(theirs).min() else {
                (*disk, *block, *next) = (*disk + 1, 0, 0);
                continue;
            };
            *block = found + 1;
            return Ok(Some((*disk, found)));
        }
        Ok(None)
    }

    /// The next page of the first round that may not be zero.
    fn next_page(&self) -> Result<Option<u64>, StoreError> {
        match &self.round {
            Round::First { gfn, .. } => self.memory.next_data(*gfn).map_err(memory),
            Round::Changed { .. } => Ok(None),
        }
    }

    /// No page is left of the first round.
    fn pages_done(&mut self) {
        if let Round::First { gfn, .. } = &mut self.round {
            let ends = self
                .ram
                .iter()
                .map(|r| (r.start + r.len) / PAGE_SIZE as u64);
            *gfn = ends.max().unwrap_or(*gfn);
        }
    }

    /// Sends a block of the first round, unless the joining replica has it.
    fn compared(&mut self, disk: usize, block: u64, out: &mut Vec<u8>) -> Result<(), StoreError> {
        let mut theirs = Digest::default();
        if let Round::First { next, .. } = &mut self.round
            && let Some((at, digest)) = self.theirs[disk].get(*next)
            && *at == block
        {
            theirs = *digest;
            *next += 1;
        }
        let record = blocks::record(&self.mirrors[disk], disk as u16, block, &mut self.data);
        let record = record.map_err(disks)?;
        // A hole costs nothing, but is not free: it has been looked for.
        self.filled.looked += PAGE_SIZE.max(record.data.len()) as u64;
        // Zeros are a record without data, whose digest is that of zeros.
        if theirs == blocks::digest(record.data) {
            self.filled.blocks_equal += 1;
            return Ok(());
        }
        self.filled.blocks_sent += 1;
        record.encode(out);
        Ok(())
    }

    /// Sends a block as it is.
    fn block(&mut self, disk: usize, block: u64, out: &mut Vec<u8>) -> Result<(), StoreError> {
        let Some(mirror) = self.mirrors.get(disk) else {
            return Ok(());
        };
        let record = blocks::record(mirror, disk as u16, block, &mut self.data);
        let record = record.map_err(disks)?;
        self.filled.looked += PAGE_SIZE.max(record.data.len()) as u64;
        self.filled.blocks_sent += 1;
        record.encode(out);
        Ok(())
    }

    /// Encodes pages of a cut.
    pub(crate) fn encode(&mut self, gfns: &[u64], pages: &[[u8; PAGE_SIZE]]) -> Piece {
        let mut out = Vec::new();
        for (gfn, page) in gfns.iter().zip(pages) {
            self.encoder.encode(*gfn, page, None, &mut out);
        }
        self.filled.pages_sent += pages.len() as u64;
        Piece::Pages(out)
    }
}
