//! One member as a plain state machine: messages, ticks and requests in; a record to write, messages and answers out.
//! No sockets, no clock, no files: the simulation and the deployed member run this same code.
//!
//! **Nothing leaves before the record is on disk.** [`Node::take`] gives the record, if it has changed, together with
//! everything that depends on it; the caller writes the record and only then lets the rest out. If it cannot write, it
//! drops the rest and [`Node::stop`]s the member for good.
//!
//! The consensus is omnipaxos' own. Around it:
//!
//! * A request waits here until a decision shows its effect, and is proposed again when a leader changes or nothing
//!   happens for a while (omnipaxos does not repeat a forwarded proposal that was lost). [`Applied`] sees to it that
//!   only one copy takes effect.
//! * A leader without a majority would append without end: while too much is undecided nothing is added.
//! * omnipaxos can send the difference of two snapshots; merging it at the receiver takes in entries that are not
//!   decided there (it advances the decided index first). Differences are sent as whole states instead, and refused
//!   when received.

mod messages;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use checkpoint::ClusterId;
use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::messages::Message;
use omnipaxos::messages::ballot_leader_election::HeartbeatMsg;
use omnipaxos::messages::sequence_paxos::PaxosMsg;
use omnipaxos::{ClusterConfig, OmniPaxos, ServerConfig};

use super::entry::{Applied, Entry, LogSnapshot, Outcome, Pid, Turn, What};
use super::storage::{Durable, Record};
use crate::master::{Rejection, Reply, Request, Snapshot};

/// Ticks of a round of heartbeats; a lost leader is replaced after about two.
pub const ELECTION_TICKS: u64 = 8;
const RESEND_TICKS: u64 = 8;
/// A request without effect is proposed again after this many ticks.
const RETRY_TICKS: u64 = 24;
/// A request without effect is given up after this many ticks.
pub const PATIENCE_TICKS: u64 = 150;
/// The log is folded into a snapshot when it has so many decided entries, or so many bytes of them.
const FOLD_ENTRIES: u64 = 64;
const FOLD_BYTES: usize = 1 << 20;
/// No more is proposed while so many entries, or bytes of entries, are undecided.
const UNDECIDED_MAX: u64 = 128;
const UNDECIDED_BYTES_MAX: usize = 4 << 20;
/// Longest command in bytes, as in a request to the master.
const COMMAND_MAX: usize = 1 << 20;
/// Commands are refused while the record is longer than this: it has to stay below its limit.
const RECORD_HIGH: usize = 56 << 20;
/// A member that asks so often for a leader's round, bound to a later one, will not come free by itself.
const BOUND_TIMES: u32 = 3;
/// No honest index is beyond this.
const INDEX_MAX: usize = 1 << 48;
const CONFIGURATION: u32 = 1;

/// A message between members.
pub type PeerMessage = Message<Entry>;

/// Whom an answer is for; the caller's own numbering.
pub type Ticket = u64;

/// What happens to a member.
#[derive(Clone, Debug)]
pub enum Event {
    /// A message of the member `from`, as the connection knows it.
    Message(Pid, Box<PeerMessage>),
    /// A connection with that member was made anew; what was under way may be lost.
    Reconnected(Pid),
    /// Time has passed.
    Tick,
    /// Somebody asks for a change.
    Propose(Ticket, Box<Request>),
    /// Somebody asks for everything decided so far.
    Read(Ticket),
}

/// Why a request was not answered as hoped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// What has been decided before does not allow it.
    Rejected(Rejection),
    /// No decision in time. It may still come.
    Undecided {
        /// Members that answer this one, itself included.
        answering: usize,
        /// All.
        members: usize,
    },
    /// It had an effect, but what was answered is not known any more.
    AnswerLost,
    /// It cannot be taken.
    TooLarge(String),
    /// This member does not take part any more.
    Stopped(String),
}

/// What a member answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To the change.
    Reply(Reply),
    /// Everything decided so far.
    Snapshot(Snapshot),
    /// Neither.
    Refused(Refusal),
}

