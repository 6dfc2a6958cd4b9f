//! Everything that can happen next.

use chain::replica::Event;
use checkpoint::Generation;

use agent::host::{Input, Order};

use super::{LinkId, Mutant, World};

/// Microseconds that a step takes.
const STEP_US: u64 = 200;

/// What an owner may wish for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Plan {
    /// The chain without these; without any, a new generation of the same chain.
    Without(Vec<usize>),
    Unprotected,
    Anew(Vec<usize>),
    Join(usize),
    /// What is joining becomes the tail.
    Promote,
}

/// One thing that happens; its outcome depends on nothing but the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next frame arrives.
    Down(LinkId),
    /// The next answer arrives.
    Up(LinkId),
    /// The VM runs for an epoch.
    Run(usize),
    /// The owner says that it lives.
    Beat(usize),
    Connect(usize),
    /// The time for connecting is over.
    ConnectFails(usize),
    /// A new owner brings its chain up to date.
    Bridge(usize),
    BridgeFails(usize),
    /// Commits are overdue, and the owner's process says so.
    Slow(usize),
    /// The agent reads its mail.
    Mail(usize),
    /// The process does what it was told.
    Obey(usize),
    /// Something that an agent does on the side is done, or cannot be.
    Errand(usize, usize),
    ErrandFails(usize, usize),
    /// So much time has passed that the agent looks up.
    Tick(usize),
    /// Time passes until somebody looks up.
    Wait,
    /// A replica hears nothing of its predecessor.
    Suspect(usize),
    /// The master does not answer for so long that it is asked no more.
    Silence(usize),
    Order(usize, Order),
    /// A host hears what the master had decided at one moment.
    Watch(usize, usize),
    /// An agent ends; the VM's process goes on.
    AgentEnds {
        host: usize,
        recovers: bool,
        prepared: bool,
    },
    AgentReturns(usize),
    /// The guest powers itself off.
    PowersOff(usize),
    /// The owner's disk fails: a backup that has everything is to take the VM over.
    GivesUp(usize),
    /// It listens to the tail's acknowledgements, whether or not the rest of the chain is there.
    ListenToTail(usize),
    /// A replica connects to the next one.
    Link(usize),
    Feed(usize),
    /// A disk is done.
    Prepared(usize),
    /// So much time passes for a failed replica that it says so again.
    StillFailed(usize),
    /// A host hears of the newest configuration.
    Look(usize),
    /// A replica asks for the VM.
    Ask(usize),
    /// The master decides on this request.
    Decide(usize),
    /// This request never arrives.
    Forget(usize),
    Hear(usize),
    /// This answer never arrives.
    Lose(usize),
    GiveUp(usize),
    Propose(usize, Plan),
    Crash {
        host: usize,
        recovers: bool,
        prepared: bool,
    },
    Back(usize),
    Cut(LinkId),
    Part(usize, usize),
    Heal(usize, usize),
    /// The next checkpoint cannot be prepared there.
    Doom {
        host: usize,
        damaged: bool,
    },
    /// The next replica acknowledges what nobody has.
    Lie(usize),
}

impl World {
    /// Makes it happen, and checks what must hold at every instant.
    ///
    /// # Errors
    /// What does not hold.
    pub fn apply(&mut self, step: &Step) -> Result<(), String> {
        self.clock.0 += STEP_US;
        match step {
            Step::ConnectFails(i) => self.fail_to_connect(*i),
            Step::Bridge(i) => self.bridge(*i),
            Step::BridgeFails(i) => self.fail_to_bridge(*i),
            Step::Slow(i) => {
                self.say_slow(*i);
                Ok(())
            }
            Step::Mail(i) => self.take_mail(*i),
            Step::Obey(i) => self.obey(*i),
            Step::Errand(i, which) => self.run_errand(*i, *which),
            Step::ErrandFails(i, which) => self.fail_errand(*i, *which),
            Step::Tick(i) => self.tick(*i),
            Step::Wait => {
                self.wait();
                Ok(())
            }
            Step::Suspect(i) => self.feed(*i, Input::Suspected { silence_ms: 300 }),
            Step::Silence(i) => self.silence(*i),
            Step::PowersOff(i) => {
                self.power_off(*i);
                Ok(())
            }
            Step::GivesUp(i) => {
                self.give_vm_up(*i);
                Ok(())
            }
            Step::Order(i, order) => self.order(*i, order),
            Step::Watch(i, moment) => self.agent_watches(*i, *moment),
            Step::AgentEnds {
                host,
                recovers,
                prepared,
            } => {
                self.end_agent(*host, *recovers, *prepared);
                Ok(())
            }
            Step::AgentReturns(i) => {
                self.agent_returns(*i);
                Ok(())
            }
            Step::Down(link) => self.deliver_down(*link),
            Step::Up(link) => self.deliver_up(*link),
            Step::Run(i) => self.run_owner(*i),
            Step::Beat(i) => {
                self.beat(*i);
                Ok(())
            }
            Step::Connect(i) => self.connect(*i),
            Step::Link(i) => self.link_next(*i),
            Step::Feed(i) => self.fill(*i),
            Step::Prepared(i) => self.finish_prepare(*i),
            Step::StillFailed(i) => self.still_failed(*i),
            Step::Look(i) => self.look(*i),
            Step::Ask(i) => {
                self.ask(*i);
                Ok(())
            }
            Step::Decide(which) => {
                self.decide(*which);
                Ok(())
            }
            Step::Forget(which) => {
                let asked = self.asked.remove(*which);
                self.unknown(asked.host, asked.by)
            }
            Step::Hear(which) => self.hear(*which),
            Step::Lose(which) => {
                let answer = self.answers.remove(*which);
                match answer.reply.0 {
                    Some(reply) => self.unknown(answer.host, reply.by),
                    None => Ok(()),
                }
            }
            Step::GiveUp(i) => self.give_up_asking(*i),
            Step::ListenToTail(i) => self.listen_to_tail(*i),
            Step::Propose(i, plan) => {
                self.propose(*i, plan);
                Ok(())
            }
            Step::Crash {
                host,
                recovers,
                prepared,
            } => {
                self.crash(*host, *recovers, *prepared);
                Ok(())
            }
            Step::Back(i) => {
                self.come_back(*i);
                Ok(())
            }
            Step::Cut(link) => {
                self.counts.0.cuts += 1;
                self.say(|| format!("{link:?} ends"));
                self.cut(*link);
                Ok(())
            }
            Step::Part(a, b) => {
                self.part(*a, *b);
                Ok(())
            }
            Step::Heal(a, b) => {
                self.blocked.remove(&(*a.min(b), *a.max(b)));
                Ok(())
            }
            Step::Doom { host, damaged } => {
                if let Some(standby) = self.standby(*host) {
                    standby.doomed = Some(*damaged);
                }
                Ok(())
            }
            Step::Lie(i) => {
                self.lie(*i);
                Ok(())
            }
        }?;
        self.check()
    }

