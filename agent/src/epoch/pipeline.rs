//! The owner's epoch pipeline as a plain state machine: which epoch is open, which are under way, what an ack lets out.
//!
//! No sockets, clocks or threads: the epoch loop feeds it events and carries out what it answers.

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation};

/// What the VM's output may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// There is no chain: output flows.
    Unprotected,
    /// A chain begins: its full checkpoint, and perhaps later ones, are on their way. Output flows, so the chain must not resume
    /// the VM from any of them.
    Syncing,
    /// The full checkpoint is committed, and output has been held since the capture of a later one. The VM is protected once
    /// that one is committed.
    Holding,
    /// Output is held until its epoch is committed.
    Protected,
    /// Another host owns the VM, or may: nothing is let out any more.
    Fenced,
}

impl Mode {
    /// Whether output is held: only an ack, or the master's decision, lets it out.
    #[must_use]
    pub fn holds(self) -> bool {
        matches!(self, Mode::Holding | Mode::Protected)
    }

    /// Whether a chain that begins is not complete yet.
    #[must_use]
    pub fn begins(self) -> bool {
        matches!(self, Mode::Syncing | Mode::Holding)
    }
}

/// A checkpoint has been captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Its epoch.
    pub epoch: Epoch,
    /// The caller has to begin holding output, in the pause that captured it.
    pub begin_hold: bool,
    /// Whether the epoch that is open now ends with output held. Decided when it opens, since its disk writes are sent, and
    /// with them its announcement, before it is captured.
    pub next_held: bool,
}

