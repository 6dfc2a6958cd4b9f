//! One seeded world.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use checkpoint::{ClusterId, Generation, RequestId, VmId};
use omnipaxos::messages::Message;
use omnipaxos::messages::sequence_paxos::PaxosMsg;

use super::super::entry::{Applied, Entry, Outcome, Pid};
use super::super::node::{Answer, Event, Node, Output, PATIENCE_TICKS, PeerMessage, Refusal};
use super::super::storage::{Identity, Record};
use crate::mark::Mark;
use crate::master::{Command, Order, Reply, Request};
use crate::view::{Life, Member, VmShape};

#[path = "../../../../tests/commands/mod.rs"]
mod commands;
use commands::{reconfigure, register, take_over};

/// A mechanism switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    SendBeforeWriting,
    ForgetPromise,
    BeginEmpty,
    ReadLocally,
    SendDifferences,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub decided: u64,
    pub answered: u64,
    pub reads: u64,
    pub granted: u64,
    pub refused: u64,
    pub undecided: u64,
    pub crashes: u64,
    pub crashes_written: u64,
    pub breaks: u64,
    pub partitions: u64,
    pub failed_disks: u64,
    pub leaders: u64,
    pub snapshots: u64,
    pub repeated: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.decided += other.decided;
        self.answered += other.answered;
        self.reads += other.reads;
        self.granted += other.granted;
        self.refused += other.refused;
        self.undecided += other.undecided;
        self.crashes += other.crashes;
        self.crashes_written += other.crashes_written;
        self.breaks += other.breaks;
        self.partitions += other.partitions;
        self.failed_disks += other.failed_disks;
        self.leaders += other.leaders;
        self.snapshots += other.snapshots;
        self.repeated += other.repeated;
    }
}

/// Splitmix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

struct Site {
    node: Option<Node>,
    disk: Record,
    /// With the mutant: written with the next record, if it comes to that.
    late: Option<Record>,
    /// Writes fail.
    failing: bool,
    /// What it stands still with until it can write.
    stuck: Option<Output>,
}

#[derive(Default)]
struct Link {
    queue: VecDeque<PeerMessage>,
    cut: bool,
    /// Broken since the last message: the next one finds a new connection.
    renew: bool,
}

enum Asked {
    Command(Box<Command>),
    Read { at_least: u64 },
}

pub struct World {
    rng: Rng,
    mutant: Mutant,
    sites: Vec<Site>,
    links: BTreeMap<(Pid, Pid), Link>,
    asked: BTreeMap<u64, Asked>,
    next_ticket: u64,
    /// The one history: entries, and the state after each.
    history: Vec<Entry>,
    states: Vec<Applied>,
    /// Every VM's record that ever was.
    known: BTreeSet<String>,
    /// The newest revision that anybody was told.
    told: u64,
    /// Who was given a VM in which generation.
    granted: BTreeMap<(VmId, Generation), String>,
    leaders: BTreeMap<u32, Pid>,
    /// Nobody crashes any more.
    mended: bool,
    pub counts: Counts,
    pub story: Vec<String>,
}

fn names(n: u64) -> Vec<String> {
    (1..=n).map(|i| format!("m{i}")).collect()
}

impl World {
    pub fn new(seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng(seed ^ 0x9a05);
        let n = if rng.one_in(2) { 3 } else { 5 };
        let sites = (1..=n).map(|me| {
            let identity = Identity {
                members: names(n),
                me,
            };
            let disk = Record::new(identity, ClusterId(u128::from(me)));
            Site {
                node: None,
                disk,
                late: None,
                failing: false,
                stuck: None,
            }
        });
        let mut world = Self {
            rng,
            mutant,
            sites: sites.collect(),
            links: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_ticket: 0,
            history: Vec::new(),
            states: vec![Applied::default()],
            known: BTreeSet::new(),
            told: 0,
            granted: BTreeMap::new(),
            leaders: BTreeMap::new(),
            mended: false,
            counts: Counts::default(),
            story: Vec::new(),
        };
        for from in 1..=n {
            for to in (1..=n).filter(|to| *to != from) {
                world.links.insert((from, to), Link::default());
            }
        }
        for me in 1..=n {
            world.start(me).expect("a fresh member starts");
        }
        world
    }

