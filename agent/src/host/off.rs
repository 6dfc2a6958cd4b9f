//! A VM that is off: it runs nowhere by somebody's wish, and its newest disks are this host's. Nobody may resume it; it boots
//! from these disks and from no others.

use chain::VmRecord;
use chain::master::{Command, DisksFrom};

use super::machine::{Ask, Part, Purpose};
use super::owner::Owner;
use super::{Answered, Disks, Effect, Machine, Refusal, Ticket};
use crate::control::EventKind;

/// What is being done about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Off {
    /// Who waits for it to boot.
    starting: Option<Ticket>,
    /// Its process is being ended; who waits for that.
    ending: Option<Vec<Ticket>>,
}

impl Off {
    /// It is being stopped or started.
    pub(super) fn is_busy(&self) -> bool {
        self.ending.is_some() || self.starting.is_some()
    }

    /// Everybody who waits for something.
    pub(super) fn tickets(&mut self) -> Vec<Ticket> {
        let ending = self.ending.as_mut().map(std::mem::take);
        let ending = ending.into_iter().flatten();
        self.starting.take().into_iter().chain(ending).collect()
    }
}

impl Machine {
    /// The owner's VM is to run no more, once the master has decided so.
    pub(super) fn power_off(&mut self, ticket: Option<Ticket>, out: &mut Vec<Effect>) {
        let command = Command::PowerOff {
            vm: self.vm(),
            expect: self.generation(),
            by: self.me.clone(),
            at: None,
        };
        self.propose(Purpose::PowerOff(ticket), command, out);
    }

    /// An order to stop took the place of the question that a guest had put by switching itself off: whatever becomes of the
    /// order, the VM is off. (If the question was refused, it is put again with what has been decided since.)
    pub(super) fn off_all_the_same(&mut self, why: &Refusal, out: &mut Vec<Effect>) {
        let off = matches!(&self.part, Part::Owner(owner) if owner.off);
        if off && self.ask.is_none() && matches!(why, Refusal::Unknown(_)) {
            self.power_off(None, out);
        }
    }

    /// The master has decided that the VM is off.
    pub(super) fn powered_off(&mut self, record: VmRecord, out: &mut Vec<Effect>) {
        let asked = |ask: &mut Ask| matches!(ask.purpose, Purpose::PowerOff(_));
        let stopped = self.ask.take_if(asked);
        let ending = stopped.and_then(|ask| ask.purpose.ticket());
        let why = format!("{} was stopped meanwhile", record.view.name);
        self.ask_no_more(&why, out);
        self.answer_all(&why, out);
        self.record = record;
        out.push(Effect::Kill);
        out.push(Effect::Bury);
        self.part = Part::Off(Off {
            starting: None,
            ending: Some(ending.into_iter().collect()),
        });
    }

    /// The process is gone: what it had may be used again.
    pub(super) fn buried(&mut self, out: &mut Vec<Effect>) {
        let Part::Off(off) = &mut self.part else {
            return;
        };
        let Some(waiting) = off.ending.take() else {
            return;
        };
        out.push(Effect::Say(
            EventKind::PoweredOff,
            "off; its newest disks are on this host".into(),
        ));
        for ticket in waiting {
            out.push(Effect::Answer(ticket, Ok(Answered::Done)));
        }
    }

    pub(super) fn order_stop_off(
        &mut self,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        match &mut self.part {
            Part::Off(Off {
                ending: Some(waiting),
                ..
            }) => waiting.push(ticket),
            _ => out.push(Effect::Answer(ticket, Ok(Answered::Done))),
        }
        Ok(())
    }

    pub(super) fn order_start(
        &mut self,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        let record = self.record.clone();
        let name = &record.view.name;
        match &mut self.part {
            Part::Off(off) if off.ending.is_some() => {
                Err(format!("{name} is being stopped; try again"))
            }
            Part::Off(off) if off.starting.is_none() => {
                off.starting = Some(ticket);
                out.push(Effect::FindDisks(record));
                Ok(())
            }
            Part::Off(_) => Err(format!("{name} is being started already")),
            Part::Owner(_) => Err(format!("{name} runs on this host already")),
            Part::Orphan(orphan) => Err(format!("{name} is not off: {}", orphan.state)),
            Part::Standby(_) | Part::Nothing { .. } => {
                Err(format!("{name} runs on {}", record.view.owner))
            }
        }
    }

    pub(super) fn start_disks_found(&mut self, result: Result<(), String>, out: &mut Vec<Effect>) {
        if let Err(why) = result {
            return self.not_started(why, out);
        }
        let command = Command::Start {
            vm: self.vm(),
            expect: self.generation(),
            by: self.me.clone(),
            from: DisksFrom::Newest,
        };
        self.propose(Purpose::Start, command, out);
    }

    pub(super) fn not_started(&mut self, why: String, out: &mut Vec<Effect>) {
        let Part::Off(off) = &mut self.part else {
            return;
        };
        let ticket = off.starting.take();
        out.push(Effect::Say(
            EventKind::Failed,
            format!("not started: {why}"),
        ));
        if let Some(ticket) = ticket {
            out.push(Effect::Answer(ticket, Err(why)));
        }
    }

    /// Whether this is what the master has decided on this host's wish to boot the VM.
    pub(super) fn is_starts_answer(&self, record: &VmRecord) -> bool {
        let asked = self.ask.as_ref().map(|ask| &ask.command);
        matches!(asked, Some(Command::Start { expect, .. })
            if record.view.generation == expect.next() && record.view.chain.is_empty())
    }

    /// The master has decided that this host boots it.
    pub(super) fn started(&mut self, record: VmRecord, out: &mut Vec<Effect>) {
        if record.view.owner != self.me || record.view.generation <= self.generation() {
            return;
        }
        let Part::Off(off) = &mut self.part else {
            return;
        };
        let ticket = off.starting.take();
        self.record = record.clone();
        let text = "booted from its newest disks, not protected yet".into();
        let mut owner = Owner::restarting(ticket, text);
        owner.wanted = self.policy.wanted(&record, &self.me);
        self.part = Part::Owner(Box::new(owner));
        out.push(Effect::Boot(record, Disks::Found));
    }

    /// Its process failed before the guest ran: it is off again, if the master says so.
    pub(super) fn start_refused(&mut self, why: &Refusal, out: &mut Vec<Effect>) {
        self.not_started(why.text(), out);
        out.push(Effect::Read);
    }

    pub(super) fn order_delete(
        &mut self,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        let (name, owner) = (self.name(), &self.record.view.owner);
        match &self.part {
            Part::Off(_) | Part::Orphan(_) => {
                self.remove(Some(ticket), out);
                Ok(())
            }
            Part::Owner(_) => Err(format!(
                "{name} runs: stop it first (`understudy stop {name}`)"
            )),
            Part::Standby(_) | Part::Nothing { .. } => {
                Err(format!("{name} is {owner}'s; ask that host's agent"))
            }
        }
    }
}
