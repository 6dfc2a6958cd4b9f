//! What a replica is told and what it answers.

use checkpoint::{Epoch, Generation};

use crate::mark::Mark;

/// What a checkpoint is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Base {
    /// It replaces the whole image: the first of a history.
    Nothing,
    /// It replaces the whole image of a joining replica; its end says which checkpoint that then is.
    Install,
    /// The checkpoint before it.
    On {
        /// That one, exactly.
        base: Mark,
        /// The generation this checkpoint was first sent in.
        origin: Generation,
    },
}

/// What happens to a replica. Frames come from the connection greeted as the predecessor's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A checkpoint begins.
    Begin {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
        /// What it is applied to.
        base: Base,
        /// From its capture on, at the latest, the owner's output is held.
        held: bool,
    },
    /// Part of a checkpoint: pages, disk writes, machine state.
    Data {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
    },
    /// Which disk blocks need not be sent, because every replica holds them?
    Compare {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint, the first of a history.
        epoch: Epoch,
    },
    /// The checkpoint is complete, says the sender.
    End {
        /// The sender's generation.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
        /// The checkpoint that a joining replica holds with it.
        install: Option<Mark>,
    },
    /// The predecessor lives.
    Heartbeat {
        /// The sender's generation.
        generation: Generation,
    },
    /// The predecessor has sent everything that it held when it connected, which was up to `epoch`.
    Complete {
        /// The sender's generation.
        generation: Generation,
        /// Its newest checkpoint then.
        epoch: Epoch,
    },
    /// The owner has stopped the VM for good at `epoch` and wants the head to take it over.
    Yield {
        /// The sender's generation.
        generation: Generation,
        /// The VM's last checkpoint there.
        epoch: Epoch,
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
    /// A connection to the next replica stands: the successor's, or at the tail the joining replica's.
    NextUp {
        /// The generation it was made in.
        generation: Generation,
        /// What the next replica holds and may go on from.
        holds: Option<Mark>,
    },
    /// That connection has ended.
    NextDown,
    /// The joining replica has been sent everything up to [`Replica::hist`](super::Replica::hist), between two
    /// checkpoints: from here on it is sent what is forwarded.
    JoinerFed {
        /// The generation it was sent in.
        generation: Generation,
    },
    /// The next replica says: its tail has everything up to `epoch`; or, joining, that it has.
    NextAck {
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
    /// The takeover that the replica froze for was not granted, and the configuration has not changed.
    Unfreeze,
    /// One heartbeat's time has passed.
    Tick {
        /// Milliseconds, on the same clock.
        now_ms: u64,
    },
}

/// What the driver has to do. "The frame in hand" is the one the event was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the frame in hand to the next replica.
    Forward,
    /// Compare the disk blocks that the frame in hand names with the store's, and pass it on with what differs marked; the
    /// tail answers the owner instead.
    Compare,
    /// Keep the frame in hand, at the end of what is kept, to send it again should the next replica change. The beginning
    /// of a checkpoint replaces one that was kept without its end.
    Keep,
    /// Send the next replica what is kept after this checkpoint, the unfinished one included.
    Resend {
        /// What it holds.
        after: Mark,
    },
    /// Drop what is kept up to this checkpoint.
    Trim(Epoch),
    /// Drop all that is kept.
    TrimAll,
    /// Tell the successor that it has now been sent everything up to this checkpoint.
    SayComplete(Epoch),
    /// The successor cannot go on from what it holds: tell the predecessor, end the connection.
    Unfit(String),
    /// End the connection to the next replica, if there is one, and make it again: what it said meanwhile was not heeded,
    /// and a new connection begins with it.
    AskNext,
    /// End the connection to the predecessor: what it sent meanwhile was not taken. It connects again, is told what this
    /// replica holds, and sends what is missing.
    AskPrevious,
    /// Fill the joining replica, then say [`Event::JoinerFed`].
    Feed,
    /// Tell the owner that the joining replica has everything and can become the tail.
    JoinerReady,
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
    Prepare {
        /// The checkpoint.
        epoch: Epoch,
    },
    /// Store: put the prepared checkpoint into the image. Cannot fail.
    Commit(Mark),
    /// Tell the predecessor that the tail has everything up to this epoch.
    AckUp(Epoch),
    /// Tell the owner (this is the tail).
    AckOwner(Epoch),
    /// Tell the sender of the frame in hand that its generation is over.
    Refuse(Generation),
    /// The VM should be taken over: the predecessor has been silent for this many milliseconds, or (0) yields.
    Suspect(u64),
    /// This replica has declared itself failed (invariant I7): tell predecessor and agent.
    Failed(String),
    /// It is failed still: tell the predecessor again, it may have had nobody to tell the owner through.
    StillFailed(String),
}

/// Where a replica stands. None of these is final: a newer generation leads out of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Not part of the chain.
    Offline,
    /// Being filled by the tail, or just made a member and not sure to have everything acknowledged so far.
    Joining,
    /// A member that holds no checkpoint of this history yet, or none before which the owner began to hold its output.
    Syncing,
    /// Could resume the VM.
    Serving,
    /// As serving, and nobody else in the chain could.
    LastSurvivor,
    /// Stopped for a takeover.
    Frozen,
    /// Declared itself failed.
    Failed,
}

impl State {
    /// Whether the VM could be resumed from here.
    #[must_use]
    pub fn could_resume(self) -> bool {
        matches!(self, Self::Serving | Self::LastSurvivor)
    }
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
    /// The chain has just begun: the owner lets output out that this checkpoint does not know of.
    #[error("this replica holds checkpoint {0}, but the VM's output was not held yet then")]
    Flowing(Mark),
    /// Not a member, or not for long enough.
    #[error(
        "this replica holds checkpoint {0}, but it is still joining: newer ones may have been acknowledged without it"
    )]
    Joining(Mark),
}
