//! One replica of one VM, as a plain state machine (van Renesse & Schneider, OSDI 2004, section 3).
//!
//! No sockets, clocks or threads: its driver feeds it [`Event`]s and carries out the [`Action`]s it answers with, in
//! order and before the next event. The server is one driver; the model checker and the simulation are others.
//!
//! `Hist` is the sequence of processed checkpoints, of which only the newest is named here (the store has the
//! content); `Sent` is what was processed here and not acknowledged by those after it. `Sent` is kept whole, so that
//! another successor can be brought up to date with it.
//!
//! Rules:
//! * a checkpoint's content is forwarded as it arrives, but its *end* only once it has been prepared here, that is
//!   verified whole and durable to the degree configured: nobody further down can process what this replica may lose
//!   (invariant I2, at every instant);
//! * after [`Replica::freeze`] nothing is taken, forwarded or acknowledged;
//! * what is held outside of the master's [`History`] of the VM is forgotten: an unacknowledged suffix that a new owner
//!   does not have, or checkpoints from before output was let out unprotected;
//! * what the owner sent while it did not hold its output yet is not resumed from ([`Mark::held`]): a chain that begins
//!   protects only once a checkpoint after that has been processed;
//! * a new member is not resumed from before its predecessor has said that it has everything
//!   ([`Event::Complete`]): what was acknowledged before it came is in it then (I5).

mod event;
mod next;
mod place;
mod receive;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation, HostId};

use crate::mark::Mark;
use crate::sent::Sent;
use crate::view::{History, View};
pub use event::{Action, Base, Event, FreezeError, State};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Failure {
    why: String,
    damaged: bool,
    /// Since it was said last.
    ticks: u32,
}

/// A replica that came back, or whose configuration has changed, waits so many times longer before it suspects anybody: the
/// owner may only not have come to it yet.
const RETURNED: u32 = 20;

/// Ticks after which a failed replica says again that it has failed.
const SAY_FAILED: u32 = 50;

/// The checkpoint being received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Open {
    epoch: Epoch,
    what: What,
    /// The owner's output is held from its capture on, at the latest.
    held: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum What {
    /// It repeats what has been processed.
    Duplicate,
    /// The first of a history.
    Full,
    /// A joining replica's filling: the checkpoint that it is becomes known at its end.
    Install(Option<Mark>),
    /// The next one, first sent in that generation.
    Next(Generation),
}

/// This host's part in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Part {
    Member { position: usize, since: Generation },
    Joiner,
    Nothing,
}

/// Silence of the predecessor, counted in ticks that this replica itself lived through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Silence {
    heard: bool,
    ticks: u32,
    last_ms: u64,
    suspected: bool,
    /// Nobody has been heard since the replica came back with its host, or since the configuration changed.
    returned: bool,
}

/// What came from the predecessor while this replica was frozen. (What the next replica says is always asked for again:
/// its acknowledgements are few, and a connection tells them all.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Missed {
    /// Something that only the predecessor can send again: part of a checkpoint, or that this was all.
    sent: bool,
    /// The owner has stopped the VM at this epoch and wants it to be taken over.
    yielded: Option<Epoch>,
}

