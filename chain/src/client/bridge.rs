//! Brings a chain up to date that a new owner takes over with its VM.

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use checkpoint::{Epoch, HostId};

use super::{ClientError, reach};
use crate::greet::Role;
use crate::kept::Kept;
use crate::link::Link;
use crate::mark::Mark;
use crate::owner::{Joined, Sender};
use crate::view::View;
use crate::wire::{self, Kind, Payload};

/// A head that does not acknowledge what it lacked for this long is lost.
const BRIDGE_PATIENCE: Duration = Duration::from_secs(5);

/// Brings the chain of a VM that has been taken over up to what the new owner resumed from: its replicas may lack the
/// last checkpoints that the new owner had as a replica and nobody acknowledged. Before the owner's own client connects.
/// Returns once the head holds `mark`. A driver of the new owner's [`Sender`] for what is in this process; what comes after
/// is sent from the VM's.
///
/// # Errors
/// [`ClientError::Unfit`] if `kept` does not reach back to what the head holds; others may pass: try again.
pub fn bridge(from: &HostId, view: &View, mark: Mark, kept: &Kept) -> Result<(), ClientError> {
    let head = view.chain.first().ok_or(ClientError::NoChain)?;
    let lost = |e| ClientError::Send(head.host.clone(), e);
    let mut sender = Sender::taking_over(view.generation, mark, kept.sent());
    let mut sent = false;
    loop {
        let peer = reach(head, view, Role::Update, from)?;
        let after = match sender.connected(view, peer.holds) {
            Joined::GoesOn { after, .. } if after == mark => return Ok(()),
            Joined::GoesOn { after, .. } if !sent => after,
            _ => {
                return Err(ClientError::Unfit {
                    host: head.host.clone(),
                    holds: peer.holds,
                    newest: Some(mark),
                });
            }
        };
        peer.stream
            .set_write_timeout(Some(BRIDGE_PATIENCE))
            .map_err(lost)?;
        kept.resend(&peer.link, after, view.generation)
            .map_err(lost)?;
        sent = true;
        wait_for(&peer.stream, &peer.link, mark.epoch).map_err(lost)?;
        sender.lost();
    }
}

/// Waits until the chain has acknowledged `epoch` over this connection.
fn wait_for(mut stream: &TcpStream, link: &Link, epoch: Epoch) -> io::Result<()> {
    stream.set_read_timeout(Some(BRIDGE_PATIENCE))?;
    let mut payload = Payload::default();
    loop {
        match wire::read(&mut stream, &mut payload) {
            Ok(frame) if frame.kind == Kind::Ack && frame.epoch >= epoch => {
                link.close();
                return Ok(());
            }
            Ok(frame) if frame.kind == Kind::Ack => {}
            Ok(frame) => return Err(io::Error::other(format!("it answered {:?}", frame.kind))),
            Err(e) => return Err(io::Error::other(e.to_string())),
        }
    }
}
