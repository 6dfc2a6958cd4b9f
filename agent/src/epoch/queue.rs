//! The queue from the epoch loop and the disks to the shipping thread. Its order is the order on the wire, which is
//! what ties disk writes to epochs: everything tagged e is queued before e's checkpoint.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{DiskOp, DiskRecord, Epoch, MachineState};

use super::staging::Staging;

/// Bytes of pages that may be queued, unless [`ShipQueue::limit_pages`] says otherwise.
const PAGES_MAX: u64 = 64 << 20;
/// Staging buffers held ready, to be filled without page faults; they take no more than pages that are queued may.
const FREE: usize = 8;
/// Checkpoints whose unchanged pages are kept for whoever wants to know.
const UNCHANGED: usize = 16;

/// Something to send.
#[derive(Debug)]
pub struct Item {
    /// The epoch it belongs to.
    pub epoch: Epoch,
    /// Whether that epoch ends with output held: the chain may resume the VM from its checkpoint.
    pub held: bool,
    /// What.
    pub content: Content,
}

/// Part of a checkpoint.
#[derive(Debug)]
pub enum Content {
    /// One encoded [`DiskRecord`].
    Disk(Vec<u8>),
    /// Pages of the open epoch: while the guest runs (first synchronisation), or stands still because they find no room.
    Pages(Staging),
    /// All of memory as it was at the checkpoint before: to be compared with what the replicas have then. Not sent.
    Check(Staging),
    /// A question about the disks' content, during the first synchronisation: what the owner's disk held a moment ago.
    Compare(Blocks),
    /// The rest of an epoch: it is complete with this.
    Checkpoint {
        /// Its pages.
        staging: Staging,
        /// vCPU and device state.
        machine: Box<MachineState>,
    },
}

impl Content {
    fn page_bytes(&self) -> u64 {
        match self {
            Content::Pages(staging) | Content::Checkpoint { staging, .. } => staging.bytes(),
            Content::Disk(_) | Content::Compare(_) | Content::Check(_) => 0,
        }
    }
}

/// Digests of successive blocks of a disk, as [`chain::blocks`] has them.
#[derive(Debug)]
pub struct Blocks {
    /// The disk.
    pub disk: u16,
    /// The first block.
    pub first: u64,
    /// Of each.
    pub digests: Vec<chain::blocks::Digest>,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    /// Whether a chain listens; if not, nothing is queued.
    active: bool,
    closed: bool,
    session: u64,
    open: Epoch,
    /// Of the open epoch: see [`Item::held`].
    held: bool,
    /// Bytes of disk records queued or sent but not committed, by epoch.
    disk_bytes: VecDeque<(Epoch, u64)>,
    disk_total: u64,
    /// Writes of the guest's so far.
    writes: u64,
    /// Bytes of pages queued.
    pages: u64,
    /// Bytes of pages that the shipping thread took last, and has not sent yet.
    shipping: u64,
    pages_limit: u64,
    free: Vec<Staging>,
    /// Of the checkpoints shipped, the pages that had not changed.
    unchanged: VecDeque<Vec<u64>>,
}

/// The queue. Bounded: disk records and pages by bytes, staged epochs by the pipeline's limit.
#[derive(Debug)]
pub struct ShipQueue {
    state: Mutex<State>,
    more: Condvar,
    room: Condvar,
    disk_limit: u64,
}

/// Proof that the disk barrier is held: no disk write is tagged while this exists.
#[derive(Debug)]
pub struct Barrier<'a> {
    state: MutexGuard<'a, State>,
    queue: &'a ShipQueue,
}

impl ShipQueue {
    /// A queue that lets `disk_limit` bytes of uncommitted disk writes be outstanding.
    #[must_use]
    pub fn new(disk_limit: u64) -> Self {
        Self {
            state: Mutex::new(State {
                pages_limit: PAGES_MAX,
                ..State::default()
            }),
            more: Condvar::new(),
            room: Condvar::new(),
            disk_limit,
        }
    }

