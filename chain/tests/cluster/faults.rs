//! What befalls hosts and what is between them.

use chain::Mark;
use chain::replica::Event;

use super::standby::Standby;
use super::{Content, Host, LinkId, Message, World, digest};

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
        let ended: Vec<LinkId> = self
            .links
            .keys()
            .filter(|l| l.from == i || l.to == i)
            .copied()
            .collect();
        self.hosts[i] = Host {
            disk,
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

    pub fn come_back(&mut self, i: usize) {
        self.hosts[i].up = true;
        self.say(|| format!("h{i} is back"));
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
