//! The end of an epoch: the only part of it during which the guest does not run.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use checkpoint::{Epoch, PageBitmap};

use super::{Mode, Owner, OwnerError, Pipeline, RamView, lock};
use crate::fault::{self, Fault};

impl Owner {
    /// Waits for something to change; false if this state of affairs is over.
    fn quiet(&self, until: impl Fn(&Pipeline) -> bool) -> bool {
        let mut pipeline = lock(&self.pipeline);
        loop {
            if pipeline.mode() != Mode::Protected || lock(&self.signals).any() {
                return false;
            }
            if until(&pipeline) {
                return true;
            }
            pipeline = self
                .changed
                .wait_timeout(pipeline, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The guest's last epoch here: it stands still from its end on, until it is told to run on.
    pub(super) fn stop_at_commit(
        &self,
        view: &RamView,
        dirty: &mut PageBitmap,
        stopped: &Sender<Epoch>,
    ) -> Result<(), OwnerError> {
        if !self.quiet(Pipeline::may_capture) {
            return Ok(());
        }
        let last = lock(&self.pipeline).open();
        self.checkpoint(view, dirty, false)?;
        if self.quiet(|pipeline| pipeline.committed() >= last) {
            let _ = stopped.send(last);
            // Until something else is wanted of it.
            self.quiet(|_| false);
        }
        let mode = lock(&self.pipeline).mode();
        let go_on = {
            let signals = lock(&self.signals);
            signals.go_on || signals.unprotect.is_some()
        };
        if mode != Mode::Fenced && go_on {
            self.vm.resume();
        }
        Ok(())
    }

    /// One checkpoint: the only part of an epoch during which the guest does not run. Afterwards it does, unless `resume`
    /// says otherwise.
    pub(super) fn checkpoint(
        &self,
        view: &RamView,
        dirty: &mut PageBitmap,
        resume: bool,
    ) -> Result<(), OwnerError> {
        let mut staging = self.queue.take_staging();
        dirty.clear();
        self.output_waiting.store(false, Ordering::Release);
        let _urgent = chain::urgent_section();
        let begun = Instant::now();
        self.vm.pause().map_err(Self::vm_error)?;
        let stopped = Instant::now();
        let machine = self.vm.capture().map_err(Self::vm_error)?;
        let state = Instant::now();
        self.vm.dirty().harvest(dirty).map_err(Self::vm_error)?;
        let harvested = Instant::now();
        view.copy_dirty(dirty, &mut staging)?;
        let copied = Instant::now();
        {
            // The pipeline's lock is always taken before the queue's (an ack that fences does so too).
            let mut pipeline = lock(&self.pipeline);
            if pipeline.mode() == Mode::Fenced {
                return Ok(());
            }
            let (epoch, begin_hold) = pipeline.captured();
            for gate in &self.gates {
                gate.seal(epoch)
                    .map_err(|e| OwnerError::Output(e.to_string()))?;
                if begin_hold && !fault::is(Fault::Hold) {
                    gate.set_hold(true);
                }
            }
            lock(&self.captured_at).push_back((epoch, copied));
            self.queue
                .barrier()
                .checkpoint(epoch, staging, Box::new(machine));
        }
        if resume {
            self.vm.resume();
        }
        let resumed = Instant::now();
        let mut r = lock(&self.recorder);
        let us = |from: Instant, to: Instant| to.duration_since(from).as_micros() as u64;
        r.epochs += 1;
        r.pause.push(us(begun, resumed));
        r.stop.push(us(begun, stopped));
        r.state.push(us(stopped, state));
        r.harvest.push(us(state, harvested));
        r.copy.push(us(harvested, copied));
        Ok(())
    }

    pub(super) fn switch_harvest(
        &self,
        dirty: &mut PageBitmap,
        old: Duration,
        new: Duration,
    ) -> Result<(), OwnerError> {
        if old.is_zero() && !new.is_zero() {
            self.vm.dirty().start().map_err(Self::vm_error)?;
        } else if !old.is_zero() && new.is_zero() {
            self.vm.dirty().stop().map_err(Self::vm_error)?;
        }
        dirty.clear();
        Ok(())
    }

    pub(super) fn harvest(&self, dirty: &mut PageBitmap) -> Result<(), OwnerError> {
        let begun = Instant::now();
        dirty.clear();
        self.vm.dirty().harvest(dirty).map_err(Self::vm_error)?;
        let mut r = lock(&self.recorder);
        r.epochs += 1;
        r.harvest.push(begun.elapsed().as_micros() as u64);
        r.dirty.push(dirty.count());
        Ok(())
    }
}
