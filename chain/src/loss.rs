//! A replica that a chain has lost, as everybody tells everybody else: the one shape it has.

use checkpoint::{Generation, HostId};
use serde::{Deserialize, Serialize};

/// What kind of loss it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LossKind {
    /// It does not answer, or its connection has ended.
    Silent,
    /// It has declared itself failed, or said something that a replica does not say.
    Failed,
    /// The chain cannot go on from what it holds.
    Unfit,
    /// It answers that it cannot stand by, or not yet.
    Declined,
}

/// A replica is lost, in one generation. A report about a generation that is over changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The configuration that it is about.
    pub generation: Generation,
    /// Which replica, if that is known.
    pub host: Option<HostId>,
    /// What kind of loss.
    pub kind: LossKind,
    /// Why, for an administrator.
    pub why: String,
}

impl Loss {
    /// Whether it is still about the configuration in force.
    #[must_use]
    pub fn concerns(&self, generation: Generation) -> bool {
        self.generation == generation
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Some(host) => write!(f, "{host}: {}", self.why),
            None => f.write_str(&self.why),
        }
    }
}