/// What has to be done.
#[derive(Debug, Default)]
pub struct Output {
    /// To be written before anything else here is done.
    pub record: Option<Vec<u8>>,
    /// To be sent, in this order.
    pub messages: Vec<PeerMessage>,
    /// To be answered.
    pub answers: Vec<(Ticket, Answer)>,
    /// The revision of what has been applied here, if it has grown.
    pub revision: Option<u64>,
}

#[derive(Debug)]
enum Waiting {
    Request(Ticket, Box<Request>),
    Read(Vec<Ticket>),
}

#[derive(Debug)]
struct Pending {
    waiting: Waiting,
    since: u64,
    /// When, and in whose round, it was last proposed.
    proposed: Option<(u64, Ballot)>,
}

/// The machine.
pub struct Node {
    omni: OmniPaxos<Entry, Durable>,
    durable: Durable,
    me: Pid,
    members: usize,
    incarnation: u64,
    next_number: u64,
    applied: Applied,
    applied_idx: u64,
    now: u64,
    pending: BTreeMap<u64, Pending>,
    /// How often each member has asked this leader for its round while bound to a later one.
    bound: BTreeMap<Pid, u32>,
    /// The round of each member's newest heartbeat: the library would count one that comes twice as two members.
    heartbeats: BTreeMap<Pid, u32>,
    /// Reads that came after the newest marker was proposed: the next one answers them.
    reads: Vec<Ticket>,
    record_len: usize,
    stopped: Option<String>,
    output: Output,
    /// What was applied, for the simulation.
    #[cfg(test)]
    pub(super) trace: Vec<(u64, Entry)>,
    /// Switched off by a mutant: reads through the log.
    #[cfg(test)]
    pub(super) read_locally: bool,
    /// Switched off by a mutant: states sent whole.
    #[cfg(test)]
    pub(super) send_differences: bool,
}

impl Node {
    /// A member that goes on from its record; raises its incarnation, so the first [`Node::take`] has a record.
    ///
    /// # Errors
    /// Text: the membership is not one that omnipaxos takes.
    pub fn new(mut record: Record) -> Result<Self, String> {
        record.incarnation += 1;
        let (me, members) = (record.identity.me, record.identity.members.len());
        let incarnation = record.incarnation;
        let (applied, applied_idx) = (record.snapshot.clone(), record.compacted);
        let durable = Durable::new(record);
        let cluster = ClusterConfig {
            configuration_id: CONFIGURATION,
            nodes: (1..=members as Pid).collect(),
            flexible_quorum: None,
        };
        let server = ServerConfig {
            pid: me,
            election_tick_timeout: ELECTION_TICKS,
            resend_message_tick_timeout: RESEND_TICKS,
            buffer_size: 64,
            ..ServerConfig::default()
        };
        let omni = cluster.build_for_server(server, durable.clone());
        let mut node = Self {
            omni: omni.map_err(|e| e.to_string())?,
            durable,
            me,
            members,
            incarnation,
            next_number: 0,
            applied,
            applied_idx,
            now: 0,
            pending: BTreeMap::new(),
            bound: BTreeMap::new(),
            heartbeats: BTreeMap::new(),
            reads: Vec::new(),
            record_len: 0,
            stopped: None,
            output: Output::default(),
            #[cfg(test)]
            trace: Vec::new(),
            #[cfg(test)]
            read_locally: false,
            #[cfg(test)]
            send_differences: false,
        };
        node.settle();
        Ok(node)
    }

    /// Its number.
    #[must_use]
    pub fn me(&self) -> Pid {
        self.me
    }

