//! A standby, and its road to owner: suspicion, the master's decision, activation.

use chain::master::Command;
use chain::{Mark, VmRecord};
use checkpoint::Generation;

use super::machine::{Declined, Part, Purpose};
use super::owner::Owner;
use super::{Effect, Machine, Micros, Refusal, Report, SECOND, Ticket};
use crate::control::{EventKind, FailoverReport};

/// A replica and a process that waits.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Standby {
    /// The replica is there, and the process.
    ready: bool,
    /// Silence that was noticed before the process was there.
    suspected_ms: Option<u64>,
    taking: Option<Taking>,
    /// How long to wait before another attempt if this one fails; none: as after the first.
    pause: Option<Micros>,
    /// How often it could not resume a VM that the master says is this host's.
    vain: u32,
}

/// A takeover under way.
#[derive(Clone, Debug, PartialEq)]
struct Taking {
    ticket: Option<Ticket>,
    report: FailoverReport,
    /// What the frozen replica holds; none: it is being frozen.
    held: Option<Mark>,
    /// What the master has granted.
    granted: Option<VmRecord>,
    /// The record that gives the VM to this host, if that was heard before it asked.
    told: Option<VmRecord>,
}

/// After so many attempts a replica that cannot resume its VM is given up.
const VAIN_MAX: u32 = 3;

/// Between attempts to stand by: at first, and at most.
const RETRY: (Micros, Micros) = (SECOND, 60 * SECOND);

impl Standby {
    /// Another attempt.
    pub(super) fn again(pause: Micros) -> Self {
        Self {
            pause: Some(pause),
            ..Self::default()
        }
    }

    /// One whose replica and process are there.
    pub(super) fn waiting() -> Self {
        Self {
            ready: true,
            ..Self::default()
        }
    }

    /// Everybody who waits for something.
    pub(super) fn tickets(&mut self) -> Vec<Ticket> {
        let ticket = self.taking.as_mut().and_then(|taking| taking.ticket.take());
        ticket.into_iter().collect()
    }

    /// Whether a takeover is under way.
    pub(super) fn is_taking(&self) -> bool {
        self.taking.is_some()
    }

    /// Whether the replica has been made.
    pub(super) fn exists(&self) -> bool {
        self.ready
    }

    /// Whether the master is being asked for the VM.
    pub(super) fn is_asking(&self) -> bool {
        let taking = self.taking.as_ref();
        taking.is_some_and(|taking| taking.held.is_some() && taking.granted.is_none())
    }
}

impl Machine {
    fn standby(&mut self) -> Option<&mut Standby> {
        match &mut self.part {
            Part::Standby(standby) => Some(standby),
            _ => None,
        }
    }

    fn taking(&mut self) -> Option<&mut Taking> {
        self.standby()?.taking.as_mut()
    }

    pub(super) fn standby_spawned(
        &mut self,
        now: Micros,
        result: Result<(), String>,
        out: &mut Vec<Effect>,
    ) {
        let view = self.record.view.clone();
        let Some(standby) = self.standby() else {
            return;
        };
        match result {
            Ok(()) => {
                standby.ready = true;
                let suspected = standby.suspected_ms.take();
                // The configuration may have changed while the replica was made.
                out.push(Effect::Adopt(view));
                if let Some(silence_ms) = suspected {
                    self.suspected(now, silence_ms, out);
                }
            }
            Err(why) => {
                out.push(Effect::Say(
                    EventKind::Failed,
                    format!("cannot stand by: {why}"),
                ));
                self.decline(now, why, out);
            }
        }
    }

    pub(super) fn standby_report(&mut self, now: Micros, report: &Report, out: &mut Vec<Effect>) {
        let why = match report {
            Report::Ready => {
                let text = "the standby is instantiated and waits";
                return out.push(Effect::Say(EventKind::StandbyReady, text.into()));
            }
            Report::GiveUp { why } => why.clone(),
            Report::Gone => "the standby's process has ended".into(),
            _ => return,
        };
        // A replica whose standby is gone could not resume the VM: better that the owner knows it is lost.
        out.push(Effect::Say(EventKind::Failed, why.clone()));
        if let Some(ticket) = self.taking().and_then(|taking| taking.ticket) {
            out.push(Effect::Answer(ticket, Err(why.clone())));
        }
        self.ask = None;
        out.push(Effect::Kill);
        self.decline(now, why, out);
    }

