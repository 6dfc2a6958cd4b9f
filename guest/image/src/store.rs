//! The counter and its copy on the disk.
//!
//! One disk request is on its way at a time. Increments that arrive meanwhile are covered by the next write
//! (group commit), so a reply waits for at most two writes however many requests are pipelined.

use crate::log;
use crate::proto::{DISK_BLOCK, DISK_SECTOR, Status, fill_disk_block, parse_disk_block};
use crate::time::Clock;
use crate::virtio::Transport;
use crate::virtio::blk::{Ask, Blk};

/// How long the first read may take before the disk is given up, microseconds.
const FIRST_READ_US: u64 = 5_000_000;

/// What a reply has to wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// The write of this counter value, or a later one.
    Write(u64),
    /// A flush after that write.
    Flush(u64),
    /// The read of this number.
    Read(u64),
}

/// The counter in memory and what is known about the disk.
pub struct Store {
    blk: Option<Blk>,
    /// The counter.
    pub counter: u64,
    /// Newest value whose write succeeded.
    pub on_disk: u64,
    tried: u64,
    flushed: u64,
    flush_tried: u64,
    flush_wanted: u64,
    reads_wanted: u64,
    reads_done: u64,
    /// Outcome of the last read.
    read: (Status, u64),
    now: Option<(Ask, u64)>,
    last: usize,
}

impl Store {
    /// Finds the disk, if there is one, and takes the counter up from it.
    pub fn new(clock: &mut Clock) -> Store {
        let mut s = Store {
            blk: None,
            counter: 0,
            on_disk: 0,
            tried: 0,
            flushed: 0,
            flush_tried: 0,
            flush_wanted: 0,
            reads_wanted: 0,
            reads_done: 0,
            read: (Status::NoDisk, 0),
            now: None,
            last: 0,
        };
        let Some(transport) = Transport::find(2) else {
            log!("no disk");
            return s;
        };
        let slot = transport.slot();
        match Blk::new(transport) {
            Err(why) => log!("disk in slot {slot} is unusable: {why}"),
            Ok(b) if b.read_only || b.sectors < (DISK_BLOCK / DISK_SECTOR) as u64 => {
                log!(
                    "disk in slot {slot} is not used: {} sectors, read-only {}",
                    b.sectors,
                    b.read_only
                );
            }
            Ok(b) => s.attach(b, slot, clock),
        }
        s
    }

    fn attach(&mut self, mut blk: Blk, slot: usize, clock: &mut Clock) {
        blk.start(Ask::Read);
        let until = clock.now_us() + FIRST_READ_US;
        let ok = loop {
            if let Some(ok) = blk.finished() {
                break ok;
            }
            if clock.now_us() > until {
                // The device may still write into the buffer: it is never used again.
                log!("disk in slot {slot} does not answer; going on without");
                return;
            }
            core::hint::spin_loop();
        };
        let found = blk.block().and_then(|b| parse_disk_block(b)).filter(|_| ok);
        if let Some(c) = found {
            (self.counter, self.on_disk, self.tried) = (c, c, c);
            (self.flushed, self.flush_tried) = (c, c);
        }
        let counter = self.counter;
        log!(
            "disk in slot {slot}: {} sectors, flush {}, counter {counter} (found {})",
            blk.sectors,
            blk.can_flush,
            found.is_some()
        );
        self.blk = Some(blk);
    }

    /// Adds one; what its reply has to wait for.
    pub fn increment(&mut self, flush: bool, no_wait: bool) -> Need {
        self.counter += 1;
        match (&self.blk, no_wait, flush) {
            (None, ..) | (_, true, _) => Need::Nothing,
            (Some(b), _, true) if b.can_flush => {
                self.flush_wanted = self.counter;
                Need::Flush(self.counter)
            }
            _ => Need::Write(self.counter),
        }
    }

    /// Asks for a read of the block that starts after now.
    pub fn read_back(&mut self) -> Need {
        if self.blk.is_none() {
            return Need::Nothing;
        }
        let running = matches!(self.now, Some((Ask::Read, _)));
        let n = self.reads_done + 1 + u64::from(running);
        self.reads_wanted = self.reads_wanted.max(n);
        Need::Read(n)
    }

    /// Whether what a reply waits for has happened, and how it went.
    pub fn outcome(&self, need: Need) -> Option<Status> {
        let written = |c: u64| match () {
            () if self.on_disk >= c => Some(Status::Ok),
            () if self.tried >= c => Some(Status::DiskError),
            () => None,
        };
        match need {
            Need::Nothing => Some(Status::Ok),
            Need::Write(c) => written(c),
            Need::Flush(c) => match written(c)? {
                Status::Ok if self.flushed >= c => Some(Status::Ok),
                Status::Ok if self.flush_tried >= c => Some(Status::DiskError),
                Status::Ok => None,
                bad => Some(bad),
            },
            Need::Read(n) => (self.reads_done >= n).then_some(self.read.0),
        }
    }

    /// What the last read found.
    pub fn last_read(&self) -> (Status, u64) {
        self.read
    }

    /// The disk has ended a request.
    pub fn pending(&self) -> bool {
        self.blk.as_ref().is_some_and(Blk::pending)
    }

    /// Takes in the request that ended and starts the next; true if something ended.
    pub fn poll(&mut self) -> bool {
        let Some(blk) = &mut self.blk else {
            return false;
        };
        let ended = blk.finished();
        if let (Some(ok), Some((ask, value))) = (ended, self.now) {
            self.now = None;
            match ask {
                Ask::Write => {
                    self.tried = value;
                    if ok {
                        self.on_disk = value;
                    }
                }
                Ask::Flush => {
                    self.flush_tried = value;
                    if ok {
                        self.flushed = value;
                    }
                }
                Ask::Read => {
                    self.reads_done += 1;
                    let found = blk.block().and_then(|b| parse_disk_block(b));
                    self.read = match (ok, found) {
                        (false, _) => (Status::DiskError, 0),
                        (true, None) => (Status::DiskTorn, 0),
                        (true, Some(c)) => (Status::Ok, c),
                    };
                }
            }
        }
        if self.now.is_none() {
            self.start_next();
        }
        ended.is_some()
    }

    /// Starts what is wanted, beginning behind the kind that ran last: none starves another.
    fn start_next(&mut self) {
        let Some(blk) = &mut self.blk else { return };
        for k in 1..=3 {
            let kind = (self.last + k) % 3;
            let (wanted, ask, value) = match kind {
                0 => (self.counter > self.tried, Ask::Write, self.counter),
                1 => (
                    self.flush_wanted > self.flush_tried && self.on_disk > self.flush_tried,
                    Ask::Flush,
                    self.on_disk,
                ),
                _ => (self.reads_wanted > self.reads_done, Ask::Read, 0),
            };
            if wanted {
                if ask == Ask::Write
                    && let Some(block) = blk.block()
                {
                    fill_disk_block(value, block);
                }
                blk.start(ask);
                self.last = kind;
                self.now = Some((ask, value));
                return;
            }
        }
    }

    /// Interrupts for the disk.
    pub fn interrupts(&mut self, on: bool) {
        if let Some(b) = &mut self.blk {
            if on {
                b.acknowledge();
            }
            b.interrupts(on);
        }
    }
}
