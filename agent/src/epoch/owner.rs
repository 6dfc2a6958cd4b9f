//! The owner's epoch loop: one thread that pauses, captures and resumes the guest, and what it shares with the
//! threads that ship, receive acks and do the devices' I/O.

mod capture;
mod commit;
mod disks;
mod orders;
mod run;
mod sync;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation};
use netbuf::Gate;

use super::figures::{Figures, Progress, SyncFigures};
use super::guest::{CaptureError, Guest};
use super::pipeline::{Action, Mode, Pipeline};
use super::queue::ShipQueue;
use super::rhythm::Lengths;
use super::staging::{RamView, StagingError};
use super::stats::{EpochStats, Measures};
use crate::fault::{self, Fault};
use disks::Answers;
use orders::Order;

/// Pages queued to the chain take at most this part of the VM's RAM,
const QUEUED_SHARE: u64 = 2;
/// but so many bytes are always allowed. What finds no room waits in the guest.
const QUEUED_MIN: u64 = 64 << 20;

/// Lengths of epochs and bounds.
#[derive(Clone, Copy, Debug)]
pub struct EpochOptions {
    /// How long epochs may be.
    pub lengths: Lengths,
    /// What a pause may cost because of pages that are left writable.
    pub pause_budget: Duration,
    /// All of memory is compared with what the replicas have after so many epochs; 0: never.
    pub verify_epochs: u64,
    /// Checkpoints under way at most.
    pub max_in_flight: usize,
}

/// What the epoch loop could not do.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The VM could not be paused, captured or resumed.
    #[error("virtual machine: {0}")]
    Vm(String),
    /// The guest has switched itself off, or crashed. What follows from that others decide.
    #[error("the guest has ended")]
    Ended,
    /// Guest memory could not be copied.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A disk could not be read for its initial copy.
    #[error("disk {index} cannot be read at byte {offset} for the backups' copy of it: {source}")]
    Disk {
        /// Which.
        index: usize,
        /// Where, in bytes.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// netbuf found its epochs out of order: a bug, and output stays held.
    #[error("held output: {0}")]
    Output(String),
}

impl From<CaptureError> for OwnerError {
    fn from(error: CaptureError) -> Self {
        match error {
            CaptureError::Ended => Self::Ended,
            CaptureError::Failed(why) => Self::Vm(why),
        }
    }
}

/// What an owner reports, unasked.
#[derive(Debug)]
pub enum OwnerEvent {
    /// The first checkpoint that the chain may resume the VM from is committed.
    Protected {
        /// The configuration.
        generation: Generation,
        /// That checkpoint.
        epoch: Epoch,
        /// Since the synchronisation began.
        took: Duration,
        /// What it came to.
        sync: SyncFigures,
    },
    /// The chain that begins cannot be completed, for a cause of this host's. Output flows as before.
    AttemptFailed {
        /// The configuration.
        generation: Generation,
        /// The cause.
        error: OwnerError,
    },
    /// A protected VM cannot be kept running here. It stands still, its output stays held, and heartbeats end, so that a
    /// backup resumes it.
    GaveUp {
        /// Why.
        why: String,
    },
}

/// Hears of them.
pub type OnEvent = Box<dyn Fn(OwnerEvent) + Send + Sync>;

/// What an owner is made of.
pub struct OwnerParts {
    /// The virtual machine.
    pub guest: Arc<dyn Guest>,
    /// One gate per network card.
    pub gates: Vec<Arc<Gate>>,
    /// Its disks, in order.
    pub disks: Vec<Arc<diskbuf::Mirror>>,
    /// To the shipping thread.
    pub queue: Arc<ShipQueue>,
    /// The configuration's.
    pub generation: Generation,
    /// The next checkpoint.
    pub open: Epoch,
    /// Checkpoints under way at most.
    pub max_in_flight: usize,
    /// Where reports go.
    pub on_event: OnEvent,
}

/// When things happened, for figures and for who waits.
#[derive(Debug)]
struct Book {
    measured_since: Instant,
    captured_at: VecDeque<(Epoch, Instant)>,
    /// While a chain begins, since when.
    sync_since: Option<Instant>,
    last_commit: Option<Instant>,
}

