//! The requests that were answered last: one that comes again is answered as the first time.

use std::collections::VecDeque;

use checkpoint::RequestId;
use serde::{Deserialize, Serialize};

use crate::master::Outcome;

/// Most requests remembered.
pub const RECENT_MAX: usize = 512;

/// The newest requests, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Recent(VecDeque<(RequestId, Outcome)>);

impl Recent {
    pub(super) fn get(&self, id: RequestId) -> Option<&Outcome> {
        let mut newest_first = self.0.iter().rev();
        newest_first.find(|(known, _)| *known == id).map(|(_, o)| o)
    }

    pub(super) fn note(&mut self, id: RequestId, outcome: Outcome) {
        self.0.push_back((id, outcome));
        while self.0.len() > RECENT_MAX {
            self.0.pop_front();
        }
    }
}