/// The state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    host: HostId,
    generation: Generation,
    part: Part,
    length: usize,
    history: History,
    /// Newest processed checkpoint, always part of `history`; `None`: the image is not valid.
    hist: Option<Mark>,
    /// The generation in which this member was last known to have everything; it is complete if that is not before it
    /// became a member.
    complete_in: Option<Generation>,
    open: Option<Open>,
    sent: Sent,
    /// Whether the next replica is sent what is forwarded.
    linked: bool,
    /// A joining replica is there, or will be: the tail sends it what others send a successor.
    has_joiner: bool,
    /// The checkpoint that makes the joining replica ready, once it acknowledges it.
    joiner_target: Option<Epoch>,
    /// Newest checkpoint that the tail has.
    acked: Option<Epoch>,
    frozen: bool,
    /// What was not taken while frozen, and has to be asked for again if the takeover is not granted.
    missed_while_frozen: Missed,
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
            part: Part::Nothing,
            length: 0,
            history: History::default(),
            hist: None,
            complete_in: None,
            open: None,
            sent: Sent::default(),
            linked: false,
            has_joiner: false,
            joiner_target: None,
            acked: None,
            frozen: false,
            missed_while_frozen: Missed::default(),
            failure: None,
            silence: Silence::default(),
            missed: missed.max(2),
        };
        new.place(view);
        new
    }

    /// The generation followed.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Newest processed checkpoint; `None` while the image is not valid. A predecessor may go on from it.
    #[must_use]
    pub fn hist(&self) -> Option<Mark> {
        self.hist
    }

    /// The checkpoint that the VM may be, or is about to be, resumed from by this replica.
    #[must_use]
    pub fn resumable(&self) -> Option<Mark> {
        let may = self.frozen || self.state().could_resume();
        self.hist.filter(|_| may)
    }

    /// Newest checkpoint that the tail is known to have.
    #[must_use]
    pub fn acked(&self) -> Option<Epoch> {
        self.acked
    }

    /// What a predecessor that connects has to be told: acknowledgements may have been lost with the connection before.
    #[must_use]
    pub fn acked_up(&self) -> Option<Epoch> {
        match self.part {
            Part::Joiner => self.hist.map(|mark| mark.epoch),
            _ => self.acked,
        }
    }

    /// Processed here, not yet acknowledged by those after it: first and last.
    #[must_use]
    pub fn sent(&self) -> Option<(Epoch, Epoch)> {
        self.sent.range()
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
            return State::Failed;
        }
        if self.frozen {
            return State::Frozen;
        }
        match self.part {
            Part::Nothing => State::Offline,
            Part::Joiner => State::Joining,
            Part::Member { .. } if self.hist.is_none() => State::Syncing,
            Part::Member { .. } if !self.has_everything() => State::Joining,
            Part::Member { .. } if !self.holds_output() => State::Syncing,
            Part::Member { .. } if self.length == 1 => State::LastSurvivor,
            Part::Member { .. } => State::Serving,
        }
    }

    /// Whether this is the chain's tail.
    #[must_use]
    pub fn is_tail(&self) -> bool {
        matches!(self.part, Part::Member { position, .. } if position + 1 == self.length)
    }

    /// The successor's position in the chain, if there is one.
    #[must_use]
    pub fn successor(&self) -> Option<usize> {
        match self.part {
            Part::Member { position, .. } => (position + 1 < self.length).then_some(position + 1),
            _ => None,
        }
    }

    /// Whether the next replica is sent what is forwarded.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.linked
    }

    /// Whether no checkpoint is half received, and what is held may be passed on: the moment to bring a joining replica
    /// to exactly [`Replica::hist`]. A failed replica's content is not to be trusted, a frozen one links nobody.
    #[must_use]
    pub fn is_between_checkpoints(&self) -> bool {
        self.open.is_none() && self.failure.is_none() && !self.frozen
    }

    /// The name that the checkpoint being received will have if that is its digest.
    #[must_use]
    pub fn name_of_open(&self, digest: u32) -> Option<Mark> {
        let Open { epoch, what, held } = self.open?;
        let name = |generation| Mark {
            generation,
            epoch,
            digest,
            held,
        };
        match what {
            What::Duplicate | What::Install(None) => None,
            What::Full => Some(name(self.generation)),
            What::Install(Some(mark)) => Some(mark),
            What::Next(origin) => Some(name(origin)),
        }
    }

    /// Whether what was acknowledged before this replica became a member is in what it has.
    fn has_everything(&self) -> bool {
        match self.part {
            Part::Member { since, .. } => self.complete_in.is_some_and(|then| then >= since),
            _ => false,
        }
    }

    /// Whether what it holds is from a time at which the owner held its output: otherwise the outside may have seen more.
    fn holds_output(&self) -> bool {
        self.hist.is_some_and(|mark| mark.held)
    }

    /// Takes one event; what is to be done is added to `actions`.
    pub fn step(&mut self, event: Event, actions: &mut VecDeque<Action>) {
        match event {
            Event::Begin {
                generation,
                epoch,
                base,
                held,
            } => {
                self.missed_while_frozen.sent |= self.misses(generation);
                if self.accepts(generation, actions) {
                    self.begin(epoch, base, held, actions);
                }
            }
            Event::Data { generation, epoch } => {
                if self.accepts(generation, actions)
                    && let Some(open) = self.open.filter(|open| open.epoch == epoch)
                    && open.what != What::Duplicate
                {
                    self.pass(open, actions);
                    actions.push_back(Action::Stage);
                }
            }
            Event::Compare { generation, epoch } => {
                let asks = |open: Open| open.epoch == epoch && open.what == What::Full;
                if self.accepts(generation, actions) && self.open.is_some_and(asks) {
                    actions.push_back(Action::Compare);
                }
            }
            Event::End {
                generation,
                epoch,
                install,
            } => {
                if self.accepts(generation, actions) {
                    self.end(epoch, install, actions);
                }
            }
            Event::Heartbeat { generation } => {
                self.accepts(generation, actions);
            }
            Event::Complete { generation, epoch } => {
                self.missed_while_frozen.sent |= self.misses(generation);
                if self.accepts(generation, actions) {
                    self.complete(epoch, actions);
                }
            }
            Event::Yield { generation, epoch } => {
                if self.misses(generation) {
                    self.missed_while_frozen.yielded = Some(epoch);
                }
                if self.accepts(generation, actions) {
                    self.yielded(epoch, actions);
                }
            }
            Event::Prepared { digest } => self.prepared(digest, actions),
            Event::StoreFailed { why, damaged } => self.fail(why, damaged, actions),
            Event::NextUp { generation, holds } => self.next_up(generation, holds, actions),
            Event::NextDown => self.linked = false,
            Event::JoinerFed { generation } => self.joiner_fed(generation, actions),
            Event::NextAck { generation, epoch } => self.next_ack(generation, epoch, actions),
            Event::Heard { now_ms } => {
                self.silence.heard = true;
                self.silence.returned = false;
                self.silence.ticks = 0;
                self.silence.last_ms = now_ms;
            }
            Event::Unfreeze => self.unfreeze(actions),
            Event::Tick { now_ms } => self.tick(now_ms, actions),
        }
    }

    /// The owner has stopped the VM for good.
    fn yielded(&self, epoch: Epoch, actions: &mut VecDeque<Action>) {
        let last = self.hist.is_some_and(|hist| hist.epoch == epoch);
        let head = matches!(self.part, Part::Member { position: 0, .. });
        if head && last && self.state().could_resume() {
            actions.push_back(Action::Suspect(0));
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
                    ticks: 0,
                });
                actions.push_back(Action::Failed(why));
            }
        }
    }

    /// Whether something of this generation is not taken because the replica is frozen.
    fn misses(&self, generation: Generation) -> bool {
        self.frozen && generation == self.generation
    }

    fn accepts(&self, generation: Generation, actions: &mut VecDeque<Action>) -> bool {
        if generation < self.generation {
            actions.push_back(Action::Refuse(self.generation));
        }
        // A newer generation than the master has told this replica: it will be told; until then it takes nothing.
        generation == self.generation
            && !self.frozen
            && self.failure.is_none()
            && self.part != Part::Nothing
    }

    /// Silent ticks until suspicion. Only the head hears the owner itself; further down the silence may be a replica's
    /// death, which the owner repairs without a failover if it is given the time.
    fn patience(&self) -> u32 {
        let hops = match self.part {
            Part::Member { position, .. } => u32::try_from(position).unwrap_or(u32::MAX),
            _ => 0,
        };
        let returned = if self.silence.returned { RETURNED } else { 1 };
        self.missed
            .saturating_mul(hops.saturating_mul(6).saturating_add(1))
            .saturating_mul(returned)
    }

    fn tick(&mut self, now_ms: u64, actions: &mut VecDeque<Action>) {
        if let Some(failure) = &mut self.failure {
            failure.ticks += 1;
            if failure.ticks == SAY_FAILED {
                failure.ticks = 0;
                actions.push_back(Action::StillFailed(failure.why.clone()));
            }
            return;
        }
        if !self.silence.heard || self.silence.suspected || !self.state().could_resume() {
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