    /// At most so many bytes of pages are queued from now on; a single piece is taken whatever its size.
    pub fn limit_pages(&self, bytes: u64) {
        self.lock().pages_limit = bytes;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked while holding this lock has brought the process down already (panics abort it).
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, on: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        on.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a new configuration's session: drops what an earlier one left and ends its shipping thread.
    pub fn new_session(&self) -> u64 {
        let mut state = self.lock();
        reset(&mut state);
        state.active = false;
        state.session += 1;
        self.room.notify_all();
        self.more.notify_all();
        state.session
    }

    /// Whether `session` is the one under way.
    #[must_use]
    pub fn is_current(&self, session: u64) -> bool {
        self.lock().session == session
    }

    /// The shipping thread of `session` has failed: whoever waits for room would wait for ever.
    pub fn end_session(&self, session: u64) {
        if self.lock().session == session {
            self.deactivate();
        }
    }

    /// Starts queueing in `session`, with `open` as the open epoch and whether it ends with output held; what an earlier
    /// configuration left is dropped. False: the session is over.
    pub fn activate(&self, session: u64, open: Epoch, held: bool) -> bool {
        let mut state = self.lock();
        if state.closed || state.session != session {
            return false;
        }
        reset(&mut state);
        state.active = true;
        state.open = open;
        state.held = held;
        self.room.notify_all();
        true
    }

    /// Stops queueing and drops what is queued.
    pub fn deactivate(&self) {
        let mut state = self.lock();
        state.active = false;
        reset(&mut state);
        self.room.notify_all();
        self.more.notify_all();
    }

    /// Ends the queue: [`ShipQueue::next`] answers `None` from now on.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.active = false;
        state.items.clear();
        self.room.notify_all();
        self.more.notify_all();
    }

    /// The next thing to send in `session`; waits for it. What was taken before has been sent. `None`: the session is over.
    pub fn next(&self, session: u64) -> Option<Item> {
        let mut state = self.lock();
        let mut first = true;
        loop {
            if state.closed || state.session != session {
                return None;
            }
            if std::mem::take(&mut first) {
                state.shipping = 0;
                self.room.notify_all();
            }
            if let Some(item) = state.items.pop_front() {
                state.shipping = item.content.page_bytes();
                state.pages -= state.shipping;
                self.room.notify_all();
                return Some(item);
            }
            state = self.wait(&self.more, state);
        }
    }

    /// Holds the disk barrier: the open epoch can be advanced, or a block queued without a write between.
    pub fn barrier(&self) -> Barrier<'_> {
        Barrier {
            state: self.lock(),
            queue: self,
        }
    }

    /// Bytes of pages queued or just being sent.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        let state = self.lock();
        state.pages + state.shipping
    }

    /// Whether another epoch's pages may be expected to find room: at least half of it is free.
    #[must_use]
    pub fn expects_room(&self) -> bool {
        let state = self.lock();
        !state.active || state.pages + state.shipping <= state.pages_limit / 2
    }

    /// Whether so many bytes of pages are within the limit, with what is queued.
    #[must_use]
    pub fn fits(&self, bytes: u64) -> bool {
        let state = self.lock();
        state.pages + state.shipping + bytes <= state.pages_limit
    }

    /// Queues pages of the open epoch once there is room; gives them back if there was none for so long. `Ok` too if nobody
    /// listens.
    ///
    /// # Errors
    /// The pages, after `patience`.
    pub fn push_pages(&self, staging: Staging, patience: Duration) -> Result<(), Staging> {
        let bytes = staging.bytes();
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while state.active && !has_room(&state, bytes) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(staging);
            };
            state = self
                .room
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        self.push(&mut state, Content::Pages(staging));
        Ok(())
    }

    /// Queues a question about blocks of the streamed epoch.
    pub fn push_compare(&self, blocks: Blocks) {
        self.push(&mut self.lock(), Content::Compare(blocks));
    }

    fn push(&self, state: &mut State, content: Content) {
        if state.active && !state.closed {
            state.pages += content.page_bytes();
            state.items.push_back(Item {
                epoch: state.open,
                held: state.held,
                content,
            });
            self.more.notify_one();
        }
    }

    /// These pages of a checkpoint, ascending, had not changed since the one before.
    pub fn tell_unchanged(&self, pages: Vec<u64>) {
        let mut state = self.lock();
        state.unchanged.push_back(pages);
        if state.unchanged.len() > UNCHANGED {
            state.unchanged.pop_front();
        }
    }

    /// What [`ShipQueue::tell_unchanged`] was told, a checkpoint at a time.
    pub fn take_unchanged(&self) -> Option<Vec<u64>> {
        self.lock().unchanged.pop_front()
    }

    /// Queues all of memory, to be checked against what the checkpoint before it made of the replicas' image.
    pub fn push_check(&self, whole: Staging) {
        self.push(&mut self.lock(), Content::Check(whole));
    }

    /// A staging buffer, warm if one was given back.
    pub fn take_staging(&self) -> Staging {
        self.lock().free.pop().unwrap_or_default()
    }

    /// Gives a staging buffer back.
    pub fn give_staging(&self, mut staging: Staging) {
        staging.clear();
        let mut state = self.lock();
        let held: u64 = state.free.iter().map(Staging::capacity).sum();
        if state.free.len() < FREE && held + staging.capacity() <= state.pages_limit {
            state.free.push(staging);
        }
    }

    /// A disk write has been made on the owner's mirror: tag it with the open epoch and stream it. Blocks while more
    /// than the limit is uncommitted; the caller is a disk's worker thread, never the pause.
    pub fn disk_write(&self, record: &DiskRecord<'_>) {
        let mut state = self.lock();
        if !state.active {
            // Whoever activates the queue reads the disk afterwards.
            state.writes += 1;
            return;
        }
        drop(state);
        let length = u64::from(record.len);
        let weight = if record.op == DiskOp::Write {
            length
        } else {
            0
        };
        // Before the lock: the pause waits for it.
        let bytes = encoded(record);
        let mut state = self.lock();
        while state.active
            && !state.closed
            && state.disk_total > 0
            && state.disk_total + weight > self.disk_limit
        {
            state = self.wait(&self.room, state);
        }
        state.writes += 1;
        self.push_disk(&mut state, bytes, weight);
    }

    fn push_disk(&self, state: &mut State, bytes: Vec<u8>, weight: u64) {
        if !state.active || state.closed {
            return;
        }
        let epoch = state.open;
        state.disk_total += weight;
        match state.disk_bytes.back_mut() {
            Some((e, total)) if *e == epoch => *total += weight,
            _ => state.disk_bytes.push_back((epoch, weight)),
        }
        self.push(state, Content::Disk(bytes));
    }

    /// Uncommitted disk bytes: the epoch loop ends an epoch early when they pile up.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.lock().disk_total
    }

    /// Everything up to `epoch` is committed.
    pub fn committed(&self, epoch: Epoch) {
        let mut state = self.lock();
        while let Some(&(e, bytes)) = state.disk_bytes.front() {
            if e > epoch {
                break;
            }
            state.disk_bytes.pop_front();
            state.disk_total -= bytes;
        }
        self.room.notify_all();
    }

    /// Waits until fewer than `limit` items are queued (or queueing has ended). Answers how many writes the guest has made.
    #[must_use]
    pub fn wait_below(&self, limit: usize) -> u64 {
        let mut state = self.lock();
        while state.active && !state.closed && state.items.len() >= limit {
            state = self.wait(&self.room, state);
        }
        state.writes
    }
}

