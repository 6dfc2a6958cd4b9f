//! What a replica is told and what it answers.

use checkpoint::{Epoch, Generation};

use crate::mark::Mark;

/// What happens to a replica. Frames come from the connection greeted as the predecessor's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A checkpoint begins.
    Begin {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
        /// What it is applied to; `None`: it replaces the whole image.
        base: Option<Mark>,
    },
    /// Part of a checkpoint: pages, disk writes, machine state.
    Data {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
    },
    /// The checkpoint is complete, says the sender.
    End {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
    },
    /// The predecessor lives.
    Heartbeat {
        /// The sender's generation.
        generation: Generation,
    },
    /// Outcome of [`Action::Prepare`], fed back before anything else: whole, verified and durable.
    Prepared {
        /// Digest of the checkpoint.
        digest: u32,
    },
    /// Outcome of any action for the store that it could not carry out.
    StoreFailed {
        /// Why.
        why: String,
        /// Whether what the store held before is lost too; otherwise only the checkpoint under way is.
        damaged: bool,
    },
    /// The successor says that the tail has everything up to `epoch`.
    SuccessorAck {
        /// The sender's generation.
        generation: Generation,
        /// The newest checkpoint acknowledged.
        epoch: Epoch,
    },
    /// Something came from the predecessor.
    Heard {
        /// Milliseconds, on any clock that only grows.
        now_ms: u64,
    },
    /// One heartbeat's time has passed.
    Tick {
        /// Milliseconds, on the same clock.
        now_ms: u64,
    },
}

/// What the driver has to do. "The frame in hand" is the one the event was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the frame in hand to the successor.
    Forward,
    /// Store: a checkpoint begins.
    Open {
        /// The checkpoint.
        epoch: Epoch,
        /// It replaces the image, which is not valid until it has been committed.
        full: bool,
    },
    /// Store: take the frame in hand.
    Stage,
    /// Store: the frame in hand ends the checkpoint; verify that it is whole and make it durable to the degree
    /// configured. Answer with [`Event::Prepared`] or [`Event::StoreFailed`].
    Prepare,
    /// Store: put the prepared checkpoint into the image. Cannot fail.
    Commit(Mark),
    /// Tell the predecessor that the tail has everything up to this epoch.
    AckUp(Epoch),
    /// Tell the owner (this is the tail).
    AckOwner(Epoch),
    /// Tell the sender of the frame in hand that its generation is over.
    Refuse(Generation),
    /// The predecessor has been silent for this many milliseconds.
    Suspect(u64),
    /// This replica has declared itself failed (invariant I7): tell predecessor and agent.
    Failed(String),
}

/// Where a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Holds no checkpoint, or one of an earlier configuration that must not be resumed from.
    Syncing,
    /// Could resume the VM.
    Serving,
    /// Stopped for a takeover.
    Frozen,
    /// Declared itself failed.
    Failed,
}

/// Why a replica cannot be resumed from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FreezeError {
    /// What it held is lost.
    #[error("this host's replica has failed: {0}")]
    Failed(String),
    /// It is empty, or being filled.
    #[error("this replica holds no complete checkpoint")]
    Empty,
    /// The configuration has changed since.
    #[error(
        "this replica holds checkpoint {held}, but generation {now} has begun since and its owner may have let output out that this checkpoint does not know of"
    )]
    Outdated {
        /// What it holds.
        held: Mark,
        /// The generation followed.
        now: Generation,
    },
}
