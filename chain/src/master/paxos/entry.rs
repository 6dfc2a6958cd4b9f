//! What the members agree on: the log's entries, and what applying them in order gives.

use std::collections::{BTreeMap, BTreeSet};

use checkpoint::ClusterId;
use omnipaxos::storage::Snapshot;
use serde::{Deserialize, Serialize};

use crate::master::{MasterState, Rejection, Reply, Request};

/// A member's number, from 1 on.
pub type Pid = u64;

/// Which member proposed, and which of its proposals it is. One that is proposed again has the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Turn {
    /// The member that proposed it.
    pub member: Pid,
    /// How often that member had been started then: numbers begin anew at each start.
    pub incarnation: u64,
    /// Counts up within an incarnation.
    pub number: u64,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A change.
    Request(Box<Request>),
    /// Nothing changes; the state at this place of the log answers a read.
    Read,
}

/// One place of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name.
    pub id: Turn,
    /// The member waits for none of its requests below this number any more.
    pub floor: u64,
    /// The cluster that this log is to be of, by a member that does not know it yet: the log's first entry decides.
    pub begin: Option<ClusterId>,
    /// What is asked.
    pub what: What,
}

impl omnipaxos::storage::Entry for Entry {
    type Snapshot = LogSnapshot;
}

/// What applying an entry answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A request was carried out, or refused by what had been decided before.
    Request(Result<Reply, Rejection>),
    /// A read's place in the log.
    Read,
    /// A second copy of a request that took effect before: it has none now.
    Repeated,
    /// Nobody waits for it any more, so it may not take effect this late.
    Stale,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    incarnation: u64,
    floor: u64,
    /// Requests from `floor` on that have been applied.
    done: BTreeSet<u64>,
}

/// The state that a prefix of the log gives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The master's.
    pub state: MasterState,
    asked: BTreeMap<Pid, Asked>,
}

impl Applied {
    /// Applies the log's next entry: the same on every member.
    ///
    /// A request takes effect at most once, although a member that gets no answer proposes it again: otherwise the copy
    /// of a registration that was answered long ago could bring back a VM that has been removed since.
    pub fn apply(&mut self, entry: &Entry) -> Outcome {
        if let Some(cluster) = entry.begin {
            self.state.begin(cluster);
        }
        let Turn {
            member,
            incarnation,
            number,
        } = entry.id;
        let asked = self.asked.entry(member).or_default();
        if incarnation > asked.incarnation {
            *asked = Asked {
                incarnation,
                ..Asked::default()
            };
        }
        if incarnation < asked.incarnation || number < asked.floor {
            return Outcome::Stale;
        }
        if entry.floor > asked.floor {
            asked.floor = entry.floor;
            asked.done = asked.done.split_off(&entry.floor);
        }
        if !asked.done.insert(number) {
            return Outcome::Repeated;
        }
        match &entry.what {
            What::Request(request) => Outcome::Request(self.state.answer(request)),
            What::Read => Outcome::Read,
        }
    }

    /// Whether a request has taken effect already.
    #[must_use]
    pub fn has(&self, id: Turn) -> bool {
        let asked = self.asked.get(&id.member);
        asked.is_some_and(|a| a.incarnation == id.incarnation && a.done.contains(&id.number))
    }
}

/// A prefix of the log, folded.
///
/// omnipaxos makes one of a piece of the log without knowing where that begins, hence `then`; what is kept and what is
/// sent is always folded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSnapshot {
    base: Option<Applied>,
    then: Vec<Entry>,
}

impl LogSnapshot {
    /// Of a state.
    #[must_use]
    pub fn of(applied: Applied) -> Self {
        Self {
            base: Some(applied),
            then: Vec::new(),
        }
    }

    /// The state. What has no base is a prefix from the log's beginning.
    #[must_use]
    pub fn folded(self) -> Applied {
        let mut applied = self.base.unwrap_or_default();
        for entry in &self.then {
            applied.apply(entry);
        }
        applied
    }
}

impl Snapshot<Entry> for LogSnapshot {
    fn create(entries: &[Entry]) -> Self {
        Self {
            base: None,
            then: entries.to_vec(),
        }
    }

    fn merge(&mut self, delta: Self) {
        if delta.base.is_some() {
            *self = delta;
        } else {
            self.then.extend(delta.then);
        }
    }

    fn use_snapshots() -> bool {
        true
    }
}
