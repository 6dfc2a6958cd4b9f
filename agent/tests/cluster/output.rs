//! What the outside may see of a VM: the shipped pipeline decides, and this is its driver and the gate of the VM's network.
//! Nothing else here knows the pipeline.

use agent::epoch::pipeline::{Action, Mode, Pipeline};
use checkpoint::{Epoch, Generation};

use super::{Item, upto};

/// The pipeline and the gate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    pipeline: Pipeline,
    /// The epoch that is open will have ended with output held.
    next_held: bool,
    /// Frames wait at the gate.
    held: bool,
    /// So much of what the VM has done the outside may have seen, while frames wait.
    released: usize,
}

/// A checkpoint that has been captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    pub epoch: Epoch,
    /// It is the first of a chain that begins anew.
    pub full: bool,
    /// Output is held from its capture on at the latest: the VM may be resumed from it.
    pub held: bool,
}

/// What an acknowledgement has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acked {
    Nothing,
    /// Everything up to that epoch is committed; perhaps the VM is protected by that.
    Committed {
        protects: bool,
    },
}

impl Output {
    /// Of a VM that runs from `open` on.
    pub fn new(generation: Generation, open: Epoch, limit: usize) -> Self {
        Self {
            pipeline: Pipeline::new(generation, open, limit),
            next_held: false,
            held: false,
            released: 0,
        }
    }

    /// Of a VM that has been taken over with a chain that goes on from there: everything is held from the first instruction
    /// on. The outside has seen so much of it already, as far as this host knows.
    pub fn hold(&mut self, released: usize) {
        self.pipeline.begin_held();
        self.next_held = true;
        self.held = true;
        self.released = released;
    }

    /// The epoch in which the guest runs.
    pub fn open(&self) -> Epoch {
        self.pipeline.open()
    }

    pub fn committed(&self) -> Epoch {
        self.pipeline.committed()
    }

    /// Whether frames wait until their epoch is committed.
    pub fn holds(&self) -> bool {
        self.held
    }

    /// Whether another host owns the VM, or may.
    pub fn is_fenced(&self) -> bool {
        self.pipeline.mode() == Mode::Fenced
    }

    /// Whether epochs end with a checkpoint.
    pub fn captures(&self) -> bool {
        let mode = self.pipeline.mode();
        mode.begins() || mode == Mode::Protected
    }

    /// Whether the chain could resume the VM.
    pub fn is_protected(&self) -> bool {
        self.pipeline.mode() == Mode::Protected
    }

    /// Whether the next checkpoint is the first of a chain that begins anew.
    pub fn full_is_next(&self) -> bool {
        self.pipeline.full_is_next()
    }

    /// Whether the guest may run on: at the bound an epoch only grows.
    pub fn may_run(&self) -> bool {
        !self.is_fenced() && (!self.captures() || self.pipeline.may_capture())
    }

    /// Whether something waits for an acknowledgement that is due.
    pub fn waits(&self) -> bool {
        self.pipeline.mode() == Mode::Protected && self.pipeline.in_flight() > 0
    }

    /// A chain that begins anew is connected. A guest that stands still speaks no more until it has everything.
    pub fn begin_sync(&mut self, generation: Generation, frozen: bool) {
        self.pipeline.begin_sync(generation, frozen);
        self.next_held = false;
        if !self.is_fenced() && !frozen {
            self.held = false;
        }
    }

    /// The chain goes on in place.
    pub fn go_on(&mut self, generation: Generation) {
        self.pipeline.go_on(generation);
    }

    /// The master has recorded that there is no chain any more.
    pub fn unprotect(&mut self, generation: Generation) {
        if self.pipeline.unprotect(generation) {
            self.held = false;
        }
    }

    /// The open epoch ends; the VM has done so much by then.
    pub fn capture(&mut self, done: usize) -> Captured {
        let full = self.full_is_next();
        let captured = self.pipeline.captured();
        if captured.begin_hold && !self.held {
            self.held = true;
            self.released = done;
        }
        Captured {
            epoch: captured.epoch,
            full,
            held: std::mem::replace(&mut self.next_held, captured.next_held),
        }
    }

    /// The tail says that it has everything up to `epoch`.
    pub fn ack(&mut self, generation: Generation, epoch: Epoch, content: &[Item]) -> Acked {
        match self.pipeline.ack(generation, epoch) {
            Action::None => Acked::Nothing,
            Action::Fence => {
                self.stop(content);
                Acked::Nothing
            }
            Action::Commit {
                epoch,
                release,
                protects,
            } => {
                if release {
                    self.released = self.released.max(upto(content, epoch));
                }
                Acked::Committed { protects }
            }
        }
    }

    /// The chain that begins comes to nothing: everything as before it.
    pub fn abandon(&mut self) {
        self.pipeline.abandon();
    }

    /// Whether a chain begins that is not complete yet.
    pub fn begins(&self) -> bool {
        self.pipeline.mode().begins()
    }

    /// Nothing is let out any more.
    pub fn fence(&mut self, content: &[Item]) {
        self.pipeline.fence();
        self.stop(content);
    }

    fn stop(&mut self, content: &[Item]) {
        if !self.held {
            self.held = true;
            self.released = content.len();
        }
    }

    /// What the outside may have seen of what the VM has done.
    pub fn visible<'a>(&self, content: &'a [Item]) -> &'a [Item] {
        match self.held {
            true => &content[..self.released],
            false => content,
        }
    }
}
