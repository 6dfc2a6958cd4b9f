//! The queue from the epoch loop and the disks to the shipping thread. Its order is the order on the wire, which is
//! what ties disk writes to epochs: everything tagged e is queued before e's checkpoint.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use checkpoint::{DiskOp, DiskRecord, Epoch, MachineState};

use super::staging::Staging;

/// Something to send.
#[derive(Debug)]
pub enum Item {
    /// One encoded disk record of `epoch`.
    Disk {
        /// Its epoch.
        epoch: Epoch,
        /// An encoded [`DiskRecord`].
        bytes: Vec<u8>,
    },
    /// Pages of the open epoch that is streamed while the guest runs (first synchronisation).
    Pages {
        /// Their epoch.
        epoch: Epoch,
        /// The pages.
        staging: Staging,
    },
    /// A question about the disks' content, during the first synchronisation.
    Compare {
        /// The epoch that is streamed.
        epoch: Epoch,
        /// What the owner's disk held a moment ago.
        blocks: Blocks,
    },
    /// The rest of an epoch: it is complete with this.
    Checkpoint {
        /// The epoch.
        epoch: Epoch,
        /// Its pages.
        staging: Staging,
        /// vCPU and device state.
        machine: Box<MachineState>,
    },
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
    /// Bytes of disk records queued or sent but not committed, by epoch.
    disk_bytes: VecDeque<(Epoch, u64)>,
    disk_total: u64,
    free: Vec<Staging>,
}

/// The queue. Bounded: disk records by bytes, staged epochs by the pipeline's limit.
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
            state: Mutex::default(),
            more: Condvar::new(),
            room: Condvar::new(),
            disk_limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked while holding this lock has brought the process down already (panics abort it).
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Starts queueing, with `open` as the open epoch; what an earlier configuration left is dropped.
    pub fn activate(&self, open: Epoch) {
        let mut state = self.lock();
        reset(&mut state);
        state.active = true;
        state.open = open;
        self.room.notify_all();
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

    /// The next thing to send in `session`; waits for it. `None`: the session is over.
    pub fn next(&self, session: u64) -> Option<Item> {
        let mut state = self.lock();
        loop {
            if state.closed || state.session != session {
                return None;
            }
            if let Some(item) = state.items.pop_front() {
                self.room.notify_all();
                return Some(item);
            }
            state = self
                .more
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Holds the disk barrier: the open epoch can be advanced, or a block read and queued without a write between.
    pub fn barrier(&self) -> Barrier<'_> {
        Barrier {
            state: self.lock(),
            queue: self,
        }
    }

    /// Queues pages of the streamed epoch, waiting while many are queued already.
    pub fn push_pages(&self, epoch: Epoch, staging: Staging) {
        let mut state = self.lock();
        while state.active && state.items.len() > 8 {
            state = self
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.active {
            state.items.push_back(Item::Pages { epoch, staging });
            self.more.notify_one();
        }
    }

    /// Queues a question about blocks of the streamed epoch.
    pub fn push_compare(&self, epoch: Epoch, blocks: Blocks) {
        let mut state = self.lock();
        if state.active {
            state.items.push_back(Item::Compare { epoch, blocks });
            self.more.notify_one();
        }
    }

    /// A staging buffer, warm if one was given back.
    pub fn take_staging(&self) -> Staging {
        self.lock().free.pop().unwrap_or_default()
    }

    /// Gives a staging buffer back.
    pub fn give_staging(&self, mut staging: Staging) {
        staging.clear();
        let mut state = self.lock();
        if state.free.len() < 8 {
            state.free.push(staging);
        }
    }

    /// A disk write has been made on the owner's mirror: tag it with the open epoch and stream it. Blocks while more
    /// than the limit is uncommitted; the caller is a disk's worker thread, never the pause.
    pub fn disk_write(&self, record: &DiskRecord<'_>) {
        let length = u64::from(record.len);
        let weight = if record.op == DiskOp::Write {
            length
        } else {
            0
        };
        let mut state = self.lock();
        while state.active
            && !state.closed
            && state.disk_total > 0
            && state.disk_total + weight > self.disk_limit
        {
            state = self
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        push_disk(&mut state, record, weight);
        self.more.notify_one();
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
}

fn reset(state: &mut State) {
    state.items.clear();
    state.disk_bytes.clear();
    state.disk_total = 0;
}

fn push_disk(state: &mut State, record: &DiskRecord<'_>, weight: u64) {
    if !state.active || state.closed {
        return;
    }
    let epoch = state.open;
    let mut bytes = Vec::with_capacity(record.data.len() + 64);
    record.encode(&mut bytes);
    state.items.push_back(Item::Disk { epoch, bytes });
    state.disk_total += weight;
    match state.disk_bytes.back_mut() {
        Some((e, total)) if *e == epoch => *total += weight,
        _ => state.disk_bytes.push_back((epoch, weight)),
    }
}

impl Barrier<'_> {
    /// Ends `epoch` for disk writes: later ones belong to the epoch after it. Queues its checkpoint.
    pub fn checkpoint(mut self, epoch: Epoch, staging: Staging, machine: Box<MachineState>) {
        self.state.open = epoch.next();
        if self.state.active {
            self.state.items.push_back(Item::Checkpoint {
                epoch,
                staging,
                machine,
            });
            self.queue.more.notify_one();
        }
    }

    /// Queues a block of the initial copy; not counted against the limit of guest writes.
    pub fn copy_block(mut self, record: &DiskRecord<'_>) {
        push_disk(&mut self.state, record, 0);
        self.queue.more.notify_one();
    }

    /// Items queued now.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.state.items.len()
    }

    /// Waits until fewer than `limit` items are queued (or queueing has ended).
    #[must_use]
    pub fn wait_below(self, limit: usize) -> Self {
        let Self { mut state, queue } = self;
        while state.active && !state.closed && state.items.len() >= limit {
            state = queue
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Self { state, queue }
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
        queue.activate(Epoch(5));
        queue.disk_write(&record(&[1; 512]));
        queue
            .barrier()
            .checkpoint(Epoch(5), Staging::default(), machine());
        queue.disk_write(&record(&[2; 512]));
        let order: Vec<(Epoch, bool)> = (0..3)
            .map(|_| match queue.next(0).unwrap() {
                Item::Disk { epoch, .. } => (epoch, false),
                Item::Checkpoint { epoch, .. } => (epoch, true),
                other => panic!("{other:?} was not queued"),
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
        queue.activate(Epoch(1));
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
            .checkpoint(Epoch(1), Staging::default(), machine());
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
}
