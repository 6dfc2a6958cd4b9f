//! What a replica's lock protects: the state machine, its store and its links; carries out the machine's actions.

mod content;
mod filling;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use checkpoint::{Epoch, Generation, codec};

use super::board::Board;
use super::env::{Env, ServerEvent, lock};
use crate::kept::{Buffers, KEPT_MAX, Kept, base_of, end_of};
use crate::link::{HELLO_LIMIT, Link, Trouble};
use crate::replica::{Action, Event, Replica};
use crate::store::ReplicaStore;
use crate::view::View;
use crate::wire::{
    FLAG_DECLINED, FLAG_HELD, FLAG_INSTALL, FLAG_KEEP, Frame, Kind, Payload, WireError,
};
pub(super) use content::Job;
pub(super) use filling::{Copier, Feeding};

/// Where heartbeats go and what they say.
pub(super) type Beat = Arc<Mutex<Option<(Arc<Link>, Frame)>>>;

pub(super) struct State {
    pub(super) view: View,
    pub(super) replica: Replica,
    /// None once the replica has been taken apart.
    pub(super) store: Option<Box<dyn ReplicaStore>>,
    /// The predecessor.
    pub(super) up: Option<Arc<Link>>,
    /// The next replica: the successor, or one that is joining.
    pub(super) down: Option<Arc<Link>>,
    /// What was sent on and not acknowledged.
    pub(super) kept: Kept,
    buffers: Arc<Buffers>,
    /// The frame in hand is to be kept.
    keep: bool,
    /// Somebody fills a joining replica, and waits for the moment between two checkpoints.
    pub(super) feeding: Option<Feeding>,
    /// What is to be done before the next frame, without the lock.
    pub(super) jobs: Vec<Job>,
    /// Why there is no next replica yet.
    pub(super) lack: Option<Lack>,
    /// What the predecessor has been told of a host that declines: once more for one that connects later.
    refusal: Option<(Frame, Vec<u8>)>,
    /// Owners who want the tail's acks.
    pub(super) owners: Vec<Arc<Link>>,
    /// Apart from the rest, so that a checkpoint being processed delays no heartbeat.
    pub(super) beat: Beat,
    /// What others may know without waiting.
    pub(super) board: Arc<Board>,
    actions: VecDeque<Action>,
}

/// Why there is no next replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lack {
    /// Who is to blame, and for what.
    pub(super) trouble: Trouble,
    /// There will be none in this generation: its host declines, or another one is at its address.
    pub(super) is_final: bool,
}

impl Lack {
    /// One that may pass.
    pub(super) fn passing(trouble: Trouble) -> Self {
        Self {
            trouble,
            is_final: false,
        }
    }
}

/// How a replica ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// This host is no member any more since that generation, or has no replica in it: whoever speaks is told so.
    Retired(Generation),
    /// With all its connections: another one takes its place, or the server ends.
    Closed,
}

/// The frame that an event is about.
#[derive(Clone, Copy)]
pub(super) struct InHand<'a> {
    pub(super) frame: &'a Frame,
    pub(super) payload: &'a Payload,
    pub(super) link: &'a Arc<Link>,
}

/// The event that a predecessor's frame is.
///
/// # Errors
/// [`WireError`] for a frame that no predecessor sends.
fn event_of(frame: &Frame, payload: &Payload) -> Result<Event, WireError> {
    let (generation, epoch) = (frame.generation, frame.epoch);
    Ok(match frame.kind {
        Kind::Begin => Event::Begin {
            generation,
            epoch,
            base: base_of(frame.flags, payload).ok_or(WireError::Payload(Kind::Begin))?,
            held: frame.flags & FLAG_HELD != 0,
        },
        Kind::Complete => Event::Complete { generation, epoch },
        Kind::Yield => Event::Yield { generation, epoch },
        Kind::Pages | Kind::Disk | Kind::Machine => Event::Data { generation, epoch },
        Kind::Compare => Event::Compare { generation, epoch },
        Kind::End => Event::End {
            generation,
            epoch,
            install: end_of(frame.flags, payload)
                .ok_or(WireError::Payload(Kind::End))?
                .0,
        },
        Kind::Heartbeat => Event::Heartbeat { generation },
        other => {
            return Err(WireError::OutOfPlace(
                other,
                "a predecessor does not send it",
            ));
        }
    })
}

