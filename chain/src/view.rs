//! What the master decides: who owns a VM and which replicas, in which order, hold its checkpoints.

use std::net::SocketAddr;

use checkpoint::{CpuFeatures, Epoch, Generation, HostId, RamRange, VmId};
use serde::{Deserialize, Serialize};

use crate::mark::Mark;

/// A replica in a chain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Its host.
    pub host: HostId,
    /// Its chain server.
    pub addr: SocketAddr,
    /// The generation since which it has been a member without a break; the master's to set. What a replica was told to
    /// hold before that may lack checkpoints acknowledged while it was none.
    pub since: Generation,
}

impl Member {
    /// A member as it is asked for: the master notes since when it is one.
    #[must_use]
    pub fn new(host: HostId, addr: SocketAddr) -> Self {
        Self {
            host,
            addr,
            since: Generation::ZERO,
        }
    }
}

/// Where a VM's history went on from a takeover: of what was sent in generation `until` or earlier, only checkpoints up to
/// `epoch` belong to it. The rest was never acknowledged; the new owner gives those epochs another content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fork {
    /// The last generation concerned.
    pub until: Generation,
    /// The last epoch that counts.
    pub epoch: Epoch,
}

/// Most takeovers remembered. A replica that missed more is filled again.
const FORKS_MAX: usize = 64;

/// Which checkpoints belong to a VM's history, as far as the master has to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct History {
    /// Checkpoints of earlier generations do not count: the owner has let output out since that they do not know of.
    pub since: Generation,
    /// Takeovers since then, oldest first; epochs and generations grow.
    pub forks: Vec<Fork>,
}

impl History {
    /// A history that begins in `generation`.
    #[must_use]
    pub fn new(generation: Generation) -> Self {
        Self {
            since: generation,
            forks: Vec::new(),
        }
    }

    /// Whether `mark` belongs to it. Once it does not, it never will again: histories only grow stricter.
    #[must_use]
    pub fn contains(&self, mark: Mark) -> bool {
        mark.generation >= self.since
            && self
                .forks
                .iter()
                .all(|fork| mark.generation > fork.until || mark.epoch <= fork.epoch)
    }

    /// Somebody took over in `until` from checkpoint `epoch`.
    pub(crate) fn fork(&mut self, until: Generation, epoch: Epoch) {
        // An earlier takeover that went further says less than this one.
        self.forks.retain(|fork| fork.epoch < epoch);
        self.forks.push(Fork { until, epoch });
        while self.forks.len() > FORKS_MAX {
            let oldest = self.forks.remove(0);
            self.since = self.since.max(oldest.until.next());
        }
    }
}

/// One VM's configuration in one generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct View {
    /// The VM's number.
    pub vm: VmId,
    /// The VM's name.
    pub name: String,
    /// Raised by the master at every change of owner or chain.
    pub generation: Generation,
    /// The one host that may run the VM and release its output.
    pub owner: HostId,
    /// Head first. Empty: not protected, recorded by the master before output may flow.
    pub chain: Vec<Member>,
    /// A replica that the tail is filling. It counts for nothing yet.
    pub joining: Option<Member>,
    /// What may be resumed from.
    pub history: History,
}

impl View {
    /// Position of `host` in the chain.
    #[must_use]
    pub fn position(&self, host: &HostId) -> Option<usize> {
        self.chain.iter().position(|m| m.host == *host)
    }

    /// Whether `host` is the one being filled.
    #[must_use]
    pub fn is_joining(&self, host: &HostId) -> bool {
        self.joining.as_ref().is_some_and(|m| m.host == *host)
    }

    /// Whether `host` holds a replica: a member of the chain, or about to be one.
    #[must_use]
    pub fn holds(&self, host: &HostId) -> bool {
        self.position(host).is_some() || self.is_joining(host)
    }