    /// This host cannot stand by now. Whoever asks is told why; and it is tried again for as long as it is a member.
    fn decline(&mut self, now: Micros, why: String, out: &mut Vec<Effect>) {
        let pause = self
            .standby()
            .and_then(|standby| standby.pause)
            .unwrap_or(RETRY.0);
        out.push(Effect::Decline(self.generation(), why.clone()));
        self.part = Part::Nothing {
            declined: Some(Declined {
                why,
                retry_at: now + pause,
                pause: RETRY.1.min(pause * 2),
            }),
        };
    }

    pub(super) fn settle_nothing(&mut self, now: Micros, out: &mut Vec<Effect>) {
        let Part::Nothing {
            declined: Some(declined),
        } = &mut self.part
        else {
            return;
        };
        if now < declined.retry_at {
            return;
        }
        let pause = declined.pause;
        declined.retry_at = Micros::MAX;
        if self.record.view.holds(&self.me) {
            self.part = Part::Standby(Box::new(Standby::again(pause)));
            out.push(Effect::StandBy(self.record.clone()));
        }
    }

    pub(super) fn suspected(&mut self, now: Micros, silence_ms: u64, out: &mut Vec<Effect>) {
        let Some(standby) = self.standby() else {
            return;
        };
        if !standby.ready {
            standby.suspected_ms = Some(silence_ms);
            return;
        }
        if standby.taking.is_some() {
            return;
        }
        let (text, cause) = match silence_ms {
            0 => (
                "the owner does not run the VM any more and hands it over".to_string(),
                "handed over by its owner".to_string(),
            ),
            ms => (
                format!("silence on the checkpoint stream for {ms} ms"),
                format!("silence for {ms} ms"),
            ),
        };
        out.push(Effect::Say(EventKind::Suspected, text));
        self.take_over(now, &cause, silence_ms, None, out);
    }

    pub(super) fn take_over(
        &mut self,
        now: Micros,
        cause: &str,
        silence_ms: u64,
        ticket: Option<Ticket>,
        out: &mut Vec<Effect>,
    ) {
        let name = self.name().to_string();
        let Some(standby) = self.standby() else {
            return;
        };
        standby.taking = Some(Taking {
            ticket,
            report: FailoverReport {
                vm: name,
                cause: cause.into(),
                silence_ms,
                suspected_us: now,
                ..FailoverReport::default()
            },
            held: None,
            granted: None,
            told: None,
        });
        // Frozen before asking: whatever the tail acks from now on was forwarded by this replica before (I2, I5).
        out.push(Effect::Freeze);
    }

    pub(super) fn frozen(
        &mut self,
        now: Micros,
        result: Result<Mark, String>,
        out: &mut Vec<Effect>,
    ) {
        let here = self.generation();
        let Some(taking) = self.taking() else {
            return out.push(Effect::Unfreeze);
        };
        // The question that was granted is put again, even if this host does not know what it was based on any more.
        let told = taking.told.as_ref().map(|told| told.view.generation);
        let expect = told.map_or(here, |granted| Generation(granted.0.saturating_sub(1)));
        let held = match result {
            Ok(held) => held,
            Err(why) => return self.not_frozen(now, why, out),
        };
        taking.held = Some(held);
        let command = Command::TakeOver {
            vm: self.vm(),
            expect,
            by: self.me.clone(),
            at: held,
        };
        self.propose(Purpose::TakeOver, command, out);
    }

    /// The replica holds nothing that the VM could be resumed from. If the VM is this host's all the same (it was granted, the
    /// answer was lost, and then the replica's memory), it is looked for elsewhere.
    fn not_frozen(&mut self, now: Micros, why: String, out: &mut Vec<Effect>) {
        let Some(standby) = self.standby() else {
            return;
        };
        standby.vain += 1;
        let given_up = standby.vain >= VAIN_MAX;
        let told = standby
            .taking
            .as_mut()
            .and_then(|taking| taking.told.take());
        let Some(record) = told.filter(|_| given_up) else {
            return self.not_granted(&Refusal::Rejected(why), out);
        };
        self.answer_all(&why, out);
        let why = format!("it is this host's, but cannot be resumed here: {why}");
        out.push(Effect::Say(EventKind::Orphaned, why.clone()));
        out.push(Effect::RemoveReplica(record.view.generation));
        out.push(Effect::Kill);
        self.record = record;
        self.orphan(now, &why);
    }

