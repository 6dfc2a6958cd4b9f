//! The load: a pass writes one changing u64 into each of N distinct pages, with some work after each.

use core::hint::black_box;

use crate::boot::PDPT;
use crate::log;
use crate::params::{Params, Range};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;
/// GiBs the page tables can map (one PDPT).
const MAX_GIB: u64 = 512;
/// Iterations of work done between two looks at the network: some 10 us.
const CHUNK: u64 = 4096;

/// The load in force and where its pass is.
pub struct Load {
    free: [Range; 16],
    available: u64,
    pages: u64,
    work: u64,
    /// Whole passes done.
    pub passes: u64,
    next: u64,
    range: usize,
    at: u64,
    work_left: u64,
    x: u64,
}

impl Load {
    /// Takes all free RAM; maps what lies above 4 GiB.
    pub fn new(params: &Params) -> Load {
        let free = map_high(params.free);
        let available = free.iter().map(|r| (r.end - r.start) / PAGE).sum();
        let mut l = Load {
            free,
            available,
            pages: 0,
            work: 0,
            passes: 0,
            next: 0,
            range: 0,
            at: 0,
            work_left: 0,
            x: 0x9e37_79b9_7f4a_7c15,
        };
        let pages = l.set(params.pages, params.work);
        if pages < params.pages {
            log!("pages={} is cut to what there is", params.pages);
        }
        log!("load: {pages} of {available} pages, work {}", params.work);
        l
    }

    /// Changes the load; begins a new pass. Returns the pages per pass in force.
    pub fn set(&mut self, pages: u64, work: u64) -> u64 {
        self.pages = pages.min(self.available);
        self.work = work;
        self.work_left = 0;
        self.rewind();
        self.pages
    }

    /// Whether there is a load at all.
    pub fn active(&self) -> bool {
        self.pages > 0
    }

    fn rewind(&mut self) {
        self.next = 0;
        self.range = 0;
        self.at = self.free[0].start;
    }

    /// A small piece of the pass: the work left after the last page (at most [`CHUNK`] iterations of it), or a page.
    pub fn step(&mut self) {
        if self.work_left > 0 {
            let n = self.work_left.min(CHUNK);
            for _ in 0..n {
                // A dependent chain nobody can shorten: an xorshift step.
                self.x ^= self.x << 13;
                self.x ^= self.x >> 7;
                self.x = black_box(self.x ^ self.x << 17);
            }
            self.work_left -= n;
            return;
        }
        if self.next == self.pages {
            self.passes += 1;
            self.rewind();
        }
        while self.at >= self.free[self.range].end {
            self.range += 1;
            self.at = self.free[self.range].start;
        }
        // The place within the page differs from page to page, the value from pass to pass.
        let offset = self.next % (PAGE / 8) * 8;
        // SAFETY: a page of free RAM: mapped, and nobody's but ours. `set` keeps `pages` within what `free` holds.
        unsafe {
            ((self.at + offset) as *mut u64)
                .write_volatile(self.passes.wrapping_add(1) ^ self.x << 32)
        };
        self.at += PAGE;
        self.next += 1;
        self.work_left = self.work;
    }
}

/// Maps RAM above 4 GiB, with page tables taken from the first free range. What cannot be mapped is dropped.
fn map_high(mut free: [Range; 16]) -> [Range; 16] {
    let Some(donor) = free
        .iter()
        .position(|r| r.end <= 4 * GIB && r.end - r.start > 16 * PAGE)
    else {
        return free.map(|r| if r.end > 4 * GIB { Range::default() } else { r });
    };
    let mut mapped = 4;
    for i in 0..free.len() {
        let r = free[i];
        if r.end <= 4 * GIB {
            continue;
        }
        let last = (r.end - 1) / GIB;
        let mut ok = last < MAX_GIB && r.start >= 4 * GIB;
        for gib in (r.start / GIB).max(mapped)..=last {
            ok = ok && free[donor].end - free[donor].start > PAGE;
            if !ok {
                break;
            }
            let table = free[donor].start;
            free[donor].start += PAGE;
            // SAFETY: `table` is a free, mapped page that has just been taken out of `free`; the PDPT's entry `gib` is
            // empty, so no translation changes. Bits: present, writable, user, accessed, dirty, large.
            unsafe {
                for k in 0..512 {
                    (table as *mut u64)
                        .add(k as usize)
                        .write_volatile((gib * GIB + k * LARGE) | 0xe7);
                }
                (&raw mut PDPT)
                    .cast::<u64>()
                    .add(gib as usize)
                    .write_volatile(table | 0x27);
            }
            mapped = gib + 1;
        }
        if !ok {
            log!("RAM {:#x}-{:#x} is not used", r.start, r.end);
            free[i] = Range::default();
        }
    }
    free
}
