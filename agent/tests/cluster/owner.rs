//! A VM's process: what the guest has done and let out. What it sends the shipped sender decides, when it holds output the
//! shipped pipeline (`output.rs`); `src/child/protector.rs` and `src/epoch` drive both with sockets and threads as here.

use std::collections::BTreeSet;
use std::sync::Arc;

use chain::owner::Sender;
use chain::{Mark, View};
use checkpoint::{Epoch, Generation};

use super::kept::Kept;
use super::output::{Acked, Captured, Output};
use super::{Aside, Content, Item, LinkId, Message, Mutant, Op, Role, World, digest, index, upto};

/// Why the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Still {
    /// The last backup of this generation is lost, and it is not to run alone.
    Frozen(Generation),
    /// This owner cannot go on with it: a backup is to take it over.
    GivenUp,
    /// It is to be taken over from this checkpoint, once that has been captured and is committed.
    Stopping(Option<Epoch>),
    /// It has powered itself off, or crashed.
    Ended,
}

/// A configuration's chain is being connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attempt {
    InPlace,
    Anew,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The newest configuration that it was told, or was started in.
    pub view: Arc<View>,
    /// The newest that it was told to protect itself by.
    pub newest: Generation,
    /// The generation in which it became the owner.
    pub since: Generation,
    /// How often the VM had been booted when this life of it began.
    pub boot: u32,
    /// Everything the VM has done since it booted.
    pub content: Content,
    /// So much of it is in checkpoints.
    pub captured: usize,
    /// So much the outside has seen of it from here.
    shown: usize,
    /// What it sends; only a sender that is in use is a client's.
    pub sender: Sender,
    pub is_client: bool,
    /// The frames of what that has pending.
    pub kept: Kept,
    pub output: Output,
    pub attempt: Option<Attempt>,
    /// Attempts that have come to nothing.
    pub tries: Aside<u32>,
    /// Heartbeats since something was acknowledged.
    pub overdue: Aside<u32>,
    pub still: Option<Still>,
    /// The newest configuration whose first checkpoint is committed.
    pub protected: Aside<Option<Generation>>,
    /// Nobody listens to the chain any more: something was lost, and its agent is told.
    pub deaf: bool,
    /// What a free agent knows of its chain: it cannot go on from what its head holds.
    pub unfit: bool,
    /// Replicas said to be lost.
    pub troubles: BTreeSet<usize>,
    /// The joining replica has everything.
    pub ready: bool,
    /// A change has been asked of the master in this generation.
    pub asked: bool,
}

impl Owner {
    fn new(view: Arc<View>, content: Content, output: Output, boot: u32) -> Self {
        let generation = view.generation;
        Self {
            newest: Generation::ZERO,
            since: generation,
            boot,
            captured: content.len(),
            shown: 0,
            sender: Sender::new(generation, None),
            is_client: false,
            kept: Kept::default(),
            output,
            attempt: None,
            tries: Aside::default(),
            overdue: Aside::default(),
            still: None,
            protected: Aside::default(),
            deaf: false,
            unfit: false,
            troubles: BTreeSet::new(),
            ready: false,
            asked: false,
            content,
            view,
        }
    }

    /// Of a VM that boots.
    pub fn booted(view: Arc<View>, limit: usize, boot: u32) -> Self {
        let output = Output::new(Generation::ZERO, Epoch(1), limit);
        Self::new(view, Vec::new(), output, boot)
    }

    /// Of one that goes on from what a replica held. What came after `acked` was held by the owner before, and went down
    /// with it: nobody has seen it.
    pub fn resumed(
        view: Arc<View>,
        content: Content,
        mark: Mark,
        acked: Epoch,
        limit: usize,
        boot: u32,
    ) -> Self {
        let output = Output::new(view.generation, mark.epoch.next(), limit);
        let mut owner = Self::new(view, content, output, boot);
        if owner.view.in_place() {
            owner.output.hold(upto(&owner.content, acked));
            owner.sender = Sender::new(owner.view.generation, Some(mark));
            owner.is_client = true;
        }
        // That was before.
        owner.shown = owner.visible().len();
        owner
    }

