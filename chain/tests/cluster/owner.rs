//! A host's part as a VM's owner: what it executed and let out, and the production machine for what it sends (`src/client.rs`
//! drives it with sockets). When output is held an agent decides as here.

use std::collections::BTreeSet;
use std::sync::Arc;

use chain::owner::{Joined, Sender};
use chain::{History, Mark, View};
use checkpoint::{Epoch, Generation};

use super::kept::Kept;
use super::{Content, Item, LinkId, Message, Mutant, Op, Role, World, digest, index, name};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The configuration followed.
    pub view: Arc<View>,
    /// The generation in which it became the owner.
    pub since: Generation,
    /// Everything the VM has done.
    pub content: Content,
    /// What it sends.
    pub sender: Sender,
    /// The frames of what that has pending.
    pub kept: Kept,
    /// Output is held until it is acknowledged.
    pub holding: bool,
    /// The chain has acknowledged something since it began: with the next checkpoint output begins to be held.
    pub synced: bool,
    /// Newest epoch acknowledged by the chain, or the one before its first.
    pub acked: usize,
    /// Newest epoch whose output may be out.
    pub committed: usize,
    /// What the replicas that are left may lack after a takeover.
    pub bridge: Option<Bridge>,
    /// The chain cannot go on from what its head holds.
    pub unfit: bool,
    /// Replicas said to be lost.
    pub troubles: BTreeSet<usize>,
    /// The joining replica has everything.
    pub ready: bool,
    /// A change has been asked of the master in this generation.
    pub asked: bool,
}

/// A new owner's sender, for what it had as a replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bridge {
    pub sender: Sender,
    pub kept: Kept,
    /// What it resumed from.
    pub mark: Mark,
}

/// Why somebody does not take a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// It is this one's fault.
    Lost(usize),
    /// It may pass.
    NotYet,
    /// It follows a newer generation.
    Refused(Generation),
}

impl Owner {
    /// The owner of `view`, who goes on from `content`; with `resumed` from a replica.
    /// What came after `acked` was held by the owner before, and went down with it: nobody has seen it.
    pub fn new(
        view: Arc<View>,
        content: Content,
        acked: Epoch,
        resumed: Option<(Mark, Kept)>,
    ) -> Self {
        let protected = !view.chain.is_empty();
        let resumed = resumed.filter(|_| protected);
        let committed = content.len().min(acked.0 as usize);
        let generation = view.generation;
        let base = resumed.as_ref().map(|(mark, _)| *mark);
        Self {
            since: generation,
            sender: Sender::new(generation, base),
            kept: Kept::default(),
            holding: protected,
            synced: protected,
            acked: committed,
            committed,
            bridge: resumed.map(|(mark, kept)| Bridge {
                sender: Sender::taking_over(generation, mark, kept.sent()),
                kept,
                mark,
            }),
            unfit: false,
            troubles: BTreeSet::new(),
            ready: false,
            asked: false,
            content,
            view,
        }
    }

    /// What the outside has seen of it.
    pub fn visible(&self) -> &[Item] {
        match self.holding {
            true => &self.content[..self.committed],
            false => &self.content,
        }
    }

    pub fn generation(&self) -> Generation {
        self.view.generation
    }

    /// Connected to head and tail.
    pub fn connected(&self) -> bool {
        self.sender.is_linked()
    }

    fn begin_anew(&mut self) {
        self.holding = false;
        self.synced = false;
        self.committed = self.content.len();
        self.sender = Sender::new(self.generation(), None);
        self.kept.clear();
        self.bridge = None;
    }
}

impl World {
    fn owner_mut(&mut self, i: usize) -> &mut Owner {
        self.hosts[i].owner.as_mut().expect("asked of owners only")
    }

    pub fn update_link(from: usize, to: usize, generation: Generation) -> LinkId {
        LinkId {
            from,
            to,
            generation,
            role: Role::Update,
        }
    }

    /// Whether the owner may run one epoch more.
    pub fn can_run(&self, i: usize) -> bool {
        self.hosts[i].owner.as_ref().is_some_and(|owner| {
            owner.sender.newest().is_none()
                || owner.content.len() - owner.acked < self.rules.in_flight
        })
    }

