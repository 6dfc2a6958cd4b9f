//! What the hosts' agents do: ask for ownership, follow the master's decisions, repair chains; and what befalls them.

use chain::VmRecord;
use chain::master::Command;
use chain::replica::{FreezeError, Replica, State};

use crate::owner::Owner;
use crate::world::{Asked, HOSTS, Host, LinkId, Mutant, Standby, World, index, member, name};

impl World {
    pub(super) fn suspect(&mut self) {
        let outdated = self.mutant == Mutant::ResumeOutdated;
        let able = self.hosts_where(|h| {
            h.standby
                .as_ref()
                .is_some_and(|s| s.asking.is_none() && s.machine.failed().is_none())
        });
        let Some(i) = self.pick(&able) else { return };
        let Some(standby) = &mut self.hosts[i].standby else {
            return;
        };
        let expect = standby.machine.generation();
        let held = match self.mutant {
            // Looks, but goes on.
            Mutant::AskWithoutFreezing if standby.machine.state() == State::Serving => {
                standby.machine.hist()
            }
            Mutant::AskWithoutFreezing => None,
            _ => match standby.machine.freeze() {
                Ok(mark) => Some(mark),
                Err(FreezeError::Outdated { held, .. }) if outdated => Some(held),
                Err(_) => None,
            },
        };
        let Some(held) = held else { return };
        standby.asking = Some((expect, held.epoch.0 as usize));
        self.say(format!("h{i} asks for the VM in {expect}, holding {held}"));
        let command = Command::TakeOver {
            vm: self.vm,
            expect,
            by: name(i),
        };
        self.asked.push(Asked { host: i, command });
    }

