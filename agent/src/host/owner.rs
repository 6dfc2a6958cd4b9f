//! An owner: its process, what that reports, and whom the VM is handed to when it cannot go on.

use std::collections::BTreeMap;

use chain::{Life, Mark, VmRecord};
use checkpoint::{Generation, HostId};

use super::chain_care::Probing;
use super::changes::Update;
use super::machine::{Part, Purpose};
use super::off::Off;
use super::{Answered, Effect, Loss, MS, Machine, Micros, Report, SECOND, Tell, Ticket};
use crate::child::proto::{GuestEnd, Owns};
use crate::control::{EventKind, FailoverReport, Switched};

/// How long a process may take to boot a guest.
const BOOT_PATIENCE: Micros = 60 * SECOND;
/// How long a standby may take to become the VM.
const ACTIVATE_PATIENCE: Micros = 20 * SECOND;
/// How long the guest's last epoch may take to be committed in a planned switchover.
const STOP_PATIENCE: Micros = 10 * SECOND;
/// How long the head may take to ask the master for the VM.
const TAKE_PATIENCE: Micros = 5 * SECOND;
/// After a failure a host is left alone for this long: at first, and at most.
const RETRY: (Micros, Micros) = (SECOND, 60 * SECOND);

/// How far the process is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Phase {
    /// It is being started.
    Spawning,
    /// It boots the guest, for so long at most.
    Booting(Micros),
    /// The standby becomes the VM, within this time.
    Activating(Micros, Box<FailoverReport>),
    /// The guest runs, or could.
    Running,
    /// The guest has ended; in words.
    Ended(String),
}

/// Who waits for the VM to be another host's.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Leaving {
    ticket: Ticket,
    begun: Micros,
    /// Then it runs on here.
    until: Micros,
    /// The guest stands still, and its last checkpoint is committed.
    stopped: bool,
    /// The configuration that it is to leave from.
    generation: Generation,
}

/// Who waits for the guest to switch itself off, or to boot again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Closing {
    ticket: Ticket,
    until: Micros,
    /// How long it had.
    patience: Micros,
    /// It boots again.
    reboot: bool,
}

impl Closing {
    pub(super) fn new(now: Micros, ticket: Ticket, patience: Micros, reboot: bool) -> Self {
        Self {
            ticket,
            until: now.saturating_add(patience),
            patience,
            reboot,
        }
    }
}

/// The VM's owner.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Owner {
    pub(super) phase: Phase,
    /// Who waits for it to run.
    ticket: Option<Ticket>,
    /// It was registered for this start, and nothing is left of it if that fails.
    fresh: bool,
    /// What is to be said once it runs.
    started: String,
    /// The last takeover by this host.
    pub(super) failover: Option<FailoverReport>,
    /// The generation whose first checkpoint is committed.
    pub(super) protected: Option<Generation>,
    /// Why it is less safe than it should be.
    pub(super) trouble: Option<String>,
    /// The hosts that should back it up, in order of preference; none: nobody has asked for protection.
    pub(super) wanted: Vec<HostId>,
    /// The order of `wanted` counts: an administrator has asked for it.
    pub(super) arrange: bool,
    /// `wanted` is to be noted at the master.
    pub(super) choose: bool,
    pub(super) retries: Retries,
    /// Why hosts that should back it up do not.
    pub(super) absent: BTreeMap<HostId, String>,
    /// A new owner's chain may lack what came up to this checkpoint.
    pub(super) bridge: Option<Mark>,
    /// The generation that its process followed when this agent found it: what the agent has heard of may be older.
    follows: Generation,
    /// Losses that nobody has looked into: of this generation, or of one that this agent has not heard of yet.
    pub(super) losses: Vec<Loss>,
    pub(super) probing: Option<Probing>,
    /// The generation whose chain could not begin, though nothing is wrong with it, and why.
    pub(super) failed_attempt: Option<(Generation, String)>,
    /// The generation in which what was joining has everything.
    pub(super) joiner_ready: Option<Generation>,
    /// The generation whose last backup is lost: it stands still since then, until another chain has it, or it is to run
    /// alone.
    pub(super) frozen: Option<Generation>,
    /// Its guest has switched itself off: the VM is to be off, whatever happens to the question about that.
    pub(super) off: bool,
    pub(super) leaving: Option<Leaving>,
    /// Its guest has been asked to switch itself off.
    pub(super) closing: Option<Closing>,
    /// Who waits for it to have no backups any more.
    pub(super) parting: Vec<Ticket>,
    /// A configuration that the master is to be asked for.
    pub(super) update: Option<Update>,
    /// When to look for missing backups again.
    look_at: Micros,
    /// When to ask again whether one that is to leave the chain may.
    pub(super) leave_at: Micros,
}

