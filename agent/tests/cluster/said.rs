//! What a VM's process says: a free agent notes it at once, a shipped one is sent a report.

use agent::child::proto::GuestEnd;
use agent::host::{Input, Loss, Report};
use checkpoint::{Epoch, Generation};

use super::owner::Still;
use super::{Mutant, World, name};

impl World {
    /// Its agent will hear of it. What stays true is kept for the next one, as in `src/child/reporter.rs`.
    pub fn report(&mut self, i: usize, report: Report) {
        let once = self.is(Mutant::ReportedOnce);
        let host = &mut self.hosts[i];
        let stands = matches!(
            report,
            Report::Refused { .. }
                | Report::Lost(_)
                | Report::JoinerReady { .. }
                | Report::Ended { .. }
                | Report::GiveUp { .. }
        );
        if host.agent.0.is_none() || (stands && !once) {
            host.unheard.0.push(report.clone());
        }
        if let Some(agent) = &mut host.agent.0 {
            agent.mail.push_back(Input::Report(report));
        }
    }

    /// A replica, or without one named the whole chain, is of no use. Nobody listens to this chain any more.
    pub fn say_lost(&mut self, i: usize, who: Option<usize>, unfit: bool) {
        let free = self.is_free();
        let owner = self.owner_mut(i);
        if free {
            owner.unfit |= unfit;
            owner.troubles.extend(who.filter(|_| !unfit));
            return;
        }
        owner.deaf = true;
        let generation = owner.newest;
        self.report(
            i,
            Report::Lost(Loss {
                generation,
                host: who.map(name),
                unfit,
                why: String::new(),
            }),
        );
    }

    /// No commit has come for a while.
    pub fn say_slow(&mut self, i: usize) {
        let generation = self.owner_mut(i).newest;
        let loss = Loss {
            generation,
            host: None,
            unfit: false,
            why: String::new(),
        };
        self.report(i, Report::Lost(loss));
    }

    /// A replica follows a newer configuration.
    pub fn say_refused(&mut self, i: usize, newer: Generation) {
        match self.is_free() {
            true => self.fenced(i, newer),
            false => self.report(i, Report::Refused { generation: newer }),
        }
    }

    pub fn say_ready(&mut self, i: usize) {
        let owner = self.owner_mut(i);
        owner.ready = true;
        let generation = owner.newest;
        if !self.is_free() {
            self.report(i, Report::JoinerReady { generation });
        }
    }

    pub fn say_protected(&mut self, i: usize, generation: Generation) {
        self.owner_mut(i).protected.0 = Some(generation);
        if !self.is_free() {
            let text = String::new();
            self.report(i, Report::Protected { generation, text });
        }
    }

    /// The guest has powered itself off.
    pub fn power_off(&mut self, i: usize) {
        // One that stands still does nothing.
        let Some(owner) = (self.hosts[i].owner.as_mut()).filter(|owner| owner.still.is_none())
        else {
            return;
        };
        owner.still = Some(Still::Ended);
        self.counts.0.powered_off += 1;
        self.say(|| format!("h{i}'s guest switches itself off"));
        let how = "it has powered itself off".into();
        let end = GuestEnd::PoweredOff;
        self.report(i, Report::Ended { end, how });
    }

    /// The owner cannot go on, and says so: its guest stands still.
    pub fn give_vm_up(&mut self, i: usize) {
        let Some(owner) = &mut self.hosts[i].owner else {
            return;
        };
        if owner.still.is_some() || !owner.output.is_protected() {
            return;
        }
        owner.still = Some(Still::GivenUp);
        self.counts.0.given_up += 1;
        self.say(|| format!("h{i} gives the VM up"));
        let why = "its disk fails".into();
        self.report(i, Report::GiveUp { why });
    }

    pub fn say_handed_over(&mut self, i: usize, epoch: Epoch) {
        self.counts.0.switches += 1;
        self.report(i, Report::HandedOver { epoch });
    }

    /// A free agent's owner stops if it is another's by now.
    fn fenced(&mut self, i: usize, newer: Generation) {
        if self.view().owner == name(i) {
            return;
        }
        self.end_process(i);
        self.counts.0.superseded += 1;
        self.say(|| format!("h{i} is told of {newer} and stops"));
    }
}