    /// The master decides on something it was asked.
    pub(super) fn decide(&mut self) -> Result<(), String> {
        if self.asked.is_empty() {
            return Ok(());
        }
        let at = self.below(self.asked.len());
        let Asked { host, mut command } = self.asked.swap_remove(at);
        let now = self.view().generation;
        if let (Command::TakeOver { expect, .. }, Mutant::NoCompare) = (&mut command, self.mutant) {
            *expect = now;
        }
        let result = self.master.apply(&command);
        match (&command, &result) {
            // One answer in eight never arrives.
            (Command::TakeOver { .. }, _) if self.below(8) == 0 => {}
            (Command::TakeOver { expect, .. }, _) => {
                self.answers.push((host, *expect, result.ok()));
            }
            (_, Ok(record)) => {
                self.counts.reconfigurations += 1;
                let chain: Vec<&str> = record.view.chain.iter().map(|m| m.host.as_str()).collect();
                let generation = record.view.generation;
                self.story
                    .push(format!("the master: {generation} has {chain:?}"));
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn hear_the_answer(&mut self) -> Result<(), String> {
        if self.answers.is_empty() {
            return Ok(());
        }
        let at = self.below(self.answers.len());
        let (i, expect, record) = self.answers.swap_remove(at);
        let Some(standby) = &mut self.hosts[i].standby else {
            return Ok(());
        };
        let compare = self.mutant != Mutant::NoCompare;
        let Some((_, held)) = standby.asking.filter(|(e, _)| *e == expect || !compare) else {
            return Ok(());
        };
        match record {
            Some(record) => self.activate(i, &record, held),
            None => {
                standby.asking = None;
                standby.machine.unfreeze();
                self.counts.refused += 1;
                self.say(format!("h{i} is not given the VM and goes on"));
                Ok(())
            }
        }
    }

    pub(super) fn give_up_asking(&mut self) {
        let asking = self.hosts_where(|h| h.standby.as_ref().is_some_and(|s| s.asking.is_some()));
        if let Some(i) = self.pick(&asking)
            && let Some(standby) = &mut self.hosts[i].standby
        {
            standby.asking = None;
            standby.machine.unfreeze();
            self.say(format!("h{i} got no answer and goes on"));
        }
    }

    pub(super) fn activate(
        &mut self,
        i: usize,
        record: &VmRecord,
        held: usize,
    ) -> Result<(), String> {
        let Some(standby) = self.hosts[i].standby.take() else {
            return Ok(());
        };
        let history = standby.store[..held].to_vec();
        let generation = record.view.generation;
        self.say(format!(
            "h{i} resumes from {held} as the owner in {generation}"
        ));
        self.counts.takeovers += 1;
        if !history.starts_with(&self.visible) {
            return Err(format!(
                "I5: h{i} resumes from {held}; what the outside has seen is lost"
            ));
        }
        self.hosts[i].seen = generation;
        self.hosts[i].owner = Some(Owner::new(generation, history));
        Ok(())
    }

    /// A host hears what the master has decided, and follows.
    pub(super) fn look_at_the_master(&mut self) -> Result<(), String> {
        let idle = self.hosts_where(|h| h.standby.as_ref().is_none_or(|s| s.asking.is_none()));
        let Some(i) = self.pick(&idle) else {
            return Ok(());
        };
        let record = self.master.snapshot().records[0].clone();
        let view = &record.view;
        let host = &mut self.hosts[i];
        if view.generation <= host.seen {
            return Ok(());
        }
        let mine = view.owner == name(i);
        let is_member = view.position(&name(i)).is_some();
        if let Some(owner) = &mut host.owner {
            host.seen = view.generation;
            if mine {
                owner.follow(view.generation);
                if view.chain.is_empty() {
                    owner.restart();
                }
                return self.let_out(i);
            }
            host.owner = None;
            self.say(format!("h{i} reads that it is not the owner any more"));
        } else if let Some(standby) = &mut host.standby {
            if mine {
                // Granted, but the answer was lost.
                let Ok(mark) = standby.machine.freeze() else {
                    host.standby = None;
                    host.seen = view.generation;
                    return Ok(());
                };
                self.counts.resumed += 1;
                return self.activate(i, &record, mark.epoch.0 as usize);
            }
            if is_member {
                standby.machine.adopt(view);
                standby.staged = None;
                host.seen = view.generation;
                return Ok(());
            }
            host.standby = None;
        }
        let host = &mut self.hosts[i];
        host.seen = view.generation;
        if is_member {
            host.standby = Some(Standby {
                machine: Replica::new(name(i), view, 3),
                store: Vec::new(),
                staged: None,
                asking: None,
            });
        }
        Ok(())
    }

    /// The owner wants another chain: hosts that are up, in any order, sometimes none.
    pub(super) fn repair(&mut self) {
        let Some(i) = self.pick(&self.hosts_where(|h| h.owner.is_some())) else {
            return;
        };
        let Some(expect) = self.hosts[i].owner.as_ref().map(|o| o.generation) else {
            return;
        };
        let view = self.view();
        let mut others: Vec<usize> = self
            .hosts_where(|_| true)
            .into_iter()
            .filter(|h| *h != i)
            .collect();
        if self.below(3) != 0 && !view.chain.is_empty() {
            // Those that are left, in the order they have.
            let left: Vec<usize> = view.chain.iter().map(|m| index(&m.host)).collect();
            others = left.into_iter().filter(|h| others.contains(h)).collect();
            if others.len() > 1 && self.below(2) == 0 {
                others.remove(self.below(others.len()));
            }
        } else {
            for n in (1..others.len()).rev() {
                others.swap(n, self.below(n + 1));
            }
            let keep = [3, 3, 3, 2, 2, 1, 0][self.below(7)];
            others.truncate(keep);
        }
        let command = Command::Reconfigure {
            vm: self.vm,
            expect,
            by: name(i),
            chain: others.into_iter().map(member).collect(),
        };
        self.asked.push(Asked { host: i, command });
    }

    pub(super) fn crash(&mut self) {
        let up = self.hosts_where(|_| true);
        if up.len() <= 1 {
            return;
        }
        let Some(i) = self.pick(&up) else { return };
        self.hosts[i] = Host::default();
        self.links
            .retain(|(from, to, _, _), _| *from != i && *to != i);
        self.counts.crashes += 1;
        self.say(format!("h{i} crashes"));
    }

    pub(super) fn come_back(&mut self) {
        let down: Vec<usize> = (0..HOSTS).filter(|i| !self.hosts[*i].up).collect();
        if let Some(i) = self.pick(&down) {
            self.hosts[i].up = true;
            self.say(format!("h{i} is back, empty"));
        }
    }

    /// A connection ends; what was under way on it is lost.
    pub(super) fn cut(&mut self) {
        let ids: Vec<LinkId> = self.links.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let (from, to, generation, _) = ids[self.below(ids.len())];
        self.links.retain(|(f, t, g, _), _| {
            *g != generation || !((*f, *t) == (from, to) || (*f, *t) == (to, from))
        });
        self.say(format!(
            "the connection of h{from} and h{to} in {generation} ends"
        ));
    }
}
