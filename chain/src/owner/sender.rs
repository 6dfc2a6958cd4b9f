//! What an owner sends, as a plain state machine: which checkpoint is open, what the next one is applied to, and what has to
//! be sent again to a new head (the paper's clients resend their requests).
//!
//! No sockets, clocks or locks, and no content: names and order only. The frames are its driver's to keep
//! ([`crate::Kept`]). [`crate::ChainClient`] is one driver; the bridge of a new owner, whose `Pending` is at first what it
//! had kept as a replica, another; the simulation and the model checker drive it too. A replica does the same for its
//! successor (`replica/next.rs`): what both have passed on is [`Sent`].

use checkpoint::{Epoch, Generation};

use crate::mark::Mark;
use crate::replica::Base;
use crate::sent::Sent;
use crate::view::View;

/// The checkpoint being sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Open {
    epoch: Epoch,
    /// The generation in which it was begun, which stays part of its name.
    origin: Generation,
    full: bool,
    held: bool,
}

/// The state machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sender {
    /// The generation last connected in: new checkpoints are named after it.
    generation: Generation,
    /// A connection to the head stands.
    linked: bool,
    open: Option<Open>,
    /// The last whole checkpoint, which the next one is applied to.
    newest: Option<Mark>,
    /// Sent and not acknowledged. A full checkpoint is never among them: it ends with its connection.
    pending: Sent,
}

/// How a connection to a head begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// The chain begins anew, and so does the sender: the next checkpoint has to be a full one. Nothing that was kept is
    /// of any use.
    Anew,
    /// The head is sent what is kept after this, the unfinished checkpoint last.
    GoesOn {
        /// What it holds.
        after: Mark,
        /// Then it is told that this was everything up to here.
        complete: Option<Epoch>,
    },
    /// The head cannot be brought up to date. The connection is of no use.
    Unfit {
        /// The newest checkpoint.
        newest: Option<Mark>,
    },
}

/// What is done with a frame of the open checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// It is sent to the head.
    pub forward: bool,
    /// It is kept, to be sent again. One that is neither sent nor kept is lost, and its checkpoint with it.
    pub keep: bool,
}

/// A checkpoint that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its name.
    pub mark: Mark,
    /// What was kept of it is complete.
    pub kept: bool,
}

/// An incremental checkpoint that is not the next after what the chain was sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("checkpoint {epoch} cannot follow {newest:?}, which is what the chain was sent last")]
pub struct BeginError {
    /// The checkpoint.
    pub epoch: Epoch,
    /// What the chain was sent last, if anything.
    pub newest: Option<Mark>,
}

impl Sender {
    /// Of an owner in `generation`. `base` is the checkpoint that the VM was resumed from and its chain goes on from; none
    /// if nothing has been sent yet.
    #[must_use]
    pub fn new(generation: Generation, base: Option<Mark>) -> Self {
        Self {
            generation,
            newest: base,
            pending: base.map(Sent::after).unwrap_or_default(),
            ..Self::default()
        }
    }

    /// Of a new owner that resumes from `newest` what it has sent on as a replica, for the replicas after it: they may lack
    /// the last ones.
    #[must_use]
    pub fn taking_over(generation: Generation, newest: Mark, sent: Sent) -> Self {
        Self {
            generation,
            newest: Some(newest),
            pending: sent,
            ..Self::default()
        }
    }

    /// The generation last connected in.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The last whole checkpoint sent, or resumed from.
    #[must_use]
    pub fn newest(&self) -> Option<Mark> {
        self.newest
    }

    /// Whether a connection to the head stands.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.linked
    }

    /// Whole checkpoints that are kept because the chain has not acknowledged them.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        self.pending.len()
    }

    /// A connection to the head of `view` stands, which `holds` that. Unless the head is unfit, what is sent from here on
    /// goes over it.
    pub fn connected(&mut self, view: &View, holds: Option<Mark>) -> Joined {
        self.linked = false;
        // Connected again in the generation in which the chain began, it goes on from what it has been sent.
        let begun = self.newest.is_some_and(|mark| view.history.contains(mark));
        if !view.in_place() && !begun {
            *self = Self::new(view.generation, None);
            self.linked = true;
            return Joined::Anew;
        }
        let newest = self.newest;
        let Some(after) = self.pending.goes_on_from(newest, holds) else {
            return Joined::Unfit { newest };
        };
        self.generation = view.generation;
        self.linked = true;
        let complete = newest.map(|mark| mark.epoch);
        Joined::GoesOn { after, complete }
    }

    /// The connection has failed. What is kept is sent over the next one.
    pub fn lost(&mut self) {
        self.linked = false;
    }

    /// A checkpoint begins; what it is applied to. `full`: it replaces everything. `held`: from its capture on,
    /// at the latest, output is held; once it is, it stays so until another full one.
    ///
    /// # Errors
    /// [`BeginError`]; nothing has changed then.
    pub fn begin(&mut self, epoch: Epoch, full: bool, held: bool) -> Result<Begun, BeginError> {
        let origin = self.generation;
        let (base, held) = match self.newest {
            _ if full => (Base::Nothing, held),
            Some(base) if base.epoch.next() == epoch => {
                (Base::On { base, origin }, held || base.held)
            }
            newest => return Err(BeginError { epoch, newest }),
        };
        self.open = Some(Open {
            epoch,
            origin,
            full,
            held,
        });
        Ok(Begun { base, held })
    }

    /// The checkpoint being sent, and the generation it is named after.
    #[must_use]
    pub fn open(&self) -> Option<(Epoch, Generation)> {
        self.open.map(|open| (open.epoch, open.origin))
    }

    /// What is to be done with a frame of the open checkpoint; `None` if there is none.
    #[must_use]
    pub fn pass(&self) -> Option<Pass> {
        self.open.map(|open| Pass {
            forward: self.linked,
            keep: !open.full,
        })
    }

    /// The open checkpoint is whole; `None` if there is none.
    pub fn end(&mut self, digest: u32) -> Option<Ended> {
        let open = self.open.take()?;
        let mark = Mark {
            generation: open.origin,
            epoch: open.epoch,
            digest,
            held: open.held,
        };
        self.newest = Some(mark);
        match open.full {
            true => self.pending = Sent::after(mark),
            false => self.pending.push(mark),
        }
        let kept = !open.full;
        Some(Ended { mark, kept })
    }

    /// The tail, in `generation`, has everything up to `epoch`; whether something that was kept is not needed any more.
    pub fn acked(&mut self, generation: Generation, epoch: Epoch) -> bool {
        // An ack of what was never sent is from a broken peer.
        let sent = self.newest.is_some_and(|newest| epoch <= newest.epoch);
        generation == self.generation && sent && self.pending.trim(epoch)
    }
}

/// How a checkpoint begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// What it is applied to.
    pub base: Base,
    /// Output is held from its capture on, at the latest.
    pub held: bool,
}

#[cfg(test)]
mod tests;
