//! One replica of one VM, as a plain state machine (van Renesse & Schneider, OSDI 2004, section 3).
//!
//! No sockets, clocks or threads: its driver feeds it [`Event`]s and carries out the [`Action`]s it answers with, in
//! order and before the next event. The server is one driver; the interleaving tests are another.
//!
//! `Hist` is the sequence of processed checkpoints, of which only the newest is named here (the store has the
//! content); `Sent` is what was processed here and not acknowledged by the tail yet.
//!
//! Two rules make `Hist` of a replica a prefix of its predecessors' (invariant I2), at every instant:
//! * a checkpoint's content is forwarded as it arrives, but its *end* only once it has been prepared here, that is
//!   verified whole and durable to the degree configured: nobody further down can process what this replica may lose;
//! * after [`Replica::freeze`] nothing is taken, forwarded or acknowledged.

mod event;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation, HostId};

use crate::mark::Mark;
use crate::view::View;
pub use event::{Action, Event, FreezeError, State};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    why: String,
    damaged: bool,
}

/// The checkpoint being received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Open {
    epoch: Epoch,
    /// It repeats what has been processed.
    duplicate: bool,
}

/// Silence of the predecessor, counted in ticks that this replica itself lived through.
#[derive(Clone, Debug, Default)]
struct Silence {
    heard: bool,
    ticks: u32,
    last_ms: u64,
    suspected: bool,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Replica {
    host: HostId,
    generation: Generation,
    position: usize,
    length: usize,
    /// Newest processed checkpoint; `None`: the image is not valid.
    hist: Option<Mark>,
    open: Option<Open>,
    /// Oldest checkpoint of this generation that was not acknowledged by the tail, if it has been processed.
    sent_from: Epoch,
    /// Newest checkpoint of this generation that the tail has.
    acked: Option<Epoch>,
    frozen: bool,
    failure: Option<Failure>,
    silence: Silence,
    missed: u32,
}

impl Replica {
    /// A replica that holds nothing yet, suspecting its predecessor after `missed` silent ticks.
    #[must_use]
    pub fn new(host: HostId, view: &View, missed: u32) -> Self {
        let mut new = Self {
            host,
            generation: view.generation,
            position: 0,
            length: 0,
            hist: None,
            open: None,
            sent_from: Epoch::ZERO,
            acked: None,
            frozen: false,
            failure: None,
            silence: Silence::default(),
            missed: missed.max(2),
        };
        new.place(view);
        new
    }

    fn place(&mut self, view: &View) {
        self.length = view.chain.len();
        // Not a member: neither tail nor anybody's predecessor.
        self.position = view.position(&self.host).unwrap_or(self.length);
    }

    /// The generation followed.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Newest processed checkpoint; `None` while the image is not valid.
    #[must_use]
    pub fn hist(&self) -> Option<Mark> {
        self.hist
    }

    /// Newest processed checkpoint of this generation: what acknowledgements speak of and what can be resumed from.
    #[must_use]
    pub fn current(&self) -> Option<Mark> {
        self.hist.filter(|mark| mark.generation == self.generation)
    }

    /// Newest checkpoint of this generation that the tail is known to have.
    #[must_use]
    pub fn acked(&self) -> Option<Epoch> {
        self.acked
    }

    /// Processed here in this generation, not yet acknowledged by the tail: first and last.
    #[must_use]
    pub fn sent(&self) -> Option<(Epoch, Epoch)> {
        let newest = self.current()?.epoch;
        (self.sent_from <= newest && !self.is_tail()).then_some((self.sent_from, newest))
    }

