//! A connection to head and tail of a chain, in one generation.

use std::net::TcpStream;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{Epoch, Generation, HostId, VmId, codec};

use super::acks::Acks;
use super::{ClientError, ClientEvent};
use crate::blocks;
use crate::link::{HELLO_LIMIT, Link, Trouble};
use crate::loss::{Loss, LossKind};
use crate::pulse::Voice;
use crate::view::Member;
use crate::wire::{self, FLAG_DECLINED, Frame, Kind, Payload, WireError};

/// A connection to a chain, in one generation.
#[derive(Debug)]
pub struct Connection {
    pub(super) vm: VmId,
    pub(super) generation: Generation,
    pub(super) head: Member,
    pub(super) up: Link,
    pub(super) acks_link: Link,
    pub(super) events: Mutex<Receiver<ClientEvent>>,
    pub(super) acks: Arc<Acks>,
    /// None: the connection's own heartbeats have to do.
    pub(super) voice: Option<Voice>,
}

impl Connection {
    /// The generation it was made in.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    pub(super) fn forward(
        &self,
        kind: Kind,
        epoch: Epoch,
        flags: u32,
        payload: &Payload,
    ) -> Result<(), ClientError> {
        let frame = Frame {
            kind,
            vm: self.vm,
            generation: self.generation,
            epoch,
            flags,
        };
        self.up
            .forward(&frame, payload)
            .map_err(|e| ClientError::Send(self.head.host.clone(), e))
    }

    /// The owner lives: by datagram, and by the connection if nothing else is on its way there.
    ///
    /// # Errors
    /// [`ClientError::Send`] once the connection is gone.
    pub fn heartbeat(&self) -> Result<(), ClientError> {
        if let Some(voice) = &self.voice {
            voice.beat();
        }
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
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let event = events.recv().ok()?;
        if let ClientEvent::Ack { epoch, generation } = &event
            && *generation == self.generation
        {
            self.acks.note(*generation, *epoch);
        }
        Some(event)
    }

    /// Ends it.
    pub fn close(&self) {
        self.up.close();
        self.acks_link.close();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Turns what one connection says into events, to its end.
pub(super) fn listen(
    mut stream: &TcpStream,
    host: &HostId,
    generation: Generation,
    is_acks: bool,
    events: &Sender<ClientEvent>,
) {
    let lost = |named: Option<HostId>, kind, why| {
        ClientEvent::Lost(Loss {
            generation,
            host: named,
            kind,
            why,
        })
    };
    let mut payload = Payload::default();
    loop {
        let read = wire::read(&mut stream, &mut payload);
        // Another replica that is lost is not the end of this connection: a joining one may come back.
        let over = !matches!(
            &read,
            Ok(frame) if matches!(
                frame.kind,
                Kind::Ack | Kind::Refused | Kind::JoinerReady | Kind::Broken | Kind::Compared
            )
        );
        let event = match read {
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
                kind: Kind::JoinerReady,
                ..
            }) => ClientEvent::JoinerReady { generation },
            Ok(Frame {
                kind: Kind::Compared,
                epoch,
                generation,
                ..
            }) if is_acks => match blocks::parse_answer(&payload) {
                Some(answer) => ClientEvent::Compared {
                    generation,
                    epoch,
                    answer,
                },
                None => {
                    let why = WireError::Payload(Kind::Compared).to_string();
                    lost(Some(host.clone()), LossKind::Failed, why)
                }
            },
            Ok(Frame {
                kind: Kind::Broken,
                flags,
                ..
            }) => match codec::from_bytes::<Trouble>(&payload, HELLO_LIMIT) {
                Ok((named, why)) if flags & FLAG_DECLINED != 0 => {
                    lost(Some(named), LossKind::Declined, why)
                }
                Ok((named, why)) => lost(Some(named), LossKind::Failed, why),
                Err(e) => lost(None, LossKind::Failed, e.to_string()),
            },
            Ok(frame) => {
                let why = format!("it sent an unexpected frame ({:?})", frame.kind);
                lost(Some(host.clone()), LossKind::Failed, why)
            }
            Err(e) => lost(Some(host.clone()), LossKind::Silent, e.to_string()),
        };
        if events.send(event).is_err() || over {
            return;
        }
    }
}
