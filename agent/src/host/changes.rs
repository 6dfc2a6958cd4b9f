//! What an administrator changes of a VM that exists: its configuration, and that it is protected at all.
//!
//! Both wait for their turn: an owner puts one question to the master at a time, and what its chain needs comes first.

use checkpoint::HostId;

use chain::VmShape;
use chain::master::Command;

use super::machine::{Part, Purpose};
use super::owner::Phase;
use super::{Answered, Effect, Machine, Policy, Tell, Ticket};
use crate::control::EventKind;

/// A configuration that is to be the VM's, and who waits for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Update {
    pub(super) ticket: Ticket,
    shape: VmShape,
}

impl Machine {
    /// Backups that this VM could have: other hosts, known here, each once.
    pub(super) fn check_backups(&self, backups: &[HostId]) -> Result<(), String> {
        let name = self.name();
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
        Ok(())
    }

    /// The VM comes to have these backups, in this order: by joining and leaving, if it has others.
    pub(super) fn want(&mut self, backups: Vec<HostId>, out: &mut Vec<Effect>) {
        let Some(owner) = self.owner() else { return };
        let parting = std::mem::take(&mut owner.parting);
        owner.choose = true;
        owner.arrange = true;
        owner.wanted = backups;
        owner.retries.forget();
        owner.absent.clear();
        owner.looked(0, 0);
        for ticket in parting {
            let why = "an order to protect it came after this one";
            out.push(Effect::Answer(ticket, Err(why.into())));
        }
    }

    /// The VM is to have no backups. Whoever ordered it is answered once the master has decided so.
    pub(super) fn order_unprotect(&mut self, ticket: Ticket) -> Result<(), String> {
        self.owned()?;
        let name = self.name().to_string();
        let Some(owner) = self.owner() else {
            return Ok(());
        };
        if let Phase::Ended(how) = &owner.phase {
            return Err(format!("{name} does not run: {how}"));
        }
        if owner.leaving.is_some() {
            return Err(format!("{name} is being handed over; try again"));
        }
        owner.wanted.clear();
        owner.absent.clear();
        owner.arrange = false;
        owner.choose = true;
        owner.parting.push(ticket);
        Ok(())
    }

    /// The backups that an administrator wants gone: the next thing to ask the master, if it is to be asked.
    pub(super) fn settle_parting(&mut self, out: &mut Vec<Effect>) {
        let view = &self.record.view;
        if !view.chain.is_empty() || view.joining.is_some() {
            return self.reconfigure(Vec::new(), None, true, out);
        }
        let Some(owner) = self.owner() else { return };
        let parting = std::mem::take(&mut owner.parting);
        let text = "not protected any more, as an administrator has ordered";
        out.push(Effect::Say(EventKind::Unprotected, text.into()));
        for ticket in parting {
            out.push(Effect::Answer(ticket, Ok(Answered::Done)));
        }
    }

    /// The master did not decide on another chain: whoever wanted the backups gone is told, and orders it again.
    pub(super) fn not_parted(&mut self, why: &str, out: &mut Vec<Effect>) {
        let Some(owner) = self.owner() else { return };
        for ticket in std::mem::take(&mut owner.parting) {
            out.push(Effect::Answer(ticket, Err(why.into())));
        }
    }

    /// The VM comes to have this configuration.
    pub(super) fn order_apply(
        &mut self,
        ticket: Ticket,
        shape: VmShape,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        let name = self.name().to_string();
        let update = Update { ticket, shape };
        let policy = Policy::of_text(&name, &update.shape.config_toml);
        self.check_backups(&policy.backups_but(&self.me))?;
        match &mut self.part {
            Part::Off(off) if off.is_busy() || self.ask.is_some() => Err(format!(
                "{name} is being stopped, started or changed; try again"
            )),
            Part::Off(_) => {
                self.ask_update(update, out);
                Ok(())
            }
            Part::Owner(owner) if matches!(owner.phase, Phase::Ended(_)) => Err(format!(
                "{name} does not run: stop it first (`understudy stop {name}`)"
            )),
            Part::Owner(owner) if owner.update.is_some() => {
                Err(format!("{name} is being changed already; try again"))
            }
            Part::Owner(owner) => {
                owner.update = Some(update);
                Ok(())
            }
            _ => self.owned(),
        }
    }

    /// Puts the question to the master.
    pub(super) fn ask_update(&mut self, update: Update, out: &mut Vec<Effect>) {
        let command = Command::Update {
            vm: self.vm(),
            expect: self.generation(),
            by: self.me.clone(),
            shape: update.shape,
        };
        self.propose(Purpose::Update(update.ticket), command, out);
    }

    /// The same again, in the generation that is now; or it has been decided, and the news of it was here first.
    pub(super) fn ask_update_again(
        &mut self,
        ticket: Ticket,
        asked: Command,
        out: &mut Vec<Effect>,
    ) {
        let Command::Update { shape, .. } = asked else {
            return;
        };
        match shape == self.record.shape {
            true => self.updated(ticket, out),
            false => self.ask_update(Update { ticket, shape }, out),
        }
    }

    /// They may be others than the process was started with.
    pub(super) fn tell_epochs(&self, out: &mut Vec<Effect>) {
        let epochs = self.policy.epochs.map(Tell::Epochs);
        out.extend(epochs.map(Effect::Tell));
    }

    /// The record has the new configuration.
    pub(super) fn updated(&mut self, ticket: Ticket, out: &mut Vec<Effect>) {
        out.push(Effect::Say(
            EventKind::Changed,
            "configured anew, as an administrator has ordered".into(),
        ));
        let backups = self.policy.backups_but(&self.me);
        if let Some(owner) = self.owner() {
            let moves = !owner.wanted.is_empty() && !backups.is_empty() && owner.wanted != backups;
            self.tell_epochs(out);
            if moves {
                self.want(backups, out);
            }
        }
        out.push(Effect::Answer(ticket, Ok(Answered::Done)));
    }
}