    /// Why this replica has failed, if it has.
    #[must_use]
    pub fn failed(&self) -> Option<&str> {
        self.failure.as_ref().map(|f| f.why.as_str())
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> State {
        if self.failure.is_some() {
            State::Failed
        } else if self.frozen {
            State::Frozen
        } else if self.current().is_some() {
            State::Serving
        } else {
            State::Syncing
        }
    }

    /// Whether this is the chain's tail.
    #[must_use]
    pub fn is_tail(&self) -> bool {
        self.position + 1 == self.length
    }

    /// The successor's position in the chain, if there is one.
    #[must_use]
    pub fn successor(&self) -> Option<usize> {
        (self.position + 1 < self.length).then_some(self.position + 1)
    }

    /// Follows a newer configuration, in place. What was half received is dropped; what was processed stays, to go on
    /// from if the owner says so. It cannot be *resumed* from until this generation's owner has added to it: an owner
    /// that begins anew lets output out meanwhile. A failed replica may be filled again.
    pub fn adopt(&mut self, view: &View) {
        if view.generation <= self.generation {
            return;
        }
        self.generation = view.generation;
        self.place(view);
        self.open = None;
        self.acked = None;
        self.frozen = false;
        self.silence = Silence::default();
        if self.failure.take().is_some_and(|f| f.damaged) {
            self.hist = None;
        }
    }

    /// Before a takeover: from here on nothing is taken, forwarded or acknowledged. What this replica has then includes
    /// everything the tail has acknowledged or ever will in this generation (invariants I2 and I5).
    ///
    /// A replica that failed because of what it *received* still has what it had, and nothing newer went past it.
    ///
    /// # Errors
    /// [`FreezeError`]; nothing has changed then.
    pub fn freeze(&mut self) -> Result<Mark, FreezeError> {
        if let Some(failure) = self.failure.as_ref().filter(|f| f.damaged) {
            return Err(FreezeError::Failed(failure.why.clone()));
        }
        let held = self.hist.ok_or(FreezeError::Empty)?;
        if held.generation != self.generation {
            return Err(FreezeError::Outdated {
                held,
                now: self.generation,
            });
        }
        self.frozen = true;
        self.open = None;
        Ok(held)
    }

    /// The takeover was refused and the configuration has not changed: go on as before. What arrived meanwhile is
    /// lost, so the next checkpoint shows a hole and the replica then declares itself failed; it never guesses.
    pub fn unfreeze(&mut self) {
        self.frozen = false;
        self.silence.suspected = false;
        self.silence.ticks = 0;
    }

    /// Takes one event; what is to be done is added to `actions`.
    pub fn step(&mut self, event: Event, actions: &mut VecDeque<Action>) {
        match event {
            Event::Begin {
                generation,
                epoch,
                base,
            } => {
                if self.accepts(generation, actions) {
                    self.begin(epoch, base, actions);
                }
            }
            Event::Data { generation, epoch } => {
                if self.accepts(generation, actions) && self.is_open(epoch, false) {
                    actions.extend([Action::Forward, Action::Stage]);
                }
            }
            Event::End { generation, epoch } => {
                if self.accepts(generation, actions) {
                    self.end(epoch, actions);
                }
            }
            Event::Heartbeat { generation } => {
                self.accepts(generation, actions);
            }
            Event::Prepared { digest } => self.prepared(digest, actions),
            Event::StoreFailed { why, damaged } => self.fail(why, damaged, actions),
            Event::SuccessorAck { generation, epoch } => {
                self.successor_ack(generation, epoch, actions);
            }
            Event::Heard { now_ms } => {
                self.silence.heard = true;
                self.silence.ticks = 0;
                self.silence.last_ms = now_ms;
            }
            Event::Tick { now_ms } => self.tick(now_ms, actions),
        }
    }

    fn fail(&mut self, why: String, damaged: bool, actions: &mut VecDeque<Action>) {
        self.open = None;
        match &mut self.failure {
            Some(failure) => failure.damaged |= damaged,
            None => {
                self.failure = Some(Failure {
                    why: why.clone(),
                    damaged,
                });
                actions.push_back(Action::Failed(why));
            }
        }
    }

    fn accepts(&self, generation: Generation, actions: &mut VecDeque<Action>) -> bool {
        if generation < self.generation {
            actions.push_back(Action::Refuse(self.generation));
        }
        // A newer generation than the master has told this replica: it will be told; until then it takes nothing.
        generation == self.generation && !self.frozen && self.failure.is_none()
    }

    fn is_open(&self, epoch: Epoch, duplicate: bool) -> bool {
        self.open == Some(Open { epoch, duplicate })
    }

    fn begin(&mut self, epoch: Epoch, base: Option<Mark>, actions: &mut VecDeque<Action>) {
        // Within a generation epochs only grow, so this one has been processed before: its acknowledgement was lost.
        let duplicate = self.current().is_some_and(|hist| epoch <= hist.epoch);
        if !duplicate
            && let Some(base) = base
            && let Some(why) = self.misfit(epoch, base)
        {
            return self.fail(why, false, actions);
        }
        self.open = Some(Open { epoch, duplicate });
        if duplicate {
            return;
        }
        if base.is_none() {
            // The image is being replaced: from here until it is processed there is nothing to resume from.
            self.hist = None;
            self.acked = None;
        }
        let full = base.is_none();
        actions.extend([Action::Forward, Action::Open { epoch, full }]);
    }

    fn end(&mut self, epoch: Epoch, actions: &mut VecDeque<Action>) {
        if self.is_open(epoch, false) {
            actions.push_back(Action::Prepare);
        } else if self.is_open(epoch, true) {
            self.open = None;
            // The acknowledgement was lost: once more what is known to be safe.
            if let Some(acked) = self.acked {
                self.acknowledge(acked, actions);
            }
        }
    }

    /// Why checkpoint `epoch` on top of `base` does not fit what this replica holds.
    fn misfit(&self, epoch: Epoch, base: Mark) -> Option<String> {
        let Some(hist) = self.hist else {
            return Some(format!(
                "checkpoint {epoch} came, but this replica has no full checkpoint to apply it to"
            ));
        };
        if epoch > hist.epoch.next() {
            return Some(format!(
                "checkpoint {epoch} came after {}: those between are missing",
                hist.epoch
            ));
        }
        if base != hist || epoch != base.epoch.next() {
            return Some(format!(
                "checkpoint {epoch} belongs on top of checkpoint {base}, but this replica holds checkpoint {hist}"
            ));
        }
        None
    }

    fn prepared(&mut self, digest: u32, actions: &mut VecDeque<Action>) {
        let Some(Open {
            epoch,
            duplicate: false,
        }) = self.open.take()
        else {
            return;
        };
        let first = self.current().is_none();
        let mark = Mark {
            generation: self.generation,
            epoch,
            digest,
        };
        self.hist = Some(mark);
        if first {
            self.sent_from = epoch;
        }
        if self.is_tail() {
            self.acked = Some(epoch);
            actions.push_back(Action::Commit(mark));
            self.acknowledge(epoch, actions);
        } else {
            actions.extend([Action::Forward, Action::Commit(mark)]);
        }
    }

    fn acknowledge(&self, epoch: Epoch, actions: &mut VecDeque<Action>) {
        if self.is_tail() {
            actions.push_back(Action::AckOwner(epoch));
        }
        actions.push_back(Action::AckUp(epoch));
    }

    fn successor_ack(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        actions: &mut VecDeque<Action>,
    ) {
        // An ack of what this replica has not processed is from a broken peer: believing it would let output out.
        let processed = self.current().is_some_and(|hist| epoch <= hist.epoch);
        if generation != self.generation
            || self.frozen
            || self.failure.is_some()
            || self.is_tail()
            || !processed
            || epoch < self.sent_from
        {
            return;
        }
        self.sent_from = epoch.next();
        self.acked = Some(epoch);
        self.acknowledge(epoch, actions);
    }

    /// Silent ticks until suspicion. Only the head hears the owner itself; further down the silence may be a replica's
    /// death, which the owner repairs without a failover if it is given the time.
    fn patience(&self) -> u32 {
        let hops = u32::try_from(self.position).unwrap_or(u32::MAX);
        self.missed
            .saturating_mul(hops.saturating_mul(4).saturating_add(1))
    }

    fn tick(&mut self, now_ms: u64, actions: &mut VecDeque<Action>) {
        if !self.silence.heard || self.silence.suspected || self.state() != State::Serving {
            return;
        }
        self.silence.ticks += 1;
        if self.silence.ticks > self.patience() {
            self.silence.suspected = true;
            let silent = now_ms.saturating_sub(self.silence.last_ms);
            actions.push_back(Action::Suspect(silent));
        }
    }
}
