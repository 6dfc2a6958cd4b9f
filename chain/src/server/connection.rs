//! One accepted connection: the greeting, then frames until it ends.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use checkpoint::{Epoch, codec};

use super::env::Env;
use super::registry::Registry;
use super::slot::Slot;
use crate::files;
use crate::greet::{Hello, Role};
use crate::link::{HELLO_LIMIT, Link};
use crate::urgent::ordinary_thread;
use crate::wire::{self, Frame, Kind, Payload, WireError};

/// A peer that does not greet keeps a thread for this long.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// Nor one that fetches files and asks for nothing more.
const FILE_PATIENCE: Duration = Duration::from_secs(30);

/// Serves one connection to its end. A malformed or hostile peer is logged and cut off; nothing of what it sent before
/// a complete checkpoint has any effect.
pub(super) fn serve(registry: &Registry, stream: &TcpStream) {
    let peer = stream
        .peer_addr()
        .map_or_else(|_| "a peer".to_string(), |a| a.to_string());
    match run(registry, stream) {
        Ok(()) | Err(WireError::Closed) => {}
        Err(e) => tracing::warn!("connection from {peer}: {e}"),
    }
}

fn run(registry: &Registry, mut stream: &TcpStream) -> Result<(), WireError> {
    let link = Arc::new(Link::new(stream)?);
    let mut payload = Payload::default();
    stream.set_read_timeout(Some(GREETING_PATIENCE))?;
    let mut answered = false;
    let (slot, role) = loop {
        let frame = wire::read(&mut stream, &mut payload)?;
        if frame.kind != Kind::Hello {
            return Err(WireError::OutOfPlace(frame.kind, "a greeting comes first"));
        }
        let hello: Hello = codec::from_bytes(&payload, HELLO_LIMIT)
            .map_err(|_| WireError::Payload(Kind::Hello))?;
        // One question is answered urgently, and nothing else is done so.
        if hello.role != Role::Probe || std::mem::replace(&mut answered, true) {
            ordinary_thread();
        }
        if hello.role == Role::File && hello.to == registry.env.options.host {
            stream.set_read_timeout(Some(FILE_PATIENCE))?;
            link.send(&answer(&frame, Kind::HelloOk), &[])?;
            let options = &registry.env.options;
            return files::serve(options.files.as_deref(), &options.host, stream, &link);
        }
        if let Some(slot) = greeted(registry, &frame, &hello, &link)? {
            break (slot, hello.role);
        }
    };
    stream.set_read_timeout(None)?;
    let result = frames(&registry.env, &slot, role, stream, &link);
    slot.disconnected(&link);
    result
}

/// Answers a greeting; the replica, if the connection stands.
fn greeted(
    registry: &Registry,
    frame: &Frame,
    hello: &Hello,
    link: &Arc<Link>,
) -> Result<Option<Arc<Slot>>, WireError> {
    let me = &registry.env.options.host;
    if hello.to != *me {
        let payload = codec::to_bytes(me, HELLO_LIMIT).unwrap_or_default();
        link.send(&answer(frame, Kind::Stranger), &payload)?;
        return Ok(None);
    }
    if hello.role == Role::Probe {
        let alive = registry.alive(frame.vm).to_bytes();
        link.send(&answer(frame, Kind::Alive), &alive)?;
        return Ok(None);
    }
    match registry.find(frame.vm) {
        Some(slot) => Ok(slot
            .greet(&registry.env, frame, hello, link)?
            .then_some(slot)),
        None => absent(registry, frame, link).map(|()| None),
    }
}

fn answer(to: &Frame, kind: Kind) -> Frame {
    Frame {
        kind,
        vm: to.vm,
        generation: to.generation,
        epoch: Epoch::ZERO,
        flags: 0,
    }
}

/// No replica of that VM is here, any more or yet.
fn absent(registry: &Registry, frame: &Frame, link: &Link) -> Result<(), WireError> {
    let gone = registry.gone(frame.vm);
    if let Some(newer) = gone.filter(|newer| *newer > frame.generation) {
        let refusal = Frame {
            generation: newer,
            ..answer(frame, Kind::Refused)
        };
        return Ok(link.send(&refusal, &[])?);
    }
    let host = registry.env.options.host.clone();
    let declined = registry.declined(frame.vm);
    // What keeps it from one generation's replica need not keep it from a later one's.
    let (kind, why) = match declined.filter(|(then, _)| frame.generation <= *then) {
        Some((_, why)) => (Kind::Declined, format!("cannot stand by: {why}")),
        None => (
            Kind::NotReady,
            format!("holds no replica of VM {} yet", frame.vm),
        ),
    };
    let payload = codec::to_bytes(&(host, why), HELLO_LIMIT).unwrap_or_default();
    Ok(link.send(&answer(frame, kind), &payload)?)
}

fn frames(
    env: &Env,
    slot: &Slot,
    role: Role,
    mut stream: &TcpStream,
    link: &Arc<Link>,
) -> Result<(), WireError> {
    loop {
        let mut payload = slot.buffers.take();
        let frame = wire::read(&mut stream, &mut payload)?;
        match role {
            Role::Update => slot.frame(env, &frame, payload, link)?,
            Role::Query => slot.query(&frame, &payload, link)?,
            Role::Look if frame.kind == Kind::Yield => slot.yielded(env, &frame)?,
            Role::Acks | Role::Look | Role::Probe | Role::File => {
                return Err(WireError::OutOfPlace(
                    frame.kind,
                    "this connection is for acks, or for the answer to its greeting, only",
                ));
            }
        }
    }
}