/// When to try hosts again that were lost.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Retries(BTreeMap<HostId, (Micros, Micros)>);

impl Retries {
    /// It was lost, or could not join.
    pub(super) fn failed(&mut self, host: &HostId, now: Micros) {
        let entry = self.0.entry(host.clone()).or_insert((now, RETRY.0));
        entry.0 = now + entry.1;
        entry.1 = RETRY.1.min(entry.1 * 2);
    }

    pub(super) fn joined(&mut self, host: &HostId) {
        self.0.remove(host);
    }

    pub(super) fn due(&self, host: &HostId, now: Micros) -> bool {
        now >= self.due_at(host)
    }

    pub(super) fn due_at(&self, host: &HostId) -> Micros {
        self.0.get(host).map_or(0, |(at, _)| *at)
    }

    /// An administrator wants it now.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}

impl Owner {
    fn new(phase: Phase, ticket: Option<Ticket>) -> Self {
        Self {
            phase,
            ticket,
            fresh: false,
            started: "runs, not protected yet".into(),
            failover: None,
            protected: None,
            trouble: None,
            wanted: Vec::new(),
            arrange: false,
            choose: false,
            retries: Retries::default(),
            absent: BTreeMap::new(),
            bridge: None,
            follows: Generation::ZERO,
            losses: Vec::new(),
            probing: None,
            failed_attempt: None,
            joiner_ready: None,
            frozen: None,
            off: false,
            leaving: None,
            closing: None,
            parting: Vec::new(),
            update: None,
            look_at: 0,
            leave_at: 0,
        }
    }

    /// Of a VM that boots for the first time.
    pub(super) fn starting(ticket: Ticket) -> Self {
        Self {
            fresh: true,
            ..Self::new(Phase::Spawning, Some(ticket))
        }
    }

    /// Of a VM that boots again, from the disks it has.
    pub(super) fn restarting(ticket: Option<Ticket>, started: String) -> Self {
        Self {
            started,
            ..Self::new(Phase::Spawning, ticket)
        }
    }

    /// Of a VM that is resumed.
    pub(super) fn activating(now: Micros, report: FailoverReport, ticket: Option<Ticket>) -> Self {
        let phase = Phase::Activating(now + ACTIVATE_PATIENCE, Box::new(report));
        Self::new(phase, ticket)
    }

    /// The guest runs, as far as this host knows.
    pub(super) fn runs(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Whether it is time to look for missing backups.
    pub(super) fn looks(&self, now: Micros) -> bool {
        now >= self.look_at
    }

    pub(super) fn looked(&mut self, now: Micros, period: Micros) {
        self.look_at = now + period;
    }

    pub(super) fn next_look(&self) -> Micros {
        self.look_at
    }

    /// A host has everything that it needs as a backup.
    pub(super) fn joined(&mut self, host: &HostId) {
        self.retries.joined(host);
        self.absent.remove(host);
    }

    /// Everybody who waits for something.
    pub(super) fn tickets(&mut self) -> Vec<Ticket> {
        let leaving = self.leaving.take().map(|leaving| leaving.ticket);
        let closing = self.closing.take().map(|closing| closing.ticket);
        let update = self.update.take().map(|update| update.ticket);
        let parting = std::mem::take(&mut self.parting);
        let one = [self.ticket.take(), leaving, closing, update];
        one.into_iter().flatten().chain(parting).collect()
    }
}

impl Machine {
    pub(super) fn owner(&mut self) -> Option<&mut Owner> {
        match &mut self.part {
            Part::Owner(owner) => Some(owner),
            _ => None,
        }
    }

    /// Whether the chain holds this VM's history, so that what is left of it can go on in place.
    pub(super) fn chain_is_filled(&self) -> bool {
        let Part::Owner(owner) = &self.part else {
            return false;
        };
        let since = self.record.view.history.since;
        owner.bridge.is_some() || owner.protected.is_some_and(|then| then >= since)
    }

    /// Whether a backup could resume the VM from where its output stands.
    pub(super) fn is_protected(&self) -> bool {
        let view = &self.record.view;
        !view.chain.is_empty() && self.chain_is_filled()
    }

