//! One replica of one VM, as a plain state machine (van Renesse & Schneider, OSDI 2004, section 3).
//!
//! No sockets, clocks or threads: the server feeds it what arrived and carries out what it answers. `Hist` is the
//! sequence of processed checkpoints, of which only the newest number is kept here (the store has the content);
//! `Sent` is what was processed but not acknowledged by the tail yet.

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation, HostId};

use crate::view::View;

/// What to do with a frame of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Stage it, and forward it unless this is the tail.
    Take,
    /// It repeats a checkpoint that has been processed: drop it.
    Duplicate,
    /// Its sender's generation is over.
    Refuse(Generation),
    /// This replica cannot use it any more.
    Fail,
    /// Drop it: the replica is frozen, failed or not in the chain.
    Drop,
}

/// What else to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell the predecessor that the tail has everything up to this epoch.
    AckUp(Epoch),
    /// Tell the owner (this is the tail).
    AckOwner(Epoch),
    /// The predecessor has been silent for this many milliseconds.
    Suspect(u64),
    /// Declare this replica failed (invariant I7).
    Fail(String),
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Replica {
    host: HostId,
    generation: Generation,
    chain: Vec<HostId>,
    /// Newest processed checkpoint; `None`: the image is not valid.
    hist: Option<Epoch>,
    /// The checkpoint being received.
    open: Option<Open>,
    sent: VecDeque<Epoch>,
    acked: Option<Epoch>,
    frozen: bool,
    failed: Option<String>,
    heard: bool,
    silent_ticks: u32,
    last_heard_ms: u64,
    missed: u32,
    suspected: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    epoch: Epoch,
    duplicate: bool,
}

impl Replica {
    /// A replica that holds nothing yet, suspecting its predecessor after `missed` silent ticks.
    #[must_use]
    pub fn new(host: HostId, view: &View, missed: u32) -> Self {
        Self {
            host,
            generation: view.generation,
            chain: view.chain.iter().map(|m| m.host.clone()).collect(),
            hist: None,
            open: None,
            sent: VecDeque::new(),
            acked: None,
            frozen: false,
            failed: None,
            heard: false,
            silent_ticks: 0,
            last_heard_ms: 0,
            missed: missed.max(2),
            suspected: false,
        }
    }

    /// The generation followed.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Newest processed checkpoint; `None` while the image is not valid.
    #[must_use]
    pub fn hist(&self) -> Option<Epoch> {
        self.hist
    }