/// Shared between the epoch loop and its feeders. Locks are taken in this order: pipeline, then one of the others.
pub struct Owner {
    guest: Arc<dyn Guest>,
    gates: Vec<Arc<Gate>>,
    disks: Vec<Arc<diskbuf::Mirror>>,
    queue: Arc<ShipQueue>,
    pipeline: Mutex<Pipeline>,
    changed: Condvar,
    orders: Mutex<VecDeque<Order>>,
    output_waiting: AtomicBool,
    /// The chain has changed: epochs are as long as a guest's that is not idle.
    stirred: AtomicBool,
    gave_up: AtomicBool,
    measures: Arc<Measures>,
    book: Mutex<Book>,
    progress: Progress,
    answers: Answers,
    on_event: OnEvent,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Panics abort this process (see `child::protected`), so a poisoned lock can only be seen in unit tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Owner {
    /// An owner of `parts`, not protected.
    #[must_use]
    pub fn new(parts: OwnerParts) -> Arc<Self> {
        let ram = RamView::new(parts.guest.memory()).bytes() as u64;
        parts.queue.limit_pages(QUEUED_MIN.max(ram / QUEUED_SHARE));
        let pipeline = Pipeline::new(parts.generation, parts.open, parts.max_in_flight);
        Arc::new(Self {
            guest: parts.guest,
            gates: parts.gates,
            disks: parts.disks,
            queue: parts.queue,
            pipeline: Mutex::new(pipeline),
            changed: Condvar::new(),
            orders: Mutex::default(),
            output_waiting: AtomicBool::new(false),
            stirred: AtomicBool::new(false),
            gave_up: AtomicBool::new(false),
            measures: Arc::default(),
            book: Mutex::new(Book {
                measured_since: Instant::now(),
                captured_at: VecDeque::new(),
                sync_since: None,
                last_commit: None,
            }),
            progress: Progress::default(),
            answers: Answers::default(),
            on_event: parts.on_event,
        })
    }

    /// Where the shipper records its figures.
    #[must_use]
    pub fn measures(&self) -> Arc<Measures> {
        self.measures.clone()
    }

    /// The queue to the shipping thread.
    #[must_use]
    pub fn queue(&self) -> Arc<ShipQueue> {
        self.queue.clone()
    }

    /// The virtual machine.
    #[must_use]
    pub fn guest(&self) -> &dyn Guest {
        &*self.guest
    }

    /// Begin protecting (again), by a chain that begins anew: its shipper is about to read the queue in `session`.
    pub fn begin(&self, generation: Generation, session: u64) {
        self.order(Order::Begin(generation, session));
    }

    /// Before a VM that has been taken over runs: from its first instruction on output is held and disk writes are
    /// queued in `session`, because its chain goes on from the checkpoint it resumes from.
    pub fn hold(&self, session: u64) {
        let open = lock(&self.pipeline).open();
        self.hold_output();
        self.queue.activate(session, open, true);
    }

    fn hold_output(&self) {
        for gate in &self.gates {
            if !fault::is(Fault::Hold) {
                gate.set_hold(true);
            }
        }
    }

    /// After [`Owner::hold`], once it runs: epochs end from here on.
    pub fn begin_held(&self) {
        self.order(Order::BeginHeld);
    }

    /// The chain goes on in place in a newer configuration; output stays held.
    pub fn go_on(&self, generation: Generation) {
        lock(&self.pipeline).go_on(generation);
        self.stirred.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// The newest committed checkpoint.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        lock(&self.pipeline).committed()
    }

    /// Whether this is the configuration that the owner follows.
    #[must_use]
    pub fn is_current(&self, generation: Generation) -> bool {
        lock(&self.pipeline).generation() == generation
    }

    /// Whether a chain begins that is not complete yet.
    #[must_use]
    pub fn begins(&self) -> bool {
        lock(&self.pipeline).mode().begins()
    }

    /// Whether the chain could resume the VM, and output is held for it.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        lock(&self.pipeline).mode() == Mode::Protected
    }

    /// No replica is left and the master has recorded so: let output flow.
    pub fn unprotect(&self, generation: Generation) {
        self.order(Order::Unprotect(generation));
    }

    /// What is sent to the chain that begins in `generation` does not reach it: output flows as before.
    pub fn abandon(&self, generation: Generation) {
        self.order(Order::Abandon(generation));
    }

    /// Harvest the dirty log every `period` without copying (zero: stop). A bench's baseline.
    pub fn harvest_only(&self, period: Duration) {
        self.order(Order::HarvestOnly(period));
    }

    /// Replaces the epoch lengths.
    pub fn set_options(&self, options: EpochOptions) {
        self.order(Order::Options(options));
    }

    /// Stops the guest at the end of an epoch and tells `stopped` which, once it is committed. For a planned switchover.
    pub fn quiesce(&self, stopped: Sender<Epoch>) {
        self.order(Order::Quiesce(stopped));
    }

    /// The last backup is lost: the guest stands still, its output held, until there is another one.
    pub fn freeze(&self) {
        self.order(Order::Freeze);
    }

    /// The chain goes on in place after all: a frozen guest runs on, its output held as before.
    pub fn thaw(&self) {
        self.order(Order::Thaw);
    }

    /// Nobody has taken a stopped guest over: it runs on.
    pub fn run_on(&self) {
        self.order(Order::RunOn);
    }

    /// Ends the loop.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    /// This owner cannot go on with a VM whose output is held: heartbeats end at once and the guest stops, so that a backup
    /// resumes it. Until the master has decided something else.
    pub fn give_up(&self, why: String) {
        if !self.gave_up.swap(true, Ordering::AcqRel) {
            tracing::error!("giving the virtual machine up: {why}");
            // Before anybody hears of it: what is decided about it comes after it in the loop.
            self.order(Order::GiveUp);
            (self.on_event)(OwnerEvent::GaveUp { why });
        }
    }

    /// Whether it did: no heartbeat may be sent then.
    #[must_use]
    pub fn gave_up(&self) -> bool {
        self.gave_up.load(Ordering::Acquire)
    }

    fn order(&self, order: Order) {
        lock(&self.orders).push_back(order);
        self.wake();
    }

    /// Wakes the loop if it waits for a change.
    fn wake(&self) {
        // Taking the pipeline's lock orders this with the loop's check of what it waits for.
        drop(lock(&self.pipeline));
        self.changed.notify_all();
    }

    /// Whether what the loop is doing has become pointless.
    fn is_over(&self) -> bool {
        let pipeline = lock(&self.pipeline);
        let syncing = (pipeline.mode() == Mode::Syncing).then(|| pipeline.generation());
        let over = |order: &Order| order.ends_attempt(syncing);
        pipeline.mode() == Mode::Fenced || lock(&self.orders).iter().any(over)
    }

    /// A frame has been held: the epoch loop may end the epoch early.
    pub fn output_held(&self) {
        if !self.output_waiting.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Stops for good: what is held is dropped, the guest stands still.
    pub fn fence(&self) {
        let mut pipeline = lock(&self.pipeline);
        let action = pipeline.fence();
        let _ = self.carry_out(action);
        drop(pipeline);
        self.changed.notify_all();
    }

    /// Ends holding: what is held goes out in order, and later frames at once.
    fn flow(&self) {
        for gate in &self.gates {
            gate.set_hold(false);
        }
    }
}
