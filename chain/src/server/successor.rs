//! The connection to the next replica: made patiently in the background, then read for acks.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use checkpoint::{Epoch, Generation, HostId, codec};

use super::slot::Slot;
use super::state::other;
use super::{Shared, lock};
use crate::link::{HELLO_LIMIT, Hello, Link, Role, Trouble};
use crate::mark::Mark;
use crate::replica::Event;
use crate::view::View;
use crate::wire::{self, Frame, Kind, Payload, WireError};

/// Between attempts to reach a successor that is not ready: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(320));
/// A replica that is to join has this long to get ready, then the owner is told that it does not.
const JOINER_PATIENCE: Duration = Duration::from_secs(15);
/// A successor has this long to answer again when the connection to it was ended to ask it for what was missed.
const SUCCESSOR_PATIENCE: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const GREETING_TIMEOUT: Duration = Duration::from_secs(1);

/// Connects to the next replica, if there is one, for as long as this configuration is followed: it may still be creating
/// its image, and however late it comes, it must not be left out for good. A connection that breaks is made again.
pub(super) fn connect(slot: &Arc<Slot>, shared: &Arc<Shared>) {
    let (view, next) = {
        let state = lock(&slot.state);
        let next = match state.replica.successor() {
            Some(position) => state.view.chain.get(position),
            None if state.replica.is_tail() => state.view.joining.as_ref(),
            None => None,
        };
        (state.view.clone(), next.cloned())
    };
    let Some(member) = next else {
        return;
    };
    let (slot, shared) = (slot.clone(), shared.clone());
    let spawned = super::spawn("chain-down", move || {
        let mut pause = RETRY.0;
        let mut waited = Duration::ZERO;
        while follows(&slot, view.generation) {
            match greet(member.addr, &view, Role::Update, &shared.options.host) {
                Ok(peer) => {
                    // One that holds nothing fitting is there, but it is of no use to ask it all the time.
                    if listen(&slot, &shared, &view, peer) {
                        pause = RETRY.0;
                    }
                    waited = Duration::ZERO;
                }
                Err(e) => {
                    tracing::debug!("next replica {}: {e}", member.host);
                    let mut state = lock(&slot.state);
                    let trouble = e.blame(&member.host);
                    // A successor is missed by those who wait for the chain. But for a joining replica nobody waits, nor for
                    // one that was there when the predecessor connected.
                    let patience = match state.replica.is_tail() {
                        true => JOINER_PATIENCE,
                        false => SUCCESSOR_PATIENCE,
                    };
                    if waited >= patience {
                        waited = Duration::ZERO;
                        state.tell_trouble(&trouble);
                    }
                    state.down_trouble = Some(trouble);
                }
            }
            waited += pause;
            std::thread::sleep(pause);
            pause = RETRY.1.min(pause * 2);
        }
    });
    if let Err(e) = spawned {
        tracing::error!("{e}");
    }
}

fn follows(slot: &Slot, generation: Generation) -> bool {
    let state = lock(&slot.state);
    state.replica.generation() == generation && state.store.is_some()
}

/// Reads the next replica's acks until the connection ends; false if it was of no use from the beginning.
fn listen(slot: &Arc<Slot>, shared: &Arc<Shared>, view: &View, peer: Greeted) -> bool {
    let link = Arc::new(peer.link);
    {
        let mut state = lock(&slot.state);
        if state.replica.generation() != view.generation || state.store.is_none() {
            link.close();
            return false;
        }
        state.down = Some(link.clone());
        state.down_trouble = None;
        let frame = state.own_frame(Kind::Heartbeat, Epoch::ZERO);
        *lock(&slot.beat) = Some((link.clone(), frame));
        let up = Event::NextUp {
            generation: view.generation,
            holds: peer.holds,
        };
        if let Err(e) = state.run(shared, up, None) {
            state.lost_next(&e.to_string());
        }
        if !state.is_down(&link) {
            return false;
        }
    }
    super::joiner::begin_if_wanted(slot, shared, &link);
    let mut payload = Payload::default();
    let why = loop {
        let frame = match wire::read(&mut &peer.stream, &mut payload) {
            Ok(frame) => frame,
            Err(e) => break e.to_string(),
        };
        let mut state = lock(&slot.state);
        if !state.is_down(&link) {
            return true;
        }
        match frame.kind {
            Kind::Ack => {
                let ack = Event::NextAck {
                    generation: frame.generation,
                    epoch: frame.epoch,
                };
                if let Err(e) = state.run(shared, ack, None) {
                    break e.to_string();
                }
            }
            Kind::Digests => {
                if let Err(e) = state.digests(&payload) {
                    break e.to_string();
                }
            }
            Kind::Broken | Kind::JoinerReady => state.tell_up(frame.kind, frame.epoch, &payload),
            Kind::Refused => {
                let newer = Frame {
                    generation: frame.generation,
                    ..state.own_frame(Kind::Refused, Epoch::ZERO)
                };
                if let Some(up) = &state.up {
                    let _ = up.send(&newer, &[]);
                }
            }
            _ => break format!("it sent an unexpected frame ({:?})", frame.kind),
        }
    };
    let mut state = lock(&slot.state);
    if state.is_down(&link) {
        state.lost_next(&why);
    }
    true
}

/// A peer that took the connection.
pub(crate) struct Greeted {
    pub(crate) link: Link,
    pub(crate) stream: TcpStream,
    /// The checkpoint that it holds and can go on from.
    pub(crate) holds: Option<Mark>,
}

/// Connects and greets; succeeds only if the peer is ready in this generation.
pub(crate) fn greet(
    addr: SocketAddr,
    view: &View,
    role: Role,
    from: &HostId,
) -> Result<Greeted, GreetError> {
    let (link, stream) = Link::connect(addr, CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(GREETING_TIMEOUT))?;
    let hello = Hello {
        role,
        from: from.clone(),
    };
    let frame = Frame {
        kind: Kind::Hello,
        vm: view.vm,
        generation: view.generation,
        epoch: Epoch::ZERO,
        flags: 0,
    };
    let payload = codec::to_bytes(&hello, HELLO_LIMIT).map_err(other)?;
    link.send(&frame, &payload)?;
    let mut answer = Payload::default();
    let frame = wire::read(&mut &stream, &mut answer)?;
    stream.set_read_timeout(None)?;
    match frame.kind {
        Kind::HelloOk if answer.is_empty() => Ok(Greeted {
            link,
            stream,
            holds: None,
        }),
        Kind::HelloOk => Ok(Greeted {
            holds: Some(Mark::from_bytes(&answer).ok_or(WireError::Payload(Kind::HelloOk))?),
            link,
            stream,
        }),
        Kind::Refused => Err(GreetError::Refused(frame.generation)),
        Kind::NotReady => {
            let (host, why): Trouble = codec::from_bytes(&answer, HELLO_LIMIT)
                .map_err(|_| WireError::Payload(Kind::NotReady))?;
            Err(GreetError::NotReady { host, why })
        }
        kind => Err(WireError::OutOfPlace(kind, "it does not answer a greeting").into()),
    }
}

/// Why a peer does not take a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GreetError {
    #[error("cannot connect: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{host} is not ready: {why}")]
    NotReady { host: HostId, why: String },
    #[error("follows the newer generation {0}")]
    Refused(Generation),
}

impl GreetError {
    /// Whose fault it is: the peer's, unless it says that another one further down is to blame.
    pub(crate) fn blame(self, peer: &HostId) -> Trouble {
        match self {
            Self::NotReady { host, why } => (host, why),
            other => (peer.clone(), other.to_string()),
        }
    }
}
