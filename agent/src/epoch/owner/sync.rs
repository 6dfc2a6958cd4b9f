//! The full checkpoint of a chain that begins anew: everything, while the guest runs.

use std::time::Instant;

use checkpoint::{Generation, PAGE_SIZE};

use super::capture::PIECE;
use super::run::Run;
use super::{Owner, OwnerError, lock};
use crate::epoch::pipeline::Mode;

/// The guest is paused for the last round once fewer pages than this are dirty.
const SYNC_SMALL: u64 = 2048;
/// Or after this many rounds: a guest that dirties faster than the link carries is caught by the pause all the same.
const SYNC_ROUNDS: u32 = 8;

impl Owner {
    /// The full checkpoint of a configuration: everything, streamed while the guest runs; only the last round pauses. Output
    /// flows. A frozen guest stands still until its end and after, and what is held stays so. False: it was interrupted.
    pub(super) fn synchronise(
        &self,
        run: &mut Run,
        generation: Generation,
        session: u64,
        frozen: bool,
    ) -> Result<bool, OwnerError> {
        let epoch = {
            let mut pipeline = lock(&self.pipeline);
            pipeline.begin_sync(generation, frozen);
            if pipeline.mode() == Mode::Fenced {
                return Ok(false);
            }
            pipeline.open()
        };
        // Until the chain has what it may resume the VM from, the VM is not protected, and held output would wait for nothing.
        if !frozen {
            self.flow();
        }
        let disks = self.disks.iter().map(|mirror| mirror.size()).sum();
        self.progress.begin(disks, run.view.bytes() as u64);
        {
            let mut book = lock(&self.book);
            book.sync_since = Some(Instant::now());
            book.captured_at.clear();
        }
        let now = self.measures.now();
        self.measures.meter().begin(now);
        if !self.queue.activate(session, epoch, false) {
            return Ok(false);
        }
        run.hot.clear();
        let dirty = self.guest.dirty();
        dirty.start().map_err(|e| OwnerError::Vm(e.to_string()))?;
        self.copy_disks(epoch)?;
        if !self.stream_memory(run)? {
            return Ok(false);
        }
        self.checkpoint(run, !frozen)
    }

    /// False: it was interrupted.
    fn stream_memory(&self, run: &mut Run) -> Result<bool, OwnerError> {
        // After the dirty log has begun: what is written to a page not seen here is in it.
        let touched = run.view.touched();
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        let pages: u64 = touched.iter().map(|range| range.end - range.start).sum();
        self.progress
            .memory((run.view.bytes() as u64).saturating_sub(bytes(pages)));
        for mut range in touched {
            while !range.is_empty() {
                let count = (PIECE as u64).min(range.end - range.start);
                let mut staging = self.queue.take_staging();
                run.view.copy(range.start, count, &mut staging)?;
                if !self.queue_piece(staging, false) {
                    return Ok(false);
                }
                range.start += count;
                self.progress.memory(bytes(count));
            }
        }
        for _ in 0..SYNC_ROUNDS {
            run.dirty.clear();
            self.harvest_into(&mut run.dirty)?;
            if run.dirty.count() < SYNC_SMALL {
                break;
            }
            let mut staging = self.queue.take_staging();
            if !self.queue_pieces(&run.view, &mut run.dirty.iter(), &mut staging, false)?
                || !self.queue_piece(staging, false)
            {
                return Ok(false);
            }
            run.dirty.clear();
        }
        // What the last harvest took out of the log is still to be sent.
        self.guest.dirty().merge_back(&run.dirty);
        Ok(self.still_syncing())
    }

    pub(super) fn still_syncing(&self) -> bool {
        lock(&self.pipeline).mode() == Mode::Syncing && !self.is_over()
    }
}
