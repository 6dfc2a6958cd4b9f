//! The owner's side of a chain: updates to the head, acks from the tail.

mod acks;
mod bridge;
mod connection;

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use checkpoint::{
    CheckpointEnd, Epoch, Generation, HostId, Tally, VmId, codec, disk_records, records,
};

use crate::blocks::{self, Answer, Digest};
use crate::greet::{GreetError, Greeted, Role, greet};
use crate::kept::{Buffers, Kept, begin_payload};
use crate::link::HELLO_LIMIT;
use crate::loss::{Loss, LossKind};
use crate::mark::Mark;
use crate::owner::{BeginError, Joined, Sender};
use crate::pulse::Voice;
use crate::view::{Member, View};
use crate::wire::{FLAG_HELD, FLAG_KEEP, Frame, Kind, Payload};
use acks::Acks;
pub use bridge::bridge;
pub use connection::Connection;
use connection::listen;

/// Machine state is sent in pieces of this size.
const MACHINE_PIECE: usize = 512 << 10;

/// Why the chain does not take something.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The chain of the view is empty.
    #[error("the chain is empty")]
    NoChain,
    /// A replica does not take the connection.
    #[error("backup {host} at {addr}: {why}")]
    Peer {
        /// Which.
        host: HostId,
        /// Where.
        addr: std::net::SocketAddr,
        /// Whether it does not answer, or answers that it does not.
        kind: LossKind,
        /// Why.
        why: String,
    },
    /// A replica follows a newer generation.
    #[error(
        "backup {host} follows the newer generation {generation}: this host does not own the VM any more"
    )]
    Refused {
        /// Which.
        host: HostId,
        /// That generation.
        generation: Generation,
    },
    /// The connection to the head failed.
    #[error("sending to {0}: {1}")]
    Send(HostId, io::Error),
    /// The head cannot be brought up to date from what is kept here.
    #[error(
        "backup {host} holds {}, which is too far behind {}: it has to be filled again",
        said(holds),
        said(newest)
    )]
    Unfit {
        /// Which.
        host: HostId,
        /// What it holds.
        holds: Option<Mark>,
        /// The newest checkpoint.
        newest: Option<Mark>,
    },
    /// Content without a beginning.
    #[error("no checkpoint has been begun")]
    NotBegun,
    /// The client has been closed.
    #[error("this chain is not sent to any more")]
    Closed,
    /// An incremental checkpoint that is not the next after what the chain holds.
    #[error(transparent)]
    Base(#[from] BeginError),
    /// A value too large to send.
    #[error(transparent)]
    Codec(#[from] checkpoint::CodecError),
}

impl ClientError {
    /// Whom the chain of `generation` has lost with it, if anybody.
    #[must_use]
    pub fn loss(&self, generation: Generation) -> Option<Loss> {
        let (host, kind) = match self {
            Self::Peer { host, kind, .. } => (host, *kind),
            Self::Send(host, _) => (host, LossKind::Silent),
            Self::Unfit { host, .. } => (host, LossKind::Unfit),
            _ => return None,
        };
        Some(Loss {
            generation,
            host: Some(host.clone()),
            kind,
            why: self.to_string(),
        })
    }
}

fn said(mark: &Option<Mark>) -> String {
    mark.map_or_else(|| "nothing".into(), |mark| format!("checkpoint {mark}"))
}

/// Connects to a replica; the error names whoever is to blame, perhaps one further down.
fn reach(member: &Member, view: &View, role: Role, from: &HostId) -> Result<Greeted, ClientError> {
    greet(member, view, role, from).map_err(|e| match e {
        GreetError::Refused(generation) => ClientError::Refused {
            host: member.host.clone(),
            generation,
        },
        other => {
            let kind = match other {
                GreetError::NotReady { .. } => LossKind::Declined,
                _ => LossKind::Silent,
            };
            let (host, why) = other.blame(&member.host);
            let at = view.position(&host).map(|i| view.chain[i].addr);
            ClientError::Peer {
                host,
                addr: at.unwrap_or(member.addr),
                kind,
                why,
            }
        }
    })
}

/// What comes back from a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEvent {
    /// The tail has processed every checkpoint up to this one.
    Ack {
        /// The checkpoint.
        epoch: Epoch,
        /// The generation the tail follows.
        generation: Generation,
    },
    /// A replica follows a newer generation.
    Refused {
        /// That generation.
        generation: Generation,
    },
    /// Answer to [`ChainClient::compare`].
    Compared {
        /// The generation the tail follows.
        generation: Generation,
        /// The checkpoint under way.
        epoch: Epoch,
        /// Which blocks need not be sent.
        answer: Answer,
    },
    /// The joining replica has everything: it can become the tail.
    JoinerReady {
        /// The generation in which it joins.
        generation: Generation,
    },
    /// A replica is lost.
    Lost(Loss),
}