    fn say(&mut self, text: String) {
        self.story.push(text);
    }

    fn site(&mut self, me: Pid) -> &mut Site {
        &mut self.sites[me as usize - 1]
    }

    fn n(&self) -> u64 {
        self.sites.len() as u64
    }

    fn majority(&self) -> usize {
        self.sites.len() / 2 + 1
    }

    fn start(&mut self, me: Pid) -> Result<(), String> {
        let mutant = self.mutant;
        let site = self.site(me);
        let mut record = Record::parse(&site.disk.to_bytes()?)?;
        if mutant == Mutant::ForgetPromise {
            record.promise = Default::default();
        }
        if mutant == Mutant::BeginEmpty && record.incarnation > 0 {
            record = Record {
                incarnation: record.incarnation,
                ..Record::new(record.identity, record.proposal)
            };
        }
        let mut node = Node::new(record)?;
        node.read_locally = mutant == Mutant::ReadLocally;
        node.send_differences = mutant == Mutant::SendDifferences;
        site.node = Some(node);
        self.say(format!("{me} starts"));
        self.break_links_of(me);
        self.act(me)
    }

    /// Loses what is under way to and from `me`.
    fn break_links_of(&mut self, me: Pid) {
        for ((from, to), link) in &mut self.links {
            if *from == me || *to == me {
                link.queue.clear();
                link.renew = true;
            }
        }
    }

    fn crash(&mut self, me: Pid) {
        let site = self.site(me);
        (site.node, site.late, site.stuck) = (None, None, None);
        self.break_links_of(me);
        self.counts.crashes += 1;
        self.say(format!("{me} crashes"));
    }

    fn feed(&mut self, me: Pid, event: Event) -> Result<(), String> {
        if let Site {
            node: Some(node),
            stuck: None,
            ..
        } = self.site(me)
        {
            node.handle(event);
            // Several events may go into one write.
            if self.rng.one_in(4) {
                return Ok(());
            }
            return self.act(me);
        }
        Ok(())
    }

    /// Does what the member wants done: writes, then the rest; it may die at any point of this.
    fn act(&mut self, me: Pid) -> Result<(), String> {
        let Site {
            node: Some(node),
            stuck: None,
            ..
        } = self.site(me)
        else {
            return Ok(());
        };
        let output = node.take();
        self.carry_out(me, output)
    }

    /// Its disk can be written again.
    fn mend(&mut self, me: Pid) -> Result<(), String> {
        let site = self.site(me);
        site.failing = false;
        match site.stuck.take() {
            Some(output) => {
                self.say(format!("{me} can write again"));
                self.carry_out(me, output)
            }
            None => Ok(()),
        }
    }