    /// Whether this configuration goes on from what the chain holds, rather than beginning anew.
    #[must_use]
    pub fn in_place(&self) -> bool {
        !self.chain.is_empty() && self.history.since < self.generation
    }
}

/// What a replica needs to hold a VM: image, mirrors, standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmShape {
    /// RAM.
    pub ram: Vec<RamRange>,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// What it may use of a processor: hosts that lack any of it cannot resume it.
    #[serde(default)]
    pub cpu: CpuFeatures,
    /// Disk sizes in bytes, in order.
    pub disks: Vec<u64>,
    /// Text of the VM's configuration.
    pub config_toml: String,
}

/// The master's record of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The configuration in force.
    pub view: View,
    /// What a replica needs.
    pub shape: VmShape,
    /// Every host that has had a part since an administrator chose some, the first owner first: whoever owns the VM wants
    /// the others as backups, however long they have been away.
    pub hosts: Vec<HostId>,
    /// The master's revision at the last change of this record: of two records of a VM the one with the higher is newer.
    pub revision: u64,
    /// Whether it is to run.
    pub life: Life,
    /// Where its newest disks are.
    pub disks: DiskPlace,
}

/// Whether a VM is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Life {
    /// Defined, or stopped by somebody's wish: it runs nowhere, and nobody may resume it.
    Off,
    /// Its owner runs it, or is about to; if the owner is lost, a replica resumes it.
    On,
}

/// Where a VM's newest disks are: always with its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlace {
    /// The host.
    pub host: HostId,
    /// The generation since which they are the newest.
    pub generation: Generation,
    /// While the VM is off: the last committed checkpoint that they include, if there was one.
    pub epoch: Option<Epoch>,
}

impl VmRecord {
    /// The hosts that `owner` wants as backups.
    #[must_use]
    pub fn wanted_by(&self, owner: &HostId) -> Vec<HostId> {
        let others = self.hosts.iter().filter(|host| *host != owner);
        others.cloned().collect()
    }

    /// The record with another configuration.
    pub(crate) fn entering(&self, view: View) -> Self {
        let mut next = self.clone();
        let members = view.chain.iter().chain(&view.joining);
        let hosts = members.map(|m| &m.host);
        for host in std::iter::once(&view.owner).chain(hosts) {
            if !next.hosts.contains(host) {
                next.hosts.push(host.clone());
            }
        }
        next.view = view;
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(generation: u64, epoch: u64) -> Mark {
        Mark {
            generation: Generation(generation),
            epoch: Epoch(epoch),
            digest: 0,
            held: true,
        }
    }

    #[test]
    fn i5_a_takeover_cuts_what_nobody_acknowledged() {
        let mut history = History::new(Generation(2));
        assert!(history.contains(mark(2, 20)));
        assert!(!history.contains(mark(1, 1)), "before it began");
        history.fork(Generation(4), Epoch(10));
        assert!(history.contains(mark(4, 10)) && history.contains(mark(3, 9)));
        assert!(!history.contains(mark(4, 11)) && !history.contains(mark(2, 11)));
        assert!(history.contains(mark(5, 11)), "the new owner's");
        // The next one resumes from less: it had not received all that the first one had.
        history.fork(Generation(5), Epoch(8));
        assert!(!history.contains(mark(4, 9)) && !history.contains(mark(5, 11)));
        assert!(history.contains(mark(4, 8)) && history.contains(mark(6, 9)));
        assert_eq!(history.forks.len(), 1, "the earlier one says nothing more");
    }

    #[test]
    fn a_long_history_is_bounded_and_what_it_forgets_does_not_count() {
        let mut history = History::new(Generation(1));
        for n in 1..=100 {
            history.fork(Generation(n), Epoch(n * 10));
        }
        assert_eq!(history.forks.len(), FORKS_MAX);
        assert!(!history.contains(mark(36, 1)));
        assert!(history.contains(mark(37, 370)) && !history.contains(mark(37, 371)));
    }
}
