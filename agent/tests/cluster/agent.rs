//! A host's agent: the shipped machine, and what its driver (`src/daemon/run.rs`) keeps beside it. Each VM's inputs come one
//! after the other; what takes its time is an [`Errand`], done in any order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use agent::host::{Answered, Effect, Fate, Input, Machine, Order, Refusal, Report, Tell, Ticket};
use chain::master::{Followed, Follower, Snapshot};
use chain::{Mark, VmRecord};
use checkpoint::{ClusterId, Epoch, HostId};

use super::errands::Errand;
use super::kept::Kept;
use super::{Content, Mutant, Reply, World, member, name};

/// What a replica that was taken apart leaves.
#[derive(Clone, Debug)]
pub struct Handed {
    pub mark: Mark,
    pub content: Content,
    pub acked: Epoch,
    pub kept: Kept,
}

/// The process that the agent has started, or found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    None,
    Standby,
    Owner,
}

#[derive(Clone, Debug)]
pub struct Agent {
    /// Which life of it this is: what an earlier one asked for nobody hears.
    pub life: u32,
    follower: Follower,
    pub machine: Option<Machine>,
    /// Named as in the daemon: what an older one says is not heeded.
    pub number: u64,
    pub process: Process,
    pub spawning: bool,
    pub next: Option<Effect>,
    pub handed: Option<Handed>,
    pub kept: Kept,
    /// The mailbox.
    pub mail: std::collections::VecDeque<Input>,
    /// On its way to the process.
    pub told: std::collections::VecDeque<Tell>,
    pub errands: Vec<Errand>,
    /// Orders that are not answered.
    pub tickets: BTreeMap<Ticket, Order>,
    ticket: Ticket,
}

impl Agent {
    pub fn new(life: u32) -> Self {
        Self {
            life,
            follower: Follower::new(Some(ClusterId::NIL)),
            machine: None,
            number: 0,
            process: Process::None,
            spawning: false,
            next: None,
            handed: None,
            kept: Kept::default(),
            mail: Default::default(),
            told: Default::default(),
            errands: Vec::new(),
            tickets: BTreeMap::new(),
            ticket: 0,
        }
    }

    /// Of which it knows everything that the master has decided.
    pub fn revision(&self) -> u64 {
        self.follower.revision()
    }

    /// What its machine asks the master.
    pub fn owns(&self) -> bool {
        self.machine.as_ref().is_some_and(|machine| {
            let role = machine.summary().role;
            role == agent::host::Role::Owner
        })
    }
}

fn peers(hosts: usize, me: usize) -> Arc<BTreeMap<HostId, SocketAddr>> {
    let others = (0..hosts).filter(|i| *i != me);
    Arc::new(others.map(|i| (name(i), member(i).addr)).collect())
}

impl World {
    /// All hosts have agents; the first has booted the VM.
    pub fn begin_agents(&mut self) {
        for i in 0..self.hosts.len() {
            self.hosts[i].agent.0 = Some(Box::new(Agent::new(0)));
        }
        let record = self.record().expect("registered").clone();
        let (peers, mut out) = (peers(self.hosts.len(), 0), Vec::new());
        let machine = Machine::starting(name(0), peers, &record, 0, &mut out);
        let agent = self.agent(0).expect("made above");
        agent.machine = Some(machine);
        agent.process = Process::Owner;
        agent.number = 1;
        for input in [Input::Spawned(Ok(())), Input::Report(Report::Ready)] {
            self.feed(0, input).expect("the beginning");
        }
    }

    pub fn agent(&mut self, i: usize) -> Option<&mut Agent> {
        self.hosts[i].agent.0.as_deref_mut()
    }

    pub fn machine(&self, i: usize) -> Option<&Machine> {
        self.hosts[i].agent.0.as_ref()?.machine.as_ref()
    }

    /// The machine takes an input; what it wants done is done, or begun.
    pub fn feed(&mut self, i: usize, input: Input) -> Result<(), String> {
        let now = self.clock.0;
        let mut out = Vec::new();
        if input != Input::Tick {
            self.say(|| format!("h{i}'s agent: {}", short(&input)));
        }
        let Some(machine) = self.agent(i).and_then(|agent| agent.machine.as_mut()) else {
            return Ok(());
        };
        machine.step(now, input, &mut out);
        for effect in out {
            self.carry_out_effect(i, effect)?;
        }
        Ok(())
    }

    /// Time has passed.
    ///
    /// # Errors
    /// If the machine wants to be told so again, at once: its thread would never rest.
    pub fn tick(&mut self, i: usize) -> Result<(), String> {
        for _ in 0..2 {
            self.feed(i, Input::Tick)?;
            if self.wakes_at(i).is_none_or(|at| at > self.clock.0) {
                return Ok(());
            }
        }
        let machine = self.machine(i);
        Err(format!("liveness: h{i}'s agent does not rest: {machine:?}"))
    }

    /// The next letter is taken out of the mailbox.
    pub fn take_mail(&mut self, i: usize) -> Result<(), String> {
        match self.agent(i).and_then(|agent| agent.mail.pop_front()) {
            Some(input) => self.feed(i, input),
            None => Ok(()),
        }
    }

