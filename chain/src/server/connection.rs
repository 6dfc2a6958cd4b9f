//! One accepted connection: the greeting, then frames until it ends.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use checkpoint::{Epoch, codec};

use super::slot::Slot;
use super::{Shared, lock};
use crate::link::{HELLO_LIMIT, Hello, Link, Role};
use crate::wire::{self, Frame, Kind, Payload, WireError};

/// A peer that does not greet keeps a thread for this long.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// Serves one connection to its end. A malformed or hostile peer is logged and cut off; nothing of what it sent before
/// a complete checkpoint has any effect.
pub(super) fn serve(shared: &Shared, stream: &TcpStream) {
    let peer = stream
        .peer_addr()
        .map_or_else(|_| "a peer".to_string(), |a| a.to_string());
    match run(shared, stream) {
        Ok(()) | Err(WireError::Closed) => {}
        Err(e) => tracing::warn!("connection from {peer}: {e}"),
    }
}

fn run(shared: &Shared, mut stream: &TcpStream) -> Result<(), WireError> {
    let link = Arc::new(Link::new(stream)?);
    let mut payload = Payload::default();
    stream.set_read_timeout(Some(GREETING_PATIENCE))?;
    let (slot, role) = loop {
        let frame = wire::read(&mut stream, &mut payload)?;
        if frame.kind != Kind::Hello {
            return Err(WireError::OutOfPlace(frame.kind, "a greeting comes first"));
        }
        let hello: Hello = codec::from_bytes(&payload, HELLO_LIMIT)
            .map_err(|_| WireError::Payload(Kind::Hello))?;
        let slot = lock(&shared.slots).get(&frame.vm).cloned();
        match slot {
            Some(slot) if slot.greet(shared, &frame, &hello, &link)? => break (slot, hello.role),
            Some(_) => {}
            None => absent(shared, &frame, &link)?,
        }
    };
    stream.set_read_timeout(None)?;
    let result = frames(shared, &slot, role, stream, &link);
    slot.disconnected(&link);
    result
}

/// No replica of that VM is here, any more or yet.
fn absent(shared: &Shared, frame: &Frame, link: &Link) -> Result<(), WireError> {
    let answer = |kind, generation| Frame {
        kind,
        vm: frame.vm,
        generation,
        epoch: Epoch::ZERO,
        flags: 0,
    };
    let gone = lock(&shared.gone).get(&frame.vm).copied();
    if let Some(newer) = gone.filter(|newer| *newer > frame.generation) {
        return Ok(link.send(&answer(Kind::Refused, newer), &[])?);
    }
    let host = shared.options.host.clone();
    let why = match lock(&shared.declined).get(&frame.vm) {
        Some(why) => format!("cannot stand by: {why}"),
        None => format!("holds no replica of VM {} yet", frame.vm),
    };
    let trouble = (host, why);
    let payload = codec::to_bytes(&trouble, HELLO_LIMIT).unwrap_or_default();
    Ok(link.send(&answer(Kind::NotReady, frame.generation), &payload)?)
}

fn frames(
    shared: &Shared,
    slot: &Slot,
    role: Role,
    mut stream: &TcpStream,
    link: &Arc<Link>,
) -> Result<(), WireError> {
    loop {
        let mut payload = slot.buffers.take();
        let frame = wire::read(&mut stream, &mut payload)?;
        match role {
            Role::Update => slot.frame(shared, &frame, payload, link)?,
            Role::Query => slot.query(&frame, &payload, link)?,
            Role::Look if frame.kind == Kind::Yield => slot.yielded(shared, &frame)?,
            Role::Acks | Role::Look => {
                return Err(WireError::OutOfPlace(
                    frame.kind,
                    "this connection is for acks, or for the answer to its greeting, only",
                ));
            }
        }
    }
}
