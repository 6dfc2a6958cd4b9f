//! What a shipped machine wants done, as `src/daemon/run.rs` does it.

use std::sync::Arc;

use agent::child::proto::{Owns, Registered};
use agent::control::EventKind;
use agent::host::{Effect, Input, Report, Tell};
use chain::replica::FreezeError;
use chain::{Mark, View};
use checkpoint::{ClusterId, Generation};

use super::agent::{Handed, Process};
use super::errands::Errand;
use super::owner::{Owner, Still};
use super::{Asked, Bridge, Mutant, World, name};

impl World {
    pub fn carry_out_effect(&mut self, i: usize, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::Freeze => {
                let frozen = self.freeze(i)?;
                self.feed(i, Input::Frozen(frozen))
            }
            Effect::Unfreeze => {
                self.finish_prepare(i)?;
                self.unfreeze(i)
            }
            Effect::Adopt(view) => {
                self.finish_prepare(i)?;
                let newer = |s: &super::Standby| view.generation > s.machine.generation();
                if self.hosts[i].standby.as_ref().is_some_and(newer) {
                    self.adopt(i, &Arc::new(view));
                }
                Ok(())
            }
            Effect::HandOver(view) => self.take_apart(i, &view),
            Effect::RemoveReplica(generation) => {
                self.remove_replica(i, generation);
                Ok(())
            }
            Effect::Decline(generation, why) => {
                self.say(|| format!("h{i} declines {generation}: {why}"));
                self.hosts[i].declined = Some(generation);
                self.remove_replica(i, generation);
                Ok(())
            }
            Effect::FindProcess => {
                let found = self.adopt_process(i);
                self.feed(i, Input::Adopted(found))
            }
            Effect::StandBy(ref record) | Effect::Boot(ref record, _) => {
                self.hosts[i].registered.0 = record.revision;
                self.spawn(i, effect);
                Ok(())
            }
            Effect::Activate { view, mark } => self.activate_standby(i, view, mark),
            Effect::Tell(tell) => {
                self.tell(i, tell);
                Ok(())
            }
            Effect::Kill if self.is(Mutant::StopOnlyDecided) && !self.is_on() => Ok(()),
            Effect::Kill => {
                self.kill(i);
                Ok(())
            }
            Effect::Propose { ask, command } => {
                let Some(agent) = self.agent(i) else {
                    return Ok(());
                };
                let by = (agent.life, ask);
                self.asked.push(Asked {
                    host: i,
                    by,
                    command,
                });
                Ok(())
            }
            Effect::Bridge { view, mark } => {
                let Some(agent) = self.agent(i) else {
                    return Ok(());
                };
                let kept = agent.kept.clone();
                self.hosts[i].bridge = Some(Bridge::new(Arc::new(view), mark, kept));
                Ok(())
            }
            Effect::Bury => self.begin_errand(i, Errand::Bury),
            Effect::Read => self.begin_errand(i, Errand::Read),
            Effect::Probe(members) => self.begin_errand(i, Errand::Probe(members)),
            Effect::Survey(view) => self.begin_errand(i, Errand::Survey(view)),
            Effect::Yield(view) => self.begin_errand(i, Errand::Yield(view)),
            Effect::FindDisks(record) => {
                let Some(agent) = self.agent(i) else {
                    return Ok(());
                };
                if agent.spawning {
                    agent.next = Some(Effect::FindDisks(record));
                    return Ok(());
                }
                self.begin_errand(i, Errand::FindDisks)
            }
            Effect::Say(kind, text) => {
                self.counts.0.superseded += u64::from(kind == EventKind::Superseded);
                self.say(|| format!("h{i} says {kind:?}: {text}"));
                Ok(())
            }
            Effect::Answer(ticket, result) => {
                self.answered(i, ticket, &result);
                Ok(())
            }
            Effect::Forget => {
                self.kill(i);
                if let Some(agent) = self.agent(i) {
                    agent.machine = None;
                    agent.errands.clear();
                    agent.tickets.clear();
                }
                self.hosts[i].bridge = None;
                Ok(())
            }
        }
    }

    fn begin_errand(&mut self, i: usize, errand: Errand) -> Result<(), String> {
        if let Some(agent) = self.agent(i) {
            agent.errands.push(errand);
        }
        Ok(())
    }

    fn freeze(&mut self, i: usize) -> Result<Result<Mark, String>, String> {
        self.finish_prepare(i)?;
        let mutant = self.rules.mutant;
        let Some(standby) = self.standby(i) else {
            return Ok(Err("no replica".into()));
        };
        let generation = standby.machine.generation();
        let frozen = match mutant {
            Mutant::AskWithoutFreezing => standby.machine.clone().freeze(),
            _ => standby.machine.freeze(),
        };
        let held = match (frozen, mutant) {
            (Ok(held), _) => held,
            (Err(FreezeError::Joining(held)), Mutant::ResumeIncomplete) => held,
            (Err(_), Mutant::ResumeOutdated) if standby.before.is_some() => {
                let (held, _) = standby.before.as_ref().expect("looked at");
                Mark {
                    generation,
                    ..*held
                }
            }
            (Err(why), _) => return Ok(Err(why.to_string())),
        };
        standby.asking = Some((generation, held));
        Ok(Ok(held))
    }

    fn take_apart(&mut self, i: usize, view: &View) -> Result<(), String> {
        self.finish_prepare(i)?;
        let result = match self.hand_over(i) {
            Some(handed) => {
                let mark = handed.mark;
                if let Some(agent) = self.agent(i) {
                    agent.kept = handed.kept.clone();
                    agent.handed = Some(handed);
                }
                Ok(mark)
            }
            None => Err("the replica holds nothing".into()),
        };
        self.hosts[i].seen = view.generation;
        self.drop_stale_links();
        self.feed(i, Input::HandedOver(result))
    }

    /// The replica is taken apart; nothing if it holds nothing.
    pub fn hand_over(&mut self, i: usize) -> Option<Handed> {
        let outdated = self.is(Mutant::ResumeOutdated);
        let noted = self.is(Mutant::AskWithoutFreezing);
        let mut standby = self.hosts[i].standby.take()?;
        let mut mark = standby.machine.hist();
        if outdated && mark.is_none() {
            let (_, content) = standby.before.take()?;
            standby.store = content;
            mark = standby.asking.map(|(_, held)| held);
        }
        let mark = mark.filter(|_| !standby.store.is_empty())?;
        standby.kept.abandon();
        let mut content = standby.store;
        if let (true, Some((_, held))) = (noted, standby.asking) {
            content.truncate(super::upto(&content, held.epoch));
        }
        Some(Handed {
            mark,
            content,
            acked: standby.machine.acked().unwrap_or_default(),
            kept: standby.kept,
        })
    }

    /// The standby becomes the VM.
    pub fn resume(&mut self, i: usize, view: &Arc<View>, handed: Handed) -> Result<(), String> {
        let Handed {
            mark,
            content,
            acked,
            ..
        } = handed;
        let generation = view.generation;
        self.counts.0.takeovers += 1;
        self.say(|| format!("h{i} resumes from {mark} as the owner in {generation}"));
        // One that hears of it too late is superseded already, and will not be heard.
        let in_force = self.view().generation == generation && self.is_on();
        if in_force && !content.starts_with(&self.visible) {
            return Err(format!(
                "I5: h{i} resumes from {mark}; what the outside has seen is lost"
            ));
        }
        let limit = self.rules.in_flight;
        // A grant that is heard of late is about the VM as it was before it booted again.
        let boots = self.boots.0.iter().filter(|of| **of <= generation);
        let boot = boots.count() as u32;
        let owner = Owner::resumed(view.clone(), content, mark, acked, limit, boot);
        self.hosts[i].owner = Some(owner);
        if !view.in_place() {
            self.protect(i, view)?;
        }
        self.let_out(i)
    }

    fn activate_standby(&mut self, i: usize, view: View, mark: Mark) -> Result<(), String> {
        let Some(agent) = self.agent(i) else {
            return Ok(());
        };
        let Some(handed) = agent.handed.take() else {
            return Ok(());
        };
        if agent.process != Process::Standby {
            return Ok(());
        }
        agent.process = Process::Owner;
        debug_assert_eq!(mark, handed.mark);
        self.resume(i, &Arc::new(view), handed)?;
        let (restored_us, running_us) = (self.clock.0, self.clock.0);
        self.report(
            i,
            Report::Activated {
                restored_us,
                running_us,
            },
        );
        Ok(())
    }

    fn remove_replica(&mut self, i: usize, generation: Generation) {
        self.hosts[i].seen = generation;
        self.leave_disks(i);
        if self.hosts[i].standby.take().is_some() {
            let stale = |link: &super::LinkId| link.to == i && link.generation >= generation;
            let ended: Vec<_> = self.links.keys().filter(|l| stale(l)).copied().collect();
            self.links.retain(|l, _| l.from != i);
            // Still a member, but without a replica: the predecessor has to notice.
            ended.into_iter().for_each(|link| self.cut(link));
            self.say(|| format!("h{i} gives its replica up in {generation}"));
        }
    }

    /// What the VM's process says of itself to an agent that finds it.
    pub fn owns(&self, i: usize) -> Option<Owns> {
        let host = &self.hosts[i];
        let owner = host.owner.as_ref()?;
        Some(Owns {
            vm: self.vm,
            host: name(i),
            registered: Registered {
                cluster: ClusterId::NIL,
                revision: host.registered.0,
            },
            generation: owner.newest,
            protected: owner.protected.0,
            ended: (owner.still == Some(Still::Ended)).then(|| "it has ended".into()),
            frozen: match owner.still {
                Some(Still::Frozen(of)) => Some(of),
                _ => None,
            },
        })
    }

    /// The process of this VM that an agent before has left running.
    fn adopt_process(&mut self, i: usize) -> Option<Owns> {
        if self.is(Mutant::AdoptNothing) {
            return None;
        }
        let owns = self.owns(i)?;
        let (host, newest) = (&mut self.hosts[i], owns.generation);
        host.unheard.0.retain(|report| match report {
            Report::Refused { generation } | Report::JoinerReady { generation } => {
                *generation >= newest
            }
            Report::Lost(loss) => loss.generation >= newest,
            _ => true,
        });
        // Whoever had ordered a switchover is gone.
        let owner = host.owner.as_mut()?;
        owner
            .still
            .take_if(|still| matches!(still, Still::Stopping(_)));
        let unheard = host.unheard.0.clone();
        let agent = host.agent.0.as_deref_mut()?;
        agent.number += 1;
        agent.process = Process::Owner;
        agent.mail.extend(unheard.into_iter().map(Input::Report));
        self.counts.0.adopted += 1;
        self.say(|| format!("h{i} adopts the VM's process"));
        Some(owns)
    }

    pub fn spawn(&mut self, i: usize, effect: Effect) {
        let Some(agent) = self.agent(i) else { return };
        if agent.spawning {
            agent.next = Some(effect);
            return;
        }
        agent.spawning = true;
        agent.number += 1;
        let errand = Errand::Spawn(agent.number, Box::new(effect));
        agent.errands.push(errand);
    }

    fn kill(&mut self, i: usize) {
        let Some(agent) = self.agent(i) else { return };
        agent.number += 1;
        agent.next = None;
        agent.told.clear();
        // What it has said and nobody has read is of no account.
        agent
            .mail
            .retain(|letter| !matches!(letter, Input::Report(_)));
        if std::mem::replace(&mut agent.process, Process::None) == Process::Owner {
            self.end_process(i);
        }
    }

    /// The VM's process ends, with its connections. Its disks stay.
    pub fn end_process(&mut self, i: usize) {
        let Some(owner) = self.hosts[i].owner.take() else {
            return;
        };
        self.hosts[i].disks = Some((owner.boot, owner.content));
        self.hosts[i].unheard.0.clear();
        if self.is_free() {
            self.hosts[i].bridge = None;
        }
        let bridge = self.hosts[i].bridge.as_ref().map(|b| b.view.generation);
        self.links
            .retain(|l, _| l.from != i || Some(l.generation) == bridge);
    }

    fn tell(&mut self, i: usize, tell: Tell) {
        let Some(agent) = self.agent(i) else { return };
        if agent.process != Process::None {
            agent.told.push_back(tell);
        }
    }

    /// The process does what it was told.
    pub fn obey(&mut self, i: usize) -> Result<(), String> {
        let Some(tell) = self.agent(i).and_then(|agent| agent.told.pop_front()) else {
            return Ok(());
        };
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        match tell {
            Tell::Protect(view) => return self.protect(i, &Arc::new(view)),
            Tell::Freeze if matches!(owner.still, None | Some(Still::Stopping(_))) => {
                owner.still = Some(Still::Frozen(owner.newest));
            }
            Tell::HandOver if owner.still.is_none() && owner.output.is_protected() => {
                owner.still = Some(Still::Stopping(None));
            }
            Tell::RunOn if matches!(owner.still, Some(Still::Stopping(_))) => owner.still = None,
            Tell::Freeze | Tell::HandOver | Tell::RunOn => {}
            Tell::PowerButton { reboot: false } if owner.still.is_none() => self.power_off(i),
            // What happens inside of the guest is nothing that its chain sees.
            Tell::Reset | Tell::PowerButton { reboot: true } if owner.still.is_none() => {
                self.counts.0.rebooted += 1;
                let how = "it resets itself".into();
                self.report(i, Report::Rebooted { how });
            }
            Tell::Reset | Tell::PowerButton { .. } | Tell::Epochs(_) => {}
        }
        Ok(())
    }
}
