//! One accepted connection: the greeting, then frames until it ends.

use std::net::TcpStream;
use std::sync::Arc;

use checkpoint::{Epoch, codec};

use super::slot::Slot;
use super::{Shared, lock};
use crate::link::{HELLO_LIMIT, Hello, Link, Role};
use crate::wire::{self, Frame, Kind, WireError};

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
    let mut payload = Vec::new();
    loop {
        let frame = wire::read(&mut stream, &mut payload)?;
        if frame.kind != Kind::Hello {
            return Err(WireError::Kind(frame.kind as u16));
        }
        let Ok(hello) = codec::from_bytes::<Hello>(&payload, HELLO_LIMIT) else {
            return Err(WireError::Checksum("the greeting's"));
        };
        let answer = |kind: Kind, generation| Frame {
            kind,
            vm: frame.vm,
            generation,
            epoch: Epoch::ZERO,
            flags: 0,
        };
        let slot = lock(&shared.slots).get(&frame.vm).cloned();
        let Some(slot) = slot else {
            match lock(&shared.gone).get(&frame.vm) {
                Some(newer) if *newer > frame.generation => {
                    link.send(&answer(Kind::Refused, *newer), &[])?
                }
                _ => link.send(
                    &answer(Kind::NotReady, frame.generation),
                    format!(
                        "{} holds no replica of VM {} yet",
                        shared.options.host, frame.vm
                    )
                    .as_bytes(),
                )?,
            }
            continue;
        };
        match slot.greet(&frame, &hello, &link) {
            Greeting::Welcome => link.send(&answer(Kind::HelloOk, frame.generation), &[])?,
            Greeting::Later(why) => {
                link.send(&answer(Kind::NotReady, frame.generation), why.as_bytes())?;
                continue;
            }
            Greeting::Refused(newer) => {
                link.send(&answer(Kind::Refused, newer), &[])?;
                continue;
            }
        }
        let result = frames(shared, &slot, stream, &link, &mut payload);
        slot.disconnected(&link, hello.role == Role::Update);
        return result;
    }
}

/// Answer to a greeting.
pub(super) enum Greeting {
    Welcome,
    Later(String),
    Refused(checkpoint::Generation),
}

fn frames(
    shared: &Shared,
    slot: &Slot,
    mut stream: &TcpStream,
    link: &Arc<Link>,
    payload: &mut Vec<u8>,
) -> Result<(), WireError> {
    loop {
        let frame = wire::read(&mut stream, payload)?;
        slot.frame(shared, &frame, payload, link)?;
    }
}
