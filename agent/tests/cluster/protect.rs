//! How a VM's process follows its configurations, and is connected to their chains; how a new owner brings its chain up to
//! date first.

use std::sync::Arc;

use chain::owner::{Joined, Sender};
use chain::{History, Mark, View};
use checkpoint::{Epoch, Generation};

use super::greeting::Greeting;
use super::kept::Kept;
use super::owner::{Attempt, Still};
use super::{Aside, LinkId, Message, Mutant, Role, World, index};

/// A new owner's sender, for what it had as a replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bridge {
    pub view: Arc<View>,
    pub sender: Sender,
    pub kept: Kept,
    /// What it resumed from.
    pub mark: Mark,
    /// What its head lacked has been sent.
    pub sent: bool,
    /// Attempts that have come to nothing.
    pub tries: Aside<u32>,
}

impl Bridge {
    pub fn new(view: Arc<View>, mark: Mark, kept: Kept) -> Self {
        Self {
            sender: Sender::taking_over(view.generation, mark, kept.sent()),
            kept,
            mark,
            sent: false,
            tries: Aside::default(),
            view,
        }
    }
}

impl World {
    /// The process is told to follow `view`.
    pub fn protect(&mut self, i: usize, view: &Arc<View>) -> Result<(), String> {
        let owner = self.owner_mut(i);
        if view.generation <= owner.newest {
            return Ok(());
        }
        owner.newest = view.generation;
        owner.view = view.clone();
        owner.sender.lost();
        owner.unfit = false;
        owner.troubles.clear();
        owner.ready = false;
        owner.asked = false;
        owner.deaf = false;
        owner.tries.0 = 0;
        let generation = view.generation;
        if view.chain.is_empty() {
            owner.is_client = false;
            owner.attempt = None;
            owner.kept.clear();
            owner.output.unprotect(generation);
            owner.still.take_if(|still| *still != Still::Ended);
        } else if owner.is_client && view.in_place() {
            owner.output.go_on(generation);
            let filled = owner.protected.0 >= Some(view.history.since);
            owner
                .still
                .take_if(|still| filled && matches!(still, Still::Frozen(_)));
            owner.attempt = Some(Attempt::InPlace);
        } else {
            owner.is_client = true;
            owner.sender = Sender::new(generation, None);
            owner.kept.clear();
            owner.attempt = Some(Attempt::Anew);
        }
        self.let_out(i)
    }

    fn greeted(&mut self, i: usize, greeting: Greeting) {
        self.owner_mut(i).tries.0 += 1;
        match greeting {
            Greeting::Lost(who) if self.is_free() => self.say_lost(i, Some(who), false),
            Greeting::Refused(newer) if newer > self.owner_mut(i).generation() => {
                if !self.is_free() {
                    self.owner_mut(i).attempt = None;
                }
                self.say_refused(i, newer);
            }
            Greeting::Lost(_) | Greeting::Refused(_) | Greeting::NotYet => {}
        }
    }

    fn head_holds(&self, head: usize) -> Option<Mark> {
        self.hosts[head].standby.as_ref()?.machine.hist()
    }

    pub fn can_connect(&self, i: usize) -> bool {
        let free = self.is_free();
        self.hosts[i].owner.as_ref().is_some_and(|o| {
            let asked = o.attempt.is_some() || (free && o.is_client && o.newest > Generation::ZERO);
            asked && !o.connected() && !o.unfit && !o.view.chain.is_empty()
        })
    }

    /// The process connects to its chain, if all of it is there.
    pub fn connect(&mut self, i: usize) -> Result<(), String> {
        let owner = self.owner_mut(i);
        let generation = owner.generation();
        let chain: Vec<usize> = owner.view.chain.iter().map(|m| index(&m.host)).collect();
        let (head, tail) = (chain[0], chain[chain.len() - 1]);
        for who in [head, tail] {
            if let Err(greeting) = self.greet(i, who, generation) {
                self.greeted(i, greeting);
                return Ok(());
            }
        }
        let holds = self.head_holds(head);
        let numbers_only = self.is(Mutant::AnyBase);
        let undecided = self.is(Mutant::FullUndecided);
        let owner = self.owner_mut(i);
        let alike = |mark: &Mark| holds.is_some_and(|held| held.epoch == mark.epoch);
        let holds = match owner.sender.newest().filter(alike) {
            Some(newest) if numbers_only => Some(newest),
            _ => holds,
        };
        let mut frames = Vec::new();
        let mut anew = false;
        match owner.sender.connected(&owner.view.clone(), holds) {
            Joined::GoesOn { after, complete } => {
                frames = owner.kept.after(Some(after));
                frames.extend(complete.map(Message::Complete));
                self.counts.0.in_place += 1;
            }
            Joined::Anew => anew = true,
            Joined::Unfit { .. } if undecided => {
                let mut decided = View::clone(&owner.view);
                decided.history = History::new(generation);
                owner.sender = Sender::new(generation, None);
                owner.sender.connected(&decided, None);
                anew = true;
            }
            Joined::Unfit { .. } => {
                self.counts.0.unfit += 1;
                self.say(|| format!("h{i}: h{head} is unfit in {generation}"));
                self.owner_mut(i).attempt = None;
                self.say_lost(i, Some(head), true);
                return Ok(());
            }
        }
        let owner = self.owner_mut(i);
        owner.attempt = None;
        owner.deaf = false;
        if anew {
            let frozen = owner.is_frozen();
            // Whatever else it stood still for does not count any more, but for its end.
            owner
                .still
                .take_if(|still| !frozen && *still != Still::Ended);
            owner.kept.clear();
            owner.output.begin_sync(generation, frozen);
        }
        let resent = frames.len();
        self.open_links(i, head, tail, generation)?;
        self.counts.0.resent += u64::from(resent > 1);
        self.send_down(Self::update_link(i, head, generation), frames);
        self.say(|| format!("h{i} connects to {chain:?} in {generation}, sends {resent} frames"));
        if !anew && !self.owner_mut(i).output.begins() {
            self.say_protected(i, generation);
        }
        if self.is(Mutant::PromoteEarly) {
            self.say_ready(i);
        }
        self.let_out(i)
    }

