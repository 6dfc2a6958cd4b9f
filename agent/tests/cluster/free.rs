//! Agents that are free to do anything ([`Agents::Free`](super::Agents)): ask for ownership, follow the master's decisions or not,
//! ask for any chain. Which and when is a step each.

use std::sync::Arc;

use chain::View;
use chain::master::Command;
use chain::replica::FreezeError;

use super::{Answer, Asked, Bridge, Mutant, Plan, World, index, member, name};

impl World {
    pub fn can_ask(&self, i: usize) -> bool {
        self.takes(i)
            && self.reaches_master(i)
            && self.hosts[i].standby.as_ref().is_some_and(|s| {
                s.asking.is_none()
                    && match self.rules.mutant {
                        Mutant::ResumeIncomplete => s.machine.hist().is_some(),
                        Mutant::ResumeOutdated => s.may_resume().is_some() || s.before.is_some(),
                        _ => s.may_resume().is_some(),
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
        self.asked.push(Asked {
            host: i,
            by: (0, 0),
            command,
        });
    }

    /// An answer arrives.
    pub fn hear(&mut self, which: usize) -> Result<(), String> {
        let Answer {
            host: i,
            expect,
            granted,
            reply,
        } = self.answers.remove(which);
        if let Some(reply) = reply.0 {
            return self.agent_hears(i, reply);
        }
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
        self.hosts[i].seen = view.generation;
        let Some(handed) = self.hand_over(i) else {
            self.say(|| format!("h{i} is given the VM, but holds nothing any more"));
            return Ok(());
        };
        let (mark, kept) = (handed.mark, handed.kept.clone());
        let late = !view.chain.is_empty() && !view.history.contains(mark);
        self.counts.0.late_grants += u64::from(late);
        self.resume(i, view, handed)?;
        if late {
            // Granted from an earlier checkpoint than this: the others may hold what does not count any more.
            self.owner_mut(i).unfit = true;
        } else if view.in_place() {
            self.hosts[i].bridge = Some(Bridge::new(view.clone(), mark, kept));
        }
        Ok(())
    }

    pub fn can_look(&self, i: usize) -> bool {
        self.takes(i)
            && self.reaches_master(i)
            && match &self.hosts[i].agent.0 {
                Some(agent) => agent.revision() < self.master.0.revision(),
                None => self.is_free() && self.view().generation > self.hosts[i].seen,
            }
    }

    /// A host hears what the master has decided, and follows.
    pub fn look(&mut self, i: usize) -> Result<(), String> {
        if !self.is_free() {
            return self.agent_watches(i, self.past.0.len() - 1);
        }
        let view = self.view();
        let mine = view.owner == name(i);
        let holds = view.holds(&name(i));
        let host = &mut self.hosts[i];
        host.seen = view.generation;
        if host.owner.is_some() {
            if mine {
                self.hosts[i].bridge = None;
                return self.protect(i, &view);
            }
            self.end_process(i);
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
            self.asked.push(Asked {
                host: i,
                by: (0, 0),
                command,
            });
        }
    }
}
