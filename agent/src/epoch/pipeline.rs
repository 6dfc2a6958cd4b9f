//! The owner's epoch pipeline as a plain state machine: which epoch is open, which are under way, what an ack lets out.
//!
//! No sockets, clocks or threads: the epoch loop feeds it events and carries out what it answers.

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation};

/// What the VM's output may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// No backup has ever been complete in this configuration: output is not held.
    Unprotected,
    /// The first checkpoint is on its way: output is not held yet.
    Syncing,
    /// Output is held until its epoch is committed.
    Protected,
    /// Another host owns the VM, or may: nothing is let out any more.
    Fenced,
}

/// What the caller has to do after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Release the frames of every epoch up to and including this one.
    Release(Epoch),
    /// Drop what is held, let nothing out again, stop the guest.
    Fence,
}

/// The pipeline of one generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pipeline {
    generation: Generation,
    open: Epoch,
    in_flight: VecDeque<Epoch>,
    committed: Epoch,
    limit: usize,
    mode: Mode,
}

impl Pipeline {
    /// A pipeline whose first checkpoint will be `open`, in `generation`, with at most `limit` checkpoints under way.
    #[must_use]
    pub fn new(generation: Generation, open: Epoch, limit: usize) -> Self {
        Self {
            generation,
            open,
            in_flight: VecDeque::new(),
            committed: Epoch(open.0.saturating_sub(1)),
            limit: limit.max(1),
            mode: Mode::Unprotected,
        }
    }

    /// The epoch the guest is running in.
    #[must_use]
    pub fn open(&self) -> Epoch {
        self.open
    }

    /// The newest committed checkpoint.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// The configuration's generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The current mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Checkpoints captured but not committed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether another checkpoint may be captured now. If not, the open epoch grows: back-pressure, not a queue.
    #[must_use]
    pub fn may_capture(&self) -> bool {
        self.mode != Mode::Fenced && self.in_flight.len() < self.limit
    }

    /// A configuration with replicas exists and its first checkpoint is being sent.
    pub fn begin_sync(&mut self, generation: Generation) {
        if self.mode != Mode::Fenced {
            self.generation = generation;
            self.in_flight.clear();
            self.mode = Mode::Syncing;
        }
    }

    /// The VM has been resumed from a checkpoint that its chain goes on from: output is held from the first instruction.
    pub fn begin_held(&mut self) {
        if self.mode == Mode::Unprotected {
            self.mode = Mode::Protected;
        }
    }

    /// The chain goes on in place in a newer configuration: what is under way stays so, and is acknowledged in that one.
    pub fn go_on(&mut self, generation: Generation) {
        if self.mode != Mode::Fenced && generation > self.generation {
            self.generation = generation;
        }
    }

    /// The last replica is gone and the master has recorded so: output flows again, unprotected.
    pub fn unprotect(&mut self, generation: Generation) -> Action {
        if self.mode == Mode::Fenced {
            return Action::None;
        }
        self.generation = generation;
        self.mode = Mode::Unprotected;
        self.in_flight.clear();
        Action::Release(Epoch(self.open.0.saturating_sub(1)))
    }

    /// The open epoch's checkpoint has been captured; the next epoch is open. Returns the captured epoch and whether
    /// the caller has to begin holding output (the first checkpoint of a configuration: from here on the guest's
    /// output depends on state that only this owner has).
    pub fn captured(&mut self) -> (Epoch, bool) {
        let epoch = self.open;
        self.open = epoch.next();
        let begin_hold = self.mode == Mode::Syncing;
        if begin_hold {
            self.mode = Mode::Protected;
        }
        self.in_flight.push_back(epoch);
        (epoch, begin_hold)
    }

    /// The tail says that it has processed `epoch` in `generation`.
    pub fn ack(&mut self, generation: Generation, epoch: Epoch) -> Action {
        if self.mode == Mode::Fenced || generation < self.generation {
            return Action::None;
        }
        if generation > self.generation {
            return self.fence();
        }
        // An ack for what was never captured can only come from a broken or hostile peer: it must release nothing.
        if self.in_flight.back().is_none_or(|newest| epoch > *newest) || epoch <= self.committed {
            return Action::None;
        }
        while self
            .in_flight
            .front()
            .is_some_and(|oldest| *oldest <= epoch)
        {
            self.in_flight.pop_front();
        }
        self.committed = epoch;
        Action::Release(epoch)
    }

    /// Stop for good.
    pub fn fence(&mut self) -> Action {
        self.mode = Mode::Fenced;
        self.in_flight.clear();
        Action::Fence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn protected() -> Pipeline {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_sync(Generation(3));
        assert_eq!(p.captured(), (Epoch(10), true));
        p
    }

    #[test]
    fn i1_only_an_ack_of_the_current_generation_releases() {
        let mut p = protected();
        assert_eq!(p.ack(Generation(2), Epoch(10)), Action::None);
        assert_eq!(p.committed(), Epoch(9));
        assert_eq!(p.ack(Generation(3), Epoch(10)), Action::Release(Epoch(10)));
        assert_eq!(
            p.ack(Generation(3), Epoch(10)),
            Action::None,
            "a repeated ack releases nothing again"
        );
    }

    #[test]
    fn i1_an_ack_of_an_epoch_never_captured_releases_nothing() {
        let mut p = protected();
        assert_eq!(p.ack(Generation(3), Epoch(11)), Action::None);
        assert_eq!(p.in_flight(), 1);
    }

    #[test]
    fn i4_a_newer_generation_fences_for_good() {
        let mut p = protected();
        assert_eq!(p.ack(Generation(4), Epoch(10)), Action::Fence);
        assert!(!p.may_capture());
        assert_eq!(p.ack(Generation(3), Epoch(10)), Action::None);
        assert_eq!(
            p.unprotect(Generation(5)),
            Action::None,
            "a fenced owner never speaks again"
        );
        p.begin_sync(Generation(6));
        assert_eq!(p.mode(), Mode::Fenced);
    }

    #[test]
    fn i1_in_place_only_acks_of_the_new_configuration_release_what_was_under_way() {
        let mut p = protected();
        p.go_on(Generation(4));
        assert_eq!(p.ack(Generation(3), Epoch(10)), Action::None);
        assert_eq!(p.in_flight(), 1);
        assert_eq!(p.ack(Generation(4), Epoch(10)), Action::Release(Epoch(10)));
        p.go_on(Generation(3));
        assert_eq!(p.generation(), Generation(4), "never back");
    }

    #[test]
    fn i1_a_resumed_vm_is_held_from_the_beginning() {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_held();
        assert_eq!(p.mode(), Mode::Protected);
        assert_eq!(p.captured(), (Epoch(10), false));
        assert_eq!(p.ack(Generation(3), Epoch(10)), Action::Release(Epoch(10)));
    }

    #[test]
    fn the_bound_stops_captures_until_an_ack() {
        let mut p = protected();
        assert!(p.may_capture());
        assert_eq!(p.captured(), (Epoch(11), false));
        assert!(!p.may_capture());
        assert_eq!(p.ack(Generation(3), Epoch(11)), Action::Release(Epoch(11)));
        assert_eq!(p.in_flight(), 0, "an ack covers all epochs before it");
    }
}
