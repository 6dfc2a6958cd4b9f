//! What the hosts' agents do: ask for ownership, follow the master's decisions, ask for other chains.

use std::sync::Arc;

use chain::View;
use chain::master::Command;
use chain::replica::FreezeError;

use super::{Answer, Asked, Mutant, Owner, Plan, World, index, member, name};

impl World {
    pub fn can_ask(&self, i: usize) -> bool {
        self.takes(i)
            && self.reaches_master(i)
            && self.hosts[i].standby.as_ref().is_some_and(|s| {
                let mut machine = s.machine.clone();
                s.asking.is_none()
                    && match machine.freeze() {
                        Ok(_) => true,
                        Err(FreezeError::Joining(_)) => self.is(Mutant::ResumeIncomplete),
                        Err(_) => self.is(Mutant::ResumeOutdated) && s.before.is_some(),
                    }
            })
    }

    /// A replica suspects its predecessor, rightly or not.
    pub fn ask(&mut self, i: usize) {
        let (without, mutant) = (self.is(Mutant::AskWithoutFreezing), self.rules.mutant);
        let Some(standby) = self.standby(i) else {
            return;
        };
        let expect = standby.machine.generation();
        let frozen = match without {
            true => standby.machine.clone().freeze(),
            false => standby.machine.freeze(),
        };
        let held = match frozen {
            Ok(held) => held,
            Err(FreezeError::Joining(held)) if mutant == Mutant::ResumeIncomplete => held,
            Err(_) if mutant == Mutant::ResumeOutdated => match &standby.before {
                Some((held, _)) => *held,
                None => return,
            },
            Err(_) => return,
        };
        standby.asking = Some((expect, held));
        let mut at = held;
        if mutant == Mutant::ResumeOutdated {
            at.generation = expect;
        }
        self.say(|| format!("h{i} asks for the VM in {expect}, holding {held}"));
        let command = Command::TakeOver {
            vm: self.vm,
            expect,
            by: name(i),
            at,
        };
        self.asked.push(Asked { host: i, command });
    }

    /// The master decides on something it was asked.
    pub fn decide(&mut self, which: usize) {
        let Asked { host, mut command } = self.asked.remove(which);
        let now = self.view().generation;
        if let (Command::TakeOver { expect, at, .. }, Mutant::NoCompare) =
            (&mut command, self.rules.mutant)
        {
            *expect = now;
            at.generation = now;
        }
        let result = Arc::make_mut(&mut self.master.0).apply(&command);
        let record = self.master.0.snapshot().records.remove(0);
        self.now = self.told(record);
        match (&command, result) {
            (Command::TakeOver { expect, .. }, result) => {
                self.counts.0.refused += u64::from(result.is_err());
                let granted = result.ok().map(|record| self.told(record));
                if self.hosts[host].up {
                    self.answers.push(Answer {
                        host,
                        expect: *expect,
                        granted,
                    });
                }
            }
            (_, Ok(record)) => {
                self.counts.0.reconfigurations += 1;
                if let Some(owner) = &mut self.hosts[host].owner
                    && owner.generation() == record.view.generation
                {
                    // Asked twice, and known already.
                    owner.asked = false;
                }
                let view = &record.view;
                let was_joined = view
                    .chain
                    .last()
                    .is_some_and(|m| m.since == view.generation);
                self.counts.0.joins += u64::from(was_joined && view.in_place());
                self.counts.0.anew += u64::from(!view.in_place());
                self.say(|| {
                    let chain: Vec<&str> = view.chain.iter().map(|m| m.host.as_str()).collect();
                    let joining = view.joining.as_ref().map(|m| m.host.as_str());
                    format!(
                        "the master: {} has {chain:?}, joining {joining:?}, history {:?}",
                        view.generation, view.history
                    )
                });
            }
            (_, Err(why)) => {
                if let Some(owner) = &mut self.hosts[host].owner {
                    owner.asked = false;
                }
                self.say(|| format!("the master refuses h{host}: {why}"));
            }
        }
    }

    /// An answer arrives.
    pub fn hear(&mut self, which: usize) -> Result<(), String> {
        let Answer {
            host: i,
            expect,
            granted,
        } = self.answers.remove(which);
        let any = self.is(Mutant::NoCompare);
        let Some(standby) = &self.hosts[i].standby else {
            return Ok(());
        };
        if !standby.asking.is_some_and(|(e, _)| e == expect || any) {
            return Ok(());
        }
        match granted {
            Some(view) if view.generation > standby.machine.generation() => self.activate(i, &view),
            _ => {
                self.say(|| format!("h{i} is not given the VM and goes on"));
                self.unfreeze(i)
            }
        }
    }

    pub fn give_up_asking(&mut self, i: usize) -> Result<(), String> {
        self.say(|| format!("h{i} got no answer and goes on"));
        self.unfreeze(i)
    }