    fn carry_out(&mut self, me: Pid, output: Output) -> Result<(), String> {
        let often = if output.record.is_some() { 60 } else { 1500 };
        let dies = !self.mended && self.rng.one_in(often);
        let late_writes = self.mutant == Mutant::SendBeforeWriting;
        if let Some(bytes) = &output.record {
            if self.sites[me as usize - 1].failing {
                self.counts.failed_disks += 1;
                self.say(format!("{me}'s disk fails"));
                // Either record may be there if it dies now.
                if self.rng.one_in(2) {
                    self.site(me).disk = Record::parse(bytes)?;
                    self.observe(me)?;
                }
                self.site(me).stuck = Some(output);
                return Ok(());
            }
            let lost = dies && self.rng.one_in(2);
            if lost {
                self.crash(me);
                return Ok(());
            }
            let node = self.sites[me as usize - 1].node.as_ref();
            let mut written = node.expect("it runs").record_for_test();
            // What is written is what is read again; looked at now and then, it takes its time.
            if self.rng.one_in(50) && Record::parse(bytes)? != written {
                return Err(format!("the record of {me} is not read as it was written"));
            }
            let site = self.site(me);
            if late_writes {
                match site.late.replace(written) {
                    Some(before) => written = before,
                    None => written = site.disk.clone(),
                }
            }
            self.site(me).disk = written;
            // Decided and folded is decided, though the member may die before anybody hears of it.
            self.observe(me)?;
            if dies {
                self.counts.crashes_written += 1;
                self.crash(me);
                return Ok(());
            }
        }
        for message in output.messages {
            if let Message::SequencePaxos(paxos) = &message {
                let sync = match &paxos.msg {
                    PaxosMsg::Promise(p) => p.log_sync.as_ref(),
                    PaxosMsg::AcceptSync(a) => Some(&a.log_sync),
                    _ => None,
                };
                let snapshot = sync.is_some_and(|s| s.decided_snapshot.is_some());
                self.counts.snapshots += u64::from(snapshot);
                if let PaxosMsg::AcceptSync(sync) = &paxos.msg {
                    let before = self.leaders.insert(sync.n.n, sync.n.pid);
                    self.counts.leaders += u64::from(before.is_none());
                }
            }
            let link = self.links.get_mut(&(me, message.get_receiver()));
            let link = link.ok_or_else(|| format!("{me} sends to nobody: {message:?}"))?;
            if !link.cut {
                link.queue.push_back(message);
            }
        }
        self.observe(me)?;
        self.answers(me, output.answers)?;
        if dies {
            self.crash(me);
        }
        Ok(())
    }

    /// What `me` has applied has to be the one history.
    fn observe(&mut self, me: Pid) -> Result<(), String> {
        let Some(node) = &mut self.sites[me as usize - 1].node else {
            return Ok(());
        };
        let trace = std::mem::take(&mut node.trace);
        for (idx, entry) in trace {
            let at = idx as usize;
            if let Some(there) = self.history.get(at) {
                if *there != entry {
                    return Err(format!("entry {idx} of {me} differs: {entry:?}, {there:?}"));
                }
                continue;
            }
            if at != self.history.len() {
                return Err(format!("{me} applies entry {idx} before those before it"));
            }
            let have = |s: &&Site| {
                let first = s.disk.compacted;
                first > idx || s.disk.log.get((idx - first) as usize) == Some(&entry)
            };
            let have = self.sites.iter().filter(have).count();
            if have < self.majority() {
                return Err(format!(
                    "entry {idx} is decided by {me}, but only in {have} records of {}",
                    self.n()
                ));
            }
            let mut state = self.states[at].clone();
            if let Outcome::Request(Ok(Reply::Vm(record))) = state.apply(&entry) {
                self.known.insert(format!("{record:?}"));
            }
            self.history.push(entry);
            self.states.push(state);
            self.counts.decided += 1;
        }
        let node = self.sites[me as usize - 1].node.as_ref().expect("as above");
        let (applied, idx) = node.applied_for_test();
        if self.states.get(idx as usize) != Some(applied) {
            return Err(format!(
                "the state of {me} after {idx} entries differs: {applied:?}, {:?}",
                self.states.get(idx as usize)
            ));
        }
        Ok(())
    }

