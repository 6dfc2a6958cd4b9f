//! The owner's side of a chain: updates to the head, acks from the tail.

mod bridge;
mod connection;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint::{
    CheckpointEnd, Epoch, Generation, HostId, Tally, VmId, codec, disk_records, records,
};

use crate::blocks::{self, Answer, Digest};
use crate::greet::{GreetError, Greeted, Role, greet};
use crate::kept::{Buffers, Kept, TooMuch, begin_payload};
use crate::link::HELLO_LIMIT;
use crate::mark::Mark;
use crate::pulse::Voice;
use crate::replica::Base;
use crate::view::{Member, View};
use crate::wire::{FLAG_KEEP, Frame, Kind, Payload};
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
    /// The chain acknowledges nothing, and everything has to be kept.
    #[error("more than {} MiB are not acknowledged by the chain", crate::KEPT_MAX >> 20)]
    TooMuch,
    /// An incremental checkpoint that is not the next after what the chain holds.
    #[error("checkpoint {epoch} cannot follow {base:?}, which is what the chain was sent last")]
    Base {
        /// The checkpoint.
        epoch: Epoch,
        /// What the chain was sent last, if anything.
        base: Option<Mark>,
    },
    /// A value too large to send.
    #[error(transparent)]
    Codec(#[from] checkpoint::CodecError),
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
            let (host, why) = other.blame(&member.host);
            let at = view.position(&host).map(|i| view.chain[i].addr);
            ClientError::Peer {
                host,
                addr: at.unwrap_or(member.addr),
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
    JoinerReady,
    /// A replica is lost.
    Lost {
        /// Which, if known.
        host: Option<HostId>,
        /// Why.
        why: String,
    },
}

/// What has been sent, and what of it would have to be sent again.
#[derive(Debug, Default)]
struct Sending {
    /// The newest of the owner's generations that this client has heard of.
    generation: Generation,
    /// Of the checkpoint under way.
    tally: Tally,
    open: Option<Open>,
    /// The last whole checkpoint, which the next one is applied to.
    base: Option<Mark>,
    kept: Kept,
    connection: Option<Arc<Connection>>,
}

/// The checkpoint being sent.
#[derive(Clone, Copy, Debug)]
struct Open {
    epoch: Epoch,
    /// The generation in which it was begun.
    origin: Generation,
    full: bool,
}

/// An owner's checkpoints on their way into the chain: from one configuration to the next. What the chain has not
/// acknowledged is kept, and sent again to a new head (the paper's clients do so with their requests).
#[derive(Debug)]
pub struct ChainClient {
    vm: VmId,
    from: HostId,
    sending: Mutex<Sending>,
    /// Newest checkpoint that needs not be kept any more. Apart, so that a slow link delays no acknowledgement.
    acked: Arc<AtomicU64>,
    buffers: Buffers,
}

impl ChainClient {
    /// A client of `vm` for `from`, its owner in `generation`. `base` is the checkpoint the VM was resumed from, which
    /// its chain goes on from; none if nothing has been sent yet.
    #[must_use]
    pub fn new(vm: VmId, from: HostId, generation: Generation, base: Option<Mark>) -> Self {
        let sending = Sending {
            generation,
            base,
            ..Sending::default()
        };
        Self {
            vm,
            from,
            sending: Mutex::new(sending),
            acked: Arc::default(),
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
        let (sender, events) = channel();
        let mut sending = self.sending();
        if let Some(old) = sending.connection.take() {
            old.close();
        }
        for (name, stream, host, is_acks) in [
            ("chain-head", up.stream, head.host.clone(), false),
            ("chain-acks", acks.stream, tail.host, true),
        ] {
            let sender = sender.clone();
            std::thread::Builder::new()
                .name(name.into())
                .spawn(move || listen(&stream, &host, is_acks, &sender))
                .map_err(|e| ClientError::Send(head.host.clone(), e))?;
        }
        let connection = Arc::new(Connection {
            vm: self.vm,
            generation: view.generation,
            voice: Voice::new(head.addr, &self.from, view).ok(),
            head,
            up: up.link,
            acks: acks.link,
            events: Mutex::new(events),
            acked: self.acked.clone(),
        });
        // Connected again in the generation in which the chain began, it goes on from what it has been sent.
        let begun = |base: Mark| up.holds.is_some() && view.history.contains(base);
        if view.in_place() || sending.base.is_some_and(begun) {
            self.go_on(&mut sending, &connection, up.holds)?;
        } else {
            *sending = Sending::default();
        }
        sending.generation = view.generation;
        sending.connection = Some(connection.clone());
        Ok(connection)
    }

    /// Sends a new head what it lacks of what this client has sent before.
    fn go_on(
        &self,
        sending: &mut Sending,
        connection: &Connection,
        holds: Option<Mark>,
    ) -> Result<(), ClientError> {
        sending.kept.trim(self.acked(), Some(&self.buffers));
        let Some(after) = holds.filter(|held| sending.kept.reaches(*held, sending.base)) else {
            return Err(ClientError::Unfit {
                host: connection.head.host.clone(),
                holds,
                newest: sending.base,
            });
        };
        let generation = connection.generation;
        let lost = |e| ClientError::Send(connection.head.host.clone(), e);
        sending
            .kept
            .resend(&connection.up, after, generation)
            .map_err(lost)?;
        if let Some(base) = sending.base {
            connection.forward(Kind::Complete, base.epoch, 0, &Payload::default())?;
        }
        Ok(())
    }

    fn acked(&self) -> Epoch {
        Epoch(self.acked.load(Ordering::Acquire))
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
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
        let Some(open) = sending.open else {
            return Err(ClientError::NotBegun);
        };
        let mut buffer = self.buffers.take();
        buffer.fill(payload);
        let sent = match &sending.connection {
            Some(connection) => connection.forward(kind, open.epoch, flags, &buffer),
            None => Err(ClientError::NoChain),
        };
        if open.full {
            self.buffers.give(buffer);
            return sent;
        }
        if sent.is_err() {
            sending.connection = None;
        }
        let frame = Frame {
            kind,
            vm: self.vm,
            generation: open.origin,
            epoch: open.epoch,
            flags,
        };
        sending
            .kept
            .push(frame, buffer)
            .map_err(|TooMuch| ClientError::TooMuch)
    }

    /// Announces a checkpoint; `full` if it replaces the replicas' whole image, which only the first after a chain that
    /// begins anew does. Otherwise it is applied to the last one sent.
    ///
    /// # Errors
    /// [`ClientError::Base`] if a checkpoint in between was never sent; [`ClientError::TooMuch`] if too much is
    /// unacknowledged. A full checkpoint fails with its connection.
    pub fn begin(&self, epoch: Epoch, full: bool) -> Result<(), ClientError> {
        self.start(epoch, full, 0)
    }

    fn start(&self, epoch: Epoch, full: bool, extra: u32) -> Result<(), ClientError> {
        let mut sending = self.sending();
        sending.kept.trim(self.acked(), Some(&self.buffers));
        sending.tally = Tally::default();
        let origin = sending.generation;
        let base = match sending.base {
            _ if full => Base::Nothing,
            Some(base) if base.epoch.next() == epoch => Base::On { base, origin },
            base => return Err(ClientError::Base { epoch, base }),
        };
        sending.open = Some(Open {
            epoch,
            origin,
            full,
        });
        let (flags, payload) = begin_payload(base);
        self.put(&mut sending, Kind::Begin, flags | extra, &payload)
    }

    /// As [`ChainClient::begin`] with `full`, but the replicas' disks keep what they hold: the caller has to send every block
    /// that [`ChainClient::compare`] does not find to be equal, those that are zero too.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn begin_over(&self, epoch: Epoch) -> Result<(), ClientError> {
        self.start(epoch, true, FLAG_KEEP)
    }

    /// Asks which of these disk blocks every replica holds already, of the checkpoint begun by
    /// [`ChainClient::begin_over`]. [`ClientEvent::Compared`] answers. The digests have to be of what the disk held at some
    /// moment before this call, and every write after that moment has to be sent.
    ///
    /// # Errors
    /// As [`ChainClient::begin`].
    pub fn compare(&self, disk: u16, first: u64, digests: &[Digest]) -> Result<(), ClientError> {
        let payload = blocks::payload(disk, first, digests);
        self.put(&mut self.sending(), Kind::Compare, 0, &payload)
    }

    fn content(
        &self,
        kind: Kind,
        payload: &[u8],
        pages: usize,
        disk: usize,
    ) -> Result<(), ClientError> {
        let mut sending = self.sending();
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
        let mut sending = self.sending();
        let end: CheckpointEnd = sending.tally.end();
        let payload = codec::to_bytes(&end, HELLO_LIMIT)?;
        self.put(&mut sending, Kind::End, 0, &payload)?;
        if let Some(open) = sending.open.take() {
            let mark = Mark {
                generation: open.origin,
                epoch: open.epoch,
                digest: end.digest,
            };
            sending.base = Some(mark);
            if !open.full {
                sending.kept.close(mark);
            }
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
        sending.kept.trim(self.acked(), Some(&self.buffers));
        sending.kept.len()
    }
}