fn has_room(state: &State, bytes: u64) -> bool {
    let queued = state.pages + state.shipping;
    queued == 0 || queued + bytes <= state.pages_limit
}

fn reset(state: &mut State) {
    state.items.clear();
    state.disk_bytes.clear();
    state.disk_total = 0;
    state.pages = 0;
    state.shipping = 0;
}

/// A record as it is sent.
#[must_use]
pub fn encoded(record: &DiskRecord<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(record.data.len() + 64);
    record.encode(&mut bytes);
    bytes
}

impl Barrier<'_> {
    /// Ends `epoch` for disk writes: later ones belong to the epoch after it, which ends with output held or not. Queues its
    /// checkpoint.
    pub fn checkpoint(
        mut self,
        epoch: Epoch,
        staging: Staging,
        machine: Box<MachineState>,
        next_held: bool,
    ) {
        self.state.open = epoch;
        self.queue
            .push(&mut self.state, Content::Checkpoint { staging, machine });
        self.state.open = epoch.next();
        self.state.held = next_held;
    }

    /// Queues a block of the initial copy, an encoded record that was read when the guest had made `writes` writes; not counted
    /// against the limit of guest writes. False: it has made more since, and the block may be older than one of them.
    #[must_use]
    pub fn copy_block(mut self, bytes: Vec<u8>, writes: u64) -> bool {
        if self.state.writes != writes {
            return false;
        }
        self.queue.push_disk(&mut self.state, bytes, 0);
        true
    }

    /// Writes that the guest has made so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.state.writes
    }

    /// Items queued now.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.state.items.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(data: &[u8]) -> DiskRecord<'_> {
        DiskRecord {
            disk: 0,
            op: DiskOp::Write,
            offset: 0,
            len: data.len() as u32,
            data,
        }
    }

    fn machine() -> Box<MachineState> {
        Box::new(MachineState {
            ram: vec![],
            vm: vec![],
            vcpus: vec![],
            devices: vec![],
        })
    }

    #[test]
    fn i6_writes_before_the_barrier_belong_to_the_epoch_and_later_ones_to_the_next() {
        let queue = ShipQueue::new(1 << 20);
        assert!(queue.activate(0, Epoch(5), true));
        queue.disk_write(&record(&[1; 512]));
        queue
            .barrier()
            .checkpoint(Epoch(5), Staging::default(), machine(), true);
        queue.disk_write(&record(&[2; 512]));
        let order: Vec<(Epoch, bool)> = (0..3)
            .map(|_| {
                let item = queue.next(0).unwrap();
                (
                    item.epoch,
                    matches!(item.content, Content::Checkpoint { .. }),
                )
            })
            .collect();
        assert_eq!(
            order,
            [(Epoch(5), false), (Epoch(5), true), (Epoch(6), false)]
        );
    }

    #[test]
    fn uncommitted_disk_bytes_are_bounded_and_a_commit_makes_room() {
        let queue = std::sync::Arc::new(ShipQueue::new(1000));
        assert!(queue.activate(0, Epoch(1), true));
        queue.disk_write(&record(&[1; 900]));
        let writer = {
            let queue = queue.clone();
            std::thread::spawn(move || queue.disk_write(&record(&[2; 900])))
        };
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!writer.is_finished(), "the second write must wait");
        assert_eq!(queue.disk_bytes(), 900);
        queue
            .barrier()
            .checkpoint(Epoch(1), Staging::default(), machine(), true);
        queue.committed(Epoch(1));
        writer.join().unwrap();
        assert_eq!(queue.disk_bytes(), 900);
    }

    #[test]
    fn nothing_is_queued_without_a_chain() {
        let queue = ShipQueue::new(1000);
        queue.disk_write(&record(&[1; 900]));
        assert_eq!(queue.barrier().queued(), 0);
    }

    fn pages(count: u64) -> Staging {
        let memory =
            vmm::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
        let mut staging = Staging::default();
        super::super::staging::RamView::new(&memory)
            .copy(0, count, &mut staging)
            .unwrap();
        staging
    }

    #[test]
    fn c8_queued_pages_are_bounded_by_bytes_and_what_is_sent_makes_room() {
        let queue = ShipQueue::new(1000);
        queue.limit_pages(40 * 4096);
        assert!(queue.activate(0, Epoch(1), true));
        let now = Duration::ZERO;
        assert!(queue.expects_room());
        queue.push_pages(pages(20), now).unwrap();
        assert!(queue.expects_room());
        queue.push_pages(pages(10), now).unwrap();
        assert!(!queue.expects_room(), "more than half is taken");
        assert!(queue.fits(10 * 4096) && !queue.fits(11 * 4096));
        let back = queue.push_pages(pages(11), now).unwrap_err();
        queue.next(0).unwrap();
        let back = queue.push_pages(back, now).unwrap_err();
        assert_eq!(queue.page_bytes(), 30 * 4096, "what is being sent counts");
        queue.next(0).unwrap();
        queue.push_pages(back, now).unwrap();
        assert_eq!(queue.page_bytes(), 21 * 4096);
        queue.deactivate();
        assert_eq!(queue.page_bytes(), 0);
        assert!(queue.activate(0, Epoch(1), true));
        queue.push_pages(pages(200), now).unwrap();
        assert_eq!(queue.page_bytes(), 200 * 4096, "one piece is always taken");
    }

    #[test]
    fn a_shipper_that_fails_keeps_nobody_waiting() {
        let queue = std::sync::Arc::new(ShipQueue::new(1000));
        queue.limit_pages(4096);
        let session = queue.new_session();
        assert!(!queue.activate(0, Epoch(1), false), "it is over");
        assert!(queue.activate(session, Epoch(1), false));
        queue.push_pages(pages(1), Duration::ZERO).unwrap();
        let waits = queue.clone();
        let waits =
            std::thread::spawn(move || waits.push_pages(pages(1), Duration::from_secs(3600)));
        queue.end_session(session + 1);
        assert!(!queue.fits(4096), "another session's failure is no concern");
        queue.end_session(session);
        waits.join().unwrap().unwrap();
        assert_eq!(queue.barrier().queued(), 0);
    }

    #[test]
    fn a_block_that_is_older_than_a_write_of_the_guests_is_not_queued() {
        let queue = ShipQueue::new(1 << 20);
        assert!(queue.activate(0, Epoch(1), false));
        let writes = queue.wait_below(16);
        queue.disk_write(&record(&[1; 512]));
        let block = encoded(&record(&[0; 512]));
        assert!(!queue.barrier().copy_block(block.clone(), writes));
        let writes = queue.wait_below(16);
        assert!(queue.barrier().copy_block(block, writes));
        assert_eq!(queue.barrier().queued(), 2);
    }
}
