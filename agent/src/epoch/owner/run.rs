//! The loop: orders first, then whatever the pipeline's mode asks for.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation, PageBitmap};

use super::{EpochOptions, Mode, Order, Owner, OwnerError, OwnerEvent, Pipeline, RamView, lock};
use crate::epoch::hot::HotSet;
use crate::epoch::rhythm::{Open, Rhythm};

/// No deadline: only an order ends the wait.
const FOREVER: Duration = Duration::from_secs(3600);
/// The longest single wait for the chain, so that what was waited for shows while it lasts.
pub(super) const STEP: Duration = Duration::from_millis(100);

/// How often the queue is looked at for room.
const POLL: Duration = Duration::from_millis(5);

/// Why the guest stands still, if it does.
#[derive(Debug)]
enum Stands {
    /// It runs.
    No,
    /// It has no backup, and is not to run without.
    Frozen,
    /// It runs until the next checkpoint can be captured.
    Stopping(Sender<Epoch>),
    /// At this checkpoint; who wants to know, until it is committed.
    Stopped(Epoch, Option<Sender<Epoch>>),
    /// A backup is to take it over.
    GivenUp,
    /// The guest has ended. Heartbeats go on: no backup is to resume it.
    Ended,
}

/// What comes next, while a guest runs.
enum Next {
    /// The epoch ends.
    End,
    /// Pages are counted.
    Look,
    /// Something else.
    Other,
}

/// What only the loop's thread has.
pub(super) struct Run {
    pub(super) view: RamView,
    pub(super) dirty: PageBitmap,
    options: EpochOptions,
    harvesting: Duration,
    stands: Stands,
    /// When epochs end; its times are counted from `began`.
    rhythm: Rhythm,
    began: Instant,
    /// Disk writes before the open epoch.
    writes: u64,
    pub(super) hot: HotSet,
    /// Epochs since memory was compared.
    unverified: u64,
}

impl Run {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn begin_epoch(&mut self) {
        let now = self.now();
        self.rhythm.begin(now);
    }
}

impl Owner {
    /// The epoch loop. Returns when told to stop or fenced: what fails ends an attempt, or is what a backup is for.
    pub fn run(&self, options: EpochOptions) {
        let view = RamView::new(self.guest.memory());
        let mut run = Run {
            dirty: PageBitmap::new(&view.ranges()),
            hot: HotSet::new(&view.ranges(), options.pause_budget),
            unverified: 0,
            view,
            options,
            harvesting: Duration::ZERO,
            stands: Stands::No,
            rhythm: Rhythm::new(options.lengths, Duration::ZERO),
            began: Instant::now(),
            writes: 0,
        };
        loop {
            let order = lock(&self.orders).pop_front();
            let done = match order {
                Some(Order::Stop) => return,
                Some(order) => self.obey(order, &mut run),
                None if lock(&self.pipeline).mode() == Mode::Fenced => {
                    if let Err(e) = self.guest.pause() {
                        tracing::error!("stopping a guest that another host owns: {e}");
                    }
                    return;
                }
                None => self.proceed(&mut run),
            };
            if let Err(e) = done {
                self.failed(e, &mut run);
            }
        }
    }

    fn obey(&self, order: Order, run: &mut Run) -> Result<(), OwnerError> {
        match order {
            Order::Begin(generation, session) => return self.obey_begin(generation, session, run),
            Order::BeginHeld => {
                lock(&self.pipeline).begin_held();
                run.begin_epoch();
            }
            Order::Unprotect(generation) => {
                self.gave_up.store(false, Ordering::Release);
                run.stands = Stands::No;
                let released = self.release_all(generation);
                if lock(&self.pipeline).mode() != Mode::Fenced {
                    self.guest.resume();
                }
                released?;
            }
            Order::Abandon(generation) => {
                let pipeline = lock(&self.pipeline);
                let meant = pipeline.generation() == generation && pipeline.mode() == Mode::Syncing;
                drop(pipeline);
                if meant {
                    self.abandon_sync(run);
                }
            }
            Order::HarvestOnly(period) => {
                self.switch_harvest(&mut run.dirty, run.harvesting, period)?;
                run.harvesting = period;
                run.begin_epoch();
            }
            Order::Options(options) => {
                run.options = options;
                run.rhythm.set(options.lengths);
            }
            Order::Quiesce(stopped) => {
                if lock(&self.pipeline).mode() == Mode::Protected
                    && matches!(run.stands, Stands::No)
                {
                    run.stands = Stands::Stopping(stopped);
                }
            }
            Order::Thaw => {
                if matches!(run.stands, Stands::Frozen) {
                    run.stands = Stands::No;
                    self.guest.resume();
                }
            }
            Order::RunOn => {
                if matches!(run.stands, Stands::Stopping(_) | Stands::Stopped(..)) {
                    run.stands = Stands::No;
                    self.guest.resume();
                }
            }
            // One that has ended, or is given up, stands still already, and does not run again because there is a chain.
            Order::Freeze if matches!(run.stands, Stands::Ended | Stands::GivenUp) => {}
            Order::Freeze => {
                run.stands = Stands::Frozen;
                self.guest.pause().map_err(OwnerError::Vm)?;
            }
            Order::GiveUp => {
                run.stands = Stands::GivenUp;
                if let Err(e) = self.guest.pause() {
                    tracing::error!("stopping a guest that is given up: {e}");
                }
            }
            Order::Stop => {}
        }
        Ok(())
    }