/// What has been sent, and what of it would have to be sent again.
#[derive(Debug)]
struct Sending {
    sender: Sender,
    /// Of the checkpoint under way.
    tally: Tally,
    /// The frames of what the sender has pending.
    kept: Kept,
    connection: Option<Arc<Connection>>,
}

impl Sending {
    /// Forgets what has been acknowledged.
    fn trim(&mut self, acks: &Acks, buffers: &Buffers) {
        let (generation, epoch) = acks.newest();
        if self.sender.acked(generation, epoch) {
            self.kept.trim(epoch, Some(buffers));
        }
    }

    fn lost(&mut self) {
        self.sender.lost();
        self.connection = None;
    }
}

/// An owner's checkpoints on their way into the chain: from one configuration to the next. What the chain has not
/// acknowledged is kept, and sent again to a new head (the paper's clients do so with their requests). What is sent and
/// kept the [`Sender`] decides; this is its driver.
///
/// Of what is kept there is a bound. At the bound sending waits for acknowledgements: a slow chain slows its owner down.
#[derive(Debug)]
pub struct ChainClient {
    vm: VmId,
    from: HostId,
    /// Bytes.
    bound: usize,
    sending: Mutex<Sending>,
    /// What `sending` sends over. Apart, so that a connection can be ended whose peer takes nothing: whoever sends has
    /// `sending` meanwhile.
    current: Mutex<Weak<Connection>>,
    /// Apart, so that a slow link delays no acknowledgement.
    acks: Arc<Acks>,
    buffers: Buffers,
}

impl ChainClient {
    /// A client of `vm` for `from`, its owner in `generation`. `base` is the checkpoint the VM was resumed from, which
    /// its chain goes on from; none if nothing has been sent yet. At most about `bound` bytes are kept
    /// ([`crate::owner_keeps`]), or one checkpoint if that is larger.
    #[must_use]
    pub fn new(
        vm: VmId,
        from: HostId,
        generation: Generation,
        base: Option<Mark>,
        bound: usize,
    ) -> Self {
        let sending = Sending {
            sender: Sender::new(generation, base),
            tally: Tally::default(),
            kept: Kept::default(),
            connection: None,
        };
        Self {
            vm,
            from,
            bound,
            sending: Mutex::new(sending),
            current: Mutex::default(),
            acks: Arc::default(),
            buffers: Buffers::default(),
        }
    }

    /// Connects to head and tail of `view`, and sends the head what it lacks. Succeeds only when the whole chain is
    /// connected. If the chain begins anew, so does this client: the next checkpoint has to be a full one.
    ///
    /// # Errors
    /// [`ClientError`] naming the replica; [`ClientError::Refused`] is final, [`ClientError::Unfit`] for this
    /// generation, the others may pass.
    pub fn connect(&self, view: &View) -> Result<Arc<Connection>, ClientError> {
        let (head, tail) = match (view.chain.first(), view.chain.last()) {
            (Some(head), Some(tail)) => (head.clone(), tail.clone()),
            _ => return Err(ClientError::NoChain),
        };
        let up = reach(&head, view, Role::Update, &self.from)?;
        let acks = reach(&tail, view, Role::Acks, &self.from)?;
        let (events_in, events) = channel();
        // Before the lock: whoever has it may be waiting for the old head.
        self.hang_up();
        let mut sending = self.sending();
        sending.connection = None;
        for (name, stream, host, is_acks) in [
            ("chain-head", up.stream, head.host.clone(), false),
            ("chain-acks", acks.stream, tail.host, true),
        ] {
            let (events, generation) = (events_in.clone(), view.generation);
            std::thread::Builder::new()
                .name(name.into())
                .spawn(move || listen(&stream, &host, generation, is_acks, &events))
                .map_err(|e| ClientError::Send(head.host.clone(), e))?;
        }
        let connection = Arc::new(Connection {
            vm: self.vm,
            generation: view.generation,
            voice: Voice::new(head.addr, &self.from, view).ok(),
            head,
            up: up.link,
            acks_link: acks.link,
            events: Mutex::new(events),
            acks: self.acks.clone(),
        });
        *self.current() = Arc::downgrade(&connection);
        let joined = self.join(&mut sending, &connection, view, up.holds);
        match &joined {
            Ok(()) => sending.connection = Some(connection.clone()),
            Err(_) => sending.lost(),
        }
        drop(sending);
        // Whoever waits for room may have nothing to send any more.
        self.acks.changed();
        joined.map(|()| connection)
    }

