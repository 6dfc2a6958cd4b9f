//! The link to the next replica: the successor, or at the tail a replica that is joining.

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation};

use super::{Action, Replica};
use crate::mark::Mark;
use crate::sent::Sent;

impl Replica {
    /// Whether what is processed has to be kept for the next replica.
    pub(super) fn keeps(&self) -> bool {
        self.successor().is_some() || (self.has_joiner && self.linked)
    }

    /// The next replica has connected and says what it holds: it is sent what it lacks, if that is kept.
    pub(super) fn next_up(
        &mut self,
        generation: Generation,
        holds: Option<Mark>,
        actions: &mut VecDeque<Action>,
    ) {
        let joiner = self.has_joiner;
        if generation != self.generation
            || self.failure.is_some()
            || self.frozen
            || (self.successor().is_none() && !joiner)
        {
            return;
        }
        let Some(hist) = self.hist else {
            if self.open.is_none() && !joiner {
                // Both wait for the first checkpoint of a history.
                self.linked = true;
            } else if !joiner {
                actions.push_back(Action::Unfit(
                    "it came in the middle of the first checkpoint".into(),
                ));
            }
            return;
        };
        // A tail keeps nothing before somebody joins: what is half received cannot be passed on from its beginning.
        let after = match joiner {
            true => holds.filter(|holds| *holds == hist && self.open.is_none()),
            false => self.sent.goes_on_from(Some(hist), holds),
        };
        match after {
            Some(after) => {
                if joiner {
                    self.sent = Sent::after(hist);
                    self.joiner_target = Some(hist.epoch);
                }
                self.linked = true;
                actions.push_back(Action::Resend { after });
                if !joiner && self.has_everything() {
                    actions.push_back(Action::SayComplete(hist.epoch));
                }
            }
            None if joiner => actions.push_back(Action::Feed),
            None => {
                let held = holds.map_or("nothing".into(), |mark| format!("checkpoint {mark}"));
                actions.push_back(Action::Unfit(format!(
                    "it holds {held}, and what is between that and checkpoint {hist} is not kept any more"
                )));
            }
        }
    }

    /// The joining replica has been sent everything, between two checkpoints.
    pub(super) fn joiner_fed(&mut self, generation: Generation, actions: &mut VecDeque<Action>) {
        let Some(hist) = self.hist else { return };
        if generation == self.generation
            && self.has_joiner
            && !self.frozen
            && self.failure.is_none()
            && self.open.is_none()
        {
            self.linked = true;
            self.sent = Sent::after(hist);
            self.joiner_target = Some(hist.epoch);
            actions.push_back(Action::TrimAll);
        }
    }

    pub(super) fn next_ack(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        actions: &mut VecDeque<Action>,
    ) {
        // An ack of what this replica has not processed is from a broken peer: believing it would let output out.
        let processed = self.hist.is_some_and(|hist| epoch <= hist.epoch);
        if generation != self.generation || self.frozen || self.failure.is_some() || !processed {
            return;
        }
        if self.successor().is_some() {
            if self.sent.trim(epoch) {
                actions.push_back(Action::Trim(epoch));
            }
            if self.acked.is_none_or(|acked| acked < epoch) {
                self.acked = Some(epoch);
                self.acknowledge(epoch, actions);
            }
        } else if self.has_joiner && self.linked {
            if self.sent.trim(epoch) {
                actions.push_back(Action::Trim(epoch));
            }
            if self.joiner_target.is_some_and(|target| epoch >= target) {
                self.joiner_target = None;
                actions.push_back(Action::JoinerReady);
            }
        }
    }
}