    /// A newer configuration of a VM that stays this host's.
    pub(super) fn owner_follows(&mut self, record: VmRecord, out: &mut Vec<Effect>) {
        self.record = record;
        let asked = self.ask.take();
        let view = self.record.view.clone();
        match asked.map(|ask| (ask.purpose, ask.command)) {
            // These were based on the configuration before.
            Some((Purpose::Remove(ticket), _)) => self.remove(ticket, out),
            Some((Purpose::PowerOff(ticket), _)) => self.power_off(ticket, out),
            Some((Purpose::Update(ticket), asked)) => self.ask_update_again(ticket, asked, out),
            _ if matches!(&self.part, Part::Owner(owner) if owner.off) => self.power_off(None, out),
            _ => {}
        }
        let filled = self.chain_is_filled();
        let Some(owner) = self.owner() else { return };
        if view.generation > owner.follows && (view.chain.is_empty() || filled) {
            // It runs on alone, or with its output held. A chain that begins anew is filled while it stands still.
            owner.frozen = None;
        }
        owner.trouble = None;
        // What its process said of this generation before this agent knew it counts.
        owner
            .losses
            .retain(|loss| loss.generation >= view.generation);
        if !view.in_place() {
            owner.bridge = None;
        }
        if let Some(leaving) = owner.leaving.take_if(|l| l.generation != view.generation) {
            // The chain was changed meanwhile: the head that was asked is not the head any more.
            out.push(Effect::Tell(Tell::RunOn));
            let why = format!(
                "{}'s chain was changed meanwhile; it runs on here",
                view.name
            );
            out.push(Effect::Answer(leaving.ticket, Err(why)));
        }
        match owner.bridge {
            Some(mark) => out.push(Effect::Bridge { view, mark }),
            None => out.push(Effect::Tell(Tell::Protect(view))),
        }
    }

    /// Another host owns the VM.
    pub(super) fn superseded(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Effect>) {
        out.push(Effect::Kill);
        let view = &record.view;
        let text = format!(
            "{} owns it in generation {}: stopped here",
            view.owner, view.generation
        );
        out.push(Effect::Say(EventKind::Superseded, text.clone()));
        if let Some(owner) = self.owner() {
            let leaving = owner.leaving.take();
            for ticket in owner.tickets() {
                out.push(Effect::Answer(ticket, Err(text.clone())));
            }
            if let Some(leaving) = leaving {
                answer_switched(now, &leaving, &record, out);
            }
        }
        self.record = record;
        self.ask_no_more(&text, out);
        match self.record.view.holds(&self.me) {
            true => self.become_standby(out),
            false => self.part = Part::Nothing { declined: None },
        }
    }

    /// The agent has been started again, and the VM is this host's: its process runs, or it is an orphan.
    pub(super) fn adopted(&mut self, now: Micros, found: Option<Owns>, out: &mut Vec<Effect>) {
        if !matches!(self.part, Part::Nothing { .. }) {
            return;
        }
        let is_newer = |found: &Owns| {
            found.registered.revision > self.record.revision || found.generation > self.generation()
        };
        if self.record.life == Life::Off && !found.as_ref().is_some_and(is_newer) {
            // It was stopped, and its process not told.
            out.push(Effect::Kill);
            self.part = Part::Off(Off::default());
            return;
        }
        let Some(found) = found else {
            let text = "this host owns it, but its process ended with the agent: looking for a checkpoint of it";
            out.push(Effect::Say(EventKind::Orphaned, text.into()));
            return self.orphan(now, "looking for a checkpoint of it");
        };
        let view = self.record.view.clone();
        let phase = found.ended.map_or(Phase::Running, Phase::Ended);
        let mut owner = Owner::new(phase, None);
        owner.protected = found.protected;
        owner.frozen = found.frozen;
        owner.follows = found.generation;
        owner.wanted = self.policy.wanted(&self.record, &self.me);
        self.part = Part::Owner(Box::new(owner));
        out.push(Effect::Say(
            EventKind::Adopted,
            "its process has outlived the agent before and goes on".into(),
        ));
        if found.generation < view.generation {
            out.push(Effect::Tell(Tell::Protect(view)));
        }
    }

    pub(super) fn owner_spawned(
        &mut self,
        now: Micros,
        result: Result<(), String>,
        out: &mut Vec<Effect>,
    ) {
        match result {
            Ok(()) => {
                if let Some(owner) = self.owner()
                    && owner.phase == Phase::Spawning
                {
                    owner.phase = Phase::Booting(now + BOOT_PATIENCE);
                }
            }
            Err(why) => self.not_running(now, why, out),
        }
    }