    fn answers(&mut self, me: Pid, answers: Vec<(u64, Answer)>) -> Result<(), String> {
        for (ticket, answer) in answers {
            let asked = self.asked.remove(&ticket);
            let asked = asked.ok_or_else(|| format!("{me} answers {ticket} twice"))?;
            match (asked, answer) {
                (_, Answer::Refused(Refusal::Undecided { answering, members })) => {
                    if answering > members || members != self.sites.len() {
                        return Err(format!("{answering} of {members} members answer"));
                    }
                    self.counts.undecided += 1;
                }
                (Asked::Read { at_least }, Answer::Snapshot(snapshot)) => {
                    if snapshot.revision < at_least {
                        return Err(format!(
                            "a read gives revision {}, {at_least} was known before it",
                            snapshot.revision
                        ));
                    }
                    if snapshot.cluster == ClusterId::NIL {
                        return Err("a read of no cluster".into());
                    }
                    self.told = self.told.max(snapshot.revision);
                    self.counts.reads += 1;
                }
                (Asked::Command(command), Answer::Reply(Reply::Vm(record))) => {
                    self.counts.answered += 1;
                    if !self.known.contains(&format!("{record:?}")) {
                        return Err(format!("answered what never was: {record:?}"));
                    }
                    let newest = self.states.last().expect("never empty").state.revision();
                    // Its own revision is at most the newest; a read from now on may not show less than the state
                    // it was answered from.
                    let node = self.site(me).node.as_ref().map(|n| n.applied_for_test().0);
                    let revision = node.map_or(0, |a| a.state.revision());
                    self.told = self.told.max(revision.min(newest));
                    if let Command::TakeOver { vm, expect, by, .. } = &*command {
                        self.counts.granted += 1;
                        let by = by.to_string();
                        let before = self.granted.insert((*vm, *expect), by.clone());
                        if let Some(other) = before.filter(|other| *other != by) {
                            return Err(format!("{vm} in {expect} is given to {other} and {by}"));
                        }
                    }
                }
                (Asked::Command(_), Answer::Reply(Reply::Done { revision })) => {
                    self.counts.answered += 1;
                    self.told = self.told.max(revision);
                }
                (Asked::Command(command), Answer::Refused(Refusal::Rejected(_))) => {
                    self.counts.answered += 1;
                    self.counts.refused += u64::from(matches!(*command, Command::TakeOver { .. }));
                }
                (_, Answer::Refused(_)) => {}
                (_, answer) => return Err(format!("answered with {answer:?}")),
            }
        }
        Ok(())
    }

    fn random_command(&mut self) -> Command {
        let state = self.states.last().expect("never empty").state.snapshot();
        let pick = self.rng.next() as usize;
        let hosts = ["a", "b", "c", "d"];
        match state.records.get(pick % (state.records.len() + 1)) {
            Some(record) => {
                let view = &record.view;
                let owner = view.owner.to_string();
                if view.chain.is_empty() {
                    let chain: Vec<&str> = hosts.into_iter().filter(|h| *h != owner).collect();
                    reconfigure(view.vm, view.generation, &owner, &chain)
                } else {
                    let at = self.rng.below(view.chain.len() as u64) as usize;
                    let by = view.chain[at].host.to_string();
                    take_over(view.vm, view.generation, &by)
                }
            }
            None => register(&format!("vm{}", self.rng.below(3)), hosts[pick % 4]),
        }
    }

    fn ask(&mut self, me: Pid, asked: Asked) -> Result<u64, String> {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let event = match &asked {
            Asked::Command(command) => {
                let id = RequestId(u128::from(self.rng.next()) << 64 | u128::from(ticket));
                let order = Order::Vm((**command).clone());
                Event::Propose(ticket, Box::new(Request { id, order }))
            }
            Asked::Read { .. } => Event::Read(ticket),
        };
        if self.site(me).node.is_some() && self.site(me).stuck.is_none() {
            self.asked.insert(ticket, asked);
            self.feed(me, event)?;
        }
        Ok(ticket)
    }

    fn deliver(&mut self, from: Pid, to: Pid) -> Result<(), String> {
        let (repeat, burst) = (self.rng.one_in(50), 1 + self.rng.below(4));
        let link = self.links.get_mut(&(from, to)).expect("all pairs");
        if link.cut || self.sites[to as usize - 1].node.is_none() {
            return Ok(());
        }
        // What comes to one that stands still waits, new connections too.
        let stuck = |who: Pid| self.sites[who as usize - 1].stuck.is_some();
        if stuck(to) || link.renew && stuck(from) {
            return Ok(());
        }
        if link.renew && self.sites[from as usize - 1].node.is_some() {
            link.renew = false;
            // Both ends know of a new connection, whichever way it goes.
            self.feed(from, Event::Reconnected(to))?;
            return self.feed(to, Event::Reconnected(from));
        }
        for _ in 0..burst {
            let link = self.links.get_mut(&(from, to)).expect("all pairs");
            let Some(message) = link.queue.pop_front() else {
                return Ok(());
            };
            if repeat {
                self.counts.repeated += 1;
                self.feed(to, Event::Message(from, Box::new(message.clone())))?;
            }
            self.feed(to, Event::Message(from, Box::new(message)))?;
        }
        Ok(())
    }