    /// The master has given the VM to this host, which has not asked, or has forgotten that it did: it answers a repeated
    /// question as it did before.
    pub(super) fn granted_unheard(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Effect>) {
        self.take_over(now, "a takeover whose answer was lost", 0, None, out);
        if let Some(taking) = self.taking() {
            taking.told = Some(record);
        }
    }

    /// The VM stays whose it is, as far as this host knows: the replica goes on. If it was granted after all, the master's
    /// next record says so, and what the replica has then still includes everything acknowledged.
    pub(super) fn not_granted(&mut self, why: &Refusal, out: &mut Vec<Effect>) {
        let Some(standby) = self.standby() else {
            return;
        };
        let Some(taking) = standby.taking.take() else {
            return;
        };
        let why = format!("not taken over: {}", why.text());
        out.push(Effect::Unfreeze);
        out.push(Effect::Say(EventKind::Refused, why.clone()));
        if let Some(ticket) = taking.ticket {
            out.push(Effect::Answer(ticket, Err(why)));
        }
        out.push(Effect::Read);
    }

    /// The master had given this host the VM, and what it decided since is known here already.
    pub(super) fn granted_too_late(&mut self, out: &mut Vec<Effect>) {
        let pending = self.taking().is_some_and(|taking| taking.granted.is_none());
        if pending {
            let why = "the master has decided something else since";
            self.not_granted(&Refusal::Rejected(why.into()), out);
        }
    }

    /// The master has given this host the VM.
    pub(super) fn granted(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Effect>) {
        if record.view.owner != self.me || record.view.generation <= self.generation() {
            return;
        }
        let Some(taking) = self.taking() else {
            return self.granted_unheard(now, record, out);
        };
        let Some(held) = taking.held else { return };
        let view = &record.view;
        if view.chain.is_empty() || view.history.contains(held) {
            return self.take_apart(now, record, out);
        }
        // Granted earlier, from an earlier checkpoint, without this host's knowing: the others may hold what does not count
        // any more, so they are filled anew.
        let command = Command::Reconfigure {
            vm: view.vm,
            expect: view.generation,
            by: self.me.clone(),
            chain: view.chain.clone(),
            joining: None,
            anew: true,
        };
        self.propose(Purpose::Refill, command, out);
    }

    pub(super) fn take_apart(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Effect>) {
        if record.view.owner != self.me || record.view.generation <= self.generation() {
            return;
        }
        let Some(taking) = self.taking() else {
            return;
        };
        taking.report.decided_us = now;
        taking.report.generation = record.view.generation.0;
        taking.granted = Some(record.clone());
        self.ask = None;
        out.push(Effect::Say(
            EventKind::Decided,
            format!(
                "the master has given it to this host in generation {}",
                record.view.generation
            ),
        ));
        out.push(Effect::HandOver(record.view));
    }

    pub(super) fn handed_over(
        &mut self,
        now: Micros,
        result: Result<Mark, String>,
        out: &mut Vec<Effect>,
    ) {
        let Part::Standby(standby) = &mut self.part else {
            return;
        };
        let Some(mut taking) = standby.taking.take() else {
            return;
        };
        let Some(record) = taking.granted.take() else {
            return;
        };
        self.record = record;
        let view = self.record.view.clone();
        let mark = match result {
            Ok(mark) => mark,
            Err(why) => {
                let why = format!("cannot resume it: {why}");
                out.push(Effect::Say(EventKind::Failed, why.clone()));
                if let Some(ticket) = taking.ticket {
                    out.push(Effect::Answer(ticket, Err(why.clone())));
                }
                out.push(Effect::Kill);
                return self.orphan(now, &why);
            }
        };
        taking.report.epoch = mark.epoch.0;
        taking.report.handed_us = now;
        let mut owner = Owner::activating(now, taking.report, taking.ticket);
        owner.wanted = self.policy.wanted(&self.record, &self.me);
        out.push(Effect::Activate {
            view: view.clone(),
            mark,
        });
        if view.in_place() {
            owner.bridge = Some(mark);
            out.push(Effect::Bridge { view, mark });
        }
        self.part = Part::Owner(Box::new(owner));
    }

    pub(super) fn spawned(
        &mut self,
        now: Micros,
        result: Result<(), String>,
        out: &mut Vec<Effect>,
    ) {
        match self.part {
            Part::Standby(_) => self.standby_spawned(now, result, out),
            Part::Owner(_) => self.owner_spawned(now, result, out),
            // It is of no use any more.
            Part::Nothing { .. } | Part::Orphan(_) | Part::Off(_) => out.push(Effect::Kill),
        }
    }
}
