//! What a replica's lock protects: the state machine, its store and its links; carries out the machine's actions.

mod content;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use checkpoint::{Epoch, codec};

use super::joiner::{self, Feeding};
use super::{ServerEvent, Shared, lock};
use crate::kept::{Buffers, KEPT_MAX, Kept, base_of, end_of};
use crate::link::{HELLO_LIMIT, Link, Trouble};
use crate::replica::{Action, Event, Replica};
use crate::store::{Filled, ReplicaStore};
use crate::view::View;
use crate::wire::{FLAG_HELD, FLAG_INSTALL, FLAG_KEEP, Frame, Kind, Payload, WireError};

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
    /// The joining replica has said all that its disks hold.
    pub(super) compared: bool,
    /// How the last filling of a joining replica went.
    pub(super) filled: Option<Filled>,
    /// In so many frames so far.
    pub(super) digest_frames: u64,
    /// Why there is no successor yet.
    pub(super) down_trouble: Option<Trouble>,
    /// Owners who want the tail's acks.
    pub(super) owners: Vec<Arc<Link>>,
    /// Apart from the rest, so that a checkpoint being processed delays no heartbeat.
    pub(super) beat: Beat,
    actions: VecDeque<Action>,
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
            view,
            replica,
            store: Some(store),
            up: None,
            down: None,
            kept: Kept::default(),
            buffers,
            keep: false,
            feeding: None,
            compared: false,
            filled: None,
            digest_frames: 0,
            down_trouble: None,
            owners: Vec::new(),
            beat: Beat::default(),
            actions: VecDeque::new(),
        }
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
        self.down_trouble = None;
        if self.feeding.take().is_some()
            && let Some(store) = &mut self.store
        {
            store.copy_end();
        }
        if let Some(down) = self.down.take() {
            down.close();
        }
        let mut actions = VecDeque::new();
        self.replica.step(Event::NextDown, &mut actions);
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
        if let Some(up) = &self.up
            && up.send(&frame, payload).is_err()
        {
            self.up = None;
        }
    }

    pub(super) fn tell_trouble(&mut self, trouble: &Trouble) {
        if let Ok(payload) = codec::to_bytes(trouble, HELLO_LIMIT) {
            self.tell_up(Kind::Broken, Epoch::ZERO, &payload);
        }
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
        let trouble = (host, why.to_string());
        self.tell_trouble(&trouble);
        self.down_trouble = Some(trouble);
    }

    /// Handles one frame from a predecessor. Its payload goes back to the buffers, unless it is kept.
    pub(super) fn frame(
        &mut self,
        shared: &Shared,
        frame: &Frame,
        payload: Payload,
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        let hand = InHand {
            frame,
            payload: &payload,
            link,
        };
        let result = self.handle(shared, hand);
        if std::mem::take(&mut self.keep) {
            self.keep_frame(frame, payload);
        } else {
            self.buffers.give(payload);
        }
        joiner::send_the_rest(self, shared);
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

    fn handle(&mut self, shared: &Shared, hand: InHand<'_>) -> Result<(), WireError> {
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
        self.run(shared, event, Some(hand))?;
        if frame.generation == mine {
            let now_ms = shared.now_ms();
            self.run(shared, Event::Heard { now_ms }, None)?;
        }
        Ok(())
    }

    /// Feeds one event to the machine and does what it answers, and what follows from that.
    pub(super) fn run(
        &mut self,
        shared: &Shared,
        event: Event,
        hand: Option<InHand<'_>>,
    ) -> Result<(), WireError> {
        let mut actions = std::mem::take(&mut self.actions);
        self.replica.step(event, &mut actions);
        let mut result = Ok(());
        while let Some(action) = actions.pop_front() {
            match self.carry_out(shared, action, hand) {
                Ok(Some(follows)) => self.replica.step(follows, &mut actions),
                Ok(None) => {}
                Err(e) => result = Err(e),
            }
        }
        self.actions = actions;
        result
    }

    fn carry_out(
        &mut self,
        shared: &Shared,
        action: Action,
        hand: Option<InHand<'_>>,
    ) -> Result<Option<Event>, WireError> {
        match action {
            Action::Forward => {
                if let (Some(down), Some(hand)) = (&self.down, hand)
                    && let Err(e) = down.forward(hand.frame, hand.payload)
                {
                    self.lost_next(&e.to_string());
                }
            }
            Action::Keep => self.keep = true,
            Action::Resend { after } => {
                let generation = self.replica.generation();
                let joins = self.replica.is_tail();
                if let Some(down) = &self.down
                    && let Err(e) = if joins { down.set_queued() } else { Ok(()) }
                        .and_then(|()| self.kept.resend(down, after, generation))
                {
                    self.lost_next(&e.to_string());
                }
            }
            Action::Trim(epoch) => self.kept.trim(epoch, Some(&self.buffers)),
            Action::TrimAll => self.kept.clear(),
            Action::SayComplete(epoch) => {
                let frame = self.own_frame(Kind::Complete, epoch);
                if let Some(down) = &self.down
                    && let Err(e) = down.send(&frame, &[])
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
                    return Ok(match flags & FLAG_INSTALL != 0 {
                        true => failed.or_else(|| self.say_digests(hand)),
                        false => failed,
                    });
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
                    return self.compare(hand);
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
            }
            Action::AckUp(epoch) => self.tell_up(Kind::Ack, epoch, &[]),
            Action::AckOwner(epoch) => {
                let frame = self.own_frame(Kind::Ack, epoch);
                self.owners.retain(|owner| owner.send(&frame, &[]).is_ok());
            }
            Action::Refuse(generation) => {
                if let Some(hand) = hand {
                    let refusal = Frame {
                        generation,
                        ..self.own_frame(Kind::Refused, Epoch::ZERO)
                    };
                    hand.link.send(&refusal, &[])?;
                }
            }
            Action::Suspect(silence_ms) => {
                let vm = self.view.vm;
                let _ = shared.events.send(ServerEvent::Suspect { vm, silence_ms });
            }
            Action::Failed(why) => self.failed(shared, why),
            Action::StillFailed(why) => self.tell_trouble(&(shared.options.host.clone(), why)),
        }
        Ok(None)
    }

    /// This replica has declared itself failed. Its connections stay, so that predecessor and owner hear of it, but it
    /// beats no more: if the owner is gone too, its successor has to notice the silence.
    fn failed(&mut self, shared: &Shared, why: String) {
        tracing::error!("{}: this host's replica has failed: {why}", self.view.name);
        *lock(&self.beat) = None;
        self.tell_trouble(&(shared.options.host.clone(), why.clone()));
        let vm = self.view.vm;
        let _ = shared.events.send(ServerEvent::Failed { vm, why });
    }
}

/// Why a frame that should not come ends a connection, as an I/O error.
pub(super) fn other(why: impl std::fmt::Display) -> io::Error {
    io::Error::other(why.to_string())
}