impl State {
    pub(super) fn new(
        view: View,
        replica: Replica,
        store: Box<dyn ReplicaStore>,
        buffers: Arc<Buffers>,
    ) -> Self {
        Self {
            board: Arc::new(Board::new(&view, &replica)),
            view,
            replica,
            store: Some(store),
            up: None,
            down: None,
            kept: Kept::default(),
            buffers,
            keep: false,
            feeding: None,
            jobs: Vec::new(),
            lack: None,
            refusal: None,
            owners: Vec::new(),
            beat: Beat::default(),
            actions: VecDeque::new(),
        }
    }

    /// Notes where the replica stands, for those who do not wait for the lock.
    pub(super) fn note(&self) {
        self.board.note(&self.replica);
    }

    pub(super) fn is_up(&self, link: &Arc<Link>) -> bool {
        self.up.as_ref().is_some_and(|up| Arc::ptr_eq(up, link))
    }

    pub(super) fn is_down(&self, link: &Arc<Link>) -> bool {
        self.down
            .as_ref()
            .is_some_and(|down| Arc::ptr_eq(down, link))
    }

    /// Follows a newer configuration.
    pub(super) fn adopt(&mut self, view: View) {
        self.replica.adopt(&view);
        self.view = view;
        self.board.note_view(&self.view);
        self.note();
        self.hang_up();
        self.kept.abandon();
        if self.replica.successor().is_none() || self.replica.hist().is_none() {
            self.kept.clear();
        }
        // Predecessor and owner stay connected until they have been told that their generation is over.
        self.owners.clear();
    }

    /// Ends the connection to the next replica, if there is one.
    pub(super) fn hang_up(&mut self) {
        *lock(&self.beat) = None;
        self.found_next();
        self.stop_filling();
        if let Some(down) = self.down.take() {
            down.close();
        }
        let mut actions = VecDeque::new();
        self.replica.step(Event::NextDown, &mut actions);
    }

    /// The replica is over.
    pub(super) fn end(&mut self, how: End) {
        match how {
            End::Retired(generation) => self.retire(generation),
            End::Closed => {
                self.hang_up();
                self.store = None;
                let up = self.up.take();
                for link in up.into_iter().chain(self.owners.drain(..)) {
                    link.close();
                }
            }
        }
    }

    fn retire(&mut self, generation: Generation) {
        if generation <= self.replica.generation()
            && let Some(up) = self.up.take()
        {
            // Still a member, but without a replica: the predecessor has to notice. After a newer decision it stays
            // connected instead, to be told of it.
            up.close();
        }
        let view = View {
            generation,
            chain: Vec::new(),
            joining: None,
            ..self.view.clone()
        };
        self.replica.adopt(&view);
        self.note();
        self.store = None;
        self.kept.clear();
        self.hang_up();
    }

    pub(super) fn own_frame(&self, kind: Kind, epoch: Epoch) -> Frame {
        Frame {
            kind,
            vm: self.view.vm,
            generation: self.replica.generation(),
            epoch,
            flags: 0,
        }
    }

    pub(super) fn tell_up(&mut self, kind: Kind, epoch: Epoch, payload: &[u8]) {
        let frame = self.own_frame(kind, epoch);
        self.say_up(&frame, payload);
    }

    /// Passes a frame of the next replica's up, as this one's.
    pub(super) fn pass_up(&mut self, frame: &Frame, payload: &[u8]) {
        let frame = Frame {
            flags: frame.flags,
            ..self.own_frame(frame.kind, frame.epoch)
        };
        self.say_up(&frame, payload);
    }

    fn say_up(&mut self, frame: &Frame, payload: &[u8]) {
        if frame.flags & FLAG_DECLINED != 0 {
            self.refusal = Some((*frame, payload.to_vec()));
        }
        if let Some(up) = &self.up
            && up.post(frame, payload).is_err()
        {
            self.up = None;
        }
    }

    /// Tells whoever waits for this tail's acknowledgements.
    fn tell_owners(&mut self, frame: &Frame, payload: &[u8]) {
        self.owners
            .retain(|owner| owner.post(frame, payload).is_ok());
    }