    fn obey_begin(
        &self,
        generation: Generation,
        session: u64,
        run: &mut Run,
    ) -> Result<(), OwnerError> {
        run.harvesting = Duration::ZERO;
        self.gave_up.store(false, Ordering::Release);
        let frozen = matches!(run.stands, Stands::Frozen);
        if !frozen {
            run.stands = Stands::No;
            self.guest.resume();
        }
        let whole = self.synchronise(run, generation, session, frozen)?;
        // Nothing runs and nothing leaves: the checkpoint that it may be resumed from needs not wait for an ack.
        if whole && frozen && self.checkpoint(run, true)? {
            run.stands = Stands::No;
        }
        run.begin_epoch();
        Ok(())
    }

    /// What is to be done without an order.
    fn proceed(&self, run: &mut Run) -> Result<(), OwnerError> {
        match &mut run.stands {
            Stands::Frozen | Stands::GivenUp | Stands::Ended | Stands::Stopped(_, None) => {
                self.wait(FOREVER, |_| false);
            }
            Stands::Stopped(last, tell) => {
                let last = *last;
                if self.wait(FOREVER, |pipeline| pipeline.committed() >= last)
                    && let Some(tell) = tell.take()
                {
                    // Whoever asked may have given up.
                    let _ = tell.send(last);
                }
            }
            Stands::Stopping(_) => {
                if self.wait(STEP, |pipeline| self.may_capture(pipeline)) {
                    let last = lock(&self.pipeline).open();
                    if self.checkpoint(run, false)?
                        && let Stands::Stopping(tell) =
                            std::mem::replace(&mut run.stands, Stands::No)
                    {
                        run.stands = Stands::Stopped(last, Some(tell));
                    }
                }
            }
            Stands::No => return self.proceed_running(run),
        }
        Ok(())
    }

    fn proceed_running(&self, run: &mut Run) -> Result<(), OwnerError> {
        let (mode, full_is_next) = {
            let pipeline = lock(&self.pipeline);
            (pipeline.mode(), pipeline.full_is_next())
        };
        match mode {
            Mode::Fenced => {}
            // A synchronisation that was interrupted: whatever did so comes next.
            Mode::Syncing if full_is_next => {
                self.wait(FOREVER, |_| false);
            }
            Mode::Syncing | Mode::Holding | Mode::Protected => match self.wait_for_epoch_end(run) {
                Next::End => drop(self.checkpoint(run, true)?),
                Next::Look => self.look(run)?,
                Next::Other => {}
            },
            Mode::Unprotected if run.harvesting.is_zero() => {
                self.wait(FOREVER, |_| false);
            }
            Mode::Unprotected => {
                let due = run.rhythm.last() + run.harvesting;
                self.wait(due.saturating_sub(run.now()), |_| false);
                if run.now() >= due {
                    self.harvest(&mut run.dirty)?;
                    run.begin_epoch();
                }
            }
        }
        Ok(())
    }

    /// What the loop could not do ends the attempt to protect the VM; if its output is held already, a backup has to take it
    /// over.
    fn failed(&self, error: OwnerError, run: &mut Run) {
        if matches!(error, OwnerError::Ended) {
            run.stands = Stands::Ended;
            return;
        }
        let (mode, generation) = {
            let pipeline = lock(&self.pipeline);
            (pipeline.mode(), pipeline.generation())
        };
        match mode {
            Mode::Fenced => tracing::error!("a guest that another host owns: {error}"),
            Mode::Holding | Mode::Protected => self.give_up(error.to_string()),
            Mode::Syncing | Mode::Unprotected => {
                self.abandon_sync(run);
                (self.on_event)(OwnerEvent::AttemptFailed { generation, error });
            }
        }
    }