    fn partition(&mut self) {
        // Sides, or one-way cuts.
        let (mask, one_way) = (self.rng.next(), self.rng.one_in(3));
        for ((from, to), link) in &mut self.links {
            let (a, b) = (mask >> from & 1, mask >> to & 1);
            link.cut = if one_way { a > b } else { a != b };
            if link.cut {
                link.queue.clear();
                link.renew = true;
            }
        }
        self.counts.partitions += 1;
        self.say(format!("partition {:b} {one_way}", mask & 0x3f));
    }

    pub fn step(&mut self) -> Result<(), String> {
        for site in &self.sites {
            let stopped = site.node.as_ref().and_then(Node::stopped);
            if let Some(why) = stopped {
                return Err(format!("stopped by itself: {why}"));
            }
        }
        let me = 1 + self.rng.below(self.n());
        let other = 1 + self.rng.below(self.n());
        match self.rng.below(1000) {
            0..200 => self.feed(me, Event::Tick)?,
            200..240 => {
                // All clocks at about the same pace, and time for what they cause.
                for me in 1..=self.n() {
                    self.feed(me, Event::Tick)?;
                    self.act(me)?;
                }
            }
            240..290 => {
                let command = self.random_command();
                self.ask(me, Asked::Command(Box::new(command)))?;
            }
            290..330 => {
                let at_least = self.told;
                self.ask(me, Asked::Read { at_least })?;
            }
            330..334 if self.site(me).node.is_some() => self.crash(me),
            334..345 if self.site(me).node.is_none() => self.start(me)?,
            345..352 if me != other => {
                for pair in [(me, other), (other, me)] {
                    let link = self.links.get_mut(&pair).expect("all pairs");
                    let keep = self.rng.below(link.queue.len() as u64 + 1) as usize;
                    link.queue.truncate(keep);
                    link.renew = true;
                }
                self.counts.breaks += 1;
                self.say(format!("{me} - {other} break"));
            }
            352..356 => self.partition(),
            356..362 => self.links.values_mut().for_each(|l| l.cut = false),
            362 => self.site(me).failing = true,
            363..366 => self.mend(me)?,
            _ if me != other => self.deliver(me, other)?,
            _ => {}
        }
        Ok(())
    }

    /// Everything that can be mended is; then there has to be progress within a bounded number of ticks.
    pub fn heal(&mut self) -> Result<(), String> {
        self.say("all is mended".into());
        self.mended = true;
        self.links.values_mut().for_each(|l| l.cut = false);
        for me in 1..=self.n() {
            self.mend(me)?;
            if self.site(me).node.is_none() {
                self.start(me)?;
            }
        }
        // All that was asked before is answered, or given up; then everybody is asked once more.
        for round in 0..2 {
            let mut tickets = Vec::new();
            if round == 1 {
                let at_least = self.told;
                for me in 1..=self.n() {
                    tickets.push((me, self.ask(me, Asked::Read { at_least })?));
                }
            }
            let given_up = self.counts.undecided;
            for _ in 0..PATIENCE_TICKS + 10 {
                for me in 1..=self.n() {
                    self.feed(me, Event::Tick)?;
                    self.act(me)?;
                }
                for _ in 0..3 {
                    let pairs: Vec<(Pid, Pid)> = self.links.keys().copied().collect();
                    for (from, to) in pairs {
                        self.deliver(from, to)?;
                        self.act(to)?;
                        self.act(from)?;
                    }
                }
                let open = |t: &u64| self.asked.contains_key(t);
                if round == 1 && !tickets.iter().any(|(_, t)| open(t)) {
                    break;
                }
            }
            if round == 1 {
                let open = tickets.iter().filter(|(_, t)| self.asked.contains_key(t));
                let open: Vec<_> = open.collect();
                if self.counts.undecided > given_up || !open.is_empty() {
                    return Err(format!("given up after all was mended: {open:?}"));
                }
            }
        }
        Ok(())
    }
}
