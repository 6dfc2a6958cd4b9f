//! What a replica has noted of itself, for those who must not wait for its lock: `status`, probes, the clock's tick. Nothing
//! is done under the board's own lock but copying.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use checkpoint::{Epoch, Generation};

use super::env::{ReplicaStatus, lock};
use crate::probe::Progress;
use crate::replica::{Replica, State};
use crate::store::Filled;
use crate::view::View;

/// Stands for no checkpoint.
const NONE: u64 = u64::MAX;

pub(super) struct Board {
    generation: AtomicU64,
    hist: AtomicU64,
    /// Since when the frame in hand is handled, plus one millisecond; 0: none is.
    busy_since: AtomicU64,
    noted: Mutex<Noted>,
}

struct Noted {
    view: View,
    state: State,
    acked: Option<Epoch>,
    failed: Option<String>,
    filling: Option<Filled>,
    filled: Option<Filled>,
}

impl Board {
    pub(super) fn new(view: &View, replica: &Replica) -> Self {
        let board = Self {
            generation: AtomicU64::new(0),
            hist: AtomicU64::new(NONE),
            busy_since: AtomicU64::new(0),
            noted: Mutex::new(Noted {
                view: view.clone(),
                state: replica.state(),
                acked: None,
                failed: None,
                filling: None,
                filled: None,
            }),
        };
        board.note(replica);
        board
    }

    /// Notes where the replica stands now.
    pub(super) fn note(&self, replica: &Replica) {
        let hist = replica.hist().map_or(NONE, |mark| mark.epoch.0);
        self.hist.store(hist, Ordering::Release);
        self.generation
            .store(replica.generation().0, Ordering::Release);
        let mut noted = lock(&self.noted);
        noted.state = replica.state();
        noted.acked = replica.acked();
        if noted.failed.as_deref() != replica.failed() {
            noted.failed = replica.failed().map(str::to_string);
        }
    }

    /// Notes the configuration that is followed now.
    pub(super) fn note_view(&self, view: &View) {
        lock(&self.noted).view = view.clone();
    }

    /// Notes how far a joining replica is filled; `None`: none is.
    pub(super) fn note_filling(&self, filling: Option<Filled>) {
        lock(&self.noted).filling = filling;
    }

    /// Notes how the filling of a joining replica ended.
    pub(super) fn note_filled(&self, filled: Filled) {
        let mut noted = lock(&self.noted);
        noted.filling = None;
        noted.filled = Some(filled);
    }

    /// A frame is in hand from here on.
    pub(super) fn busy(&self, now_ms: u64) {
        self.busy_since
            .store(now_ms.saturating_add(1), Ordering::Release);
    }

    /// None is any more.
    pub(super) fn idle(&self) {
        self.busy_since.store(0, Ordering::Release);
    }

    /// Whether a frame is in hand: the stream is not silent, however long that takes.
    pub(super) fn is_busy(&self) -> bool {
        self.busy_since.load(Ordering::Acquire) != 0
    }

    fn busy_ms(&self, now_ms: u64) -> u64 {
        match self.busy_since.load(Ordering::Acquire) {
            0 => 0,
            since => now_ms.saturating_sub(since - 1).max(1),
        }
    }

    fn hist(&self) -> Option<Epoch> {
        let hist = self.hist.load(Ordering::Acquire);
        (hist != NONE).then_some(Epoch(hist))
    }

    /// What a probe is answered.
    pub(super) fn progress(&self, now_ms: u64) -> Progress {
        Progress {
            generation: Generation(self.generation.load(Ordering::Acquire)),
            hist: self.hist(),
            busy_ms: self.busy_ms(now_ms),
            failed: lock(&self.noted).failed.clone(),
            declined: None,
        }
    }

    pub(super) fn status(&self, now_ms: u64) -> ReplicaStatus {
        let noted = lock(&self.noted);
        ReplicaStatus {
            view: noted.view.clone(),
            state: noted.state,
            epoch: self.hist(),
            acked: noted.acked,
            failed: noted.failed.clone(),
            filling: noted.filling,
            filled: noted.filled,
            busy_ms: self.busy_ms(now_ms),
        }
    }
}