    /// What the outside has seen of it.
    pub fn visible(&self) -> &[Item] {
        self.output.visible(&self.content)
    }

    pub fn generation(&self) -> Generation {
        self.view.generation
    }

    /// Whether a commit has been waited for so many times. Not for the first: that takes as long as it takes.
    pub fn is_overdue(&self, times: u32) -> bool {
        let beats = self.connected() && !self.output.begins();
        beats && self.output.waits() && self.overdue.0 > times
    }

    /// It stands still for lack of a backup.
    pub fn is_frozen(&self) -> bool {
        matches!(self.still, Some(Still::Frozen(_)))
    }

    /// Connected to head and tail.
    pub fn connected(&self) -> bool {
        self.sender.is_linked()
    }

    /// Whether its epochs end with checkpoints that somebody is sent.
    fn captures(&self) -> bool {
        // Of a chain that has never been sent anything only the first checkpoint can be.
        let begun = self.sender.newest().is_some() || !self.is_client;
        self.output.captures()
            && self.attempt != Some(Attempt::Anew)
            && (begun || self.output.full_is_next())
    }

    fn can_run(&self) -> bool {
        match self.still {
            None if self.captures() => self.output.may_run(),
            None => self.output.may_run() && !self.output.holds(),
            // The first checkpoints of a new chain are made while it stands still.
            Some(Still::Frozen(of)) => {
                let begins = of < self.generation() && self.output.begins();
                begins && self.captures() && self.output.may_run()
            }
            Some(Still::Stopping(None)) => self.captures() && self.output.may_run(),
            Some(Still::Stopping(Some(_)) | Still::GivenUp | Still::Ended) => false,
        }
    }
}

impl World {
    pub fn owner_mut(&mut self, i: usize) -> &mut Owner {
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
        self.hosts[i].owner.as_ref().is_some_and(Owner::can_run)
    }

    /// The VM runs for a while. With a chain that is an epoch, which is then sent, or kept to be sent.
    pub fn run_owner(&mut self, i: usize) -> Result<(), String> {
        let owner = self.owner_mut(i);
        if owner.still.is_none() {
            let (n, e) = (owner.content.len() as u64, owner.output.open().0);
            let item = (owner.generation().0 << 48) | (n << 32) | (e << 8) | i as u64;
            owner.content.push(item);
        }
        if !owner.captures() {
            return self.let_out(i);
        }
        let captured = owner.output.capture(owner.content.len());
        match owner.still {
            // The one after the first it may be resumed from.
            Some(Still::Frozen(_)) if !captured.full => owner.still = None,
            Some(Still::Stopping(_)) => {
                owner.still = Some(Still::Stopping(Some(captured.epoch)));
            }
            _ => {}
        }
        if captured.full && !owner.connected() {
            // A full checkpoint is not kept: it fails with its connection, and the attempt with it.
            let head = owner.view.chain.first().map(|m| index(&m.host));
            owner.is_client = false;
            owner.output.abandon();
            self.say_lost(i, head, head.is_none());
            return self.let_out(i);
        }
        if self.owner_mut(i).is_client {
            self.send_checkpoint(i, captured)?;
        }
        self.let_out(i)
    }

    fn send_checkpoint(&mut self, i: usize, captured: Captured) -> Result<(), String> {
        let claims_held = self.is(Mutant::FullHeld);
        let owner = self.owner_mut(i);
        let (content, generation) = (owner.content.clone(), owner.generation());
        let Captured { epoch, full, held } = captured;
        let before = owner.sender.newest().filter(|_| !full);
        let begun = owner.sender.begin(epoch, full, held || claims_held);
        let begun = begun.map_err(|e| format!("h{i}: {e}"))?;
        let items = match full {
            true => content.clone(),
            false => content[owner.captured..].to_vec(),
        };
        owner.captured = content.len();
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
        Ok(())
    }

