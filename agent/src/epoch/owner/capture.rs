//! The end of an epoch: the only part of it during which the guest does not run.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use checkpoint::{PAGE_SIZE, PageBitmap};

use super::run::{Run, STEP};
use super::{Mode, Owner, OwnerError, RamView, lock};
use crate::epoch::staging::Staging;

/// Pages queued in one piece, of those that are not queued with their checkpoint.
pub(super) const PIECE: usize = 1024;

impl Owner {
    /// One checkpoint: the only part of an epoch during which the guest does not run. Afterwards it does, unless `resume`
    /// says otherwise. False: it came to nothing, because of an order that is to be obeyed now.
    pub(super) fn checkpoint(&self, run: &mut Run, resume: bool) -> Result<bool, OwnerError> {
        self.learn(run);
        let verifies = self.verifies(run);
        let Run {
            view, dirty, hot, ..
        } = &mut *run;
        let mut staging = self.queue.take_staging();
        dirty.clear();
        let output = self.output_waiting.swap(false, Ordering::AcqRel);
        let _urgent = chain::urgent_section();
        let begun = Instant::now();
        self.guest.pause().map_err(OwnerError::Vm)?;
        let stopped = Instant::now();
        let machine = self.guest.capture()?;
        let state = Instant::now();
        let log = self.guest.dirty().harvest_but(dirty, hot.pages());
        log.map_err(|e| OwnerError::Vm(e.to_string()))?;
        let harvested = Instant::now();
        let fits = self.queue.fits(dirty.count() * PAGE_SIZE as u64);
        if fits {
            view.copy_dirty(dirty, &mut staging)?;
        } else {
            // The last piece too: it needs room as the others do.
            let whole = self.queue_pieces(view, &mut dirty.iter(), &mut staging, true)?;
            let last = std::mem::replace(&mut staging, self.queue.take_staging());
            if !whole || !self.queue_piece(last, true) {
                return Ok(false);
            }
        }
        let copied = Instant::now();
        let whole = verifies.then(|| view.whole()).transpose()?;
        {
            // The pipeline's lock is always taken before the queue's (an ack that fences does so too).
            let mut pipeline = lock(&self.pipeline);
            if pipeline.mode() == Mode::Fenced {
                return Ok(false);
            }
            let captured = pipeline.captured();
            for gate in &self.gates {
                gate.seal(captured.epoch)
                    .map_err(|e| OwnerError::Output(e.to_string()))?;
            }
            if captured.begin_hold {
                self.hold_output();
            }
            lock(&self.book)
                .captured_at
                .push_back((captured.epoch, copied));
            self.queue.barrier().checkpoint(
                captured.epoch,
                staging,
                Box::new(machine),
                captured.next_held,
            );
        }
        if let Some(whole) = whole {
            self.queue.push_check(whole);
        }
        if resume {
            self.guest.resume();
        }
        let resumed = Instant::now();
        let hot_pages = hot.count();
        if fits {
            hot.learn_copies(dirty.count(), copied - harvested);
        }
        hot.harvested(dirty);
        let mut r = self.measures.recorder();
        let us = |from: Instant, to: Instant| to.duration_since(from).as_micros() as u64;
        r.epochs += 1;
        r.pause.push(us(begun, resumed));
        r.stop.push(us(begun, stopped));
        r.state.push(us(stopped, state));
        r.hot.push(hot_pages);
        r.harvest.push(us(state, harvested));
        r.copy.push(us(harvested, copied));
        drop(r);
        self.epoch_ended(run, resumed - begun, output);
        Ok(true)
    }

    /// Queues pages piece by piece, waiting for room; the last piece is left in `last`. False: this has become pointless.
    pub(super) fn queue_pieces(
        &self,
        view: &RamView,
        gfns: &mut dyn Iterator<Item = u64>,
        last: &mut Staging,
        paused: bool,
    ) -> Result<bool, OwnerError> {
        loop {
            view.copy_some(gfns, PIECE, last)?;
            if last.len() < PIECE {
                return Ok(true);
            }
            let full = std::mem::replace(last, self.queue.take_staging());
            if !self.queue_piece(full, paused) {
                return Ok(false);
            }
        }
    }

    /// Queues pages of the open epoch once there is room. False: this has become pointless.
    pub(super) fn queue_piece(&self, mut pages: Staging, paused: bool) -> bool {
        loop {
            if self.is_over() {
                return false;
            }
            let begun = Instant::now();
            let pushed = self.queue.push_pages(pages, STEP);
            let waited = begun.elapsed();
            if paused && waited > Duration::from_millis(1) {
                let now = self.measures.now();
                self.measures.meter().vcpus_waited(waited, now);
            }
            match pushed {
                Ok(()) => return true,
                Err(back) => pages = back,
            }
        }
    }

    pub(super) fn harvest_into(&self, dirty: &mut PageBitmap) -> Result<(), OwnerError> {
        let harvested = self.guest.dirty().harvest(dirty);
        harvested.map_err(|e| OwnerError::Vm(e.to_string()))
    }

    pub(super) fn switch_harvest(
        &self,
        dirty: &mut PageBitmap,
        old: Duration,
        new: Duration,
    ) -> Result<(), OwnerError> {
        let log = self.guest.dirty();
        let switched = match (old.is_zero(), new.is_zero()) {
            (true, false) => log.start(),
            (false, true) => log.stop(),
            _ => Ok(()),
        };
        dirty.clear();
        switched.map_err(|e| OwnerError::Vm(e.to_string()))
    }

    pub(super) fn harvest(&self, dirty: &mut PageBitmap) -> Result<(), OwnerError> {
        let begun = Instant::now();
        dirty.clear();
        self.harvest_into(dirty)?;
        let mut r = self.measures.recorder();
        r.epochs += 1;
        r.harvest.push(begun.elapsed().as_micros() as u64);
        r.dirty.push(dirty.count());
        Ok(())
    }
}