    pub(super) fn owner_report(&mut self, now: Micros, report: Report, out: &mut Vec<Effect>) {
        let generation = self.generation();
        let Some(owner) = self.owner() else { return };
        match report {
            Report::Ready => self.booted(out),
            Report::Activated {
                restored_us,
                running_us,
            } => self.activated(restored_us, running_us, out),
            Report::Protected {
                generation: of,
                text,
            } => {
                owner.protected = owner.protected.max(Some(of));
                owner.frozen.take_if(|frozen| *frozen < of);
                if of == generation {
                    owner.trouble = None;
                    self.all_joined();
                }
                out.push(Effect::Say(EventKind::Protected, text));
            }
            Report::Refused { generation: newer } => self.refused(newer, out),
            Report::Lost(loss) => {
                // Of a chain that is lost already nothing more can be.
                if loss.generation >= generation && owner.frozen != Some(loss.generation) {
                    owner.losses.push(loss);
                }
            }
            Report::AttemptFailed {
                generation: of,
                why,
            } => {
                if of >= generation {
                    owner.failed_attempt = Some((of, why));
                }
            }
            Report::JoinerReady { generation: of } => {
                owner.joiner_ready = owner.joiner_ready.max(Some(of));
            }
            Report::HandedOver { epoch } => {
                if let Some(leaving) = &mut owner.leaving {
                    leaving.stopped = true;
                    leaving.until = now + TAKE_PATIENCE;
                    let head = self.record.view.chain.first();
                    let head = head.map_or_else(|| "nobody".into(), |m| m.host.to_string());
                    let text = format!("stopped at checkpoint {epoch}, for {head} to take over");
                    out.push(Effect::Say(EventKind::HandedOver, text));
                }
            }
            Report::Rebooted { how } => {
                let waits = owner.closing.take_if(|closing| closing.reboot);
                let text = format!("{how}: it boots again, here");
                out.push(Effect::Say(EventKind::Rebooted, text));
                if let Some(closing) = waits {
                    out.push(Effect::Answer(closing.ticket, Ok(Answered::Done)));
                }
            }
            Report::Ended { end, how } => {
                out.push(Effect::Say(EventKind::GuestEnded, how.clone()));
                owner.phase = Phase::Ended(how.clone());
                let closing = owner.closing.take().map(|closing| closing.ticket);
                if end == GuestEnd::PoweredOff {
                    owner.off = true;
                    // By its own wish, or because it was asked to: nobody is to resume it.
                    self.power_off(closing, out);
                } else if let Some(ticket) = closing {
                    out.push(Effect::Answer(ticket, Err(how)));
                }
            }
            Report::GiveUp { why } => {
                out.push(Effect::Say(EventKind::Failed, why.clone()));
                self.not_running(now, why, out);
            }
            Report::Gone => {
                let why = "the VM's process has ended";
                out.push(Effect::Say(EventKind::Failed, why.into()));
                self.not_running(now, why.into(), out);
            }
        }
    }

    /// A replica follows a newer generation, which need not be another owner's: this owner's own agent may have asked for it, or
    /// the one before, and not heard the answer. Output is held in any case; whose it is the master's record says.
    fn refused(&mut self, newer: Generation, out: &mut Vec<Effect>) {
        out.push(Effect::Read);
        if newer > self.generation()
            && let Some(owner) = self.owner()
        {
            owner.trouble = Some(format!(
                "a replica follows generation {newer}, which this host has not heard of yet: the master is asked whose that is"
            ));
        }
    }

    fn booted(&mut self, out: &mut Vec<Effect>) {
        let Some(owner) = self.owner() else { return };
        if !matches!(owner.phase, Phase::Spawning | Phase::Booting(_)) {
            return;
        }
        owner.phase = Phase::Running;
        owner.fresh = false;
        let ticket = owner.ticket.take();
        out.push(Effect::Say(EventKind::Started, owner.started.clone()));
        if let Some(ticket) = ticket {
            out.push(Effect::Answer(ticket, Ok(Answered::Done)));
        }
    }

    fn activated(&mut self, restored_us: u64, running_us: u64, out: &mut Vec<Effect>) {
        let Some(owner) = self.owner() else { return };
        let Phase::Activating(_, report) = &owner.phase else {
            return;
        };
        let report = FailoverReport {
            restored_us,
            running_us,
            ..(**report).clone()
        };
        out.push(Effect::Say(
            EventKind::Activated,
            format!(
                "runs here from checkpoint {} on, {:.1} ms after the suspicion",
                report.epoch,
                running_us.saturating_sub(report.suspected_us) as f64 / 1000.0
            ),
        ));
        owner.failover = Some(report);
        owner.phase = Phase::Running;
        let ticket = owner.ticket.take();
        self.tell_epochs(out);
        if let Some(ticket) = ticket {
            out.push(Effect::Answer(ticket, Ok(Answered::Done)));
        }
    }