    /// The VM runs for an epoch, which is then sent, or kept to be sent.
    pub fn run_owner(&mut self, i: usize) -> Result<(), String> {
        let claims_held = self.is(Mutant::FullHeld);
        let owner = self.owner_mut(i);
        let e = owner.content.len() + 1;
        let item = (owner.generation().0 << 32) | ((e as u64) << 8) | i as u64;
        owner.content.push(item);
        let (content, generation) = (owner.content.clone(), owner.generation());
        let epoch = Epoch(e as u64);
        let before = owner.sender.newest();
        let full = before.is_none();
        if full && !owner.connected() {
            // The first of a history; only a chain that has begun anew takes it.
            return self.let_out(i);
        }
        if full {
            owner.acked = e - 1;
        } else if owner.synced && !owner.holding {
            // What it said up to the end of the epoch before it said unprotected; what comes now is held.
            owner.holding = true;
            owner.committed = e - 1;
        }
        let held = owner.holding || claims_held;
        let begun = owner.sender.begin(epoch, full, held);
        let begun = begun.map_err(|e| format!("h{i}: {e}"))?;
        let items = match full {
            true => content.clone(),
            false => vec![item],
        };
        let frames = [
            Message::Begin {
                epoch,
                base: begun.base,
                held: begun.held,
            },
            Message::Data {
                epoch,
                items: items.clone(),
            },
            Message::End {
                epoch,
                install: None,
                digest: digest(&items),
            },
        ];
        let pass = owner.sender.pass().ok_or("nothing is open")?;
        if pass.keep {
            frames.iter().for_each(|f| owner.kept.push(f.clone()));
        }
        let ended = owner.sender.end(digest(&items)).ok_or("nothing is open")?;
        if ended.kept {
            owner.kept.close(ended.mark);
        }
        let (mark, owner_since) = (ended.mark, owner.since);
        let head = owner.view.chain.first().map(|m| index(&m.host));
        Arc::make_mut(&mut self.truth).insert((mark.generation, epoch), content);
        self.ops.0.push(Op::Update {
            host: i,
            owner_since,
            base: before,
            mark,
        });
        self.say(|| format!("h{i} sends checkpoint {mark} in {generation}"));
        if pass.forward
            && let Some(head) = head
        {
            self.send_down(Self::update_link(i, head, generation), frames);
        }
        self.let_out(i)
    }

    /// The outside sees what the owner may let out.
    pub fn let_out(&mut self, i: usize) -> Result<(), String> {
        let Some(owner) = &self.hosts[i].owner else {
            return Ok(());
        };
        let seen = owner.visible();
        let common = seen.len().min(self.visible.len());
        if seen[..common] != self.visible[..common] {
            return Err(format!("I4: two owners spoke: h{i} says something else"));
        }
        if seen.len() > self.visible.len() {
            self.visible = seen.to_vec();
        }
        Ok(())
    }

