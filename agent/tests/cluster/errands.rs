//! What an agent does on the side, as `src/daemon/slow.rs` does it; the outcome is an input.

use std::sync::Arc;

use agent::host::{Disks, Effect, Health, Input, Loss, Report};
use chain::replica::Event;
use chain::{Held, Mark, Member, View, VmRecord};
use checkpoint::{Generation, HostId};

use super::agent::Process;
use super::owner::Owner;
use super::{Begun, World, index, name};

#[derive(Clone, Debug)]
pub enum Errand {
    /// A process is started, that one, as what it is to be.
    Spawn(u64, Box<Effect>),
    Bury,
    Read,
    Probe(Vec<Member>),
    Survey(View),
    Yield(View),
    FindDisks,
}

impl World {
    /// Does one of the errands of host `i`.
    pub fn run_errand(&mut self, i: usize, which: usize) -> Result<(), String> {
        let Some(agent) = self.agent(i).filter(|agent| which < agent.errands.len()) else {
            return Ok(());
        };
        match agent.errands.remove(which) {
            Errand::Spawn(number, effect) => self.spawned(i, number, &effect, true),
            Errand::Bury => self.feed(i, Input::Buried),
            Errand::Read => {
                let record = self.record().map(|r| VmRecord::clone(r));
                match record {
                    Some(record) if self.reaches_master(i) => self.feed(i, Input::Decided(record)),
                    _ => Ok(()),
                }
            }
            Errand::Probe(members) => {
                let health = |member: &Member| (member.host.clone(), self.health(i, member));
                let answers = members.iter().map(health).collect();
                self.feed(i, Input::Probed(answers))
            }
            Errand::Survey(view) => {
                let held = |member: &Member| {
                    let held = match self.look_at(i, member, &view) {
                        Some(Some(mark)) => Held::Checkpoint(mark),
                        Some(None) => Held::Nothing,
                        None => Held::Unknown("no answer".into()),
                    };
                    (member.host.clone(), held)
                };
                let answers: Vec<(HostId, Held)> = view.chain.iter().map(held).collect();
                self.feed(i, Input::Surveyed(answers))
            }
            Errand::Yield(view) => self.yield_to_head(i, &view),
            Errand::FindDisks => {
                let found = self.hosts[i].disks.is_some();
                let found = found.then_some(()).ok_or_else(|| "no disks here".into());
                self.feed(i, Input::DisksFound(found))
            }
        }
    }

    /// An errand comes to nothing: there is no memory for a process, say.
    pub fn fail_errand(&mut self, i: usize, which: usize) -> Result<(), String> {
        let Some(agent) = self.agent(i).filter(|agent| which < agent.errands.len()) else {
            return Ok(());
        };
        match agent.errands[which] {
            Errand::Spawn(..) => {
                let Errand::Spawn(number, effect) = agent.errands.remove(which) else {
                    return Ok(());
                };
                self.spawned(i, number, &effect, false)
            }
            Errand::FindDisks => {
                agent.errands.remove(which);
                self.feed(i, Input::DisksFound(Err("they cannot be read".into())))
            }
            _ => Ok(()),
        }
    }

    fn health(&self, i: usize, member: &Member) -> Health {
        let m = index(&member.host);
        let host = &self.hosts[m];
        if !self.serves(m) || !self.reaches(i, m) {
            return Health::Silent("no answer".into());
        }
        let failed = host.standby.as_ref().and_then(|s| s.machine.failed());
        match failed {
            Some(why) => Health::Declines(why.into()),
            None if host.declined.is_some() => Health::Declines("it has declined".into()),
            None => Health::Answers,
        }
    }

    /// What a member holds that the VM could be resumed from; nothing if it does not say.
    fn look_at(&self, i: usize, member: &Member, view: &View) -> Option<Option<Mark>> {
        let m = index(&member.host);
        if !self.serves(m) || !self.reaches(i, m) {
            return None;
        }
        let machine = &self.hosts[m].standby.as_ref()?.machine;
        let answers = machine.generation() == view.generation && view.owner == name(i);
        answers.then(|| machine.resumable())
    }

    fn yield_to_head(&mut self, i: usize, view: &View) -> Result<(), String> {
        let Some(head) = view.chain.first() else {
            return Ok(());
        };
        let Some(Some(mark)) = self.look_at(i, head, view) else {
            return Ok(());
        };
        let (generation, epoch) = (view.generation, mark.epoch);
        let at = index(&head.host);
        self.finish_prepare(at)?;
        self.step_machine(at, Event::Yield { generation, epoch }, None)
    }