    /// Sends a new head what it lacks of what this client has sent before.
    fn join(
        &self,
        sending: &mut Sending,
        connection: &Connection,
        view: &View,
        holds: Option<Mark>,
    ) -> Result<(), ClientError> {
        sending.trim(&self.acks, &self.buffers);
        let (after, complete) = match sending.sender.connected(view, holds) {
            Joined::GoesOn { after, complete } => (after, complete),
            Joined::Anew => {
                sending.kept.clear();
                return Ok(());
            }
            Joined::Unfit { newest } => {
                return Err(ClientError::Unfit {
                    host: connection.head.host.clone(),
                    holds,
                    newest,
                });
            }
        };
        sending
            .kept
            .resend(&connection.up, after, view.generation)
            .map_err(|e| ClientError::Send(connection.head.host.clone(), e))?;
        match complete {
            Some(epoch) => connection.forward(Kind::Complete, epoch, 0, &Payload::default()),
            None => Ok(()),
        }
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`ChainClient::sending`], once there is room for more. An acknowledgement makes it, of a checkpoint that is whole:
    /// while there is none, the one under way goes on, however large.
    fn room(&self) -> Result<MutexGuard<'_, Sending>, ClientError> {
        loop {
            let seen = self.acks.turn();
            let mut sending = self.sending();
            sending.trim(&self.acks, &self.buffers);
            if self.acks.is_closed() {
                return Err(ClientError::Closed);
            }
            if sending.kept.bytes() < self.bound || sending.kept.is_empty() {
                return Ok(sending);
            }
            drop(sending);
            self.acks.wait_after(seen);
        }
    }

    fn current(&self) -> MutexGuard<'_, Weak<Connection>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection there is, if there is one.
    fn hang_up(&self) {
        if let Some(connection) = self.current().upgrade() {
            connection.close();
        }
    }

    /// Nothing more is sent: whoever waits for acknowledgements, or for the head to take something, does so no longer. A
    /// client that is replaced by another one is closed.
    pub fn close(&self) {
        self.acks.close();
        self.hang_up();
    }

    /// Sends one frame and keeps it. A connection that fails is not this call's concern: it says so itself, and what is
    /// kept is sent over the next one. A full checkpoint is not kept: it fails with its connection.
    fn put(
        &self,
        sending: &mut Sending,
        kind: Kind,
        flags: u32,
        payload: &[u8],
    ) -> Result<(), ClientError> {
        let (Some((epoch, origin)), Some(pass)) = (sending.sender.open(), sending.sender.pass())
        else {
            return Err(ClientError::NotBegun);
        };
        let mut buffer = self.buffers.take();
        buffer.fill(payload);
        let sent = match &sending.connection {
            Some(connection) if pass.forward => connection.forward(kind, epoch, flags, &buffer),
            _ => Err(ClientError::NoChain),
        };
        if sent.is_err() {
            sending.lost();
        }
        if !pass.keep {
            self.buffers.give(buffer);
            return sent;
        }
        let frame = Frame {
            kind,
            vm: self.vm,
            generation: origin,
            epoch,
            flags,
        };
        sending.kept.push(frame, buffer);
        Ok(())
    }

    /// Announces a checkpoint; `full` if it replaces the replicas' whole image, which only the first after a chain that
    /// begins anew does. Otherwise it is applied to the last one sent. `held` if from its capture on, at the latest, the
    /// VM's output is held: the replicas are not resumed from before they have one that is. Once
    /// output is held it stays so until the chain begins anew.
    ///
    /// Waits for room, as the calls that send its content do.
    ///
    /// # Errors
    /// [`ClientError::Base`] if a checkpoint in between was never sent; [`ClientError::Closed`]. A full checkpoint fails
    /// with its connection.
    pub fn begin(&self, epoch: Epoch, full: bool, held: bool) -> Result<(), ClientError> {
        self.start(epoch, full, held, 0)
    }

    fn start(&self, epoch: Epoch, full: bool, held: bool, extra: u32) -> Result<(), ClientError> {
        let mut sending = self.room()?;
        sending.tally = Tally::default();
        let begun = sending.sender.begin(epoch, full, held)?;
        let (flags, payload) = begin_payload(begun.base);
        let held = if begun.held { FLAG_HELD } else { 0 };
        self.put(&mut sending, Kind::Begin, flags | held | extra, &payload)
    }

    /// As [`ChainClient::begin`] with `full`, but the replicas' disks keep what they hold: the caller has to send every block
    /// that [`ChainClient::compare`] does not find to be equal, those that are zero too. Output is not held.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn begin_over(&self, epoch: Epoch) -> Result<(), ClientError> {
        self.start(epoch, true, false, FLAG_KEEP)
    }

    /// Asks which of these disk blocks every replica holds already, of the checkpoint begun by
    /// [`ChainClient::begin_over`]. [`ClientEvent::Compared`] answers. The digests have to be of what the disk held at some
    /// moment before this call, and every write after that moment has to be sent.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn compare(&self, disk: u16, first: u64, digests: &[Digest]) -> Result<(), ClientError> {
        let payload = blocks::payload(disk, first, digests);
        self.put(&mut *self.room()?, Kind::Compare, 0, &payload)
    }

    fn content(
        &self,
        kind: Kind,
        payload: &[u8],
        pages: usize,
        disk: usize,
    ) -> Result<(), ClientError> {
        let mut sending = self.room()?;
        sending.tally.add(payload, pages as u64, disk as u64);
        self.put(&mut sending, kind, 0, payload)
    }

    /// Sends page records of the checkpoint begun, at most [`wire::PAYLOAD_MAX`] bytes of them.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn pages(&self, payload: &[u8]) -> Result<(), ClientError> {
        self.content(Kind::Pages, payload, records(payload).count(), 0)
    }

    /// Sends disk records of the checkpoint begun.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn disk(&self, payload: &[u8]) -> Result<(), ClientError> {
        self.content(Kind::Disk, payload, 0, disk_records(payload).count())
    }

    /// Sends the encoded machine state of the checkpoint begun.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn machine(&self, state: &[u8]) -> Result<(), ClientError> {
        for piece in state.chunks(MACHINE_PIECE) {
            self.content(Kind::Machine, piece, 0, 0)?;
        }
        Ok(())
    }

    /// The checkpoint is complete.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn end(&self) -> Result<(), ClientError> {
        let mut sending = self.room()?;
        let end: CheckpointEnd = sending.tally.end();
        let payload = codec::to_bytes(&end, HELLO_LIMIT)?;
        self.put(&mut sending, Kind::End, 0, &payload)?;
        if let Some(ended) = sending.sender.end(end.digest).filter(|ended| ended.kept) {
            sending.kept.close(ended.mark);
        }
        Ok(())
    }

    /// The VM has been stopped for good at `epoch`, which is committed: asks the head to take it over.
    ///
    /// # Errors
    /// [`ClientError::NoChain`] without a connection, [`ClientError::Send`].
    pub fn yield_at(&self, epoch: Epoch) -> Result<(), ClientError> {
        let connection = self.sending().connection.clone();
        let connection = connection.ok_or(ClientError::NoChain)?;
        connection.forward(Kind::Yield, epoch, 0, &Payload::default())
    }

    /// Whole checkpoints that are kept because the chain has not acknowledged them.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        let mut sending = self.sending();
        sending.trim(&self.acks, &self.buffers);
        sending.sender.unacknowledged()
    }
}
