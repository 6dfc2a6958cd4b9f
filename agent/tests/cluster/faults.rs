//! What befalls hosts and what is between them.

use chain::Mark;
use chain::replica::Event;

use checkpoint::Generation;

use super::standby::Standby;
use super::{Agent, Content, Host, LinkId, Message, World, digest};

impl World {
    /// What of a replica outlives its process: everything prepared, nothing that is half received. With `prepared` the
    /// checkpoint in hand had just become durable.
    fn outlives(&self, i: usize, prepared: bool) -> Option<(Mark, Content)> {
        let standby: &Standby = self.hosts[i].standby.as_ref()?;
        let mut machine = standby.machine.clone();
        let mut store = standby.store.clone();
        if let (true, Some((_, Message::End { digest: said, .. })), Some((full, staged))) =
            (prepared, &standby.preparing, &standby.staged)
            && standby.doomed.is_none()
            && digest(staged) == *said
        {
            let event = Event::Prepared { digest: *said };
            machine.step(event, &mut Default::default());
            if *full {
                store.clear();
            }
            store.extend(staged);
        }
        let mark = machine.hist()?;
        let is_whole = self.truth.get(&(mark.generation, mark.epoch)) == Some(&store);
        is_whole.then_some((mark, store))
    }

    /// A host ends, and with it all that is not durable.
    pub fn crash(&mut self, i: usize, recovers: bool, prepared: bool) {
        let disk = match recovers {
            true => self.outlives(i, prepared),
            false => None,
        };
        let what = disk.as_ref().map(|(mark, _)| *mark);
        self.leave_disks(i);
        self.end_process(i);
        let ended: Vec<LinkId> = self
            .links
            .keys()
            .filter(|l| l.from == i || l.to == i)
            .copied()
            .collect();
        self.hosts[i] = Host {
            disk,
            disks: self.hosts[i].disks.take(),
            lives: self.hosts[i].lives,
            ..Host::default()
        };
        for link in ended {
            match link.from == i {
                true => drop(self.links.remove(&link)),
                false => self.cut(link),
            }
        }
        self.answers.retain(|answer| answer.host != i);
        self.counts.0.crashes += 1;
        self.say(|| format!("h{i} crashes; on its disk is {what:?}"));
    }

    /// A replica's mirrors stay where they are, whatever becomes of its memory.
    pub fn leave_disks(&mut self, i: usize) {
        let boot = self.boot;
        let host = &mut self.hosts[i];
        if let Some(standby) = host.standby.as_ref().filter(|s| !s.store.is_empty()) {
            host.disks = Some((boot, standby.store.clone()));
        }
    }

    pub fn come_back(&mut self, i: usize) {
        self.hosts[i].up = true;
        self.say(|| format!("h{i} is back"));
        self.begin_agent(i);
    }

    fn begin_agent(&mut self, i: usize) {
        if !self.is_free() {
            let host = &mut self.hosts[i];
            host.lives += 1;
            host.agent_gone = false;
            host.agent.0 = Some(Box::new(Agent::new(host.lives)));
        }
    }

    /// An agent ends, and with it the chain server, its replica, and the process that waits beside that; not a VM that
    /// runs.
    pub fn end_agent(&mut self, i: usize, recovers: bool, prepared: bool) {
        let disk = match recovers {
            true => self.outlives(i, prepared),
            false => None,
        };
        self.leave_disks(i);
        if self.hosts[i].standby.take().is_some() {
            self.hosts[i].disk = disk;
            self.links.retain(|l, _| l.from != i);
        }
        if let Some(bridge) = self.hosts[i].bridge.take() {
            let generation = bridge.view.generation;
            self.links
                .retain(|l, _| l.from != i || l.generation != generation);
        }
        let host = &mut self.hosts[i];
        host.agent_gone = true;
        host.seen = Generation::ZERO;
        host.declined = None;
        if let Some(agent) = host.agent.0.take() {
            // Of what it was sent and has not read nobody hears.
            drop(agent);
        }
        let ended: Vec<LinkId> = self.links.keys().filter(|l| l.to == i).copied().collect();
        ended.into_iter().for_each(|link| self.cut(link));
        self.counts.0.agents_died += 1;
        self.say(|| format!("h{i}'s agent ends"));
    }

    pub fn agent_returns(&mut self, i: usize) {
        self.say(|| format!("h{i} has an agent again"));
        self.begin_agent(i);
    }

    /// Two hosts cannot reach each other any more; with `b` the number of hosts, `a` and the master.
    pub fn part(&mut self, a: usize, b: usize) {
        let pair = (a.min(b), a.max(b));
        self.blocked.insert(pair);
        self.counts.0.partitions += 1;
        self.say(|| format!("h{a} and h{b} are parted"));
        let cut: Vec<LinkId> = self
            .links
            .keys()
            .filter(|l| (l.from.min(l.to), l.from.max(l.to)) == pair)
            .copied()
            .collect();
        for link in cut {
            self.cut(link);
        }
    }
}