    /// The chain that begins comes to nothing: everything as before it.
    fn abandon_sync(&self, run: &mut Run) {
        lock(&self.pipeline).abandon();
        self.queue.deactivate();
        lock(&self.book).sync_since = None;
        run.harvesting = Duration::ZERO;
        if let Err(e) = self.guest.dirty().stop() {
            // It costs the guest write faults, and nothing else.
            tracing::warn!("{e}");
        }
        if matches!(run.stands, Stands::No) {
            self.guest.resume();
        }
    }

    fn release_all(&self, generation: Generation) -> Result<(), OwnerError> {
        if !lock(&self.pipeline).unprotect(generation) {
            return Ok(());
        }
        self.queue.deactivate();
        lock(&self.book).sync_since = None;
        self.flow();
        self.guest
            .dirty()
            .stop()
            .map_err(|e| OwnerError::Vm(e.to_string()))
    }

    fn may_capture(&self, pipeline: &Pipeline) -> bool {
        pipeline.may_capture() && self.queue.expects_room()
    }

    /// Waits for something; false if it has not come after so long, or an order has, or the guest is fenced.
    pub(super) fn wait(&self, time: Duration, until: impl Fn(&Pipeline) -> bool) -> bool {
        let deadline = Instant::now() + time;
        let mut pipeline = lock(&self.pipeline);
        loop {
            if pipeline.mode() == Mode::Fenced || !lock(&self.orders).is_empty() {
                return false;
            }
            if until(&pipeline) {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            pipeline = self
                .changed
                .wait_timeout(pipeline, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until the open epoch should end, or there is something else to do.
    fn wait_for_epoch_end(&self, run: &mut Run) -> Next {
        let mut pipeline = lock(&self.pipeline);
        // Since when the epoch should have ended; up to then it has been counted.
        let mut blocked: Option<Instant> = None;
        let next = loop {
            if pipeline.mode() == Mode::Fenced || !lock(&self.orders).is_empty() {
                break Next::Other;
            }
            if self.stirred.swap(false, Ordering::AcqRel)
                || self.queue.barrier().writes() != run.writes
            {
                run.rhythm.stir();
            }
            let due = run.rhythm.due(Open {
                output: pipeline.mode().holds() && self.output_waiting.load(Ordering::Acquire),
                in_flight: pipeline.in_flight() > 0,
                begins: pipeline.mode() != Mode::Protected,
            });
            let now = run.now();
            if now >= due && self.may_capture(&pipeline) {
                break Next::End;
            }
            if now >= due {
                let now = Instant::now();
                let since = blocked.replace(now);
                self.blocked(since, now);
            } else if run.rhythm.look().is_some_and(|at| now >= at) {
                break Next::Look;
            }
            // At the bound an ack helps, which notifies, or the shipping thread, which does not; nor does a disk.
            let wait = match due.saturating_sub(now) {
                Duration::ZERO if pipeline.may_capture() => POLL,
                Duration::ZERO => STEP,
                wait => wait.min(run.options.lengths.longest),
            };
            pipeline = self
                .changed
                .wait_timeout(pipeline, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        if let Some(since) = blocked {
            self.blocked(Some(since), Instant::now());
        }
        next
    }

    /// What has become known about pages that were left writable.
    pub(super) fn learn(&self, run: &mut Run) {
        run.hot.learn_fault(self.guest.write_fault());
        while let Some(pages) = self.queue.take_unchanged() {
            run.hot.unchanged(&pages);
        }
    }

    /// Whether memory is to be compared at the end of this epoch.
    pub(super) fn verifies(&self, run: &mut Run) -> bool {
        let every = run.options.verify_epochs;
        run.unverified += 1;
        let due = every > 0 && run.unverified >= every;
        if due {
            run.unverified = 0;
        }
        due
    }

    /// Whether a guest that was idle still is.
    fn look(&self, run: &mut Run) -> Result<(), OwnerError> {
        run.dirty.clear();
        let seen = self.guest.dirty().peek(&mut run.dirty);
        seen.map_err(|e| OwnerError::Vm(e.to_string()))?;
        run.rhythm.looked(run.dirty.count());
        Ok(())
    }

    /// An epoch has ended, in a pause of this length.
    pub(super) fn epoch_ended(&self, run: &mut Run, pause: Duration, output: bool) {
        let pause = match self.guest.was_idle() {
            true => Duration::ZERO,
            false => pause,
        };
        let writes = self.queue.barrier().writes();
        let active = output || writes != run.writes;
        run.writes = writes;
        let now = run.now();
        run.rhythm.ended(now, pause, run.dirty.count(), active);
    }

    fn blocked(&self, since: Option<Instant>, now: Instant) {
        match since {
            None => self.measures.recorder().back_pressure += 1,
            Some(since) => {
                let time = self.measures.now();
                self.measures.meter().epoch_waited(now - since, time);
            }
        }
    }
}
