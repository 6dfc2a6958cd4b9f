//! The machine: which part this host has, and which input goes to which part.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use chain::master::Command;
use chain::{Life, Member, View, VmRecord};
use checkpoint::{Generation, HostId, VmId};

use super::off::Off;
use super::orphan::Orphan;
use super::owner::Owner;
use super::standby::Standby;
use super::{Answered, Disks, Effect, Input, MS, Micros, Order, Policy, Refusal, Report, Ticket};
use crate::control::EventKind;

/// Between questions to a master that does not answer.
const RETRY: Micros = 100 * MS;

/// This host's part.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    /// None, or none that it could take: then why.
    Nothing {
        /// Why it holds no replica although it is a member.
        declined: Option<Declined>,
    },
    /// It holds a replica, and a process waits to become the VM.
    Standby(Box<Standby>),
    /// It runs the VM.
    Owner(Box<Owner>),
    /// The VM is this host's, and runs nowhere.
    Orphan(Orphan),
    /// The same, by somebody's wish.
    Off(Off),
}

/// A replica that this host should hold and cannot.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Declined {
    /// In words.
    pub(super) why: String,
    /// When to try again, if it is a member still.
    pub(super) retry_at: Micros,
    /// How long to wait after that.
    pub(super) pause: Micros,
}

/// What a question to the master is for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Purpose {
    /// A takeover by this replica.
    TakeOver,
    /// After a takeover that was granted for an earlier checkpoint: the chain begins anew.
    Refill,
    /// Another chain.
    Chain,
    /// Which hosts are wanted as backups.
    Choose,
    /// Boot from this host's disks.
    Restart,
    /// The VM is to run nowhere.
    PowerOff(Option<Ticket>),
    /// Boot a VM that is off.
    Start,
    /// The cluster forgets it.
    Remove(Option<Ticket>),
    /// Another configuration.
    Update(Ticket),
}

impl Purpose {
    /// Who waits for what the master decides.
    pub(super) fn ticket(&self) -> Option<Ticket> {
        match self {
            Self::PowerOff(ticket) | Self::Remove(ticket) => *ticket,
            Self::Update(ticket) => Some(*ticket),
            _ => None,
        }
    }
}

/// The question under way; there is one at a time.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    id: u64,
    pub(super) purpose: Purpose,
    pub(super) command: Command,
    /// Not answered: asked again then.
    retry_at: Option<Micros>,
    pub(super) attempts: u32,
}

/// One VM on one host.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    pub(super) me: HostId,
    /// The chain servers of the other hosts.
    pub(super) peers: Arc<BTreeMap<HostId, SocketAddr>>,
    /// The newest configuration that this host follows.
    pub(super) record: VmRecord,
    pub(super) policy: Policy,
    pub(super) part: Part,
    pub(super) ask: Option<Ask>,
    /// A question that an order's has taken the place of: put again if nothing comes of that.
    shelved: Option<(Purpose, Command)>,
    asked: u64,
}

impl Machine {
    /// The machine of a VM that this host hears of for the first time; nothing is done yet. Feed it the record as
    /// [`Input::Decided`].
    #[must_use]
    pub fn new(me: HostId, peers: Arc<BTreeMap<HostId, SocketAddr>>, record: &VmRecord) -> Self {
        let mut known = record.clone();
        known.view.generation = Generation::ZERO;
        Self {
            policy: Policy::of(record),
            part: Part::Nothing { declined: None },
            ask: None,
            shelved: None,
            asked: 0,
            me,
            peers,
            record: known,
        }
    }

    /// The machine of a VM that was registered as this host's a moment ago, and boots here.
    #[must_use]
    pub fn starting(
        me: HostId,
        peers: Arc<BTreeMap<HostId, SocketAddr>>,
        record: &VmRecord,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Self {
        let mut new = Self::new(me, peers, record);
        new.record = record.clone();
        new.part = Part::Owner(Box::new(Owner::starting(ticket)));
        out.push(Effect::Boot(record.clone(), Disks::Configured));
        new
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> VmId {
        self.record.view.vm
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.view.name
    }

    /// The configuration followed.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.record.view
    }

    /// Its generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.record.view.generation
    }

