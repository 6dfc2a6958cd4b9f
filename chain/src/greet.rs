//! How a connection begins: one side says who it is, whom it means to reach and what for, the other answers.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use checkpoint::{Epoch, Generation, HostId, VmId, codec};
use serde::{Deserialize, Serialize};

use crate::link::{HELLO_LIMIT, Link, Trouble};
use crate::mark::Mark;
use crate::view::{Member, View};
use crate::wire::{self, Frame, Kind, Payload, WireError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const GREETING_TIMEOUT: Duration = Duration::from_secs(1);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Checkpoints come this way, acks go back.
    Update,
    /// The owner's connection to the tail: acks only.
    Acks,
    /// Anybody's connection to the tail: queries and answers.
    Query,
    /// An owner that has lost its VM: is there a checkpoint that it could be resumed from? The greeting's answer says it,
    /// and a [`Kind::Yield`] may follow.
    Look,
    /// Anybody's: does the host answer, and how far is its replica? See [`crate::probe()`].
    Probe,
    /// Anybody's: files that VMs boot from, see [`crate::files`].
    File,
}

/// Payload of [`Kind::Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What for.
    pub role: Role,
    /// Who.
    pub from: HostId,
    /// Whom this is meant for: another host that is reached at this address refuses.
    pub to: HostId,
}

/// The frame and payload that greet.
pub(crate) fn hello(
    vm: VmId,
    generation: Generation,
    hello: &Hello,
) -> io::Result<(Frame, Vec<u8>)> {
    let frame = Frame {
        kind: Kind::Hello,
        vm,
        generation,
        epoch: Epoch::ZERO,
        flags: 0,
    };
    let payload = codec::to_bytes(hello, HELLO_LIMIT).map_err(io::Error::other)?;
    Ok((frame, payload))
}

/// A peer that took the connection.
pub(crate) struct Greeted {
    pub(crate) link: Link,
    pub(crate) stream: TcpStream,
    /// The checkpoint that it holds and can go on from.
    pub(crate) holds: Option<Mark>,
}

/// Connects and greets; succeeds only if the peer is `member`'s host and ready in this generation.
pub(crate) fn greet(
    member: &Member,
    view: &View,
    role: Role,
    from: &HostId,
) -> Result<Greeted, GreetError> {
    let (link, stream) = Link::connect(member.addr, CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(GREETING_TIMEOUT))?;
    let greeting = Hello {
        role,
        from: from.clone(),
        to: member.host.clone(),
    };
    let (frame, payload) = hello(view.vm, view.generation, &greeting)?;
    link.send(&frame, &payload)?;
    let mut answer = Payload::default();
    let frame = wire::read(&mut &stream, &mut answer)?;
    stream.set_read_timeout(None)?;
    if role == Role::Update {
        link.be_patient()?;
    }
    let trouble = |kind| -> Result<Trouble, WireError> {
        codec::from_bytes(&answer, HELLO_LIMIT).map_err(|_| WireError::Payload(kind))
    };
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
            let (host, why) = trouble(Kind::NotReady)?;
            Err(GreetError::NotReady { host, why })
        }
        Kind::Declined => {
            let (host, why) = trouble(Kind::Declined)?;
            Err(GreetError::Declined { host, why })
        }
        Kind::Stranger => Err(GreetError::Stranger(Stranger {
            wanted: member.host.clone(),
            addr: member.addr,
            found: stranger(&answer)?,
        })),
        kind => Err(WireError::OutOfPlace(kind, "it does not answer a greeting").into()),
    }
}

/// Who says that it is not the one meant.
pub(crate) fn stranger(payload: &[u8]) -> Result<HostId, WireError> {
    codec::from_bytes(payload, HELLO_LIMIT).map_err(|_| WireError::Payload(Kind::Stranger))
}

/// Another host than the one meant answers at an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} at {addr} answers as host {found}: [peers] in host.toml names the wrong address")]
pub struct Stranger {
    /// Who was meant.
    pub wanted: HostId,
    /// Where.
    pub addr: SocketAddr,
    /// Who is there.
    pub found: HostId,
}

/// Why a peer does not take a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GreetError {
    #[error("cannot connect: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It may be, soon: try again.
    #[error("{host} is not ready: {why}")]
    NotReady { host: HostId, why: String },
    /// It will not be, in this generation: the chain has to do without that host.
    #[error("{host} declines: {why}")]
    Declined { host: HostId, why: String },
    /// Whoever is there is another host.
    #[error(transparent)]
    Stranger(Stranger),
    #[error("follows the newer generation {0}")]
    Refused(Generation),
}

impl GreetError {
    /// Whether asking again is of no use in this generation: the host declines, or is another one.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Declined { .. } | Self::Stranger(_))
    }

    /// Whose fault it is: the peer's, unless it says that another one further down is to blame.
    pub(crate) fn blame(self, peer: &HostId) -> Trouble {
        match self {
            Self::NotReady { host, why } | Self::Declined { host, why } => (host, why),
            other => (peer.clone(), other.to_string()),
        }
    }
}