    /// An answer of the master arrives.
    pub fn agent_hears(&mut self, i: usize, reply: Reply) -> Result<(), String> {
        let Reply { by, result } = reply;
        if self.agent(i).is_none_or(|agent| agent.life != by.0) {
            return Ok(());
        }
        let result = result.map(|record| VmRecord::clone(&record));
        self.feed(i, Input::Proposed { ask: by.1, result })
    }

    /// Nothing is known of what was asked.
    pub fn unknown(&mut self, i: usize, by: (u32, u64)) -> Result<(), String> {
        let result = Err(Refusal::Unknown("no answer".into()));
        self.agent_hears(i, Reply { by, result })
    }

    /// The host hears what the master had decided by then.
    pub fn agent_watches(&mut self, i: usize, moment: usize) -> Result<(), String> {
        let (revision, record) = self.past.0[moment].clone();
        let records: Vec<VmRecord> = record.iter().map(|r| VmRecord::clone(r)).collect();
        let snapshot = Snapshot {
            cluster: ClusterId::NIL,
            revision,
            records,
            hosts: Vec::new(),
        };
        let believes = self.is(Mutant::StaleTaken);
        let Some(agent) = self.agent(i) else {
            return Ok(());
        };
        let before = agent.follower.revision();
        if believes && revision < before {
            agent.follower = Follower::new(Some(ClusterId::NIL));
            if record.is_none() {
                return self.feed(i, Input::Removed);
            }
        }
        let news = agent.follower.snapshot(&snapshot);
        if revision >= before || believes {
            self.give_up_found(i, &snapshot);
        }
        for news in news {
            if let Followed::Removed(_) = news {
                self.feed(i, Input::Removed)?;
            }
        }
        match record {
            Some(record) if revision >= before || believes => self.hear_record(i, &record),
            _ => Ok(()),
        }
    }

    /// As `src/daemon/table.rs` does with a record: a machine is made for a VM that has come to this host.
    fn hear_record(&mut self, i: usize, record: &Arc<VmRecord>) -> Result<(), String> {
        let me = name(i);
        let hosts = self.hosts.len();
        let Some(agent) = self.agent(i) else {
            return Ok(());
        };
        if agent.machine.is_none() {
            if record.view.owner != me && !record.view.holds(&me) {
                return Ok(());
            }
            let life = agent.life;
            let (mail, follower) = (std::mem::take(&mut agent.mail), agent.follower.clone());
            *agent = Agent::new(life);
            agent.follower = follower;
            agent.mail = mail;
            agent.machine = Some(Machine::new(me, peers(hosts, i), record));
        }
        self.feed(i, Input::Decided(VmRecord::clone(record)))
    }

    /// As `src/daemon/watch.rs` does with a process that it has found running, before its VM has a machine.
    fn give_up_found(&mut self, i: usize, snapshot: &Snapshot) {
        let found = self
            .agent(i)
            .is_some_and(|agent| agent.process == Process::None);
        let Some(owns) = self.owns(i).filter(|_| found) else {
            return;
        };
        if let Fate::Elsewhere(_) | Fate::Deleted = Fate::of(&owns, &name(i), snapshot) {
            self.say(|| format!("h{i} ends the process it has found"));
            self.end_process(i);
        }
    }

    pub fn order(&mut self, i: usize, order: &Order) -> Result<(), String> {
        let Some(agent) = self.agent(i).filter(|agent| agent.machine.is_some()) else {
            return Ok(());
        };
        agent.ticket += 1;
        let ticket = agent.ticket;
        agent.tickets.insert(ticket, order.clone());
        self.counts.0.orders += 1;
        self.say(|| format!("h{i} is ordered {ticket}: {order:?}"));
        self.feed(i, Input::Ordered(ticket, order.clone()))
    }

    /// An order has been answered.
    pub fn answered(&mut self, i: usize, ticket: Ticket, result: &Result<Answered, String>) {
        self.say(|| format!("h{i} answers {ticket}: {result:?}"));
        let order = self
            .agent(i)
            .and_then(|agent| agent.tickets.remove(&ticket));
        let counts = &mut self.counts.0;
        if let (Some(order), Ok(_)) = (order, result) {
            match order {
                Order::Stop => counts.stopped += 1,
                Order::Start => counts.started += 1,
                Order::Delete => counts.deleted += 1,
                Order::HandOver => counts.handed_over += 1,
                Order::Unprotect => counts.unprotected += 1,
                Order::Apply { .. } => counts.applied += 1,
                _ => {}
            }
        }
    }

    /// When the machine has to be told that time has passed.
    pub fn wakes_at(&self, i: usize) -> Option<u64> {
        if !self.hosts[i].up {
            return None;
        }
        self.machine(i)?.wake_at().filter(|at| *at != u64::MAX)
    }

    /// Time passes until somebody has something to do.
    pub fn wait(&mut self) {
        let next = (0..self.hosts.len()).filter_map(|i| self.wakes_at(i)).min();
        if let Some(next) = next {
            self.clock.0 = self.clock.0.max(next);
        }
    }
}

fn short(input: &Input) -> String {
    let mut text = match input {
        Input::Decided(record) => format!("decided {}", record.view.generation),
        Input::Proposed { ask, result } => {
            let result = result.as_ref().map(|record| record.view.generation);
            format!("proposed {ask}: {result:?}")
        }
        other => format!("{other:?}"),
    };
    text.truncate(200);
    text
}
