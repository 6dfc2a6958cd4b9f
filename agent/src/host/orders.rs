//! What administrators order.

use checkpoint::HostId;

use chain::master::Command;

use super::machine::{Part, Purpose};
use super::owner::{Leaving, Phase};
use super::{Answered, Effect, Machine, Micros, Tell, Ticket};
use crate::control::EventKind;

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
    fn owned(&self) -> Result<(), String> {
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
        _now: Micros,
        ticket: Ticket,
        backups: Vec<HostId>,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        self.owned()?;
        let name = self.name().to_string();
        let backups = match backups.is_empty() {
            true => self.policy.backups.clone(),
            false => backups,
        };
        if backups.is_empty() {
            return Err(format!(
                "{name}: no backups are named, neither here nor in its configuration's [protect] backups"
            ));
        }
        for (i, host) in backups.iter().enumerate() {
            if *host == self.me {
                return Err(format!(
                    "backup {:?} runs {name} itself; a backup has to be another host",
                    host.as_str()
                ));
            }
            if backups[..i].contains(host) {
                return Err(format!("backup {:?} is named twice", host.as_str()));
            }
        }
        if let Some(unknown) = backups.iter().find(|host| self.member(host).is_none()) {
            let known: Vec<&str> = self.peers.keys().map(HostId::as_str).collect();
            return Err(format!(
                "backup {:?} is not among this host's peers ({}): add it to [peers] in host.toml",
                unknown.as_str(),
                known.join(", ")
            ));
        }
        let Some(owner) = self.owner() else {
            return Ok(());
        };
        if let Phase::Ended(how) = &owner.phase {
            return Err(format!("{name} does not run: {how}"));
        }
        owner.choose = true;
        owner.arrange = true;
        owner.wanted = backups;
        owner.retries.forget();
        owner.absent.clear();
        owner.looked(0, 0);
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
