//! Is a host alive, and does its replica get on? Asked over a connection of its own, answered from what the replica has
//! noted of itself, without its lock and without a disk: a replica whose disk hangs still says that it does.
//!
//! A host is alive if it *answers*. That it takes a connection says nothing: the kernel does that for a stopped process.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation, HostId, VmId, codec};
use serde::{Deserialize, Serialize};

use crate::greet::{Hello, Role, Stranger, hello, stranger};
use crate::urgent::urgent_section_with_threads;
use crate::view::Member;
use crate::wire::{self, Kind, Payload, WireError};

/// Longest encoded [`Alive`], in bytes.
pub(crate) const ALIVE_LIMIT: usize = 16 << 10;
/// A host that has not answered after this is asked once more, besides.
const AGAIN: Duration = Duration::from_millis(100);
/// ... so many times in all, at most.
const QUESTIONS_MAX: u32 = 8;
const MOMENT: Duration = Duration::from_millis(20);
/// Longest text in it, in bytes: what fails may say much.
const TEXT_MAX: usize = 4 << 10;

/// A host's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// Who answers.
    pub host: HostId,
    /// What it knows of the VM; `None` if it has no replica and has not declined to have one.
    pub replica: Option<Progress>,
}

/// How far a replica is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The generation it follows.
    pub generation: Generation,
    /// Its newest processed checkpoint.
    pub hist: Option<Epoch>,
    /// How long the frame in hand has been handled, in milliseconds; 0: none is. A disk that hangs shows here.
    pub busy_ms: u64,
    /// Why the replica has failed, if it has.
    pub failed: Option<String>,
    /// Why the host has none, if it has declined.
    pub declined: Option<String>,
}

impl Alive {
    /// For the wire.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut said = self.clone();
        if let Some(progress) = &mut said.replica {
            for text in [&mut progress.failed, &mut progress.declined] {
                *text = text.take().map(|text| shortened(&text));
            }
        }
        codec::to_bytes(&said, ALIVE_LIMIT).unwrap_or_default()
    }
}

fn shortened(text: &str) -> String {
    let end = (0..=text.len().min(TEXT_MAX))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    text[..end.unwrap_or(0)].into()
}

/// Why a host does not count as alive.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nobody listens, or the network does not get there.
    #[error("{host} at {addr} does not connect: {source}")]
    Connect {
        /// The host meant.
        host: HostId,
        /// Where.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The connection stands, but no answer came in time: the process may be stopped.
    #[error("{host} at {addr} accepts connections but does not answer: {source}")]
    Silent {
        /// The host meant.
        host: HostId,
        /// Where.
        addr: SocketAddr,
        /// What came instead.
        source: WireError,
    },
    /// Another host answers there.
    #[error(transparent)]
    Stranger(Stranger),
}

impl ProbeError {
    /// Nothing has come at all, yet.
    fn is_late(&self) -> bool {
        let late = |e: &io::Error| {
            matches!(
                e.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
            )
        };
        match self {
            Self::Connect { source, .. } => late(source),
            Self::Silent {
                source: WireError::Io(source),
                ..
            } => late(source),
            _ => false,
        }
    }
}

