//! The owner's side of a chain: updates to the head, acks from the tail.

use std::io;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use checkpoint::{
    CheckpointEnd, Epoch, Generation, HostId, Tally, VmId, codec, disk_records, records,
};

use crate::link::{HELLO_LIMIT, Link, Role, Trouble};
use crate::mark::Mark;
use crate::server::{GreetError, greet};
use crate::view::{Member, View};
use crate::wire::{self, FLAG_FULL, Frame, Kind, Payload};

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
    /// A replica is lost.
    Lost {
        /// Which, if known.
        host: Option<HostId>,
        /// Why.
        why: String,
    },
}

/// What has been sent.
#[derive(Debug, Default)]
struct Sending {
    /// Of the checkpoint under way.
    tally: Tally,
    /// The last whole checkpoint, which the next one is applied to.
    base: Option<Mark>,
}

/// A connection to a chain, for one generation.
#[derive(Debug)]
pub struct ChainClient {
    vm: VmId,
    generation: Generation,
    head: Member,
    up: Link,
    acks: Link,
    sending: Mutex<Sending>,
    held: Option<Mark>,
    events: Mutex<Receiver<ClientEvent>>,
}

impl ChainClient {
    /// Connects to head and tail of `view`. Succeeds only when the whole chain is connected.
    ///
    /// # Errors
    /// [`ClientError`] naming the replica; [`ClientError::Refused`] is final, the others may pass.
    pub fn connect(from: &HostId, view: &View) -> Result<Self, ClientError> {
        let (head, tail) = match (view.chain.first(), view.chain.last()) {
            (Some(head), Some(tail)) => (head.clone(), tail.clone()),
            _ => return Err(ClientError::NoChain),
        };
        let connect = |member: &Member, role| {
            greet(member.addr, view, role, from).map_err(|e| match e {
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
        };
        let up = connect(&head, Role::Update)?;
        let acks = connect(&tail, Role::Acks)?;
        let (sender, events) = channel();
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
        Ok(Self {
            vm: view.vm,
            generation: view.generation,
            head,
            held: up.holds,
            up: up.link,
            acks: acks.link,
            sending: Mutex::new(Sending {
                tally: Tally::default(),
                base: up.holds,
            }),
            events: Mutex::new(events),
        })
    }

    fn send(
        &self,
        kind: Kind,
        epoch: Epoch,
        flags: u32,
        payload: &[u8],
    ) -> Result<(), ClientError> {
        let frame = Frame {
            kind,
            vm: self.vm,
            generation: self.generation,
            epoch,
            flags,
        };
        self.up
            .send(&frame, payload)
            .map_err(|e| ClientError::Send(self.head.host.clone(), e))
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, payload: &[u8], pages: u64, disk: u64) {
        self.sending().tally.add(payload, pages, disk);
    }

    /// The checkpoint that every replica of the chain held when this client connected, if they held the same. An owner
    /// may go on from it instead of with a full one if it made that very checkpoint, has let nothing out that was said
    /// after it, and goes on holding; it is committed then.
    #[must_use]
    pub fn held(&self) -> Option<Mark> {
        self.held
    }

    /// Announces a checkpoint; `full` if it replaces the replicas' whole image. Otherwise it is applied to the last one
    /// sent by this client, or, as the first, to [`ChainClient::held`].
    ///
    /// # Errors
    /// [`ClientError::Send`]; [`ClientError::Base`] if a checkpoint in between was never sent.
    pub fn begin(&self, epoch: Epoch, full: bool) -> Result<(), ClientError> {
        let base = {
            let mut sending = self.sending();
            sending.tally = Tally::default();
            sending.base
        };
        if full {
            return self.send(Kind::Begin, epoch, FLAG_FULL, &[]);
        }
        match base {
            Some(mark) if mark.epoch.next() == epoch => {
                self.send(Kind::Begin, epoch, 0, &mark.to_bytes())
            }
            _ => Err(ClientError::Base { epoch, base }),
        }
    }

    /// Sends page records, at most [`wire::PAYLOAD_MAX`] bytes of them.
    ///
    /// # Errors
    /// [`ClientError::Send`].
    pub fn pages(&self, epoch: Epoch, payload: &[u8]) -> Result<(), ClientError> {
        self.count(payload, records(payload).count() as u64, 0);
        self.send(Kind::Pages, epoch, 0, payload)
    }

    /// Sends disk records.
    ///
    /// # Errors
    /// [`ClientError::Send`].
    pub fn disk(&self, epoch: Epoch, payload: &[u8]) -> Result<(), ClientError> {
        self.count(payload, 0, disk_records(payload).count() as u64);
        self.send(Kind::Disk, epoch, 0, payload)
    }

    /// Sends the encoded machine state.
    ///
    /// # Errors
    /// [`ClientError::Send`].
    pub fn machine(&self, epoch: Epoch, state: &[u8]) -> Result<(), ClientError> {
        for piece in state.chunks(MACHINE_PIECE) {
            self.count(piece, 0, 0);
            self.send(Kind::Machine, epoch, 0, piece)?;
        }
        Ok(())
    }

    /// The checkpoint is complete.
    ///
    /// # Errors
    /// [`ClientError::Send`].
    pub fn end(&self, epoch: Epoch) -> Result<(), ClientError> {
        let end: CheckpointEnd = {
            let mut sending = self.sending();
            let end = sending.tally.end();
            sending.base = Some(Mark {
                generation: self.generation,
                epoch,
                digest: end.digest,
            });
            end
        };
        self.send(Kind::End, epoch, 0, &codec::to_bytes(&end, HELLO_LIMIT)?)
    }

    /// The owner lives. Sent only if nothing else is on its way.
    ///
    /// # Errors
    /// [`ClientError::Send`] once the connection is gone.
    pub fn heartbeat(&self) -> Result<(), ClientError> {
        let frame = Frame {
            kind: Kind::Heartbeat,
            vm: self.vm,
            generation: self.generation,
            epoch: Epoch::ZERO,
            flags: 0,
        };
        self.up
            .send_if_idle(&frame)
            .map_err(|e| ClientError::Send(self.head.host.clone(), e))
    }

    /// The next thing the chain says; waits for it. `None` once both connections are over.
    pub fn next_event(&self) -> Option<ClientEvent> {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv()
            .ok()
    }

    /// Ends both connections.
    pub fn close(&self) {
        self.up.close();
        self.acks.close();
    }
}

impl Drop for ChainClient {
    fn drop(&mut self) {
        self.close();
    }
}

fn listen(mut stream: &TcpStream, host: &HostId, is_acks: bool, events: &Sender<ClientEvent>) {
    let mut payload = Payload::default();
    loop {
        let event = match wire::read(&mut stream, &mut payload) {
            Ok(Frame {
                kind: Kind::Ack,
                epoch,
                generation,
                ..
            }) if is_acks => ClientEvent::Ack { epoch, generation },
            // The head's own acks only trim what it has sent; the tail's reach the owner directly.
            Ok(Frame {
                kind: Kind::Ack, ..
            }) => continue,
            Ok(Frame {
                kind: Kind::Refused,
                generation,
                ..
            }) => ClientEvent::Refused { generation },
            Ok(Frame {
                kind: Kind::Broken, ..
            }) => match codec::from_bytes::<Trouble>(&payload, HELLO_LIMIT) {
                Ok((host, why)) => ClientEvent::Lost {
                    host: Some(host),
                    why,
                },
                Err(e) => ClientEvent::Lost {
                    host: None,
                    why: e.to_string(),
                },
            },
            Ok(frame) => ClientEvent::Lost {
                host: Some(host.clone()),
                why: format!("it sent an unexpected frame ({:?})", frame.kind),
            },
            Err(e) => ClientEvent::Lost {
                host: Some(host.clone()),
                why: e.to_string(),
            },
        };
        let over = matches!(event, ClientEvent::Lost { .. });
        if events.send(event).is_err() || over {
            return;
        }
    }
}