    /// The time for connecting is over: whoever is in the way is lost.
    pub fn fail_to_connect(&mut self, i: usize) -> Result<(), String> {
        let owner = self.owner_mut(i);
        let generation = owner.generation();
        let chain: Vec<usize> = owner.view.chain.iter().map(|m| index(&m.host)).collect();
        let (head, tail) = (chain[0], chain[chain.len() - 1]);
        let obstacle =
            [head, tail]
                .into_iter()
                .find_map(|who| match self.greet(i, who, generation) {
                    Err(Greeting::Lost(lost)) => Some(lost),
                    Err(Greeting::NotYet | Greeting::Refused(_)) => Some(who),
                    Ok(()) => None,
                });
        let Some(obstacle) = obstacle else {
            return self.connect(i);
        };
        self.say(|| format!("h{i} gives up connecting to {chain:?}: h{obstacle}"));
        self.owner_mut(i).attempt = None;
        self.say_lost(i, Some(obstacle), false);
        Ok(())
    }

    /// Makes the connections to head and tail; each first says what is acknowledged.
    fn open_links(
        &mut self,
        i: usize,
        head: usize,
        tail: usize,
        generation: Generation,
    ) -> Result<(), String> {
        self.open(Self::update_link(i, head, generation))?;
        self.open(LinkId {
            from: i,
            to: tail,
            generation,
            role: Role::Acks,
        })
    }

    pub fn can_listen_to_tail(&self, i: usize) -> bool {
        self.is_free()
            && self
                .acks_of(i)
                .is_some_and(|acks| !self.links.contains_key(&acks))
    }

    fn acks_of(&self, i: usize) -> Option<LinkId> {
        let owner = self.hosts[i].owner.as_ref()?;
        Some(LinkId {
            from: i,
            to: index(&owner.view.chain.last()?.host),
            generation: owner.generation(),
            role: Role::Acks,
        })
    }

    pub fn listen_to_tail(&mut self, i: usize) -> Result<(), String> {
        match self.acks_of(i) {
            Some(acks) if self.greet(i, acks.to, acks.generation).is_ok() => self.open(acks),
            _ => Ok(()),
        }
    }

    pub fn can_bridge(&self, i: usize) -> bool {
        self.hosts[i].bridge.as_ref().is_some_and(|bridge| {
            let head = index(&bridge.view.chain[0].host);
            let link = Self::update_link(i, head, bridge.view.generation);
            !self.links.contains_key(&link)
        })
    }

    /// A new owner brings its chain's head up to what it resumed from.
    pub fn bridge(&mut self, i: usize) -> Result<(), String> {
        let Some(bridge) = &mut self.hosts[i].bridge else {
            return Ok(());
        };
        bridge.tries.0 += 1;
        let (head, generation) = (index(&bridge.view.chain[0].host), bridge.view.generation);
        if let Err(greeting) = self.greet(i, head, generation) {
            match greeting {
                Greeting::Lost(who) if self.is_free() => self.say_lost(i, Some(who), false),
                Greeting::Refused(newer) if self.is_free() => self.say_refused(i, newer),
                _ => {}
            }
            return Ok(());
        }
        let (holds, free) = (self.head_holds(head), self.is_free());
        let Some(bridge) = &mut self.hosts[i].bridge else {
            return Ok(());
        };
        let after = match bridge.sender.connected(&bridge.view, holds) {
            Joined::GoesOn { after, .. } if after == bridge.mark => {
                return self.bridge_ends(i, None);
            }
            Joined::GoesOn { after, .. } if !bridge.sent || free => after,
            _ => {
                self.counts.0.unfit += 1;
                self.say(|| format!("h{i} cannot bridge what h{head} lacks in {generation}"));
                return self.bridge_ends(i, Some((None, true)));
            }
        };
        bridge.sent = true;
        let mut frames = bridge.kept.after(Some(after));
        // Only whole ones: the rest died with the owner before.
        while frames
            .last()
            .is_some_and(|m| !matches!(m, Message::End { .. }))
        {
            frames.pop();
        }
        let link = Self::update_link(i, head, generation);
        self.open(link)?;
        self.send_down(link, frames);
        self.counts.0.bridged += 1;
        self.say(|| format!("h{i} bridges what h{head} lacks in {generation}"));
        Ok(())
    }

    pub fn bridged_up_to(&mut self, i: usize, epoch: Epoch) {
        if let Some(bridge) = &self.hosts[i].bridge
            && epoch >= bridge.mark.epoch
        {
            let head = index(&bridge.view.chain[0].host);
            self.links
                .remove(&Self::update_link(i, head, bridge.view.generation));
        }
    }
}
