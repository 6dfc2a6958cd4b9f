//! The rule of output commit, without I/O, clocks or threads: frames in, frames out.

use std::collections::VecDeque;

use checkpoint::Epoch;
use thiserror::Error;

/// Bytes charged for a held frame besides its own: the vector's header and the allocator's. Without it a flood of
/// minimal frames would hold several times the memory the limit names.
pub const FRAME_OVERHEAD: usize = 64;

/// Why an epoch could not be sealed or released. Nothing was changed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// Epochs only grow; this one was sealed before, or a later one was.
    #[error("epoch {epoch} cannot be sealed: epoch {last} already is")]
    SealedBefore {
        /// The epoch asked for.
        epoch: Epoch,
        /// The newest sealed epoch.
        last: Epoch,
    },
    /// The epoch is still open, or was never begun: its frames may not leave.
    #[error("epoch {epoch} cannot be released: it is not sealed (newest sealed: {})", newest(.last))]
    NotSealed {
        /// The epoch asked for.
        epoch: Epoch,
        /// The newest sealed epoch, if there is one.
        last: Option<Epoch>,
    },
}

fn newest(last: &Option<Epoch>) -> String {
    last.map_or_else(|| "none".to_owned(), |e| e.to_string())
}

/// What became of a frame given to [`EpochQueue::push`].
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It waits for its epoch's commit.
    Held,
    /// Nothing is held at present: the caller sends it at once.
    SendNow(Vec<u8>),
    /// The limit is reached: the caller keeps it and tries again after a release.
    Full(Vec<u8>),
    /// The queue is fenced: the frame is gone.
    Dropped,
}

/// Frames held per epoch: one open epoch at the end, sealed ones before it, oldest first.
///
/// Begins without holding ([`EpochQueue::set_hold`]), since a machine without a committed checkpoint is not protected.
#[derive(Debug)]
pub struct EpochQueue {
    open: Vec<Vec<u8>>,
    sealed: VecDeque<(Epoch, Vec<Vec<u8>>)>,
    last_sealed: Option<Epoch>,
    held: usize,
    frames: usize,
    limit: usize,
    hold: bool,
    fenced: bool,
}

impl EpochQueue {
    /// A queue that holds at most `limit` bytes, each frame charged with [`FRAME_OVERHEAD`] more than its length.
    ///
    /// One frame is always taken while nothing is held, however small the limit, else it could never leave.
    pub fn new(limit: usize) -> EpochQueue {
        EpochQueue {
            open: Vec::new(),
            sealed: VecDeque::new(),
            last_sealed: None,
            held: 0,
            frames: 0,
            limit,
            hold: false,
            fenced: false,
        }
    }

    /// Takes a frame of the open epoch.
    pub fn push(&mut self, frame: Vec<u8>) -> Pushed {
        if self.fenced {
            return Pushed::Dropped;
        }
        if !self.hold {
            return Pushed::SendNow(frame);
        }
        let cost = cost(&frame);
        if self.frames > 0 && self.held.saturating_add(cost) > self.limit {
            return Pushed::Full(frame);
        }
        self.held = self.held.saturating_add(cost);
        self.frames += 1;
        self.open.push(frame);
        Pushed::Held
    }

    /// Closes the open epoch as `epoch`; frames pushed from now on belong to a later one.
    ///
    /// # Errors
    /// [`QueueError::SealedBefore`] if `epoch` is not newer than the newest sealed one.
    pub fn seal(&mut self, epoch: Epoch) -> Result<(), QueueError> {
        if let Some(last) = self.last_sealed
            && epoch <= last
        {
            return Err(QueueError::SealedBefore { epoch, last });
        }
        self.last_sealed = Some(epoch);
        if !self.open.is_empty() {
            self.sealed
                .push_back((epoch, std::mem::take(&mut self.open)));
        }
        Ok(())
    }

    /// Takes the frames of all sealed epochs up to and including `epoch`, in the order they were pushed. Never one of
    /// the open epoch. Released again, the same epoch gives nothing.
    ///
    /// # Errors
    /// [`QueueError::NotSealed`]; then nothing is released.
    pub fn release(&mut self, epoch: Epoch) -> Result<Vec<Vec<u8>>, QueueError> {
        if self.last_sealed.is_none_or(|last| epoch > last) {
            return Err(QueueError::NotSealed {
                epoch,
                last: self.last_sealed,
            });
        }
        let mut out = Vec::new();
        while let Some((_, frames)) = self.sealed.pop_front_if(|(e, _)| *e <= epoch) {
            if out.is_empty() {
                out = frames;
            } else {
                out.extend(frames);
            }
        }
        self.uncharge(&out);
        Ok(out)
    }

    /// Switches holding on or off. Off means that output needs no commit any more: everything held, the open epoch
    /// included, is returned in order, to be sent before anything pushed later. On returns nothing.
    #[must_use = "the frames returned must be sent"]
    pub fn set_hold(&mut self, hold: bool) -> Vec<Vec<u8>> {
        self.hold = hold;
        if hold {
            return Vec::new();
        }
        let mut out = Vec::with_capacity(self.frames);
        for (_, frames) in self.sealed.drain(..) {
            out.extend(frames);
        }
        out.append(&mut self.open);
        self.uncharge(&out);
        out
    }

    /// This owner is superseded: drops everything held and whatever is pushed from now on. Final.
    ///
    /// Returns the number of frames dropped now.
    pub fn fence(&mut self) -> usize {
        self.fenced = true;
        let dropped = self.frames;
        self.open = Vec::new();
        self.sealed = VecDeque::new();
        self.held = 0;
        self.frames = 0;
        dropped
    }

    /// Whether pushed frames are held.
    pub fn is_holding(&self) -> bool {
        self.hold
    }

    /// Whether [`EpochQueue::fence`] was called.
    pub fn is_fenced(&self) -> bool {
        self.fenced
    }

    /// Bytes held, [`FRAME_OVERHEAD`] per frame included.
    pub fn held_bytes(&self) -> usize {
        self.held
    }

    /// Frames held.
    pub fn held_frames(&self) -> usize {
        self.frames
    }

    /// The newest sealed epoch.
    pub fn last_sealed(&self) -> Option<Epoch> {
        self.last_sealed
    }

    /// Whether a frame of `len` bytes would be taken now.
    pub fn has_room_for(&self, len: usize) -> bool {
        !self.hold
            || self.fenced
            || self.frames == 0
            || self.held.saturating_add(len).saturating_add(FRAME_OVERHEAD) <= self.limit
    }

    /// Whether any frame at all would be taken now.
    pub fn has_room(&self) -> bool {
        self.has_room_for(0)
    }

    fn uncharge(&mut self, frames: &[Vec<u8>]) {
        self.frames -= frames.len();
        self.held -= frames.iter().map(|f| cost(f)).sum::<usize>();
    }
}

fn cost(frame: &[u8]) -> usize {
    frame.len().saturating_add(FRAME_OVERHEAD)
}