    /// All that this host asks of the master comes to nothing, until it asks no more.
    fn silence(&mut self, i: usize) -> Result<(), String> {
        for _ in 0..25 {
            let Some(which) = self.asked.iter().position(|asked| asked.host == i) else {
                return Ok(());
            };
            let asked = self.asked.remove(which);
            self.unknown(i, asked.by)?;
            if let Some(at) = self.wakes_at(i) {
                self.clock.0 = self.clock.0.max(at);
            }
            self.feed(i, Input::Tick)?;
        }
        Ok(())
    }

    fn still_failed(&mut self, i: usize) -> Result<(), String> {
        for _ in 0..50 {
            self.step_machine(i, Event::Tick { now_ms: 0 }, None)?;
        }
        Ok(())
    }

    /// Whether replica `i` has failed, and nothing of it is on its way up.
    fn is_silently_failed(&self, i: usize) -> bool {
        let failed = self.hosts[i]
            .standby
            .as_ref()
            .is_some_and(|s| s.machine.failed().is_some());
        let quiet = |link| self.links.get(&link).is_some_and(|l| l.up.is_empty());
        failed && !self.is(Mutant::FailedOnce) && self.up_link(i).is_some_and(quiet)
    }

    fn beat(&mut self, i: usize) {
        if let Some(owner) = &mut self.hosts[i].owner
            && let Some(head) = owner.view.chain.first()
        {
            owner.overdue.0 += 1;
            let link = Self::update_link(i, super::index(&head.host), owner.generation());
            self.send_down(link, [super::Message::Heartbeat]);
        }
    }

    fn lie(&mut self, i: usize) {
        if let Some(link) = self.down_link(i)
            && let Some(hist) = self.standby(i).and_then(|s| s.machine.hist())
        {
            let ahead = checkpoint::Epoch(hist.epoch.0 + 1_000_000);
            self.send_up(link, super::Message::Ack(link.generation, ahead));
        }
    }

    /// Frames and answers that can arrive now.
    pub fn deliveries(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (i, host) in self.hosts.iter().enumerate() {
            if let Some(agent) = &host.agent.0 {
                if !agent.mail.is_empty() {
                    steps.push(Step::Mail(i));
                }
                if !agent.told.is_empty() {
                    steps.push(Step::Obey(i));
                }
            }
        }
        for (id, link) in &self.links {
            if !link.down.is_empty() && self.takes(id.to) {
                steps.push(Step::Down(*id));
            }
            if !link.up.is_empty() && self.takes(id.from) {
                steps.push(Step::Up(*id));
            }
        }
        steps
    }

    /// What agents and servers do by themselves now, apart from deliveries and from running the VM.
    pub fn errands(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for i in self.hosts_where(|_| true) {
            let host = &self.hosts[i];
            if self.can_look(i) {
                steps.push(Step::Look(i));
            }
            if self.is_silently_failed(i) {
                steps.push(Step::StillFailed(i));
            }
            if self.can_link(i) {
                steps.push(Step::Link(i));
            }
            if self.can_connect(i) {
                steps.push(Step::Connect(i));
            }
            if self.can_listen_to_tail(i) {
                steps.push(Step::ListenToTail(i));
            }
            if self.can_bridge(i) {
                steps.push(Step::Bridge(i));
            }
            if let Some(agent) = &host.agent.0 {
                let errands = 0..agent.errands.len();
                steps.extend(errands.map(|which| Step::Errand(i, which)));
                if self.wakes_at(i).is_some_and(|at| at <= self.clock.0) {
                    steps.push(Step::Tick(i));
                }
            }
            if let Some(standby) = &host.standby {
                if standby.preparing.is_some() {
                    steps.push(Step::Prepared(i));
                } else if matches!(
                    standby.feeding,
                    Some(super::standby::Feeding::Wanted | super::standby::Feeding::Copying(_))
                ) && self.down_link(i).is_some()
                {
                    steps.push(Step::Feed(i));
                }
            }
        }
        for (which, asked) in self.asked.iter().enumerate() {
            if self.reaches_master(asked.host) {
                steps.push(Step::Decide(which));
            }
        }
        for (which, answer) in self.answers.iter().enumerate() {
            if self.takes(answer.host) && self.reaches_master(answer.host) {
                steps.push(Step::Hear(which));
            }
        }
        steps
    }

    /// The generation in force.
    pub fn generation(&self) -> Generation {
        self.view().generation
    }
}