    /// Somebody has connected as the predecessor.
    pub(super) fn tell_refusal(&mut self) {
        if let Some((frame, payload)) = self.refusal.take() {
            self.say_up(&frame, &payload);
        }
    }

    /// Nothing is known to be wrong with the next replica, or with the way to it, any more.
    pub(super) fn found_next(&mut self) {
        self.lack = None;
        self.refusal = None;
    }

    pub(super) fn tell_lack(&mut self, lack: &Lack) {
        if let Ok(payload) = codec::to_bytes(&lack.trouble, HELLO_LIMIT) {
            let frame = Frame {
                flags: if lack.is_final { FLAG_DECLINED } else { 0 },
                ..self.own_frame(Kind::Broken, Epoch::ZERO)
            };
            self.say_up(&frame, &payload);
        }
    }

    fn tell_failed(&mut self, env: &Env, why: String) {
        self.tell_lack(&Lack::passing((env.options.host.clone(), why)));
    }

    /// The connection to the next replica has ended, or is of no use.
    pub(super) fn lost_next(&mut self, why: &str) {
        let next = match self.replica.successor() {
            Some(position) => self.view.chain.get(position),
            None => self.view.joining.as_ref(),
        };
        let member = next.filter(|_| self.down.is_some());
        let Some(host) = member.map(|m| m.host.clone()) else {
            return;
        };
        self.hang_up();
        tracing::warn!("{}: lost the next replica, {host}: {why}", self.view.name);
        let lack = Lack::passing((host, why.to_string()));
        self.tell_lack(&lack);
        self.lack = Some(lack);
    }

    /// Handles one frame from a predecessor. Its payload goes back to the buffers, unless it is kept.
    pub(super) fn frame(
        &mut self,
        env: &Env,
        frame: &Frame,
        payload: Payload,
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        let hand = InHand {
            frame,
            payload: &payload,
            link,
        };
        let result = self.handle(env, hand);
        if std::mem::take(&mut self.keep) {
            self.keep_frame(frame, payload);
        } else {
            self.buffers.give(payload);
        }
        self.cut_if_due(env);
        result
    }

    fn keep_frame(&mut self, frame: &Frame, payload: Payload) {
        self.kept.push(*frame, payload);
        if self.kept.bytes() > KEPT_MAX {
            tracing::warn!(
                "{}: more than {} MiB are not acknowledged by the next replica: not kept any more",
                self.view.name,
                KEPT_MAX >> 20
            );
            self.kept.clear();
            self.replica.forget_sent();
        } else if frame.kind == Kind::End
            && let Some(mark) = self.replica.hist()
        {
            self.kept.close(mark);
        }
    }

    fn handle(&mut self, env: &Env, hand: InHand<'_>) -> Result<(), WireError> {
        let frame = hand.frame;
        if frame.vm != self.view.vm {
            return Err(WireError::OutOfPlace(
                frame.kind,
                "this connection is another VM's",
            ));
        }
        let event = event_of(frame, hand.payload)?;
        // One whose generation is over is still told so, whichever connection it uses.
        let mine = self.replica.generation();
        if frame.generation >= mine && !self.is_up(hand.link) {
            return Err(WireError::OutOfPlace(
                frame.kind,
                "another connection has taken this one's place",
            ));
        }
        self.run(env, event, Some(hand))?;
        if frame.generation == mine {
            let now_ms = env.now_ms();
            self.run(env, Event::Heard { now_ms }, None)?;
        }
        Ok(())
    }

    /// Feeds one event to the machine and does what it answers, and what follows from that.
    pub(super) fn run(
        &mut self,
        env: &Env,
        event: Event,
        hand: Option<InHand<'_>>,
    ) -> Result<(), WireError> {
        let mut actions = std::mem::take(&mut self.actions);
        self.replica.step(event, &mut actions);
        let mut result = Ok(());
        while let Some(action) = actions.pop_front() {
            match self.carry_out(env, action, hand) {
                Ok(Some(follows)) => self.replica.step(follows, &mut actions),
                Ok(None) => {}
                Err(e) => result = Err(e),
            }
        }
        self.actions = actions;
        self.note();
        result
    }

