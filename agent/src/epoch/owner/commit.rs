//! What follows from a commit, and the figures that show how it goes.

use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation};

use super::{Action, EpochStats, Figures, Mode, Owner, OwnerError, OwnerEvent, lock};

/// Epochs over which `status` reports hold times.
const HOLDS_EPOCHS: u64 = 400;

impl Owner {
    /// The tail has processed `epoch` in `generation`.
    ///
    /// # Errors
    /// When netbuf refuses to release: nothing is let out then.
    pub fn ack(&self, generation: Generation, epoch: Epoch) -> Result<(), OwnerError> {
        let mut pipeline = lock(&self.pipeline);
        let action = pipeline.ack(generation, epoch);
        self.carry_out(action)?;
        drop(pipeline);
        self.changed.notify_all();
        let Action::Commit {
            epoch, protects, ..
        } = action
        else {
            return Ok(());
        };
        self.queue.committed(epoch);
        let now = self.measures.now();
        self.measures.meter().committed(epoch, now);
        if let Some(began) = self.record_commit(epoch, protects) {
            (self.on_event)(OwnerEvent::Protected {
                generation,
                epoch,
                took: began.elapsed(),
                sync: self.progress.read(),
            });
        }
        Ok(())
    }

    /// How long the oldest captured checkpoint has been waiting for its commit; not while a chain begins, which takes as long
    /// as it takes.
    #[must_use]
    pub fn waiting_for_commit(&self) -> Option<Duration> {
        let pipeline = lock(&self.pipeline);
        if pipeline.mode() != Mode::Protected || pipeline.in_flight() == 0 {
            return None;
        }
        drop(pipeline);
        let book = lock(&self.book);
        book.captured_at.front().map(|(_, at)| at.elapsed())
    }

    /// How long the chain has neither taken nor acknowledged anything, if it should: it begins, or has a checkpoint to commit.
    #[must_use]
    pub fn stuck_for(&self) -> Option<Duration> {
        let pipeline = lock(&self.pipeline);
        let expected =
            pipeline.mode().begins() || pipeline.mode().holds() && pipeline.in_flight() > 0;
        drop(pipeline);
        let now = self.measures.now();
        expected.then(|| self.measures.meter().still_for(now))
    }

    /// How it is doing, for `status`.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let (open, committed, mode) = {
            let pipeline = lock(&self.pipeline);
            (pipeline.open(), pipeline.committed(), pipeline.mode())
        };
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let holds = self.gates.iter().flat_map(|gate| gate.recent_holds());
        let newest = open.0.saturating_sub(HOLDS_EPOCHS);
        let (queued, now) = (self.queue.page_bytes(), self.measures.now());
        let throttled = || self.measures.meter().throttled(queued, now);
        Figures {
            open_epoch: open.0,
            committed_epoch: committed.0,
            lag_ms: self.waiting_for_commit().map_or(0, ms),
            since_commit_ms: lock(&self.book).last_commit.map(|at| ms(at.elapsed())),
            held_p99_us: holds
                .filter(|hold| hold.epoch.0 >= newest)
                .map(|hold| hold.p99_us)
                .max()
                .unwrap_or_default(),
            sync: mode.begins().then(|| self.progress.read()),
            throttled: (mode == Mode::Protected).then(throttled).flatten(),
        }
    }

    pub(super) fn carry_out(&self, action: Action) -> Result<(), OwnerError> {
        match action {
            Action::Commit {
                epoch,
                release: true,
                ..
            } => {
                for gate in &self.gates {
                    gate.release(epoch)
                        .map_err(|e| OwnerError::Output(e.to_string()))?;
                }
            }
            Action::None | Action::Commit { .. } => {}
            Action::Fence => {
                for gate in &self.gates {
                    gate.fence();
                }
                self.queue.deactivate();
            }
        }
        Ok(())
    }

    /// Answers when the chain began, if the VM is protected with this.
    fn record_commit(&self, epoch: Epoch, protects: bool) -> Option<Instant> {
        let mut book = lock(&self.book);
        let mut recorder = self.measures.recorder();
        while let Some((_, at)) = book.captured_at.pop_front_if(|(e, _)| *e <= epoch) {
            recorder.commit.push(at.elapsed().as_micros() as u64);
        }
        book.last_commit = Some(Instant::now());
        match protects {
            true => book.sync_since.take(),
            false => None,
        }
    }

    /// Figures since the last call.
    #[must_use]
    pub fn take_stats(&self) -> EpochStats {
        let (mode, generation, open, committed) = {
            let p = lock(&self.pipeline);
            (p.mode(), p.generation(), p.open(), p.committed())
        };
        let recorder = std::mem::take(&mut *self.measures.recorder());
        let elapsed =
            std::mem::replace(&mut lock(&self.book).measured_since, Instant::now()).elapsed();
        let mut stats = recorder.stats();
        stats.mode = match mode {
            Mode::Unprotected => "unprotected",
            Mode::Syncing | Mode::Holding => "syncing",
            Mode::Protected => "protected",
            Mode::Fenced => "fenced",
        }
        .into();
        stats.generation = generation.0;
        stats.open_epoch = open.0;
        stats.committed_epoch = committed.0;
        stats.elapsed_us = elapsed.as_micros() as u64;
        if let Some(gate) = self.gates.first() {
            let held = gate.hold_stats();
            stats.held_us.count = held.frames;
            stats.held_us.p50 = held.p50_us;
            stats.held_us.p99 = held.p99_us;
            stats.held_us.max = held.max_us;
        }
        stats
    }
}
