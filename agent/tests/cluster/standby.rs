//! A host's part as a replica: the production machine, and what its driver keeps beside it.

use std::collections::VecDeque;
use std::sync::Arc;

use agent::host::Input;
use chain::replica::{Action, Event, Replica};
use chain::{History, Mark, View};
use checkpoint::{Epoch, Generation};

use super::kept::Kept;
use super::{Content, LinkId, Message, Mutant, World, digest, index, name};

/// How far the filling of a joining replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Feeding {
    Wanted,
    /// So many items have been sent.
    Copying(usize),
    /// The rest follows between two checkpoints.
    Rest(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Standby {
    pub machine: Replica,
    pub view: Arc<View>,
    pub store: Content,
    /// What is half received, and whether it replaces everything.
    pub staged: Option<(bool, Content)>,
    pub kept: Kept,
    pub keep: bool,
    pub feeding: Option<Feeding>,
    /// The end that is being prepared.
    pub preparing: Option<(LinkId, Message)>,
    /// In which generation it has asked for the VM, and what it had then.
    pub asking: Option<(Generation, Mark)>,
    /// Who further down is lost.
    pub trouble: Option<usize>,
    /// The next checkpoint cannot be prepared; whether what it held is lost too.
    pub doomed: Option<bool>,
    /// It has a reason to fail in this generation.
    pub excused: bool,
    /// The newest checkpoint that it has processed as a member.
    pub processed: Option<Epoch>,
    /// For a mutant: what it held before the chain began anew.
    pub before: Option<(Mark, Content)>,
    /// It has said that the joining replica is ready.
    pub said_ready: bool,
}

impl Standby {
    fn with(machine: Replica, view: Arc<View>, store: Content) -> Self {
        Self {
            machine,
            view,
            store,
            staged: None,
            kept: Kept::default(),
            keep: false,
            feeding: None,
            preparing: None,
            asking: None,
            trouble: None,
            doomed: None,
            excused: false,
            processed: None,
            before: None,
            said_ready: false,
        }
    }

    /// A new replica; `disk` is what outlived the process before.
    pub fn new(i: usize, view: &View, told: &Arc<View>, disk: Option<(Mark, Content)>) -> Self {
        let Some((mark, store)) = disk else {
            let machine = Replica::new(name(i), view, 3);
            return Self::with(machine, told.clone(), Vec::new());
        };
        let machine = Replica::returned(name(i), view, 3, mark);
        let store = match machine.hist() {
            Some(_) => store,
            None => Vec::new(),
        };
        Self::with(machine, told.clone(), store)
    }

    /// What it could resume the VM from, if it were suspicious.
    pub fn may_resume(&self) -> Option<Mark> {
        match self.machine.failed() {
            None => self.machine.resumable(),
            Some(_) => self.machine.clone().freeze().ok(),
        }
    }

    /// The next replica: the successor, or at the tail the one that joins.
    pub fn next(&self) -> Option<usize> {
        let next = match self.machine.successor() {
            Some(position) => self.view.chain.get(position),
            None if self.machine.is_tail() => self.view.joining.as_ref(),
            None => None,
        };
        next.map(|m| index(&m.host))
    }
}

impl World {
    pub fn standby(&mut self, i: usize) -> Option<&mut Standby> {
        self.hosts[i].standby.as_mut()
    }

    /// The connection that replica `i` has made to the next one in its configuration.
    pub fn down_link(&self, i: usize) -> Option<LinkId> {
        let standby = self.hosts[i].standby.as_ref()?;
        let link = Self::update_link(i, standby.next()?, standby.machine.generation());
        self.links.contains_key(&link).then_some(link)
    }

    /// The connection that replica `i`'s predecessor has made to it.
    pub fn up_link(&self, i: usize) -> Option<LinkId> {
        let generation = self.hosts[i].standby.as_ref()?.machine.generation();
        self.links
            .keys()
            .find(|l| l.to == i && l.generation == generation && l.role == super::Role::Update)
            .copied()
    }

    pub fn tell_up(&mut self, i: usize, message: Message) {
        if let Some(link) = self.up_link(i) {
            self.send_up(link, message);
        }
    }

    /// What a mutant's replica is told instead.
    fn shown(&self, view: &View) -> View {
        let mut view = view.clone();
        match self.rules.mutant {
            Mutant::ForkIgnored => view.history.forks.clear(),
            Mutant::AnyBase if view.in_place() => view.history = History::default(),
            Mutant::SinceIgnored => {
                for member in &mut view.chain {
                    member.since = Generation::ZERO;
                }
            }
            _ => {}
        }
        view
    }

    pub fn create(&mut self, i: usize, view: &Arc<View>) {
        let disk = self.hosts[i].disk.take();
        let recovered = disk.is_some();
        let standby = Standby::new(i, &self.shown(view), view, disk);
        if recovered && standby.machine.hist().is_some() {
            self.counts.0.recoveries += 1;
        }
        let holds = standby.machine.hist();
        self.hosts[i].standby = Some(standby);
        self.say(|| {
            let held = holds.map_or("nothing".into(), |m| m.to_string());
            format!(
                "h{i} follows {} from scratch, holding {held}",
                view.generation
            )
        });
    }

    pub fn adopt(&mut self, i: usize, view: &Arc<View>) {
        let shown = self.shown(view);
        let Some(standby) = self.standby(i) else {
            return;
        };
        let held = standby.machine.hist().zip(Some(standby.store.clone()));
        standby.machine.adopt(&shown);
        if standby.machine.hist().is_none() {
            standby.before = held.or(standby.before.take());
        }
        let since = |view: &View| view.position(&name(i)).map(|p| view.chain[p].since);
        if since(view) != since(&standby.view) {
            standby.processed = None;
        }
        standby.view = view.clone();
        standby.feeding = None;
        standby.said_ready = false;
        standby.trouble = None;
        standby.staged = None;
        standby.excused = false;
        standby.doomed = None;
        standby.kept.abandon();
        if standby.machine.successor().is_none() || standby.machine.hist().is_none() {
            standby.kept.clear();
        }
        if standby.machine.hist().is_none() {
            standby.store.clear();
        }
        let holds = standby.machine.hist();
        self.drop_stale_links();
        self.say(|| {
            let held = holds.map_or("nothing".into(), |m| m.to_string());
            format!("h{i} adopts {}, holding {held}", view.generation)
        });
    }

    /// The connection to the next replica has ended, or is of no use.
    pub fn lost_next(&mut self, i: usize) {
        let Some(next) = self.hosts[i].standby.as_ref().and_then(Standby::next) else {
            return;
        };
        self.hang_up(i);
        if let Some(standby) = self.standby(i) {
            standby.trouble = Some(next);
        }
        self.tell_up(i, Message::Broken(next));
    }

    pub fn hang_up(&mut self, i: usize) {
        if let Some(link) = self.down_link(i) {
            self.links.remove(&link);
        }
        if let Some(standby) = self.standby(i) {
            standby.feeding = None;
            standby.said_ready = false;
            standby.trouble = None;
            standby.machine.step(Event::NextDown, &mut VecDeque::new());
        }
    }

    pub fn unfreeze(&mut self, i: usize) -> Result<(), String> {
        let Some(standby) = self.standby(i) else {
            return Ok(());
        };
        standby.asking = None;
        self.step_machine(i, Event::Unfreeze, None)
    }

    /// Feeds a replica's machine and carries out what it answers.
    pub fn step_machine(
        &mut self,
        at: usize,
        event: Event,
        hand: Option<(LinkId, &Message)>,
    ) -> Result<(), String> {
        let mut actions = VecDeque::new();
        if let Some(standby) = self.standby(at) {
            standby.machine.step(event, &mut actions);
        }
        while let Some(action) = actions.pop_front() {
            if let Some(follows) = self.carry_out(at, action, hand)?
                && let Some(standby) = self.standby(at)
            {
                standby.machine.step(follows, &mut actions);
            }
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        at: usize,
        action: Action,
        hand: Option<(LinkId, &Message)>,
    ) -> Result<Option<Event>, String> {
        let early = self.is(Mutant::ForwardEndEarly);
        let (down, up) = (self.down_link(at), self.up_link(at));
        let mutant = self.rules.mutant;
        let slow = self.rules.slow_disks;
        let Some(standby) = self.hosts[at].standby.as_mut() else {
            return Ok(None);
        };
        let generation = standby.machine.generation();
        match action {
            Action::Forward => {
                if let (Some(down), Some((_, message))) = (down, hand)
                    && !(early && matches!(message, Message::End { .. }))
                {
                    self.send_down(down, [message.clone()]);
                }
            }
            // No owner here asks: chains begin with empty disks.
            Action::Compare => {}
            Action::Keep => standby.keep = true,
            Action::Resend { after } => {
                let frames = match mutant {
                    Mutant::SentNotResent => Vec::new(),
                    _ => standby.kept.after(Some(after)),
                };
                self.counts.0.resent += u64::from(!frames.is_empty());
                if let Some(down) = down {
                    self.send_down(down, frames);
                }
            }
            Action::Trim(epoch) => standby.kept.trim(epoch),
            Action::TrimAll => standby.kept.clear(),
            Action::SayComplete(epoch) => {
                if let Some(down) = down {
                    self.send_down(down, [Message::Complete(epoch)]);
                }
            }
            Action::Unfit(why) => {
                if mutant == Mutant::ResendAnyway {
                    let frames = standby.kept.after(None);
                    if let Some(down) = down {
                        self.send_down(down, frames);
                    }
                    return Ok(None);
                }
                self.counts.0.unfit += 1;
                self.say(|| format!("h{at}: its next replica is unfit: {why}"));
                self.lost_next(at);
            }
            Action::AskNext => {
                let relinks = match mutant {
                    Mutant::NextNotAsked => false,
                    Mutant::AcksNotAsked => !standby.machine.is_linked(),
                    _ => true,
                };
                if relinks {
                    self.hang_up(at);
                }
            }
            Action::AskPrevious => {
                if let Some(up) = up
                    && mutant != Mutant::PreviousNotAsked
                {
                    self.say(|| format!("h{at} asks h{} for what it missed", up.from));
                    self.cut(up);
                }
            }
            Action::Feed => {
                standby.feeding = Some(Feeding::Wanted);
                self.counts.0.feeds += 1;
            }
            Action::JoinerReady => {
                let again = std::mem::replace(&mut standby.said_ready, true);
                if !(again && mutant == Mutant::ReadyOnce) {
                    self.tell_up(at, Message::JoinerReady);
                }
            }
            Action::Open { full, .. } => {
                if full {
                    standby.store.clear();
                }
                standby.staged = Some((full, Vec::new()));
            }
            Action::Stage => {
                if let (Some((_, Message::Data { items, .. })), Some((_, staged))) =
                    (hand, &mut standby.staged)
                {
                    staged.extend(items);
                }
            }
            Action::Prepare { .. } => {
                if let Some((link, message)) = hand
                    && slow
                {
                    standby.preparing = Some((link, message.clone()));
                    return Ok(None);
                }
                return self.prepare(at, hand).map(Some);
            }
            Action::Commit(mark) => return self.commit(at, mark).map(|()| None),
            Action::AckUp(epoch) => {
                self.check_ack(at, epoch)?;
                if let Some(up) = up {
                    self.send_up(up, Message::Ack(generation, epoch));
                }
            }
            Action::AckOwner(epoch) => {
                self.check_ack(at, epoch)?;
                self.ack_owner(at, generation, epoch);
            }
            Action::Refuse(newer) => {
                if let Some((link, _)) = hand {
                    self.send_up(link, Message::Refused(newer));
                }
            }
            Action::Failed(why) => {
                let excused = standby.excused;
                self.counts.0.holes += u64::from(!why.contains("planted"));
                self.say(|| format!("h{at} has failed: {why}"));
                self.tell_up(at, Message::Broken(at));
                self.letter(at, Input::ReplicaFailed { why: why.clone() });
                if !excused {
                    return Err(format!("h{at} has failed without a reason: {why}"));
                }
            }
            Action::StillFailed(_) => self.tell_up(at, Message::Broken(at)),
            Action::Suspect(silence_ms) => self.letter(at, Input::Suspected { silence_ms }),
        }
        Ok(None)
    }

    /// The chain server tells the agent something.
    fn letter(&mut self, at: usize, letter: Input) {
        if let Some(agent) = self.agent(at) {
            agent.mail.push_back(letter);
        }
    }

    pub fn ack_owner(&mut self, at: usize, generation: Generation, epoch: Epoch) {
        let acks = self
            .links
            .keys()
            .find(|l| l.to == at && l.generation == generation && l.role == super::Role::Acks);
        if let Some(link) = acks.copied() {
            self.send_up(link, Message::Ack(generation, epoch));
        }
    }

    /// Verifies what was received and makes it durable: what follows.
    fn prepare(&mut self, at: usize, hand: Option<(LinkId, &Message)>) -> Result<Event, String> {
        let hidden = self.is(Mutant::FailureHidden);
        let Some(standby) = self.standby(at) else {
            return Err(format!("h{at} is no replica"));
        };
        let (Some((_, Message::End { digest: said, .. })), Some((_, staged))) =
            (hand, &standby.staged)
        else {
            return Err(format!("h{at} prepares a checkpoint without its frames"));
        };
        let failed = |damaged| Event::StoreFailed {
            why: "planted".into(),
            damaged,
        };
        if let Some(damaged) = standby.doomed.take() {
            standby.excused = true;
            if hidden {
                standby.staged = Some((false, Vec::new()));
                return Ok(Event::Prepared { digest: *said });
            }
            if damaged {
                standby.store.clear();
            }
            self.counts.0.failures += 1;
            return Ok(failed(damaged));
        }
        if digest(staged) != *said {
            return Ok(failed(false));
        }
        Ok(Event::Prepared { digest: *said })
    }

    fn commit(&mut self, at: usize, mark: Mark) -> Result<(), String> {
        let Some(standby) = self.standby(at) else {
            return Ok(());
        };
        let (full, staged) = standby.staged.take().unwrap_or_default();
        if full {
            standby.store.clear();
        }
        standby.store.extend(staged);
        if standby.view.position(&name(at)).is_some() {
            standby.processed = Some(mark.epoch);
        }
        let store = standby.store.clone();
        match self.truth.get(&(mark.generation, mark.epoch)) {
            Some(truth) if *truth == store => Ok(()),
            truth => Err(format!(
                "I3: what h{at} has as checkpoint {mark} is not what the owner sent: {store:x?}, not {truth:x?}"
            )),
        }
    }

    /// A slow disk is done.
    pub fn finish_prepare(&mut self, at: usize) -> Result<(), String> {
        let Some(standby) = self.standby(at) else {
            return Ok(());
        };
        let Some((link, message)) = standby.preparing.take() else {
            return Ok(());
        };
        let follows = self.prepare(at, Some((link, &message)))?;
        self.step_machine(at, follows, Some((link, &message)))?;
        self.frame_done(at, message)
    }
}
