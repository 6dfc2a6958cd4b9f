//! The first checkpoint of a chain that begins anew: everything, while the guest runs.

use std::time::Instant;

use checkpoint::PageBitmap;

use super::{Begin, Owner, OwnerError, lock};
use crate::epoch::pipeline::Mode;
use crate::epoch::staging::RamView;

/// Pages streamed in one piece during the first synchronisation.
const SYNC_CHUNK: u64 = 1024;
/// The first synchronisation pauses the guest for its last round once fewer pages than this are dirty.
const SYNC_SMALL: u64 = 2048;
/// Or after this many rounds: a guest that dirties faster than the link carries is caught by the pause all the same.
const SYNC_ROUNDS: u32 = 8;

impl Owner {
    /// The first checkpoint of a configuration: everything, streamed while the guest runs; only the last round pauses. A
    /// frozen guest stands still until its end, and what is held stays so.
    pub(super) fn synchronise(
        &self,
        view: &RamView,
        dirty: &mut PageBitmap,
        begin: Begin,
        frozen: bool,
    ) -> Result<(), OwnerError> {
        let started = Instant::now();
        let epoch = {
            let mut pipeline = lock(&self.pipeline);
            pipeline.begin_sync(begin.generation);
            if pipeline.mode() == Mode::Fenced {
                return Ok(());
            }
            pipeline.open()
        };
        // Until the new chain has this checkpoint the VM is not protected, and held output would wait for nothing.
        if !frozen {
            self.flow();
        }
        let disks = self.disks.iter().map(|mirror| mirror.size()).sum();
        self.progress.begin(disks, view.bytes() as u64);
        *lock(&self.sync_started) = Some((epoch, started));
        lock(&self.captured_at).clear();
        self.queue.activate(epoch);
        self.vm.dirty().start().map_err(Self::vm_error)?;
        self.copy_disks(epoch)?;
        for range in view.ranges() {
            let (mut gfn, end) = (range.start >> 12, (range.start + range.len) >> 12);
            while gfn < end && self.still_syncing() {
                let count = SYNC_CHUNK.min(end - gfn);
                let mut staging = self.queue.take_staging();
                view.copy(gfn, count, &mut staging)?;
                self.queue.push_pages(epoch, staging);
                gfn += count;
                self.progress.memory(count * checkpoint::PAGE_SIZE as u64);
            }
        }
        for _ in 0..SYNC_ROUNDS {
            if !self.still_syncing() {
                return Ok(());
            }
            dirty.clear();
            self.vm.dirty().harvest(dirty).map_err(Self::vm_error)?;
            if dirty.count() < SYNC_SMALL {
                break;
            }
            let mut staging = self.queue.take_staging();
            view.copy_dirty(dirty, &mut staging)?;
            self.queue.push_pages(epoch, staging);
        }
        // What the last harvest took out of the log is still to be sent.
        self.vm.dirty().merge_back(dirty);
        self.checkpoint(view, dirty, true)
    }

    pub(super) fn still_syncing(&self) -> bool {
        lock(&self.pipeline).mode() == Mode::Syncing && !lock(&self.signals).ends_sync()
    }
}
