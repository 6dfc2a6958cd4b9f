//! What follows from a commit, and the figures that show how it goes.

use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation};

use super::{Action, EpochStats, Figures, Mode, Owner, OwnerError, lock};

/// `status` looks at the output held in so many epochs.
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
        if let Action::Release(epoch) = action {
            self.queue.committed(epoch);
            self.record_commit(epoch);
            *lock(&self.last_commit) = Some(Instant::now());
            let mut sync = lock(&self.sync_started);
            if let Some((first, started)) = *sync
                // A replica is resumed from the first checkpoint after the full one: that is sent with output held.
                && epoch > first
            {
                *sync = None;
                (self.on_protected)(generation, first, started.elapsed(), self.progress.read());
            }
        }
        Ok(())
    }

    /// How long the oldest captured checkpoint has been waiting for its commit; not during the first synchronisation,
    /// which takes as long as it takes.
    #[must_use]
    pub fn waiting_for_commit(&self) -> Option<Duration> {
        if lock(&self.sync_started).is_some() || lock(&self.pipeline).in_flight() == 0 {
            return None;
        }
        lock(&self.captured_at).front().map(|(_, at)| at.elapsed())
    }

    /// How it is doing, for `status`.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let (open, committed) = {
            let pipeline = lock(&self.pipeline);
            (pipeline.open(), pipeline.committed())
        };
        let syncing = lock(&self.sync_started).is_some();
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let holds = self.gates.iter().flat_map(|gate| gate.recent_holds());
        let newest = open.0.saturating_sub(HOLDS_EPOCHS);
        Figures {
            open_epoch: open.0,
            committed_epoch: committed.0,
            lag_ms: self.waiting_for_commit().map_or(0, ms),
            since_commit_ms: lock(&self.last_commit).map(|at| ms(at.elapsed())),
            held_p99_us: holds
                .filter(|hold| hold.epoch.0 >= newest)
                .map(|hold| hold.p99_us)
                .max()
                .unwrap_or_default(),
            sync: syncing.then(|| self.progress.read()),
        }
    }

    pub(super) fn carry_out(&self, action: Action) -> Result<(), OwnerError> {
        match action {
            Action::None => {}
            Action::Release(epoch) => {
                for gate in &self.gates {
                    gate.release(epoch)
                        .map_err(|e| OwnerError::Output(e.to_string()))?;
                }
            }
            Action::Fence => {
                for gate in &self.gates {
                    gate.fence();
                }
                self.queue.deactivate();
            }
        }
        Ok(())
    }

    fn record_commit(&self, epoch: Epoch) {
        let mut captured = lock(&self.captured_at);
        let mut recorder = lock(&self.recorder);
        while let Some(&(e, at)) = captured.front() {
            if e > epoch {
                break;
            }
            captured.pop_front();
            recorder.commit.push(at.elapsed().as_micros() as u64);
        }
    }

    /// Figures since the last call.
    #[must_use]
    pub fn take_stats(&self) -> EpochStats {
        let (mode, generation, open, committed) = {
            let p = lock(&self.pipeline);
            (p.mode(), p.generation(), p.open(), p.committed())
        };
        let recorder = std::mem::take(&mut *lock(&self.recorder));
        let elapsed = std::mem::replace(&mut *lock(&self.measured_since), Instant::now()).elapsed();
        let mut stats = recorder.stats();
        stats.mode = match mode {
            Mode::Unprotected => "unprotected",
            Mode::Syncing => "syncing",
            Mode::Protected if lock(&self.sync_started).is_some() => "syncing",
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
