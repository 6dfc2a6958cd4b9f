//! The owner's epoch loop: one thread that pauses, captures and resumes the guest, and what it shares with the
//! threads that ship, receive acks and do the devices' I/O.

mod capture;
mod commit;
mod disks;
mod sync;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation, PageBitmap};
use netbuf::Gate;
use vmm::Vm;

use super::figures::{Figures, Progress, SyncFigures};
use super::pipeline::{Action, Mode, Pipeline};
use super::queue::ShipQueue;
use super::staging::{RamView, StagingError};
use super::stats::{EpochStats, Recorder};
use crate::fault::{self, Fault};
use disks::Answers;

/// Nothing happens by itself.
const FOREVER: Duration = Duration::from_secs(3600);
/// Lengths of epochs and bounds.
#[derive(Clone, Copy, Debug)]
pub struct EpochOptions {
    /// Longest epoch.
    pub longest: Duration,
    /// An epoch with output waiting may end after this, if nothing is in flight.
    pub shortest: Duration,
    /// Checkpoints under way at most.
    pub max_in_flight: usize,
}

/// Why the epoch loop ended.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The VM could not be paused, captured or resumed.
    #[error("virtual machine: {0}")]
    Vm(String),
    /// Guest memory could not be copied.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A disk could not be read for its initial copy.
    #[error("disk {index}: initial copy: {source}")]
    Disk {
        /// Which.
        index: usize,
        /// Why.
        source: std::io::Error,
    },
    /// netbuf found its epochs out of order: a bug, and output stays held.
    #[error("held output: {0}")]
    Output(String),
}

/// What a thread of the VM process tells the epoch loop.
#[derive(Debug, Default)]
struct Signals {
    begin: Option<Begin>,
    begin_held: bool,
    unprotect: Option<Generation>,
    harvest_only: Option<Duration>,
    options: Option<EpochOptions>,
    quiesce: Option<Sender<Epoch>>,
    go_on: bool,
    freeze: bool,
    stop: bool,
}

/// A configuration to protect by; the link's shipper runs already.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    /// Its generation.
    pub generation: Generation,
}

/// Called when the first checkpoint of a configuration is committed.
pub type OnProtected = Box<dyn Fn(Generation, Epoch, Duration, SyncFigures) + Send + Sync>;

/// Shared between the epoch loop and its feeders.
pub struct Owner {
    vm: Arc<Vm>,
    gates: Vec<Arc<Gate>>,
    disks: Vec<Arc<diskbuf::Mirror>>,
    queue: Arc<ShipQueue>,
    pipeline: Mutex<Pipeline>,
    changed: Condvar,
    signals: Mutex<Signals>,
    output_waiting: AtomicBool,
    recorder: Arc<Mutex<Recorder>>,
    measured_since: Mutex<Instant>,
    captured_at: Mutex<std::collections::VecDeque<(Epoch, Instant)>>,
    sync_started: Mutex<Option<(Epoch, Instant)>>,
    progress: Progress,
    answers: Answers,
    last_commit: Mutex<Option<Instant>>,
    on_protected: OnProtected,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Panics abort this process (see `child::run`), so a poisoned lock can only be seen in unit tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Owner {
    /// An owner in `generation` whose next checkpoint is `open`.
    #[must_use]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        vm: Arc<Vm>,
        gates: Vec<Arc<Gate>>,
        disks: Vec<Arc<diskbuf::Mirror>>,
        queue: Arc<ShipQueue>,
        generation: Generation,
        open: Epoch,
        max_in_flight: usize,
        on_protected: OnProtected,
    ) -> Arc<Self> {
        Arc::new(Self {
            vm,
            gates,
            disks,
            queue,
            pipeline: Mutex::new(Pipeline::new(generation, open, max_in_flight)),
            changed: Condvar::new(),
            signals: Mutex::default(),
            output_waiting: AtomicBool::new(false),
            recorder: Arc::default(),
            measured_since: Mutex::new(Instant::now()),
            captured_at: Mutex::default(),
            sync_started: Mutex::default(),
            progress: Progress::default(),
            answers: Answers::default(),
            last_commit: Mutex::default(),
            on_protected,
        })
    }

