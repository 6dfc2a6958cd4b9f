//! A replica's place: which configuration it follows, and what of its past counts in it.

use std::collections::VecDeque;

use checkpoint::HostId;

use super::{Action, FreezeError, Missed, Part, Replica, Sent, Silence};
use crate::mark::Mark;
use crate::view::View;

impl Replica {
    /// A replica whose host was down, with the newest checkpoint that its store still has: everything that it has ever
    /// passed on or acknowledged, since a durable store had that first.
    ///
    /// It is complete if it was sent something first in a generation in which it was a member: that lies on top of all
    /// that was acknowledged before it came.
    #[must_use]
    pub fn returned(host: HostId, view: &View, missed: u32, holds: Mark) -> Self {
        let mut back = Self::new(host, view, missed);
        if !back.history.contains(holds) {
            return back;
        }
        let Part::Member { since, .. } = back.part else {
            return back;
        };
        back.hist = Some(holds);
        back.sent = Sent::after(holds);
        if holds.generation >= since {
            back.complete_in = Some(holds.generation);
        }
        if back.is_tail() && back.has_everything() {
            back.acked = Some(holds.epoch);
        }
        back.silence.heard = true;
        back.silence.returned = true;
        back
    }

    pub(super) fn place(&mut self, view: &View) {
        self.length = view.chain.len();
        self.history = view.history.clone();
        self.part = match view.position(&self.host) {
            Some(position) => Part::Member {
                position,
                since: view.chain[position].since,
            },
            None if view.is_joining(&self.host) => Part::Joiner,
            None => Part::Nothing,
        };
        self.has_joiner = view.joining.is_some() && self.is_tail();
    }

    /// Follows a newer configuration, in place. What was half received is dropped (its sender sends it again); what was
    /// processed stays, as far as it belongs to the VM's history. A failed replica may be filled again.
    pub fn adopt(&mut self, view: &View) {
        if view.generation <= self.generation {
            return;
        }
        self.generation = view.generation;
        self.place(view);
        self.open = None;
        self.frozen = false;
        self.missed_while_frozen = Missed::default();
        self.linked = false;
        self.joiner_target = None;
        let last_ms = self.silence.last_ms;
        self.silence = Silence::default();
        let damaged = self.failure.take().is_some_and(|f| f.damaged);
        self.hist = self
            .hist
            .filter(|mark| !damaged && self.history.contains(*mark));
        match self.hist {
            None => {
                self.complete_in = None;
                self.acked = None;
                self.sent = Sent::default();
            }
            Some(mark) => {
                if self.is_tail() && self.has_everything() {
                    // Nobody is left who has to process it still.
                    self.acked = Some(mark.epoch);
                }
                if self.successor().is_none() {
                    self.sent = Sent::after(mark);
                }
                // The owner may have died once the master had decided, and may never come to say anything in this
                // configuration: that is silence too, though it is given more time.
                self.silence = Silence {
                    heard: true,
                    returned: true,
                    last_ms,
                    ..Silence::default()
                };
            }
        }
    }

    /// Before a takeover: from here on nothing is taken, forwarded or acknowledged. What this replica has then includes
    /// everything the tail has acknowledged or ever will in this generation (invariants I2 and I5).
    ///
    /// A replica that failed because of what it *received* still has what it had, and nothing newer went past it.
    ///
    /// # Errors
    /// [`FreezeError`]; nothing has changed then.
    pub fn freeze(&mut self) -> Result<Mark, FreezeError> {
        if let Some(failure) = self.failure.as_ref().filter(|f| f.damaged) {
            return Err(FreezeError::Failed(failure.why.clone()));
        }
        let held = self.hist.ok_or(FreezeError::Empty)?;
        if !self.has_everything() {
            return Err(FreezeError::Joining(held));
        }
        if !self.holds_output() {
            return Err(FreezeError::Flowing(held));
        }
        self.frozen = true;
        self.missed_while_frozen.sent |= self.open.take().is_some();
        Ok(held)
    }

    /// The takeover was not granted and the configuration has not changed: go on as before. What was not taken
    /// meanwhile is asked for again, whatever it was: it cannot be waited for, since whoever sent it may be waiting for an
    /// answer to it and send nothing more.
    pub(super) fn unfreeze(&mut self, actions: &mut VecDeque<Action>) {
        if !std::mem::take(&mut self.frozen) {
            return;
        }
        self.silence.suspected = false;
        self.silence.ticks = 0;
        let missed = std::mem::take(&mut self.missed_while_frozen);
        if self.failure.is_some() {
            return;
        }
        if self.successor().is_some() || self.has_joiner {
            actions.push_back(Action::AskNext);
        }
        if missed.sent {
            actions.push_back(Action::AskPrevious);
        }
        if let Some(epoch) = missed.yielded {
            self.yielded(epoch, actions);
        }
    }

    /// The driver could not keep what it was told to keep: another successor cannot be brought up to date any more.
    pub fn forget_sent(&mut self) {
        self.sent = Sent::default();
    }
}