    fn spawned(
        &mut self,
        i: usize,
        number: u64,
        effect: &Effect,
        works: bool,
    ) -> Result<(), String> {
        let result = match works {
            true => self.start_process(i, effect)?,
            false => Err("there is no memory for it".to_string()),
        };
        let Some(agent) = self.agent(i) else {
            return Ok(());
        };
        agent.spawning = false;
        if number == agent.number {
            let boots = matches!(effect, Effect::Boot(..));
            if result.is_ok() {
                agent.process = match boots {
                    true => Process::Owner,
                    false => Process::Standby,
                };
                agent.mail.push_back(Input::Report(Report::Ready));
            }
            self.feed(i, Input::Spawned(result))?;
        } else if result.is_ok() {
            // Nobody wants it any more.
            self.end_process(i);
            let machine = self.machine(i);
            let generation = machine.map_or(Generation::ZERO, agent::host::Machine::generation);
            self.carry_out_effect(i, Effect::RemoveReplica(generation))?;
        }
        let next = match self.agent(i) {
            Some(agent) if !agent.spawning => agent.next.take(),
            _ => None,
        };
        match next {
            Some(next) => self.carry_out_effect(i, next),
            None => Ok(()),
        }
    }

    fn start_process(&mut self, i: usize, effect: &Effect) -> Result<Result<(), String>, String> {
        match effect {
            Effect::StandBy(record) => {
                self.hosts[i].declined = None;
                self.create(i, &Arc::new(record.view.clone()));
                Ok(Ok(()))
            }
            Effect::Boot(record, disks) => self.boot(i, record, *disks),
            _ => Ok(Err("it is no process".into())),
        }
    }

    /// The VM boots: what it did before, only its disks know.
    fn boot(
        &mut self,
        i: usize,
        record: &VmRecord,
        _disks: Disks,
    ) -> Result<Result<(), String>, String> {
        // Another host's by now: it must not be heard.
        let mine = self.view().owner == name(i);
        let mut boot = u32::MAX;
        if mine {
            let newest = matches!(
                self.begun,
                Some(Begun::Started | Begun::Restarted { newest: true })
            );
            let disks = self.hosts[i].disks.as_ref();
            let whole = disks.is_some_and(|(boot, content)| {
                *boot == self.boot && content.starts_with(&self.visible)
            });
            if newest && !whole {
                return Err(format!(
                    "I6: h{i} boots the VM from disks without what the outside has seen of it"
                ));
            }
            let known = disks.filter(|_| whole).map(|(_, content)| content.clone());
            let life = known.unwrap_or_else(|| self.visible.clone());
            self.lives.0.push(life);
            self.boot += 1;
            self.boots.0.push(record.view.generation);
            boot = self.boot;
            self.visible.clear();
            self.counts.0.booted += 1;
            self.say(|| format!("h{i} boots the VM"));
        }
        let view = Arc::new(record.view.clone());
        let limit = self.rules.in_flight;
        self.hosts[i].owner = Some(Owner::booted(view, limit, boot));
        self.hosts[i].disks = Some((boot, Vec::new()));
        Ok(Ok(()))
    }

    /// The bridge of a new owner has ended.
    pub fn bridge_ends(
        &mut self,
        i: usize,
        lost: Option<(Option<usize>, bool)>,
    ) -> Result<(), String> {
        let Some(bridge) = self.hosts[i].bridge.take() else {
            return Ok(());
        };
        let generation = bridge.view.generation;
        if self.is_free() {
            return match lost {
                None => self.protect(i, &bridge.view),
                Some((who, unfit)) => {
                    self.say_lost(i, who, unfit);
                    Ok(())
                }
            };
        }
        let loss = |(host, unfit): (Option<usize>, bool)| Loss {
            generation,
            host: host.map(name),
            unfit,
            why: String::new(),
        };
        let result = lost.map_or(Ok(()), |lost| Err(loss(lost)));
        self.feed(i, Input::Bridged { generation, result })
    }

    /// The time for the bridge is over.
    pub fn fail_to_bridge(&mut self, i: usize) -> Result<(), String> {
        let Some(bridge) = &self.hosts[i].bridge else {
            return Ok(());
        };
        let (head, generation) = (index(&bridge.view.chain[0].host), bridge.view.generation);
        self.links.remove(&Self::update_link(i, head, generation));
        let lost = match self.greet(i, head, generation) {
            Err(super::greeting::Greeting::Lost(who)) => (Some(who), false),
            Err(super::greeting::Greeting::NotYet) => (Some(head), false),
            _ => (None, true),
        };
        self.bridge_ends(i, Some(lost))
    }
}
