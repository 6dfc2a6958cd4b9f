//! What the chain has acknowledged, between the thread that hears it and those that send and may wait for it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use checkpoint::{Epoch, Generation};

#[derive(Debug, Default)]
struct Known {
    /// The newest acknowledgement, of the newest generation that there was one in.
    newest: (Generation, Epoch),
    /// Counts what may be a reason to look again.
    turn: u64,
    closed: bool,
}

/// The newest acknowledgement.
#[derive(Debug, Default)]
pub(super) struct Acks {
    known: Mutex<Known>,
    changed: Condvar,
}

impl Acks {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tail, in `generation`, has everything up to `epoch`.
    pub(super) fn note(&self, generation: Generation, epoch: Epoch) {
        let mut known = self.known();
        known.newest = known.newest.max((generation, epoch));
        known.turn += 1;
        self.changed.notify_all();
    }

    pub(super) fn newest(&self) -> (Generation, Epoch) {
        self.known().newest
    }

    /// Something else than an acknowledgement is a reason to look again.
    pub(super) fn changed(&self) {
        self.known().turn += 1;
        self.changed.notify_all();
    }

    pub(super) fn close(&self) {
        self.known().closed = true;
        self.changed();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.known().closed
    }

    /// How often there has been a reason to look.
    pub(super) fn turn(&self) -> u64 {
        self.known().turn
    }

    /// Waits for one more. Whoever ends this: an acknowledgement, another connection, or [`Acks::close`].
    pub(super) fn wait_after(&self, turn: u64) {
        let known = self.known();
        let waited = self.changed.wait_while(known, |known| known.turn == turn);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}