/// What the caller has to do after an ack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Every checkpoint up to and including this one is committed.
    Commit {
        /// This one.
        epoch: Epoch,
        /// Release the frames of these epochs.
        release: bool,
        /// With this one the VM is protected.
        protects: bool,
    },
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
    /// Of a chain that begins: its full checkpoint, once captured.
    full: Option<Epoch>,
    /// The first checkpoint that is captured with output held from its capture on, once that is decided.
    first_held: Option<Epoch>,
    /// A chain begins while the guest stands still and output is held all the time.
    frozen: bool,
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
            full: None,
            first_held: None,
            frozen: false,
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

    /// Whether the next checkpoint is the full one of a chain that begins.
    #[must_use]
    pub fn full_is_next(&self) -> bool {
        self.mode == Mode::Syncing && self.full.is_none()
    }

    /// A configuration with replicas exists and its full checkpoint is being sent. `frozen`: the guest stands still, and its
    /// output stays held.
    pub fn begin_sync(&mut self, generation: Generation, frozen: bool) {
        if self.mode != Mode::Fenced {
            self.generation = generation;
            self.leave(Mode::Syncing);
            self.frozen = frozen;
        }
    }

    /// The chain that begins cannot be completed, for a cause of this host's. No effect once output is held for it: then only
    /// the master's decision ends that.
    pub fn abandon(&mut self) {
        if self.mode == Mode::Syncing {
            self.leave(Mode::Unprotected);
        }
    }

    fn leave(&mut self, to: Mode) {
        self.in_flight.clear();
        self.mode = to;
        self.full = None;
        self.first_held = None;
        self.frozen = false;
    }

    /// The VM has been resumed from a checkpoint that its chain goes on from: output is held from the first instruction.
    pub fn begin_held(&mut self) {
        if self.mode == Mode::Unprotected {
            self.mode = Mode::Protected;
            self.first_held = Some(self.open);
        }
    }

    /// The chain goes on in place in a newer configuration: what is under way stays so, and is acknowledged in that one.
    pub fn go_on(&mut self, generation: Generation) {
        if self.mode != Mode::Fenced && generation > self.generation {
            self.generation = generation;
        }
    }

    /// The last replica is gone and the master has recorded so: output flows again, unprotected. False: it does not, another
    /// host may own the VM.
    #[must_use]
    pub fn unprotect(&mut self, generation: Generation) -> bool {
        if self.mode == Mode::Fenced {
            return false;
        }
        self.generation = generation;
        self.leave(Mode::Unprotected);
        true
    }

    /// The open epoch's checkpoint has been captured; the next epoch is open.
    ///
    /// Output begins to be held in the pause that captures checkpoint k, and k is the first that the chain may resume the VM
    /// from. So what left before depends on nothing newer than k, and what the guest sends afterwards waits for k + 1.
    pub fn captured(&mut self) -> Captured {
        let epoch = self.open;
        self.open = epoch.next();
        self.in_flight.push_back(epoch);
        let mut begin_hold = false;
        if self.mode == Mode::Syncing {
            let full = *self.full.get_or_insert(epoch);
            match self.first_held {
                Some(first) if epoch >= first => {
                    self.mode = Mode::Holding;
                    begin_hold = true;
                }
                None if self.committed >= full || self.frozen => self.first_held = Some(self.open),
                _ => {}
            }
        }
        Captured {
            epoch,
            begin_hold,
            next_held: self.first_held.is_some_and(|first| self.open >= first),
        }
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
        // What is held while a chain begins (the guest was frozen) waits for the first checkpoint that can be resumed.
        let release = self.mode.holds() && self.first_held.is_some_and(|first| epoch >= first);
        let protects = release && self.mode == Mode::Holding;
        if protects {
            self.mode = Mode::Protected;
        }
        Action::Commit {
            epoch,
            release,
            protects,
        }
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

    fn committed(epoch: u64) -> Action {
        Action::Commit {
            epoch: Epoch(epoch),
            release: false,
            protects: false,
        }
    }

    fn released(epoch: u64) -> Action {
        Action::Commit {
            epoch: Epoch(epoch),
            release: true,
            protects: false,
        }
    }

    fn flows(p: &mut Pipeline, epoch: u64, next_held: bool) {
        let captured = Captured {
            epoch: Epoch(epoch),
            begin_hold: false,
            next_held,
        };
        assert_eq!(p.captured(), captured);
    }

    /// Protected in generation 3 by checkpoint 12; 13 is under way.
    fn protected() -> Pipeline {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_sync(Generation(3), false);
        flows(&mut p, 10, false);
        assert_eq!(p.ack(Generation(3), Epoch(10)), committed(10));
        flows(&mut p, 11, true);
        assert!(p.captured().begin_hold);
        let protects = Action::Commit {
            epoch: Epoch(12),
            release: true,
            protects: true,
        };
        assert_eq!(p.ack(Generation(3), Epoch(12)), protects);
        flows(&mut p, 13, true);
        p
    }

    #[test]
    fn h16_output_flows_until_the_full_checkpoint_is_committed() {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_sync(Generation(3), false);
        assert!(p.full_is_next());
        flows(&mut p, 10, false);
        assert!(!p.full_is_next());
        flows(&mut p, 11, false);
        assert!(!p.may_capture(), "the bound holds here too");
        assert_eq!(p.mode(), Mode::Syncing);
        // 11 has been announced as one that cannot be resumed from; so is 12, which opened before the ack.
        assert_eq!(p.ack(Generation(3), Epoch(10)), committed(10));
        flows(&mut p, 12, true);
        assert_eq!(p.mode(), Mode::Syncing, "12 does not hold yet");
        assert_eq!(p.ack(Generation(3), Epoch(12)), committed(12));
        let first = Captured {
            epoch: Epoch(13),
            begin_hold: true,
            next_held: true,
        };
        assert_eq!(p.captured(), first);
        assert_eq!(p.mode(), Mode::Holding);
        p.abandon();
        assert_eq!(p.mode(), Mode::Holding, "what is held stays so");
        flows(&mut p, 14, true);
        let protects = Action::Commit {
            epoch: Epoch(13),
            release: true,
            protects: true,
        };
        assert_eq!(p.ack(Generation(3), Epoch(13)), protects);
        assert_eq!(p.ack(Generation(3), Epoch(14)), released(14));
    }

    #[test]
    fn h16_an_ack_of_what_cannot_be_resumed_protects_nobody_and_releases_nothing() {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 4);
        p.begin_sync(Generation(3), false);
        flows(&mut p, 10, false);
        assert_eq!(p.ack(Generation(3), Epoch(10)), committed(10));
        flows(&mut p, 11, true);
        assert!(p.captured().begin_hold);
        assert_eq!(p.ack(Generation(3), Epoch(11)), committed(11));
        assert_eq!(p.mode(), Mode::Holding, "12 is the first that counts");
    }

    #[test]
    fn a_frozen_guests_output_waits_for_the_first_checkpoint_that_can_be_resumed() {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_sync(Generation(3), true);
        flows(&mut p, 10, true);
        assert!(
            p.captured().begin_hold,
            "without waiting: nothing leaves anyway"
        );
        assert_eq!(p.ack(Generation(3), Epoch(10)), committed(10));
        assert!(matches!(
            p.ack(Generation(3), Epoch(11)),
            Action::Commit {
                release: true,
                protects: true,
                ..
            }
        ));
    }

    #[test]
    fn h3_an_attempt_that_is_given_up_leaves_output_flowing() {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_sync(Generation(3), false);
        flows(&mut p, 10, false);
        p.abandon();
        assert_eq!(p.mode(), Mode::Unprotected);
        assert_eq!(p.ack(Generation(3), Epoch(10)), Action::None);
        p.begin_sync(Generation(4), false);
        assert!(p.full_is_next());
        flows(&mut p, 11, false);
    }

    #[test]
    fn i1_only_an_ack_of_the_current_generation_releases() {
        let mut p = protected();
        assert_eq!(p.ack(Generation(2), Epoch(13)), Action::None);
        assert_eq!(p.committed(), Epoch(12));
        assert_eq!(p.ack(Generation(3), Epoch(13)), released(13));
        assert_eq!(
            p.ack(Generation(3), Epoch(13)),
            Action::None,
            "a repeated ack releases nothing again"
        );
    }

    #[test]
    fn i1_an_ack_of_an_epoch_never_captured_releases_nothing() {
        let mut p = protected();
        assert_eq!(p.ack(Generation(3), Epoch(14)), Action::None);
        assert_eq!(p.in_flight(), 1);
    }

    #[test]
    fn i4_a_newer_generation_fences_for_good() {
        let mut p = protected();
        assert_eq!(p.ack(Generation(4), Epoch(13)), Action::Fence);
        assert!(!p.may_capture());
        assert_eq!(p.ack(Generation(3), Epoch(13)), Action::None);
        assert!(
            !p.unprotect(Generation(5)),
            "a fenced owner never speaks again"
        );
        p.begin_sync(Generation(6), false);
        assert_eq!(p.mode(), Mode::Fenced);
    }

    #[test]
    fn i1_in_place_only_acks_of_the_new_configuration_release_what_was_under_way() {
        let mut p = protected();
        p.go_on(Generation(4));
        assert_eq!(p.ack(Generation(3), Epoch(13)), Action::None);
        assert_eq!(p.in_flight(), 1);
        assert_eq!(p.ack(Generation(4), Epoch(13)), released(13));
        p.go_on(Generation(3));
        assert_eq!(p.generation(), Generation(4), "never back");
    }

    #[test]
    fn i1_a_resumed_vm_is_held_from_the_beginning() {
        let mut p = Pipeline::new(Generation(3), Epoch(10), 2);
        p.begin_held();
        assert_eq!(p.mode(), Mode::Protected);
        flows(&mut p, 10, true);
        assert_eq!(p.ack(Generation(3), Epoch(10)), released(10));
    }

    #[test]
    fn the_bound_stops_captures_until_an_ack() {
        let mut p = protected();
        assert!(p.may_capture());
        flows(&mut p, 14, true);
        assert!(!p.may_capture());
        assert_eq!(p.ack(Generation(3), Epoch(14)), released(14));
        assert_eq!(p.in_flight(), 0, "an ack covers all epochs before it");
    }
}