    /// Takes one input at `now`; what is to be done is added to `out`.
    pub fn step(&mut self, now: Micros, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::Decided(record) => self.decided(now, record, out),
            Input::Removed => self.removed(out),
            Input::Proposed { ask, result } => self.proposed(now, ask, result, out),
            Input::Ordered(ticket, order) => self.ordered(now, ticket, order, out),
            Input::Suspected { silence_ms } => self.suspected(now, silence_ms, out),
            Input::ReplicaFailed { why } => {
                out.push(Effect::Say(
                    EventKind::Failed,
                    format!("replica failed: {why}"),
                ));
            }
            Input::Frozen(result) => self.frozen(now, result, out),
            Input::HandedOver(result) => self.handed_over(now, result, out),
            Input::Spawned(result) => self.spawned(now, result, out),
            Input::Report(report) => self.report(now, report, out),
            Input::Adopted(found) => self.adopted(now, found, out),
            Input::Buried => self.buried(out),
            Input::Bridged { generation, result } => self.bridged(generation, result, out),
            Input::Probed(answers) => self.probed(now, &answers, out),
            Input::Surveyed(answers) => self.surveyed(now, &answers, out),
            Input::DisksFound(result) => self.disks_found(now, result, out),
            Input::Tick => {}
        }
        self.settle(now, out);
    }

    /// What is due now, whatever came last: the parts say what they still want.
    fn settle(&mut self, now: Micros, out: &mut Vec<Effect>) {
        if let Some(ask) = &mut self.ask
            && ask.retry_at.is_some_and(|at| at <= now)
        {
            ask.retry_at = None;
            out.push(Effect::Propose {
                ask: ask.id,
                command: ask.command.clone(),
            });
        }
        match self.part {
            Part::Nothing { .. } => self.settle_nothing(now, out),
            Part::Standby(_) | Part::Off(_) => {}
            Part::Owner(_) => self.settle_owner(now, out),
            Part::Orphan(_) => self.settle_orphan(now, out),
        }
    }

    /// When to feed it [`Input::Tick`] at the latest, if nothing else comes before.
    #[must_use]
    pub fn wake_at(&self) -> Option<Micros> {
        let retry = self.ask.as_ref().and_then(|ask| ask.retry_at);
        let part = match &self.part {
            Part::Nothing { declined } => declined.as_ref().map(|declined| declined.retry_at),
            Part::Standby(_) | Part::Off(_) => None,
            Part::Owner(_) => self.owner_wakes_at(),
            Part::Orphan(orphan) => Some(orphan.wakes_at()),
        };
        [retry, part].into_iter().flatten().min()
    }

    fn decided(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Effect>) {
        if record.view.generation <= self.record.view.generation {
            // The hosts that are wanted change without a new generation.
            if record.view.generation == self.record.view.generation {
                self.record.hosts = record.hosts;
            }
            return;
        }
        let (new, old) = (&record, &self.record);
        if new.shape.config_toml != old.shape.config_toml || new.view.name != old.view.name {
            self.policy = Policy::of(&record);
        }
        let mine = record.view.owner == self.me;
        let member = record.view.holds(&self.me);
        if mine && record.life == Life::Off && !matches!(self.part, Part::Nothing { .. }) {
            return match self.part {
                Part::Off(_) => self.record = record,
                _ => self.powered_off(record, out),
            };
        }
        let starts = self.is_starts_answer(&record);
        match &mut self.part {
            Part::Off(_) if mine && starts => self.started(record, out),
            // What this host knew was old: it was started before, and may run.
            Part::Off(_) if mine => {
                let why = format!("{} was started before", self.name());
                self.answer_all(&why, out);
                self.ask_no_more(&why, out);
                self.part = Part::Nothing { declined: None };
                self.record = record;
                out.push(Effect::FindProcess);
            }
            Part::Off(_) => {
                self.record = record;
                let why = format!("{} owns it now", self.record.view.owner);
                self.answer_all(&why, out);
                self.part = Part::Nothing { declined: None };
                if member {
                    self.become_standby(out);
                }
            }
            Part::Owner(_) if mine => self.owner_follows(record, out),
            Part::Owner(_) => self.superseded(now, record, out),
            Part::Standby(standby) if mine => {
                if standby.is_asking() {
                    // The answer to this host's own question, by another way.
                    self.granted(now, record, out);
                } else {
                    self.granted_unheard(now, record, out);
                }
            }
            Part::Standby(standby) if member => {
                if standby.exists() {
                    out.push(Effect::Adopt(record.view.clone()));
                }
                self.record = record;
            }
            Part::Standby(_) => {
                self.record = record;
                self.give_replica_up(out);
            }
            Part::Orphan(_) if mine => self.record = record,
            Part::Nothing { .. } if mine => {
                self.record = record;
                // Its process may have outlived the agent that started it.
                out.push(Effect::FindProcess);
            }
            Part::Orphan(_) | Part::Nothing { .. } => {
                self.answer_orphans_orders(&record, out);
                self.record = record;
                match member {
                    true => self.become_standby(out),
                    false => self.part = Part::Nothing { declined: None },
                }
            }
        }
    }

    pub(super) fn become_standby(&mut self, out: &mut Vec<Effect>) {
        self.part = Part::Standby(Box::default());
        out.push(Effect::StandBy(self.record.clone()));
    }

    fn removed(&mut self, out: &mut Vec<Effect>) {
        out.push(Effect::RemoveReplica(self.generation().next()));
        out.push(Effect::Kill);
        // The news may be here before the answer.
        if let Some(Purpose::Remove(Some(ticket))) = self.ask.take().map(|ask| ask.purpose) {
            out.push(Effect::Answer(ticket, Ok(Answered::Done)));
        }
        let why = format!("{} was deleted meanwhile", self.name());
        self.answer_all(&why, out);
        self.part = Part::Nothing { declined: None };
        out.push(Effect::Forget);
    }

    /// Whoever waits for an order is told why nothing comes of it.
    pub(super) fn answer_all(&mut self, why: &str, out: &mut Vec<Effect>) {
        let tickets = match &mut self.part {
            Part::Owner(owner) => owner.tickets(),
            Part::Standby(standby) => standby.tickets(),
            Part::Orphan(orphan) => orphan.tickets(),
            Part::Off(off) => off.tickets(),
            Part::Nothing { .. } => Vec::new(),
        };
        for ticket in tickets {
            out.push(Effect::Answer(ticket, Err(why.into())));
        }
    }

    /// This host is no member any more.
    pub(super) fn give_replica_up(&mut self, out: &mut Vec<Effect>) {
        let owner = &self.record.view.owner;
        let why = format!(
            "this host is no backup of {} any more, which is {owner}'s",
            self.name()
        );
        self.answer_all(&why, out);
        out.push(Effect::RemoveReplica(self.generation()));
        out.push(Effect::Kill);
        self.part = Part::Nothing { declined: None };
    }

    /// Puts a question to the master; an older one is given up: its answer will not be heeded.
    pub(super) fn propose(&mut self, purpose: Purpose, command: Command, out: &mut Vec<Effect>) {
        if let Some(old) = self.ask.take() {
            match old.purpose {
                Purpose::Chain | Purpose::Restart => {
                    self.shelved = Some((old.purpose, old.command))
                }
                Purpose::Start => self.not_started("another order came after it".into(), out),
                _ => answer_ask(&old, "another order came after it", out),
            }
        }
        self.asked += 1;
        out.push(Effect::Propose {
            ask: self.asked,
            command: command.clone(),
        });
        self.ask = Some(Ask {
            id: self.asked,
            purpose,
            command,
            retry_at: None,
            attempts: 0,
        });
    }

    /// Nothing is asked any more; whoever waits for the answer is told why.
    pub(super) fn ask_no_more(&mut self, why: &str, out: &mut Vec<Effect>) {
        if let Some(ask) = self.ask.take() {
            answer_ask(&ask, why, out);
        }
    }

    /// Nothing has come of an order's question: the one before it is put again.
    fn ask_as_before(&mut self, out: &mut Vec<Effect>) {
        let Some((purpose, command)) = self.shelved.take() else {
            return;
        };
        let based_on = match &command {
            Command::Reconfigure { expect, .. } | Command::Restart { expect, .. } => *expect,
            _ => return,
        };
        if based_on == self.generation() {
            self.propose(purpose, command, out);
        }
    }

    fn proposed(
        &mut self,
        now: Micros,
        id: u64,
        result: Result<VmRecord, Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let Some(ask) = self.ask.as_mut().filter(|ask| ask.id == id) else {
            // Given up meanwhile; what was decided counts all the same.
            if let Ok(record) = result {
                self.decided(now, record, out);
            }
            return;
        };
        if let Err(Refusal::Unknown(why)) = &result {
            ask.attempts += 1;
            if !self.gives_up() {
                let ask = self.ask.as_mut().expect("looked up above");
                ask.retry_at = Some(now + RETRY);
                if ask.attempts == 1 {
                    let text = format!("the master has not decided yet: {why}");
                    out.push(Effect::Say(EventKind::Refused, text));
                }
                return;
            }
        }
        let Some(ask) = self.ask.take() else { return };
        match (ask.purpose.clone(), result) {
            (Purpose::TakeOver | Purpose::Refill, Ok(record))
                if record.view.generation <= self.generation() =>
            {
                self.granted_too_late(out);
            }
            (Purpose::TakeOver, Ok(record)) => self.granted(now, record, out),
            (Purpose::Refill, Ok(record)) => self.take_apart(now, record, out),
            (Purpose::TakeOver | Purpose::Refill, Err(why)) => self.not_granted(&why, out),
            (Purpose::Chain, Ok(record)) => self.decided(now, record, out),
            (Purpose::Chain, Err(why)) => {
                // Somebody else was faster, perhaps a backup that took over: what has been decided is read.
                let text = format!("chain not changed: {}", why.text());
                self.not_parted(&text, out);
                out.push(Effect::Say(EventKind::Refused, text));
                out.push(Effect::Read);
            }
            (Purpose::Choose, Ok(record)) => self.decided(now, record, out),
            (Purpose::Choose, Err(_)) => out.push(Effect::Read),
            (Purpose::Restart, Ok(record)) => self.restarted(record, out),
            (Purpose::Restart, Err(why)) => {
                let why = format!("not booted from this host's disks: {}", why.text());
                self.not_booted(now, why, out);
                out.push(Effect::Read);
            }
            (Purpose::PowerOff(_), Ok(record)) => {
                // Whoever waits is answered once the process is gone.
                self.ask = Some(ask);
                self.decided(now, record, out);
            }
            (Purpose::Update(ticket), Ok(record)) => {
                self.decided(now, record, out);
                self.updated(ticket, out);
            }
            (Purpose::Start, Ok(record)) => self.started(record, out),
            (Purpose::Start, Err(why)) => self.start_refused(&why, out),
            (Purpose::Remove(ticket), Ok(_)) => {
                if let Some(ticket) = ticket {
                    out.push(Effect::Answer(ticket, Ok(Answered::Done)));
                }
                self.removed(out);
            }
            (Purpose::PowerOff(_) | Purpose::Update(_) | Purpose::Remove(_), Err(why)) => {
                answer_ask(&ask, &why.text(), out);
                out.push(Effect::Read);
                self.ask_as_before(out);
                self.off_all_the_same(&why, out);
            }
        }
    }

    /// Whether a question that was not answered again is not to be repeated.
    fn gives_up(&self) -> bool {
        /// A replica that asks stands still, and somebody waits for an order.
        const ATTEMPTS: u32 = 20;
        const ORDER_ATTEMPTS: u32 = 1;
        self.ask.as_ref().is_some_and(|ask| match ask.purpose {
            Purpose::TakeOver | Purpose::Refill | Purpose::Restart => ask.attempts > ATTEMPTS,
            Purpose::Remove(_) | Purpose::Start | Purpose::PowerOff(Some(_)) => {
                ask.attempts >= ORDER_ATTEMPTS
            }
            // An owner's chain may follow it already, in a generation that is the owner's own.
            Purpose::Update(_) => {
                !matches!(self.part, Part::Owner(_)) && ask.attempts >= ORDER_ATTEMPTS
            }
            // The VM's output is held until the master decides; nothing else may decide in its place.
            Purpose::Chain | Purpose::Choose | Purpose::PowerOff(None) => false,
        })
    }

    fn ordered(&mut self, now: Micros, ticket: Ticket, order: Order, out: &mut Vec<Effect>) {
        let done = match order {
            Order::Failover => self.order_failover(now, ticket, out),
            Order::HandOver => self.order_hand_over(now, ticket, out),
            Order::Drill => self.order_drill(now, ticket, out),
            Order::Recover { resumable } => self.order_recover(now, ticket, resumable, out),
            Order::Protect { backups } => self.order_protect(ticket, backups, out),
            Order::Unprotect => self.order_unprotect(ticket),
            Order::Apply { shape } => self.order_apply(ticket, *shape, out),
            Order::Stop => self.order_stop(ticket, out),
            Order::ShutDown { patience } => self.order_shut_down(now, ticket, patience, out),
            Order::Reboot { patience } => self.order_reboot(now, ticket, patience, out),
            Order::Start => self.order_start(ticket, out),
            Order::Delete => self.order_delete(ticket, out),
        };
        if let Err(why) = done {
            out.push(Effect::Answer(ticket, Err(why)));
        }
    }

    fn report(&mut self, now: Micros, report: Report, out: &mut Vec<Effect>) {
        match self.part {
            Part::Owner(_) => self.owner_report(now, report, out),
            Part::Standby(_) => self.standby_report(now, &report, out),
            Part::Nothing { .. } | Part::Orphan(_) | Part::Off(_) => {}
        }
    }

    /// The member that `host` would be.
    pub(super) fn member(&self, host: &HostId) -> Option<Member> {
        let addr = self.peers.get(host)?;
        Some(Member::new(host.clone(), *addr))
    }
}

fn answer_ask(ask: &Ask, why: &str, out: &mut Vec<Effect>) {
    if let Some(ticket) = ask.purpose.ticket() {
        out.push(Effect::Answer(ticket, Err(why.into())));
    }
}

impl Refusal {
    /// In words.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Rejected(why) | Self::Unknown(why) => why.clone(),
        }
    }
}
