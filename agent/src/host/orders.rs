//! What administrators order.

use checkpoint::HostId;

use chain::master::Command;

use super::machine::{Part, Purpose};
use super::owner::{Closing, Leaving, Phase};
use super::{Answered, Effect, Machine, Micros, SECOND, Tell, Ticket};
use crate::control::EventKind;

/// How long a reset may take: what its guest had asked of a disk has to end first.
const RESET_PATIENCE: Micros = 30 * SECOND;

impl Machine {
    pub(super) fn order_failover(
        &mut self,
        now: Micros,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        let name = self.name().to_string();
        match &self.part {
            Part::Owner(_) => Err(format!(
                "{name} runs on this host already; give the order to the backup that is to take over"
            )),
            Part::Standby(standby) if standby.is_taking() => {
                Err(format!("this host is taking {name} over already"))
            }
            Part::Standby(standby) if standby.exists() => {
                self.take_over(now, "an administrator's order", 0, Some(ticket), out);
                Ok(())
            }
            Part::Nothing {
                declined: Some(declined),
            } => Err(format!(
                "this host cannot stand by for {name}: {}",
                declined.why
            )),
            _ => Err(format!(
                "this host holds no replica of {name:?} (`understudy status` lists them)"
            )),
        }
    }

    /// Only of an owner.
    pub(super) fn owned(&self) -> Result<(), String> {
        let view = &self.record.view;
        match self.part {
            Part::Owner(_) => Ok(()),
            Part::Off(_) => Err(format!(
                "{} is off (`understudy start {}` boots it)",
                view.name, view.name
            )),
            Part::Orphan(_) => Err(format!(
                "{} runs nowhere at the moment (`understudy status` says why)",
                view.name
            )),
            _ => Err(format!(
                "{} runs on {}; ask that host's agent",
                view.name, view.owner
            )),
        }
    }

    fn may_leave(&self) -> Result<(), String> {
        self.owned()?;
        let Part::Owner(owner) = &self.part else {
            return Ok(());
        };
        let (view, name) = (&self.record.view, self.name());
        if view.chain.is_empty() || owner.protected != Some(view.generation) {
            return Err(format!(
                "{name} is not protected: there is nobody to take it over (`understudy protect {name}`)"
            ));
        }
        if owner.leaving.is_some() {
            return Err(format!("{name} is being handed over already"));
        }
        Ok(())
    }

    /// The guest stops at the end of an epoch, its head takes it over; this host joins the chain again.
    pub(super) fn order_hand_over(
        &mut self,
        now: Micros,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        self.may_leave()?;
        let generation = self.generation();
        if let Some(owner) = self.owner() {
            owner.leaving = Some(Leaving::planned(ticket, now, generation));
            out.push(Effect::Tell(Tell::HandOver));
        }
        Ok(())
    }

    /// As a crash: the process is killed, and the rest follows as after any.
    pub(super) fn order_drill(
        &mut self,
        now: Micros,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        self.may_leave()?;
        let generation = self.generation();
        if let Some(owner) = self.owner() {
            owner.leaving = Some(Leaving::drill(ticket, now, generation));
            let text = "an administrator's drill: its process is killed";
            out.push(Effect::Say(EventKind::HandedOver, text.into()));
            self.owner_report(now, super::Report::Gone, out);
        }
        Ok(())
    }

    /// The VM comes to have these backups, in this order. Given again, nothing changes.
    pub(super) fn order_protect(
        &mut self,
        ticket: Ticket,
        backups: Vec<HostId>,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        self.owned()?;
        let name = self.name().to_string();
        let backups = match backups.is_empty() {
            true => self.policy.backups_but(&self.me),
            false => backups,
        };
        if backups.is_empty() {
            return Err(format!(
                "{name}: no backups are named, neither here nor in its configuration's [protect] backups"
            ));
        }
        self.check_backups(&backups)?;
        let Some(owner) = self.owner() else {
            return Ok(());
        };
        if let Phase::Ended(how) = &owner.phase {
            return Err(format!("{name} does not run: {how}"));
        }
        self.want(backups, out);
        out.push(Effect::Answer(ticket, Ok(Answered::Done)));
        Ok(())
    }

    pub(super) fn order_stop(
        &mut self,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        match self.part {
            Part::Owner(_) | Part::Orphan(_) => {
                self.power_off(Some(ticket), out);
                Ok(())
            }
            Part::Off(_) => self.order_stop_off(ticket, out),
            _ => self.owned(),
        }
    }

    /// The guest is asked to switch itself off; whoever ordered it is answered once the VM is off.
    pub(super) fn order_shut_down(
        &mut self,
        now: Micros,
        ticket: Ticket,
        patience: Micros,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        match &self.part {
            Part::Owner(owner) if !matches!(owner.phase, Phase::Ended(_)) => {
                self.close(Closing::new(now, ticket, patience, false))?;
                out.push(Effect::Tell(Tell::PowerButton { reboot: false }));
                Ok(())
            }
            // Nobody is there to be asked.
            _ => self.order_stop(ticket, out),
        }
    }

    /// The guest boots again; whoever ordered it is answered once it does.
    pub(super) fn order_reboot(
        &mut self,
        now: Micros,
        ticket: Ticket,
        patience: Option<Micros>,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        self.owned()?;
        let (patience, tell) = match patience {
            Some(patience) => (patience, Tell::PowerButton { reboot: true }),
            None => (RESET_PATIENCE, Tell::Reset),
        };
        self.close(Closing::new(now, ticket, patience, true))?;
        out.push(Effect::Tell(tell));
        Ok(())
    }

    fn close(&mut self, closing: Closing) -> Result<(), String> {
        let name = self.name().to_string();
        let Some(owner) = self.owner() else {
            return Ok(());
        };
        match &owner.phase {
            Phase::Running if owner.closing.is_some() => Err(format!(
                "{name} is being shut down or rebooted already (with --now it does not wait for its guest)"
            )),
            Phase::Running => {
                owner.closing = Some(closing);
                Ok(())
            }
            Phase::Ended(how) => Err(format!(
                "{name} does not run: {how} (`understudy stop {name}`, then `understudy start {name}`)"
            )),
            _ => Err(format!("{name} is being started; try again")),
        }
    }

    /// The VM ends everywhere, once the master has decided so.
    pub(super) fn remove(&mut self, ticket: Option<Ticket>, out: &mut Vec<Effect>) {
        let command = Command::Remove {
            vm: self.vm(),
            expect: self.generation(),
            by: self.me.clone(),
        };
        self.propose(Purpose::Remove(ticket), command, out);
    }
}