/// Asks `member`'s host how its replica of `vm` gets on, for the host `from`, which follows `generation`; has the answer
/// within `patience` in all.
///
/// Asked again every 100 ms over another connection, as long as there is no answer: one lost packet can hold up a connection
/// for longer than anybody's patience, and is no sign of death.
///
/// # Errors
/// [`ProbeError`], which says how far the last one got that ended.
pub fn probe(
    member: &Member,
    vm: VmId,
    generation: Generation,
    from: &HostId,
    patience: Duration,
) -> Result<Alive, ProbeError> {
    // Whoever is late with reading would take an answer for none.
    let _urgent = urgent_section_with_threads();
    let until = Instant::now() + patience;
    let (sender, answers) = channel();
    let (mut asked, mut open) = (0, 0);
    let mut last = silent(member, io::ErrorKind::TimedOut.into());
    loop {
        let now = Instant::now();
        if now < until && asked < QUESTIONS_MAX {
            let (to, from, sender) = (member.clone(), from.clone(), sender.clone());
            let ask = move || {
                let _ = sender.send(probe_once(&to, vm, generation, &from, until));
            };
            match std::thread::Builder::new().name("probe".into()).spawn(ask) {
                Ok(_) => (asked, open) = (asked + 1, open + 1),
                Err(e) => last = silent(member, e),
            }
        }
        // Each question ends by itself when the time is over; it may take a moment to say so.
        let left = until.saturating_duration_since(now);
        match answers.recv_timeout(left.min(AGAIN).max(MOMENT)) {
            Ok(Err(e)) if e.is_late() && open > 1 => (open, last) = (open - 1, e),
            Ok(answer) => return answer,
            Err(_) if now < until => {}
            Err(_) => return Err(last),
        }
    }
}

fn silent(member: &Member, source: io::Error) -> ProbeError {
    ProbeError::Silent {
        host: member.host.clone(),
        addr: member.addr,
        source: source.into(),
    }
}

fn probe_once(
    member: &Member,
    vm: VmId,
    generation: Generation,
    from: &HostId,
    until: Instant,
) -> Result<Alive, ProbeError> {
    let connected = left(until).and_then(|left| TcpStream::connect_timeout(&member.addr, left));
    let stream = connected.map_err(|source| ProbeError::Connect {
        host: member.host.clone(),
        addr: member.addr,
        source,
    })?;
    let silent = |source| ProbeError::Silent {
        host: member.host.clone(),
        addr: member.addr,
        source,
    };
    let (kind, answer) = ask(&stream, member, (vm, generation), from, until).map_err(silent)?;
    let malformed = || silent(WireError::Payload(kind));
    match kind {
        Kind::Alive => {
            let alive: Alive = codec::from_bytes(&answer, ALIVE_LIMIT).map_err(|_| malformed())?;
            if alive.host == member.host {
                return Ok(alive);
            }
            Err(other(member, alive.host))
        }
        Kind::Stranger => Err(other(member, stranger(&answer).map_err(silent)?)),
        kind => Err(silent(WireError::OutOfPlace(
            kind,
            "it does not answer a probe",
        ))),
    }
}

fn other(member: &Member, found: HostId) -> ProbeError {
    ProbeError::Stranger(Stranger {
        wanted: member.host.clone(),
        addr: member.addr,
        found,
    })
}

fn ask(
    stream: &TcpStream,
    member: &Member,
    (vm, generation): (VmId, Generation),
    from: &HostId,
    until: Instant,
) -> Result<(Kind, Payload), WireError> {
    let greeting = Hello {
        role: Role::Probe,
        from: from.clone(),
        to: member.host.clone(),
    };
    let (frame, payload) = hello(vm, generation, &greeting)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(left(until)?))?;
    wire::write(&mut &*stream, &frame, &payload)?;
    let mut answer = Payload::default();
    let frame = wire::read(&mut Until { stream, until }, &mut answer)?;
    Ok((frame.kind, answer))
}

/// What is left of the patience.
fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(io::ErrorKind::TimedOut.into()),
        false => Ok(left),
    }
}

/// Reads until a moment, however slowly the bytes come.
pub(crate) struct Until<'a> {
    pub(crate) stream: &'a TcpStream,
    pub(crate) until: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.until)?))?;
        self.stream.read(buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_fits_its_limit_whatever_has_failed() {
        let long = "ü".repeat(1 << 20);
        let alive = Alive {
            host: HostId::new("a").unwrap(),
            replica: Some(Progress {
                failed: Some(long.clone()),
                declined: Some(long),
                ..Progress::default()
            }),
        };
        let bytes = alive.to_bytes();
        let back: Alive = codec::from_bytes(&bytes, ALIVE_LIMIT).unwrap();
        let failed = back.replica.unwrap().failed.unwrap();
        assert!(failed.len() <= TEXT_MAX && failed.starts_with("üü"));
    }
}