    /// Processed here, not yet acknowledged by the tail.
    pub fn sent(&self) -> impl Iterator<Item = Epoch> + '_ {
        self.sent.iter().copied()
    }

    /// Why this replica has failed, if it has.
    #[must_use]
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Whether it is frozen for a takeover.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether this is the chain's tail.
    #[must_use]
    pub fn is_tail(&self) -> bool {
        self.chain.last() == Some(&self.host)
    }

    /// The successor's position in the chain, if there is one.
    #[must_use]
    pub fn successor(&self) -> Option<usize> {
        let mine = self.chain.iter().position(|h| *h == self.host)?;
        (mine + 1 < self.chain.len()).then_some(mine + 1)
    }

    /// Follows a newer configuration. What was half received is dropped; what was processed stays.
    pub fn adopt(&mut self, view: &View) {
        if view.generation <= self.generation {
            return;
        }
        self.generation = view.generation;
        self.chain = view.chain.iter().map(|m| m.host.clone()).collect();
        self.open = None;
        self.frozen = false;
        self.suspected = false;
        self.heard = false;
        self.silent_ticks = 0;
        // A new chain's first checkpoint is full and is acknowledged on its own.
        self.sent.clear();
        self.acked = None;
    }

    /// Nothing more is accepted, forwarded or acknowledged: what this replica has is what it will resume from.
    pub fn freeze(&mut self) -> Option<Epoch> {
        self.frozen = true;
        self.open = None;
        self.hist
    }

    /// The takeover was refused and the configuration has not changed: go on as before. What arrived meanwhile is
    /// lost, so the next checkpoint shows a hole and the replica then declares itself failed; it never guesses.
    pub fn unfreeze(&mut self) {
        self.frozen = false;
        self.suspected = false;
        self.silent_ticks = 0;
    }

    /// Declares the replica failed.
    pub fn fail(&mut self, why: impl Into<String>) {
        if self.failed.is_none() {
            self.failed = Some(why.into());
        }
        self.open = None;
    }

    fn check(&self, generation: Generation) -> Option<Verdict> {
        if generation < self.generation {
            return Some(Verdict::Refuse(self.generation));
        }
        // A newer generation than the master has told this replica: it will be told; until then it takes nothing.
        if generation > self.generation || self.frozen || self.failed.is_some() {
            return Some(Verdict::Drop);
        }
        None
    }

    /// A checkpoint begins.
    pub fn begin(&mut self, generation: Generation, epoch: Epoch, full: bool) -> Verdict {
        if let Some(verdict) = self.check(generation) {
            return verdict;
        }
        if full {
            // The image is being replaced: from here until it is processed there is nothing to resume from.
            self.hist = None;
            self.sent.clear();
            self.acked = None;
            self.open = Some(Open {
                epoch,
                duplicate: false,
            });
            return Verdict::Take;
        }
        match self.hist {
            Some(hist) if epoch <= hist => {
                self.open = Some(Open {
                    epoch,
                    duplicate: true,
                });
                Verdict::Duplicate
            }
            Some(hist) if epoch == hist.next() => {
                self.open = Some(Open {
                    epoch,
                    duplicate: false,
                });
                Verdict::Take
            }
            Some(hist) => {
                self.fail(format!(
                    "checkpoint {epoch} came after {hist}: those between are missing"
                ));
                Verdict::Fail
            }
            None => {
                self.fail(format!("checkpoint {epoch} came, but this replica has no full checkpoint to apply it to"));
                Verdict::Fail
            }
        }
    }

    /// Part of a checkpoint, or its end.
    #[must_use]
    pub fn data(&self, generation: Generation, epoch: Epoch) -> Verdict {
        if let Some(verdict) = self.check(generation) {
            return verdict;
        }
        match self.open {
            Some(open) if open.epoch == epoch && open.duplicate => Verdict::Duplicate,
            Some(open) if open.epoch == epoch => Verdict::Take,
            _ => Verdict::Drop,
        }
    }

    /// A repeated checkpoint's end has come: acknowledge again what is known to be safe.
    pub fn duplicate_end(&mut self) -> Vec<Action> {
        self.open = None;
        let safe = if self.is_tail() {
            self.hist
        } else {
            self.acked
        };
        safe.map(|e| self.acks(e)).unwrap_or_default()
    }

    fn acks(&self, epoch: Epoch) -> Vec<Action> {
        if self.is_tail() {
            vec![Action::AckOwner(epoch), Action::AckUp(epoch)]
        } else {
            vec![Action::AckUp(epoch)]
        }
    }

    /// The store has processed the open checkpoint whole.
    pub fn processed(&mut self, epoch: Epoch) -> Vec<Action> {
        if self.frozen
            || self.open
                != Some(Open {
                    epoch,
                    duplicate: false,
                })
        {
            return Vec::new();
        }
        self.open = None;
        self.hist = Some(epoch);
        if self.is_tail() {
            self.acked = Some(epoch);
            self.acks(epoch)
        } else {
            self.sent.push_back(epoch);
            Vec::new()
        }
    }

    /// The successor says that the tail has everything up to `epoch`.
    pub fn ack(&mut self, generation: Generation, epoch: Epoch) -> Vec<Action> {
        // An ack of what this replica has not processed is from a broken peer: believing it would let output out.
        if self.check(generation).is_some() || self.is_tail() || self.hist.is_none_or(|h| epoch > h)
        {
            return Vec::new();
        }
        while self.sent.front().is_some_and(|e| *e <= epoch) {
            self.sent.pop_front();
        }
        self.acked = self.acked.max(Some(epoch));
        self.acks(epoch)
    }

    /// A heartbeat from the predecessor: only its generation matters.
    #[must_use]
    pub fn heartbeat(&self, generation: Generation) -> Verdict {
        self.check(generation).unwrap_or(Verdict::Take)
    }

    /// Something came from the predecessor in this generation.
    pub fn heard(&mut self, now_ms: u64) {
        self.heard = true;
        self.silent_ticks = 0;
        self.last_heard_ms = now_ms;
    }

    /// Silent ticks until suspicion. Only the head hears the owner itself; further down the silence may be a replica's
    /// death, which the owner repairs without a failover if it is given the time.
    fn patience(&self) -> u32 {
        let position = self.chain.iter().position(|h| *h == self.host).unwrap_or(0) as u32;
        self.missed.saturating_mul(1 + 4 * position)
    }

    /// One heartbeat's time has passed. Silence is counted in ticks this replica itself lived through, so that its own
    /// host standing still is not taken for the predecessor's death.
    pub fn tick(&mut self, now_ms: u64) -> Option<Action> {
        if !self.heard
            || self.frozen
            || self.failed.is_some()
            || self.hist.is_none()
            || self.suspected
        {
            return None;
        }
        self.silent_ticks += 1;
        if self.silent_ticks <= self.patience() {
            return None;
        }
        self.suspected = true;
        Some(Action::Suspect(now_ms.saturating_sub(self.last_heard_ms)))
    }
}