    /// The process is gone or of no use: a backup takes the VM over, or it boots again from its disks.
    fn not_running(&mut self, now: Micros, why: String, out: &mut Vec<Effect>) {
        out.push(Effect::Kill);
        let protected = self.is_protected();
        let view = self.record.view.clone();
        let Some(owner) = self.owner() else { return };
        let fresh = owner.fresh;
        let leaving = owner.leaving.take();
        for ticket in owner.tickets() {
            out.push(Effect::Answer(ticket, Err(why.clone())));
        }
        if let Phase::Ended(_) = owner.phase {
            // The guest had ended before: there is nothing to resume.
            if let Some(leaving) = leaving {
                out.push(Effect::Answer(leaving.ticket, Err(why)));
            }
            return;
        }
        if fresh {
            return self.remove(None, out);
        }
        self.ask_no_more(&why, out);
        if protected {
            out.push(Effect::Yield(view));
        }
        self.orphan(now, &why);
        if let Part::Orphan(orphan) = &mut self.part {
            orphan.leaving = leaving;
        }
    }

    /// What an owner has to do when time has passed.
    pub(super) fn settle_owner(&mut self, now: Micros, out: &mut Vec<Effect>) {
        let name = self.name().to_string();
        let head = self.record.view.chain.first().map(|m| m.host.clone());
        let Some(owner) = self.owner() else { return };
        match &owner.phase {
            Phase::Booting(until) if now >= *until => {
                let why = format!("{name}: its process did not boot within a minute");
                return self.not_running(now, why, out);
            }
            Phase::Activating(until, _) if now >= *until => {
                let why = "the standby's process did not resume the VM in time";
                out.push(Effect::Say(EventKind::Failed, why.into()));
                return self.not_running(now, why.into(), out);
            }
            _ => {}
        }
        if let Some(leaving) = owner.leaving.take_if(|leaving| now >= leaving.until) {
            // Whoever asks from now on is refused or supersedes this host; either way one of them runs.
            out.push(Effect::Tell(Tell::RunOn));
            let why = match (leaving.stopped, head) {
                (true, Some(head)) => format!("{head} has not taken {name} over; it runs on here"),
                _ => format!("{name}'s last checkpoint was not committed in time; it runs on here"),
            };
            out.push(Effect::Answer(leaving.ticket, Err(why)));
        }
        if let Some(owner) = self.owner()
            && let Some(closing) = owner.closing.take_if(|closing| now >= closing.until)
        {
            let why = format!(
                "{name} has not switched itself off within {} s of its power button, which its guest may not heed; it runs on (`understudy stop {name} --now` cuts its power)",
                closing.patience / SECOND
            );
            out.push(Effect::Answer(closing.ticket, Err(why)));
        }
        self.settle_chain(now, out);
    }

    pub(super) fn owner_wakes_at(&self) -> Option<Micros> {
        let Part::Owner(owner) = &self.part else {
            return None;
        };
        let phase = match &owner.phase {
            Phase::Booting(until) | Phase::Activating(until, _) => Some(*until),
            _ => None,
        };
        let leaving = owner.leaving.as_ref().map(|leaving| leaving.until);
        let closing = owner.closing.map(|closing| closing.until);
        let chain = self.chain_wakes_at(owner);
        [phase, leaving, closing, chain].into_iter().flatten().min()
    }
}

impl Leaving {
    /// The guest is to stop, and then to be taken over.
    pub(super) fn planned(ticket: Ticket, now: Micros, generation: Generation) -> Self {
        Self {
            ticket,
            begun: now,
            until: now + STOP_PATIENCE,
            stopped: false,
            generation,
        }
    }

    /// Its process is killed.
    pub(super) fn drill(ticket: Ticket, now: Micros, generation: Generation) -> Self {
        Self {
            stopped: true,
            until: now + TAKE_PATIENCE,
            ..Self::planned(ticket, now, generation)
        }
    }

    /// Nobody has taken over in time: whom to tell.
    pub(super) fn overdue(&self, now: Micros) -> Option<Ticket> {
        (now >= self.until).then_some(self.ticket)
    }

    pub(super) fn ticket(&self) -> Ticket {
        self.ticket
    }

    pub(super) fn until(&self) -> Micros {
        self.until
    }
}

/// Whoever wanted the VM to be another host's is told that it is.
pub(super) fn answer_switched(
    now: Micros,
    leaving: &Leaving,
    record: &VmRecord,
    out: &mut Vec<Effect>,
) {
    let switched = Switched {
        owner: record.view.owner.to_string(),
        generation: record.view.generation.0,
        decided_ms: now.saturating_sub(leaving.begun) as f64 / MS as f64,
    };
    let answer = Ok(Answered::Switched(switched));
    out.push(Effect::Answer(leaving.ticket, answer));
}