    /// The outside sees what the owner may let out.
    pub fn let_out(&mut self, i: usize) -> Result<(), String> {
        let boot = self.boot;
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        let seen = owner.output.visible(&owner.content);
        if owner.boot != boot {
            let life = self.lives.0.get(owner.boot as usize);
            let known = life.is_some_and(|life| life.starts_with(seen));
            return match seen.len() > owner.shown && !known {
                true => Err(format!("I4: h{i} speaks as the VM was before it booted")),
                false => Ok(()),
            };
        }
        let common = seen.len().min(self.visible.len());
        if seen[..common] != self.visible[..common] {
            return Err(format!("I4: two owners spoke: h{i} says something else"));
        }
        owner.shown = seen.len();
        if seen.len() > self.visible.len() {
            self.visible = seen.to_vec();
        }
        Ok(())
    }

    pub fn owner_hears_ack(
        &mut self,
        i: usize,
        link: LinkId,
        mut generation: Generation,
        epoch: Epoch,
    ) -> Result<(), String> {
        let any = self.is(Mutant::AnyGeneration);
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        let stale = link.generation != owner.generation();
        if owner.deaf || (stale && !any) {
            return Ok(());
        }
        if any {
            generation = owner.generation();
        }
        if owner.sender.acked(generation, epoch) || any {
            owner.kept.trim(epoch);
        }
        let acked = owner.output.ack(generation, epoch, &owner.content);
        let Acked::Committed { protects } = acked else {
            return Ok(());
        };
        owner.overdue.0 = 0;
        let (holds, owner_since) = (owner.output.holds(), owner.since);
        self.counts.0.commits += u64::from(holds);
        self.ops.0.push(Op::Acked {
            host: i,
            owner_since,
            epoch,
        });
        self.say(|| format!("h{i} has the ack of {epoch} ({generation})"));
        if protects {
            self.say_protected(i, generation);
        }
        self.committed(i, epoch);
        self.let_out(i)
    }

    /// What follows from a commit.
    fn committed(&mut self, i: usize, epoch: Epoch) {
        let owner = self.owner_mut(i);
        if let Some(Still::Stopping(Some(at))) = owner.still
            && epoch >= at
        {
            let generation = owner.generation();
            let head = owner.view.chain.first().map(|m| index(&m.host));
            if let Some(head) = head
                && owner.connected()
            {
                let link = Self::update_link(i, head, generation);
                self.send_down(link, [Message::Yield(at)]);
                self.say_handed_over(i, at);
            }
        }
    }

    /// What else comes up to an owner.
    pub fn owner_hears(&mut self, i: usize, link: LinkId, message: &Message) {
        let Some(owner) = &mut self.hosts[i].owner else {
            return;
        };
        let current = link.generation == owner.generation();
        if let Message::Ack(_, epoch) = message {
            if current {
                self.bridged_up_to(i, *epoch);
            }
            return;
        }
        if owner.deaf {
            return;
        }
        let bridge = self.hosts[i].bridge.as_ref();
        let bridges = bridge.is_some_and(|b| b.view.generation == link.generation);
        if !self.is_free() && bridges {
            // Whoever bridges takes any other answer for the end of the connection, and tries again.
            self.links.remove(&link);
            return;
        }
        let Some(owner) = &self.hosts[i].owner else {
            return;
        };
        match message {
            Message::Refused(newer) if *newer > owner.generation() => self.say_refused(i, *newer),
            Message::JoinerReady if current => self.say_ready(i),
            Message::Broken(who) if current => self.say_lost(i, Some(*who), false),
            _ => {}
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
            .is_some_and(|o| o.generation() <= view.generation && o.boot == self.boot);
        (host.up && has).then_some(i)
    }
}
