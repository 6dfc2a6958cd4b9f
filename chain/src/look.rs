//! After the loss of a VM's process: whether a replica holds a checkpoint from which the VM can be resumed. If one does, it
//! takes the VM over by itself; only if none does is the VM to be booted from a disk.

use checkpoint::{Generation, HostId};

use crate::greet::{GreetError, Role, greet};
use crate::mark::Mark;
use crate::view::{Member, View};
use crate::wire::{Frame, Kind};

/// What a replica holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// A complete checkpoint: the VM can be resumed from it.
    Checkpoint(Mark),
    /// Nothing that it can be resumed from: its memory went with its host, or it never had everything.
    Nothing,
    /// It does not answer, or does not know yet. Why, in words.
    Unknown(String),
}

/// Asks `member` of `view`'s chain, for the owner `from`.
#[must_use]
pub fn look(member: &Member, view: &View, from: &HostId) -> Held {
    match greet(member, view, Role::Look, from) {
        Ok(peer) => peer.holds.map_or(Held::Nothing, Held::Checkpoint),
        Err(e @ (GreetError::Io(_) | GreetError::Wire(_) | GreetError::Refused(_))) => {
            Held::Unknown(format!("{} {e}", member.host))
        }
        // Nor does one that declines say that its disk holds nothing.
        Err(
            e @ (GreetError::NotReady { .. }
            | GreetError::Declined { .. }
            | GreetError::Stranger(_)),
        ) => Held::Unknown(e.to_string()),
    }
}

/// If the head of the chain holds a checkpoint, tells it that its owner `from` does not run the VM any more.
///
/// # Errors
/// In words: that it does not answer.
pub fn yield_to(head: &Member, view: &View, from: &HostId) -> Result<(), String> {
    let failed = |e: &dyn std::fmt::Display| format!("backup {} does not answer: {e}", head.host);
    let peer = greet(head, view, Role::Look, from).map_err(|e| failed(&e))?;
    let Some(mark) = peer.holds else {
        return Ok(());
    };
    let frame = Frame {
        kind: Kind::Yield,
        vm: view.vm,
        generation: view.generation,
        epoch: mark.epoch,
        flags: 0,
    };
    peer.link.send(&frame, &[]).map_err(|e| failed(&e))
}

/// Whether `member` follows a newer generation of the VM than `view`, as far as it says.
#[must_use]
pub fn newer_generation(member: &Member, view: &View, from: &HostId) -> Option<Generation> {
    match greet(member, view, Role::Look, from) {
        Err(GreetError::Refused(newer)) => Some(newer),
        _ => None,
    }
}