    fn carry_out(
        &mut self,
        env: &Env,
        action: Action,
        hand: Option<InHand<'_>>,
    ) -> Result<Option<Event>, WireError> {
        match action {
            Action::Forward => {
                if let (Some(down), Some(hand)) = (&self.down, hand)
                    && let Err(e) = down.post_on(hand.frame, hand.payload)
                {
                    self.lost_next(&e.to_string());
                }
            }
            Action::Keep => self.keep = true,
            Action::Resend { after } => {
                let generation = self.replica.generation();
                let mut frames = self.kept.after(after, generation);
                if let Some(down) = &self.down
                    && let Err(e) =
                        frames.try_for_each(|(frame, payload)| down.post_on(&frame, payload))
                {
                    drop(frames);
                    self.lost_next(&e.to_string());
                }
            }
            Action::Trim(epoch) => self.kept.trim(epoch, Some(&self.buffers)),
            Action::TrimAll => self.kept.clear(),
            Action::SayComplete(epoch) => {
                let frame = self.own_frame(Kind::Complete, epoch);
                if let Some(down) = &self.down
                    && let Err(e) = down.post_down(&frame, &[])
                {
                    self.lost_next(&e.to_string());
                }
            }
            Action::Unfit(why) => self.lost_next(&why),
            Action::AskNext => self.hang_up(),
            Action::AskPrevious => {
                if let Some(up) = self.up.take() {
                    up.close();
                }
            }
            Action::Feed => self.feeding = Some(Feeding::Wanted),
            Action::JoinerReady => self.tell_up(Kind::JoinerReady, Epoch::ZERO, &[]),
            Action::Open { epoch, full } => {
                let generation = self.replica.generation();
                let flags = hand.map_or(0, |hand| hand.frame.flags);
                if flags & (FLAG_INSTALL | FLAG_KEEP) != 0 {
                    let failed = self.on_store(|store| store.begin_install(generation, epoch));
                    if failed.is_none() && flags & FLAG_INSTALL != 0 {
                        self.say_digests(hand);
                    }
                    return Ok(failed);
                }
                return Ok(self.on_store(|store| store.begin(generation, epoch, full)));
            }
            Action::Stage => {
                if let Some(hand) = hand {
                    return Ok(self.on_store(|store| match hand.frame.kind {
                        Kind::Pages => store.pages(hand.payload),
                        Kind::Disk => store.disk(hand.payload),
                        _ => store.machine(hand.payload),
                    }));
                }
            }
            Action::Compare => {
                if let Some(hand) = hand {
                    self.compare(hand)?;
                }
            }
            Action::Prepare { .. } => {
                if let Some(hand) = hand {
                    return Ok(Some(self.prepare(hand)));
                }
            }
            Action::Commit(mark) => {
                if let Some(store) = &mut self.store {
                    store.commit(mark);
                }
                // Whoever hears the acknowledgement may ask.
                self.note();
            }
            Action::AckUp(epoch) => self.tell_up(Kind::Ack, epoch, &[]),
            Action::AckOwner(epoch) => {
                let frame = self.own_frame(Kind::Ack, epoch);
                self.tell_owners(&frame, &[]);
            }
            Action::Refuse(generation) => {
                if let Some(hand) = hand {
                    let refusal = Frame {
                        generation,
                        ..self.own_frame(Kind::Refused, Epoch::ZERO)
                    };
                    hand.link.post(&refusal, &[])?;
                }
            }
            Action::Suspect(silence_ms) => {
                let vm = self.view.vm;
                let _ = env.events.send(ServerEvent::Suspect { vm, silence_ms });
            }
            Action::Failed(why) => self.failed(env, why),
            Action::StillFailed(why) => self.tell_failed(env, why),
        }
        Ok(None)
    }

    /// This replica has declared itself failed. Its connections stay, so that predecessor and owner hear of it, but it
    /// beats no more: if the owner is gone too, its successor has to notice the silence.
    fn failed(&mut self, env: &Env, why: String) {
        tracing::error!("{}: this host's replica has failed: {why}", self.view.name);
        *lock(&self.beat) = None;
        self.tell_failed(env, why.clone());
        let vm = self.view.vm;
        let _ = env.events.send(ServerEvent::Failed { vm, why });
    }
}