    /// Where the shipper records its figures.
    #[must_use]
    pub fn recorder(&self) -> Arc<Mutex<Recorder>> {
        self.recorder.clone()
    }

    /// The queue to the shipping thread.
    #[must_use]
    pub fn queue(&self) -> Arc<ShipQueue> {
        self.queue.clone()
    }

    /// Begin protecting (again): the shipper of the new configuration is about to read the queue.
    pub fn begin(&self, begin: Begin) {
        self.signal(|s| s.begin = Some(begin));
    }

    /// Before a VM that has been taken over runs: from its first instruction on output is held and disk writes are
    /// queued, because its chain goes on from the checkpoint it resumes from.
    pub fn hold(&self) {
        let open = lock(&self.pipeline).open();
        for gate in &self.gates {
            if !fault::is(Fault::Hold) {
                gate.set_hold(true);
            }
        }
        self.queue.activate(open);
    }

    /// After [`Owner::hold`], once it runs: epochs end from here on.
    pub fn begin_held(&self) {
        self.signal(|s| s.begin_held = true);
    }

    /// The chain goes on in place in a newer configuration; output stays held.
    pub fn go_on(&self, generation: Generation) {
        lock(&self.pipeline).go_on(generation);
    }

    /// The newest committed checkpoint.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        lock(&self.pipeline).committed()
    }

    /// No replica is left and the master has recorded so: let output flow.
    pub fn unprotect(&self, generation: Generation) {
        self.signal(|s| s.unprotect = Some(generation));
    }

    /// Harvest the dirty log every `period` without copying (zero: stop). A bench's baseline.
    pub fn harvest_only(&self, period: Duration) {
        self.signal(|s| s.harvest_only = Some(period));
    }

    /// Replaces the epoch lengths.
    pub fn set_options(&self, options: EpochOptions) {
        self.signal(|s| s.options = Some(options));
    }

    /// Stops the guest at the end of an epoch and tells `stopped` which, once it is committed. For a planned switchover.
    pub fn quiesce(&self, stopped: Sender<Epoch>) {
        self.signal(|s| s.quiesce = Some(stopped));
    }

    /// The last backup is lost: the guest stands still, its output held, until there is another one.
    pub fn freeze(&self) {
        self.signal(|s| s.freeze = true);
    }

    /// Nobody has taken a stopped guest over: it runs on.
    pub fn run_on(&self) {
        self.signal(|s| s.go_on = true);
    }

    /// Ends the loop.
    pub fn stop(&self) {
        self.signal(|s| s.stop = true);
    }

    fn signal(&self, set: impl FnOnce(&mut Signals)) {
        set(&mut lock(&self.signals));
        // Taking the pipeline's lock orders this with the loop's check of the signals before it waits.
        drop(lock(&self.pipeline));
        self.changed.notify_all();
    }

    /// A frame has been held: the epoch loop may end the epoch early.
    pub fn output_held(&self) {
        if !self.output_waiting.swap(true, Ordering::AcqRel) {
            drop(lock(&self.pipeline));
            self.changed.notify_all();
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

    /// The epoch loop. Returns when told to stop or fenced.
    ///
    /// # Errors
    /// [`OwnerError`] when the VM fails; the caller reports it, output stays held.
    pub fn run(&self, mut options: EpochOptions) -> Result<(), OwnerError> {
        let view = RamView::new(self.vm.memory());
        let mut dirty = PageBitmap::new(&view.ranges());
        let mut harvesting = Duration::ZERO;
        let mut frozen = false;
        let mut last = Instant::now();
        loop {
            let signals = std::mem::take(&mut *lock(&self.signals));
            if signals.stop {
                return Ok(());
            }
            if let Some(new) = signals.options {
                options = new;
            }
            if let Some(period) = signals.harvest_only {
                self.switch_harvest(&mut dirty, harvesting, period)?;
                harvesting = period;
                last = Instant::now();
            }
            if signals.freeze {
                self.vm.pause().map_err(Self::vm_error)?;
                frozen = true;
            }
            if let Some(generation) = signals.unprotect {
                if std::mem::take(&mut frozen) {
                    self.vm.resume();
                }
                self.release_all(generation)?;
            }
            if let Some(begin) = signals.begin {
                harvesting = Duration::ZERO;
                self.synchronise(&view, &mut dirty, begin, frozen)?;
                frozen = false;
                last = Instant::now();
            }
            if signals.begin_held {
                lock(&self.pipeline).begin_held();
                last = Instant::now();
            }
            if let Some(stopped) = signals.quiesce {
                self.stop_at_commit(&view, &mut dirty, &stopped)?;
                last = Instant::now();
            }
            let mode = lock(&self.pipeline).mode();
            match mode {
                Mode::Fenced => {
                    self.vm.pause().map_err(|e| OwnerError::Vm(e.to_string()))?;
                    return Ok(());
                }
                Mode::Protected if frozen => {
                    self.idle(last + FOREVER);
                }
                Mode::Protected => {
                    if self.wait_for_epoch_end(last, &options) {
                        self.checkpoint(&view, &mut dirty, true)?;
                        last = Instant::now();
                    }
                }
                Mode::Unprotected | Mode::Syncing => {
                    let wait = if harvesting.is_zero() {
                        FOREVER
                    } else {
                        harvesting
                    };
                    if self.idle(last + wait) && !harvesting.is_zero() {
                        self.harvest(&mut dirty)?;
                        last = Instant::now();
                    }
                }
            }
        }
    }

    /// Waits until the open epoch should end. False: something else has to be looked at first.
    fn wait_for_epoch_end(&self, last: Instant, options: &EpochOptions) -> bool {
        let mut pipeline = lock(&self.pipeline);
        let mut blocked = false;
        loop {
            if pipeline.mode() != Mode::Protected || lock(&self.signals).any() {
                return false;
            }
            let now = Instant::now();
            let early = pipeline.in_flight() == 0 && self.output_waiting.load(Ordering::Acquire);
            let due = last
                + if early {
                    options.shortest
                } else {
                    options.longest
                };
            if now >= due {
                if pipeline.may_capture() {
                    return true;
                }
                if !blocked {
                    blocked = true;
                    lock(&self.recorder).back_pressure += 1;
                }
            }
            let wait = due.saturating_duration_since(now);
            // At the bound only an ack helps; it notifies, so the length of this wait is only a safety net.
            let wait = if wait.is_zero() {
                Duration::from_millis(100)
            } else {
                wait
            };
            pipeline = self
                .changed
                .wait_timeout(pipeline, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn idle(&self, until: Instant) -> bool {
        let mut pipeline = lock(&self.pipeline);
        loop {
            if pipeline.mode() == Mode::Fenced || lock(&self.signals).any() {
                return false;
            }
            let now = Instant::now();
            if now >= until {
                return true;
            }
            pipeline = self
                .changed
                .wait_timeout(pipeline, until - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn vm_error(error: impl std::fmt::Display) -> OwnerError {
        OwnerError::Vm(error.to_string())
    }

    /// Ends holding: what is held goes out in order, and later frames at once.
    fn flow(&self) {
        for gate in &self.gates {
            gate.set_hold(false);
        }
    }

    fn release_all(&self, generation: Generation) -> Result<(), OwnerError> {
        let mut pipeline = lock(&self.pipeline);
        let action = pipeline.unprotect(generation);
        if action == Action::None {
            return Ok(());
        }
        drop(pipeline);
        self.queue.deactivate();
        *lock(&self.sync_started) = None;
        self.vm.dirty().stop().map_err(Self::vm_error)?;
        self.flow();
        Ok(())
    }
}

impl Signals {
    /// Whether a synchronisation under way has become pointless. Anything else waits until it is done.
    fn ends_sync(&self) -> bool {
        self.begin.is_some() || self.unprotect.is_some() || self.freeze || self.stop
    }

    fn any(&self) -> bool {
        self.begin.is_some()
            || self.begin_held
            || self.unprotect.is_some()
            || self.harvest_only.is_some()
            || self.options.is_some()
            || self.quiesce.is_some()
            || self.go_on
            || self.freeze
            || self.stop
    }
}
