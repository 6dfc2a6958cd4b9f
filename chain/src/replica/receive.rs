//! Receiving checkpoints: what is taken, passed on, processed and acknowledged.

use std::collections::VecDeque;

use checkpoint::{Epoch, Generation};

use super::{Action, Base, Open, Part, Replica, Sent, What};
use crate::mark::Mark;

impl Replica {
    pub(super) fn begin(
        &mut self,
        epoch: Epoch,
        base: Base,
        held: bool,
        actions: &mut VecDeque<Action>,
    ) {
        // Within a history epochs only grow, so this one has been processed before: its acknowledgement was lost.
        let duplicate = self.hist.is_some_and(|hist| epoch <= hist.epoch);
        let what = match base {
            Base::Nothing | Base::On { .. } if duplicate => What::Duplicate,
            Base::Nothing => {
                if self.hist.is_some() || self.history.since != self.generation {
                    let why = format!(
                        "checkpoint {epoch} would replace everything, but the master has not decided that the chain begins anew"
                    );
                    return self.fail(why, false, actions);
                }
                What::Full
            }
            Base::Install => {
                if self.part != Part::Joiner {
                    let why = "only a joining replica is filled by another replica".to_string();
                    return self.fail(why, false, actions);
                }
                What::Install(None)
            }
            Base::On { base, origin } => {
                if let Some(why) = self.misfit(epoch, base, origin, held) {
                    return self.fail(why, false, actions);
                }
                What::Next(origin)
            }
        };
        let open = Open { epoch, what, held };
        self.open = Some(open);
        if what == What::Duplicate {
            return;
        }
        let full = !matches!(what, What::Next(_));
        if full {
            // The image is being replaced: from here until it is processed there is nothing to resume from.
            self.hist = None;
            self.acked = None;
            self.sent = Sent::default();
            actions.push_back(Action::TrimAll);
        }
        self.pass(open, actions);
        actions.push_back(Action::Open { epoch, full });
    }

    /// The frame in hand goes on to the next replica, and is kept for another one.
    pub(super) fn pass(&self, open: Open, actions: &mut VecDeque<Action>) {
        if self.linked {
            actions.push_back(Action::Forward);
        }
        if self.keeps() && matches!(open.what, What::Next(_)) {
            actions.push_back(Action::Keep);
        }
    }

    pub(super) fn end(
        &mut self,
        epoch: Epoch,
        install: Option<Mark>,
        actions: &mut VecDeque<Action>,
    ) {
        let Some(open) = self.open.filter(|open| open.epoch == epoch) else {
            return;
        };
        match (open.what, install) {
            (What::Duplicate, None) => {}
            (What::Install(_), Some(mark)) if self.history.contains(mark) => {
                self.open = Some(Open {
                    epoch: mark.epoch,
                    what: What::Install(Some(mark)),
                    held: mark.held,
                });
                return actions.push_back(Action::Prepare { epoch: mark.epoch });
            }
            (What::Full | What::Next(_), None) => {
                return actions.push_back(Action::Prepare { epoch });
            }
            _ => {
                let why = format!("the end of checkpoint {epoch} does not fit its beginning");
                return self.fail(why, false, actions);
            }
        }
        self.open = None;
        // The acknowledgement was lost: once more what is known to be safe.
        if let Some(acked) = self.acked_up() {
            self.acknowledge(acked, actions);
        }
    }

    /// Why checkpoint `epoch` on top of `base` does not fit what this replica holds.
    pub(super) fn misfit(
        &self,
        epoch: Epoch,
        base: Mark,
        origin: Generation,
        held: bool,
    ) -> Option<String> {
        let Some(hist) = self.hist else {
            return Some(format!(
                "checkpoint {epoch} came, but this replica has no full checkpoint to apply it to"
            ));
        };
        if epoch > hist.epoch.next() {
            return Some(format!(
                "checkpoint {epoch} came after {}: those between are missing",
                hist.epoch
            ));
        }
        if base != hist || epoch != base.epoch.next() {
            return Some(format!(
                "checkpoint {epoch} belongs on top of checkpoint {base}, but this replica holds checkpoint {hist}"
            ));
        }
        let mark = Mark {
            generation: origin,
            epoch,
            digest: 0,
            held,
        };
        if base.held && !held {
            return Some(format!(
                "checkpoint {epoch} came with its output not held, after checkpoint {base}, whose was"
            ));
        }
        if origin < base.generation || origin > self.generation || !self.history.contains(mark) {
            return Some(format!(
                "checkpoint {mark} cannot follow checkpoint {base} in generation {}",
                self.generation
            ));
        }
        None
    }

    pub(super) fn prepared(&mut self, digest: u32, actions: &mut VecDeque<Action>) {
        let Some(mark) = self.name_of_open(digest) else {
            return;
        };
        let Some(Open { epoch, what, .. }) = self.open.take() else {
            return;
        };
        self.hist = Some(mark);
        if self.linked {
            actions.push_back(Action::Forward);
        }
        match what {
            What::Next(_) if self.keeps() => {
                actions.push_back(Action::Keep);
                self.sent.push(mark);
            }
            _ => {
                if self.sent.range().is_some() {
                    // What was kept does not reach this one: with a hole it is of no use to anybody.
                    actions.push_back(Action::TrimAll);
                }
                self.sent = Sent::after(mark);
            }
        }
        actions.push_back(Action::Commit(mark));
        if what == What::Full {
            self.complete_in = Some(self.generation);
        }
        if self.is_tail() {
            self.acked = Some(epoch);
        }
        if self.is_tail() || self.part == Part::Joiner {
            self.acknowledge(epoch, actions);
        }
    }

    pub(super) fn acknowledge(&self, epoch: Epoch, actions: &mut VecDeque<Action>) {
        if self.is_tail() {
            actions.push_back(Action::AckOwner(epoch));
        }
        actions.push_back(Action::AckUp(epoch));
    }

    /// The predecessor says that this replica has now been sent all that it held.
    pub(super) fn complete(&mut self, epoch: Epoch, actions: &mut VecDeque<Action>) {
        let Some(hist) = self.hist.filter(|hist| hist.epoch >= epoch) else {
            let why = format!("the predecessor holds checkpoint {epoch}, which never came");
            return self.fail(why, false, actions);
        };
        if !matches!(self.part, Part::Member { .. }) {
            return;
        }
        self.complete_in = Some(self.generation);
        if self.linked && self.successor().is_some() {
            actions.push_back(Action::SayComplete(hist.epoch));
        }
        if self.is_tail() {
            self.acked = Some(hist.epoch);
            self.acknowledge(hist.epoch, actions);
            if self.has_joiner && self.linked && self.joiner_target.is_none() {
                // Said before, but perhaps lost with an earlier connection further up.
                actions.push_back(Action::JoinerReady);
            }
        }
    }
}