    /// The cluster as far as it is decided here; nil before that.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.applied.state.cluster()
    }

    /// Members whose heartbeats arrived in the last round, this one included.
    #[must_use]
    pub fn answering(&self) -> usize {
        let heartbeats = self.omni.get_ui_states().heartbeats;
        let heard: BTreeSet<Pid> = heartbeats.iter().map(|h| h.ballot.pid).collect();
        1 + heard.len()
    }

    /// The state and the number of entries that made it.
    #[cfg(test)]
    pub(super) fn applied_for_test(&self) -> (&Applied, u64) {
        (&self.applied, self.applied_idx)
    }

    #[cfg(test)]
    pub(super) fn record_for_test(&self) -> Record {
        self.durable.lock().record.clone()
    }

    /// Why it does not take part any more.
    #[must_use]
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// The leader that this member follows, if it does.
    #[must_use]
    pub fn leader(&self) -> Option<Pid> {
        let leader = self.omni.get_current_leader();
        leader.and_then(|(pid, accepting)| accepting.then_some(pid))
    }

    /// Ends this member's part for good: it says and decides nothing any more, and answers that it does not.
    pub fn stop(&mut self, why: &str) {
        if self.stopped.is_some() {
            return;
        }
        self.stopped = Some(why.into());
        self.output = Output::default();
        let refusal = Answer::Refused(Refusal::Stopped(why.into()));
        let mut tickets = std::mem::take(&mut self.reads);
        for (_, pending) in std::mem::take(&mut self.pending) {
            match pending.waiting {
                Waiting::Request(ticket, _) => tickets.push(ticket),
                Waiting::Read(waiting) => tickets.extend(waiting),
            }
        }
        self.output.answers = tickets.into_iter().map(|t| (t, refusal.clone())).collect();
    }

    /// Takes an event in.
    pub fn handle(&mut self, event: Event) {
        if let Some(why) = &self.stopped {
            if let Event::Propose(ticket, _) | Event::Read(ticket) = event {
                let refusal = Refusal::Stopped(why.clone());
                self.output.answers.push((ticket, Answer::Refused(refusal)));
            }
            return;
        }
        // The library's own checks panic. Whatever it was, this member does not know its state any more.
        let handled = catch_unwind(AssertUnwindSafe(|| {
            self.step(event);
            self.settle();
        }));
        if handled.is_err() {
            self.stop("the consensus library failed on what it was given (see the log)");
        }
        let broken = self.durable.lock().broken.take();
        if let Some(why) = broken {
            self.stop(&format!("the members contradict each other: {why}"));
        }
    }

    /// What has to be done by now.
    pub fn take(&mut self) -> Output {
        if self.stopped.is_none() {
            let mut kept = self.durable.lock();
            if kept.changed {
                kept.changed = false;
                let bytes = kept.record.to_bytes();
                drop(kept);
                match bytes {
                    Ok(bytes) => {
                        self.record_len = bytes.len();
                        self.output.record = Some(bytes);
                    }
                    Err(why) => self.stop(&format!("its record cannot be written: {why}")),
                }
            }
        }
        std::mem::take(&mut self.output)
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Message(from, message) => {
                if self.acceptable(from, &message) && !self.repeated(from, &message) {
                    self.free(from, &message);
                    self.omni.handle_incoming(*message);
                }
            }
            Event::Reconnected(pid) => self.omni.reconnected(pid),
            Event::Tick => {
                self.now += 1;
                self.omni.tick();
                self.give_up();
            }
            Event::Propose(ticket, request) => match self.refuse(&request) {
                Some(why) => self.answer(ticket, Answer::Refused(Refusal::TooLarge(why))),
                None => self.wait_for(Waiting::Request(ticket, request)),
            },
            Event::Read(ticket) => {
                #[cfg(test)]
                if self.read_locally {
                    let snapshot = Answer::Snapshot(self.applied.state.snapshot());
                    self.answer(ticket, snapshot);
                    return;
                }
                self.reads.push(ticket);
            }
        }
    }

    /// A member that wanted to lead, crashed and came back is bound by its own promise to a round that never began,
    /// and the library leaves it there for as long as an earlier round has a leader and a majority. The leader then
    /// begins a later round than both.
    fn free(&mut self, from: Pid, message: &PeerMessage) {
        let Message::SequencePaxos(paxos) = message else {
            return;
        };
        if let PaxosMsg::PrepareReq(asked) = &paxos.msg
            && self.leader() == Some(self.me)
            && asked.n > self.omni.get_promise()
        {
            let times = self.bound.entry(from).or_default();
            *times += 1;
            // Not at once: it may be about to lead.
            if *times >= BOUND_TIMES {
                self.bound.clear();
                self.omni.try_become_leader();
            }
        } else {
            self.bound.remove(&from);
        }
    }

    fn repeated(&mut self, from: Pid, message: &PeerMessage) -> bool {
        let Message::BLE(heartbeat) = message else {
            return false;
        };
        match &heartbeat.msg {
            HeartbeatMsg::Request(_) => false,
            HeartbeatMsg::Reply(reply) => {
                self.heartbeats.insert(from, reply.round) == Some(reply.round)
            }
        }
    }

    fn refuse(&self, request: &Request) -> Option<String> {
        let size =
            checkpoint::codec::to_bytes(request, COMMAND_MAX).map_or(usize::MAX, |b| b.len());
        if size > COMMAND_MAX {
            return Some(format!("a command of more than {COMMAND_MAX} bytes"));
        }
        (self.record_len > RECORD_HIGH).then(|| {
            let len = self.record_len;
            format!("the master's record has {len} bytes, the limit is {RECORD_HIGH}; remove VMs")
        })
    }

    fn wait_for(&mut self, waiting: Waiting) {
        let pending = Pending {
            waiting,
            since: self.now,
            proposed: None,
        };
        self.pending.insert(self.next_number, pending);
        self.next_number += 1;
    }

    /// After every event: what was decided is applied, what waits is proposed, what is to be sent is made ready.
    fn settle(&mut self) {
        self.apply();
        let marker = |p: &Pending| matches!(p.waiting, Waiting::Read(_));
        if !self.reads.is_empty() && !self.pending.values().any(marker) {
            let tickets = std::mem::take(&mut self.reads);
            self.wait_for(Waiting::Read(tickets));
        }
        self.propose();
        self.send();
        self.fold();
    }

    fn apply(&mut self) {
        let before = self.applied.state.revision();
        let durable = self.durable.clone();
        let mut kept = durable.lock();
        let (compacted, decided) = (kept.record.compacted, kept.record.decided);
        if decided < compacted || decided < self.applied_idx {
            let applied = self.applied_idx;
            kept.broken.get_or_insert_with(|| {
                format!("{decided} entries decided, but {compacted} folded and {applied} applied")
            });
            return;
        }
        let jumped = self.applied_idx < compacted;
        if jumped {
            self.applied = kept.record.snapshot.clone();
            self.applied_idx = compacted;
        }
        let from = (self.applied_idx - compacted) as usize;
        let to = (decided.saturating_sub(compacted) as usize).min(kept.record.log.len());
        let entries = kept.record.log.get(from..to).unwrap_or(&[]).to_vec();
        if decided > compacted + kept.record.log.len() as u64 {
            kept.broken.get_or_insert_with(|| {
                format!("{decided} entries decided, of which some are not here")
            });
        }
        drop(kept);
        for entry in entries {
            let outcome = self.applied.apply(&entry);
            #[cfg(test)]
            self.trace.push((self.applied_idx, entry.clone()));
            self.applied_idx += 1;
            if entry.id.member == self.me && entry.id.incarnation == self.incarnation {
                self.decided(entry.id.number, Some(outcome));
            }
        }
        if jumped {
            let done = |n: &&u64| self.applied.has(self.id(**n));
            let numbers: Vec<u64> = self.pending.keys().filter(done).copied().collect();
            for number in numbers {
                self.decided(number, None);
            }
        }
        let revision = self.applied.state.revision();
        if revision > before {
            self.output.revision = Some(revision);
        }
    }

    fn id(&self, number: u64) -> Turn {
        Turn {
            member: self.me,
            incarnation: self.incarnation,
            number,
        }
    }

    /// A request of this member has its place in the log; without an outcome it is somewhere in a snapshot.
    fn decided(&mut self, number: u64, outcome: Option<Outcome>) {
        let Some(pending) = self.pending.remove(&number) else {
            return; // a second copy, or given up
        };
        match (pending.waiting, outcome) {
            (Waiting::Read(tickets), _) => {
                for ticket in tickets {
                    let snapshot = Answer::Snapshot(self.applied.state.snapshot());
                    self.answer(ticket, snapshot);
                }
            }
            (Waiting::Request(ticket, _), Some(Outcome::Request(result))) => {
                self.answer(ticket, answer_of(result));
            }
            (Waiting::Request(ticket, request), _) => {
                // It took effect, unseen. A repeated request is answered as the first time, if that is still known.
                let mut again = self.applied.state.clone();
                let result = again.answer(&request);
                let answer = if again == self.applied.state {
                    answer_of(result)
                } else {
                    Answer::Refused(Refusal::AnswerLost)
                };
                self.answer(ticket, answer);
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        self.output.answers.push((ticket, answer));
    }

    fn give_up(&mut self) {
        let late = |p: &Pending| self.now - p.since >= PATIENCE_TICKS;
        let numbers = self
            .pending
            .iter()
            .filter(|(_, p)| late(p))
            .map(|(n, _)| *n);
        let numbers: Vec<u64> = numbers.collect();
        let refusal = Answer::Refused(Refusal::Undecided {
            answering: self.answering(),
            members: self.members,
        });
        for number in numbers {
            match self.pending.remove(&number).map(|p| p.waiting) {
                Some(Waiting::Request(ticket, _)) => self.answer(ticket, refusal.clone()),
                Some(Waiting::Read(tickets)) => {
                    for ticket in tickets {
                        self.answer(ticket, refusal.clone());
                    }
                }
                None => {}
            }
        }
    }

    fn has_room(&self) -> bool {
        let kept = self.durable.lock();
        let (decided, first) = (kept.record.decided, kept.record.compacted);
        let undecided = (first + kept.record.log.len() as u64).saturating_sub(decided);
        undecided < UNDECIDED_MAX && kept.bytes_from(decided) < UNDECIDED_BYTES_MAX
    }

    fn propose(&mut self) {
        if self.leader().is_none() {
            return;
        }
        let round = self.omni.get_promise();
        let floor = self.pending.keys().next().copied();
        let begin = self.begins();
        let due: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, p)| match p.proposed {
                None => true,
                Some((at, in_round)) => in_round != round || self.now - at >= RETRY_TICKS,
            })
            .map(|(n, _)| *n)
            .collect();
        for number in due {
            if !self.has_room() {
                return;
            }
            let id = self.id(number);
            let Some(pending) = self.pending.get_mut(&number) else {
                continue;
            };
            pending.proposed = Some((self.now, round));
            let entry = Entry {
                id,
                floor: floor.unwrap_or(number),
                begin,
                what: match &pending.waiting {
                    Waiting::Request(_, request) => What::Request(request.clone()),
                    Waiting::Read(_) => What::Read,
                },
            };
            // Fails only after a change of membership, which there is none of.
            let _ = self.omni.append(entry);
        }
    }

    /// The cluster that this member would begin, as long as it knows of none.
    fn begins(&self) -> Option<ClusterId> {
        let unknown = self.cluster() == ClusterId::NIL;
        unknown.then(|| self.durable.lock().record.proposal)
    }

    fn fold(&mut self) {
        let kept = self.durable.lock();
        let decided = kept.record.decided;
        let entries = decided.saturating_sub(kept.record.compacted);
        let bytes = kept.bytes_from(0) - kept.bytes_from(decided);
        drop(kept);
        if entries >= FOLD_ENTRIES || bytes >= FOLD_BYTES {
            // Fails only if asked for what is not decided.
            let _ = self.omni.snapshot(None, true);
        }
    }
}

fn answer_of(result: Result<Reply, Rejection>) -> Answer {
    match result {
        Ok(reply) => Answer::Reply(reply),
        Err(rejection) => Answer::Refused(Refusal::Rejected(rejection)),
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("me", &self.me)
            .field("leader", &self.leader())
            .field("applied", &self.applied_idx)
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}
