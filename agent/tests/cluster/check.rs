//! What must hold at every instant.

use chain::replica::State;
use chain::{Mark, View};
use checkpoint::{Epoch, Generation};

use super::{Content, Standby, World, index, name};

/// What the chain's client did, for the check of linearizability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// An owner began to send a checkpoint.
    Update {
        host: usize,
        /// The generation in which it became the owner.
        owner_since: Generation,
        base: Option<Mark>,
        mark: Mark,
    },
    /// It knows that everything up to this epoch is committed.
    Acked {
        host: usize,
        owner_since: Generation,
        epoch: Epoch,
    },
    /// A query began.
    Query(usize),
    /// It was answered, and the answer holds.
    Answered(usize, Mark),
}

impl World {
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<(), String> {
        let now = self.view();
        self.prefixes()?;
        self.resumable_has_all(&now)?;
        self.one_line(&now)?;
        // I4, I5: what the outside has seen is what the newest owner has done.
        if let Some(i) = self.owner_in_force()
            && let Some(owner) = &self.hosts[i].owner
            && !owner.content.starts_with(&self.visible)
        {
            return Err(format!("I4: somebody else than the owner h{i} spoke"));
        }
        Ok(())
    }

    fn followers(&self) -> impl Iterator<Item = (usize, &Standby)> {
        let standby = |(i, host): (usize, &'_ super::Host)| {
            let _ = host;
            Some((i, self.hosts[i].standby.as_ref()?))
        };
        self.hosts.iter().enumerate().filter_map(standby)
    }

    /// I2: within a generation, a replica has nothing that one before it has not.
    fn prefixes(&self) -> Result<(), String> {
        for (i, first) in self.followers() {
            let view = &first.view;
            if view.position(&name(i)) != self.first_filled(view) {
                continue;
            }
            let mut before: (usize, &Content) = (i, &first.store);
            for member in &view.chain[view.position(&name(i)).unwrap_or(0) + 1..] {
                let j = index(&member.host);
                let Some(after) = self.filled(j, view.generation) else {
                    continue;
                };
                if !before.1.starts_with(&after.store) {
                    return Err(format!(
                        "I2: h{j} has {:?} in {}, h{} before it has not",
                        after.machine.hist(),
                        view.generation,
                        before.0
                    ));
                }
                before = (j, &after.store);
            }
        }
        Ok(())
    }

    fn filled(&self, i: usize, generation: Generation) -> Option<&Standby> {
        let standby = self.hosts[i].standby.as_ref()?;
        let follows = standby.machine.generation() == generation;
        let intact = standby.doomed.is_none() && !standby.store.is_empty();
        // One that is not sure to have everything counts for nothing yet: it may come back with what was never
        // acknowledged and its predecessor does not have any more.
        let counts = standby.machine.state() != State::Joining || standby.processed.is_some();
        (follows && intact && counts && standby.machine.hist().is_some()).then_some(standby)
    }

    fn first_filled(&self, view: &View) -> Option<usize> {
        view.chain
            .iter()
            .position(|m| self.filled(index(&m.host), view.generation).is_some())
    }

    /// I5, before it matters: whoever could be granted the VM now has all that the outside has seen.
    fn resumable_has_all(&self, now: &View) -> Result<(), String> {
        for (i, standby) in self.followers() {
            let machine = &standby.machine;
            if machine.generation() != now.generation || now.position(&name(i)).is_none() {
                continue;
            }
            let Some(mark) = standby.may_resume() else {
                continue;
            };
            if now.history.contains(mark) && !standby.store.starts_with(&self.visible) {
                return Err(format!(
                    "I5: h{i} could take over from {mark}; what the outside has seen would be lost"
                ));
            }
        }
        Ok(())
    }

    /// Whatever a replica of the newest configuration holds as part of the history is on the owner's line.
    fn one_line(&self, now: &View) -> Result<(), String> {
        let Some(owner) = self
            .owner_in_force()
            .and_then(|i| self.hosts[i].owner.as_ref())
        else {
            return Ok(());
        };
        for (i, standby) in self.followers() {
            let follows = standby.machine.generation() == now.generation;
            if !follows || owner.generation() != now.generation {
                continue;
            }
            if let Some(mark) = standby.machine.hist()
                && !standby.store.is_empty()
                && !owner.content.starts_with(&standby.store)
            {
                return Err(format!(
                    "h{i} holds checkpoint {mark} in {}, which is no part of the owner's history",
                    now.generation
                ));
            }
        }
        Ok(())
    }

    /// I1: nothing is acknowledged but what has been processed, by whomever.
    ///
    /// # Errors
    /// What was.
    pub fn check_ack(&self, at: usize, epoch: Epoch) -> Result<(), String> {
        let Some(standby) = &self.hosts[at].standby else {
            return Ok(());
        };
        if standby.machine.hist().is_none_or(|hist| hist.epoch < epoch) {
            return Err(format!(
                "I1: h{at} acknowledges {epoch}, which it has not processed"
            ));
        }
        Ok(())
    }
}