    pub fn owner_hears_ack(
        &mut self,
        i: usize,
        link: LinkId,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<(), String> {
        let any = self.is(Mutant::AnyGeneration);
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        let current = generation == owner.generation() && link.generation == generation;
        let e = epoch.0 as usize;
        if !(current || any) || e > owner.content.len() {
            return Ok(());
        }
        if owner.sender.acked(generation, epoch) || any {
            owner.kept.trim(epoch);
        }
        owner.acked = owner.acked.max(e);
        owner.synced |= owner.sender.newest().is_some();
        if owner.holding && e > owner.committed {
            owner.committed = e;
            let owner_since = owner.since;
            self.counts.0.commits += 1;
            self.ops.0.push(Op::Acked {
                host: i,
                owner_since,
                epoch,
            });
            self.say(|| format!("h{i} has the ack of {epoch} ({generation})"));
            return self.let_out(i);
        }
        Ok(())
    }

    /// What else comes up to an owner.
    pub fn owner_hears(&mut self, i: usize, link: LinkId, message: &Message) {
        let Some(owner) = &mut self.hosts[i].owner else {
            return;
        };
        let current = link.generation == owner.generation();
        match message {
            Message::Refused(newer) if *newer > owner.generation() => self.fenced(i, *newer),
            Message::JoinerReady if current => owner.ready = true,
            Message::Broken(who) if current => {
                owner.troubles.insert(*who);
            }
            Message::Ack(_, epoch) if current => self.bridged_up_to(i, *epoch),
            _ => {}
        }
    }

    /// A replica follows a newer configuration. Its own next one, perhaps, which it has not heard of yet: it stops if it
    /// is another's.
    pub fn fenced(&mut self, i: usize, newer: Generation) {
        if self.view().owner == name(i) {
            return;
        }
        self.hosts[i].owner = None;
        self.counts.0.fenced += 1;
        self.say(|| format!("h{i} is told of {newer} and stops"));
    }

    /// The master has decided on another configuration of a VM that is this host's still.
    pub fn owner_follows(&mut self, i: usize, view: &Arc<View>) -> Result<(), String> {
        let owner = self.owner_mut(i);
        let before = owner.generation();
        owner.sender.lost();
        owner.unfit = false;
        owner.troubles.clear();
        owner.ready = false;
        owner.asked = false;
        owner.view = view.clone();
        if view.history.since > before || view.chain.is_empty() {
            // Recorded: what has been held goes out, what replicas hold does not count any more.
            owner.begin_anew();
        }
        self.let_out(i)
    }

    /// Whether host `r` takes a connection from `from`.
    pub fn greet(&self, from: usize, r: usize, generation: Generation) -> Result<(), Greeting> {
        let host = &self.hosts[r];
        if !host.up || !self.reaches(from, r) {
            return Err(Greeting::Lost(r));
        }
        let Some(standby) = &host.standby else {
            return Err(match host.seen > generation {
                true => Greeting::Refused(host.seen),
                false => Greeting::NotYet,
            });
        };
        let machine = &standby.machine;
        if standby.preparing.is_some() || machine.generation() < generation {
            return Err(Greeting::NotYet);
        }
        if machine.generation() > generation {
            return Err(Greeting::Refused(machine.generation()));
        }
        if machine.failed().is_some() {
            return Err(Greeting::Lost(r));
        }
        let waits = machine.successor().is_some() && self.down_link(r).is_none();
        match standby.trouble.filter(|_| waits) {
            Some(trouble) => Err(Greeting::Lost(trouble)),
            None if waits => Err(Greeting::NotYet),
            None => Ok(()),
        }
    }

    fn greeted(&mut self, i: usize, greeting: Greeting) {
        match greeting {
            Greeting::Lost(who) => {
                self.owner_mut(i).troubles.insert(who);
            }
            Greeting::Refused(newer) if newer > self.owner_mut(i).generation() => {
                self.fenced(i, newer);
            }
            Greeting::Refused(_) | Greeting::NotYet => {}
        }
    }

    fn head_holds(&self, head: usize) -> Option<Mark> {
        self.hosts[head].standby.as_ref()?.machine.hist()
    }

    pub fn can_connect(&self, i: usize) -> bool {
        self.hosts[i].owner.as_ref().is_some_and(|o| {
            !o.connected()
                && !o.unfit
                && !o.view.chain.is_empty()
                && (o.bridge.is_none() || {
                    let head = index(&o.view.chain[0].host);
                    !self
                        .links
                        .contains_key(&Self::update_link(i, head, o.generation()))
                })
        })
    }

    /// The owner connects to its chain, if all of it is there.
    pub fn connect(&mut self, i: usize) -> Result<(), String> {
        let owner = self.owner_mut(i);
        let generation = owner.generation();
        let chain: Vec<usize> = owner.view.chain.iter().map(|m| index(&m.host)).collect();
        let (head, tail) = (chain[0], chain[chain.len() - 1]);
        if let Err(greeting) = self.greet(i, head, generation) {
            self.greeted(i, greeting);
            return Ok(());
        }
        if self.owner_mut(i).bridge.is_some() {
            return self.connect_bridge(i, head);
        }
        if let Err(greeting) = self.greet(i, tail, generation) {
            self.greeted(i, greeting);
            return Ok(());
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
        match owner.sender.connected(&owner.view.clone(), holds) {
            Joined::GoesOn { after, complete } => {
                frames = owner.kept.after(Some(after));
                frames.extend(complete.map(Message::Complete));
                self.counts.0.in_place += 1;
            }
            Joined::Anew => owner.kept.clear(),
            Joined::Unfit { .. } => {
                if undecided {
                    let mut decided = View::clone(&owner.view);
                    decided.history = History::new(generation);
                    owner.begin_anew();
                    owner.sender.connected(&decided, None);
                    self.open_links(i, head, tail, generation)?;
                    return self.let_out(i);
                }
                owner.unfit = true;
                self.counts.0.unfit += 1;
                self.say(|| format!("h{i}: h{head} is unfit in {generation}"));
                return Ok(());
            }
        }
        let resent = frames.len();
        self.open_links(i, head, tail, generation)?;
        self.counts.0.resent += u64::from(resent > 1);
        self.send_down(Self::update_link(i, head, generation), frames);
        self.say(|| format!("h{i} connects to {chain:?} in {generation}, sends {resent} frames"));
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
        self.acks_of(i)
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

    fn connect_bridge(&mut self, i: usize, head: usize) -> Result<(), String> {
        let holds = self.head_holds(head);
        let owner = self.owner_mut(i);
        let generation = owner.generation();
        let Some(bridge) = &mut owner.bridge else {
            return Ok(());
        };
        let after = match bridge.sender.connected(&owner.view, holds) {
            Joined::GoesOn { after, .. } if after == bridge.mark => {
                owner.bridge = None;
                return Ok(());
            }
            Joined::GoesOn { after, .. } => after,
            Joined::Anew | Joined::Unfit { .. } => {
                owner.unfit = true;
                owner.bridge = None;
                self.counts.0.unfit += 1;
                self.say(|| format!("h{i} cannot bridge what h{head} lacks in {generation}"));
                return Ok(());
            }
        };
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

    fn bridged_up_to(&mut self, i: usize, epoch: Epoch) {
        let owner = self.owner_mut(i);
        let generation = owner.generation();
        if owner
            .bridge
            .as_ref()
            .is_some_and(|bridge| epoch >= bridge.mark.epoch)
        {
            let head = index(&owner.view.chain[0].host);
            self.links.remove(&Self::update_link(i, head, generation));
        }
    }

    /// The VM, if a live owner has the newest configuration.
    pub fn owner_in_force(&self) -> Option<usize> {
        let view = self.view();
        let i = index(&view.owner);
        let host = &self.hosts[i];
        let has = host
            .owner
            .as_ref()
            .is_some_and(|o| view.owner == name(i) && o.generation() <= view.generation);
        (host.up && has).then_some(i)
    }
}
