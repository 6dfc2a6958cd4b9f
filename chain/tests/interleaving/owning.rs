//! What an owner does: runs, sends checkpoints, lets output out, connects to its chain.

use std::collections::VecDeque;

use chain::Mark;
use checkpoint::Epoch;

use crate::owner::digest;
use crate::world::{IN_FLIGHT, Message, Mutant, Way, World, index, name};

impl World {
    pub(super) fn run_owner(&mut self) -> Result<(), String> {
        let Some(i) = self.pick(&self.hosts_where(|h| h.owner.is_some())) else {
            return Ok(());
        };
        let item = self.below(usize::MAX) as u64;
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        if owner.connected && owner.sent - owner.committed >= IN_FLIGHT && owner.holding {
            return Ok(());
        }
        owner.history.push(item);
        if owner.connected {
            self.send_checkpoint(i);
        }
        self.let_out(i)
    }

    /// Sends everything not sent yet: one full checkpoint, or one incremental for each epoch.
    pub(super) fn send_checkpoint(&mut self, i: usize) {
        let Some(owner) = &mut self.hosts[i].owner else {
            return;
        };
        let (generation, mut frames) = (owner.generation, Vec::new());
        let first = match owner.base {
            Some(base) => base.epoch.0 as usize + 1,
            None => owner.history.len(),
        };
        for e in first..=owner.history.len() {
            let epoch = Epoch(e as u64);
            let history = owner.history[..e].to_vec();
            let items = match owner.base {
                Some(_) => vec![history[e - 1]],
                None => history.clone(),
            };
            let digest = digest(&items);
            let base = owner.base;
            frames.extend([
                Message::Begin { epoch, base },
                Message::Data { epoch, items },
                Message::End { epoch, digest },
            ]);
            let mark = Mark {
                generation,
                epoch,
                digest,
            };
            owner.marks.push(mark);
            owner.base = Some(mark);
            owner.sent = e;
            self.truth.insert((generation, epoch), history);
        }
        if !owner.holding {
            // What it said up to here it said unprotected; what comes now is held.
            owner.holding = true;
            owner.committed = owner.history.len();
        }
        let newest = owner.history.len();
        self.say(format!("h{i} sends checkpoint {newest} ({generation})"));
        let head = self.downstream(i, generation);
        if let Some(head) = head {
            self.send((i, head, generation, Way::Down), frames);
        }
    }

    pub(super) fn heartbeat(&mut self) {
        let Some(i) = self.pick(&self.hosts_where(|h| h.owner.is_some())) else {
            return;
        };
        let generation = self.hosts[i].owner.as_ref().map(|o| o.generation);
        if let Some(generation) = generation
            && let Some(head) = self.downstream(i, generation)
        {
            self.send((i, head, generation, Way::Down), [Message::Heartbeat]);
        }
    }

    /// What the owner's outside sees now.
    pub(super) fn let_out(&mut self, i: usize) -> Result<(), String> {
        let Some(owner) = &self.hosts[i].owner else {
            return Ok(());
        };
        let seen = owner.visible();
        let common = seen.len().min(self.visible.len());
        if seen[..common] != self.visible[..common] {
            return Err(format!("two owners spoke: h{i} says something else"));
        }
        if seen.len() > self.visible.len() {
            self.visible = seen.to_vec();
        }
        Ok(())
    }

    /// The owner connects to its chain, if all of it is there.
    pub(super) fn connect(&mut self) -> Result<(), String> {
        let waiting = self.hosts_where(|h| h.owner.as_ref().is_some_and(|o| !o.connected));
        let Some(i) = self.pick(&waiting) else {
            return Ok(());
        };
        let view = self.view();
        let Some(owner) = &self.hosts[i].owner else {
            return Ok(());
        };
        let generation = owner.generation;
        // (An owner that is behind finds replicas that are ahead, or others' views; either way it does not connect.)
        if view.generation != generation || view.owner != name(i) || view.chain.is_empty() {
            return Ok(());
        }
        let chain: Vec<usize> = view.chain.iter().map(|m| index(&m.host)).collect();
        let ready = |r: usize| {
            let standby = self.hosts[r]
                .standby
                .as_ref()
                .filter(|_| self.hosts[r].up)?;
            let follows = standby.machine.generation() == generation;
            (follows && standby.machine.failed().is_none()).then(|| standby.machine.hist())
        };
        let Some(held) = chain
            .iter()
            .map(|r| ready(*r))
            .collect::<Option<Vec<Option<Mark>>>>()
        else {
            return Ok(());
        };
        let numbers_only = self.mutant == Mutant::AnyBase;
        let equal = |a: &Mark, b: &Mark| a == b || (numbers_only && a.epoch == b.epoch);
        let alike = |a: Option<Mark>, b: Option<Mark>| a.zip(b).is_some_and(|(a, b)| equal(&a, &b));
        let same = held[0].filter(|_| held.iter().all(|h| alike(*h, held[0])));
        let before = std::iter::once(i).chain(chain.iter().copied());
        for (from, to) in before.zip(&chain) {
            self.links
                .insert((from, *to, generation, Way::Down), VecDeque::new());
            self.links
                .insert((*to, from, generation, Way::Up), VecDeque::new());
        }
        let tail = chain[chain.len() - 1];
        self.links
            .insert((tail, i, generation, Way::Acks), VecDeque::new());
        let in_place = self.below(2) == 0;
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        owner.connected = true;
        // Only from a checkpoint of its own that covers all it has let out.
        let fits = |mark: &Mark| {
            in_place
                && owner.holding
                && mark.epoch.0 as usize >= owner.committed
                && owner.marks.iter().any(|own| equal(own, mark))
        };
        match same.filter(fits) {
            Some(mark) => {
                // All replicas hold this one: it is committed, and what follows it is sent (again).
                owner.base = Some(mark);
                owner.committed = owner.committed.max(mark.epoch.0 as usize);
                self.counts.continued += 1;
                self.say(format!("h{i} goes on in place from {mark} in {generation}"));
                if self.hosts[i]
                    .owner
                    .as_ref()
                    .is_some_and(|o| o.history.len() > mark.epoch.0 as usize)
                {
                    self.send_checkpoint(i);
                }
            }
            None => {
                owner.base = None;
                owner.restart();
                self.say(format!(
                    "h{i} connects to {chain:?} and begins anew in {generation}"
                ));
            }
        }
        self.let_out(i)
    }
}