    /// The master gave this host the VM.
    fn activate(&mut self, i: usize, view: &Arc<View>) -> Result<(), String> {
        let noted = self.is(Mutant::AskWithoutFreezing);
        let Some(mut standby) = self.hosts[i].standby.take() else {
            return Ok(());
        };
        self.hosts[i].seen = view.generation;
        let before = standby.before.take();
        if let (true, None, Some((_, content))) = (
            self.is(Mutant::ResumeOutdated),
            standby.machine.hist(),
            before,
        ) {
            standby.store = content;
        }
        let outdated = standby.machine.hist().is_none().then_some(standby.asking);
        let outdated = outdated
            .filter(|_| self.is(Mutant::ResumeOutdated))
            .flatten();
        let mark = standby.machine.hist().or(outdated.map(|(_, mark)| mark));
        let (Some(mark), true) = (mark, !standby.store.is_empty()) else {
            self.say(|| format!("h{i} is given the VM, but holds nothing any more"));
            return Ok(());
        };
        standby.kept.abandon();
        let mut content = standby.store;
        if let (true, Some((_, held))) = (noted, standby.asking) {
            content.truncate(held.epoch.0 as usize);
        }
        let generation = view.generation;
        self.counts.0.takeovers += 1;
        let late = !view.chain.is_empty() && !view.history.contains(mark);
        self.counts.0.late_grants += u64::from(late);
        self.say(|| format!("h{i} resumes from {mark} as the owner in {generation}"));
        // One that hears of it too late is superseded already, and will not be heard.
        if self.view().generation == generation && !content.starts_with(&self.visible) {
            return Err(format!(
                "I5: h{i} resumes from {mark}; what the outside has seen is lost"
            ));
        }
        let acked = standby.machine.acked().unwrap_or_default();
        let resumed = Some((mark, standby.kept));
        let mut owner = Owner::new(view.clone(), content, acked, resumed);
        if late {
            // Granted from an earlier checkpoint than this: the others may hold what does not count any more.
            owner.bridge = None;
            owner.unfit = true;
        }
        self.hosts[i].owner = Some(owner);
        self.let_out(i)
    }

    pub fn can_look(&self, i: usize) -> bool {
        self.takes(i) && self.reaches_master(i) && self.view().generation > self.hosts[i].seen
    }

    /// A host hears what the master has decided, and follows.
    pub fn look(&mut self, i: usize) -> Result<(), String> {
        let view = self.view();
        let mine = view.owner == name(i);
        let holds = view.holds(&name(i));
        let host = &mut self.hosts[i];
        host.seen = view.generation;
        if host.owner.is_some() {
            if mine {
                return self.owner_follows(i, &view);
            }
            host.owner = None;
            self.say(|| format!("h{i} reads that it is not the owner any more"));
        } else if let Some(standby) = &mut host.standby {
            if mine {
                // Granted, but the answer was lost.
                if standby.machine.freeze().is_err() {
                    host.standby = None;
                    self.say(|| format!("h{i} is given the VM, but cannot resume it"));
                    return Ok(());
                }
                self.counts.0.resumed += 1;
                return self.activate(i, &view);
            }
            if holds {
                self.adopt(i, &view);
                return Ok(());
            }
            host.standby = None;
            self.drop_stale_links();
            self.say(|| format!("h{i} gives its replica up in {}", view.generation));
            return Ok(());
        }
        if holds && !mine {
            self.create(i, &view);
        }
        Ok(())
    }

    /// The owner's wish for another chain. `None`: there is nothing to wish.
    pub fn command(&self, i: usize, plan: &Plan) -> Option<Command> {
        let owner = self.hosts[i].owner.as_ref()?;
        let view = &owner.view;
        let mut chain: Vec<usize> = view.chain.iter().map(|m| index(&m.host)).collect();
        let mut joining = view.joining.as_ref().map(|m| index(&m.host));
        let mut anew = false;
        match plan {
            Plan::Without(lost) => {
                chain.retain(|h| !lost.contains(h));
                joining = joining.filter(|j| !lost.contains(j));
            }
            Plan::Unprotected => chain.clear(),
            Plan::Anew(hosts) => {
                chain.clone_from(hosts);
                joining = None;
                anew = true;
            }
            Plan::Join(new) => joining = Some(*new),
            Plan::Promote => chain.push(joining.take()?),
        }
        Some(Command::Reconfigure {
            vm: self.vm,
            expect: owner.generation(),
            by: name(i),
            joining: joining.filter(|_| !chain.is_empty()).map(member),
            chain: chain.into_iter().map(member).collect(),
            anew,
        })
    }

    pub fn propose(&mut self, i: usize, plan: &Plan) {
        if let Some(command) = self.command(i, plan) {
            self.say(|| format!("h{i} asks for another chain: {plan:?}"));
            if let Some(owner) = &mut self.hosts[i].owner {
                owner.asked = true;
            }
            self.asked.push(Asked { host: i, command });
        }
    }
}
