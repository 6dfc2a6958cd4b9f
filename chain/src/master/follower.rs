//! What one host knows of the master's decisions, in their order: answers to its own proposals and snapshots arrive in any
//! order, and nothing older undoes what is newer. A state machine without I/O.

use std::collections::BTreeMap;

use checkpoint::{ClusterId, VmId};

use super::{Command, Snapshot};
use crate::view::VmRecord;

/// What is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Followed {
    /// Which cluster this host follows from now on; said once, first of all.
    Joined(ClusterId),
    /// A decision on a VM, newer than all before on the same VM.
    Decided(Box<VmRecord>),
    /// The master knows the VM no more; nothing will be said of it again.
    Removed(VmId),
    /// A snapshot is older than one before: the master has lost decisions. It was ignored. Said once until a newer one comes.
    Stale {
        /// In words, with the remedy.
        why: String,
    },
    /// A snapshot is another cluster's. It was ignored. Said once for each such cluster.
    Foreign {
        /// In words, with the remedy.
        why: String,
    },
}

/// The machine.
#[derive(Clone, Debug, Default)]
pub struct Follower {
    cluster: Option<ClusterId>,
    /// The newest snapshot's revision.
    revision: u64,
    known: BTreeMap<VmId, VmRecord>,
    /// VMs whose removal was answered, with its revision, until a snapshot includes that.
    removed: BTreeMap<VmId, u64>,
    said_stale: bool,
    said_foreign: Option<ClusterId>,
}

impl Follower {
    /// Of a host that belongs to that cluster; without one it joins the first that it hears of.
    #[must_use]
    pub fn new(cluster: Option<ClusterId>) -> Self {
        Self {
            cluster,
            ..Self::default()
        }
    }

    /// The newest revision of which everything is known: what a watch is to wait beyond.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The cluster, once it is known.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// What is known of a VM.
    #[must_use]
    pub fn record(&self, vm: VmId) -> Option<&VmRecord> {
        self.known.get(&vm)
    }

    /// All VMs known.
    pub fn records(&self) -> impl Iterator<Item = &VmRecord> {
        self.known.values()
    }

    /// The master's answer to a command of this host.
    pub fn answered(&mut self, command: &Command, record: &VmRecord) -> Vec<Followed> {
        let vm = record.view.vm;
        // A snapshot that is newer has it, or has what came after it.
        if record.revision <= self.revision {
            return Vec::new();
        }
        if let Command::Remove { .. } = command {
            let before = self.removed.insert(vm, record.revision);
            self.known.remove(&vm);
            return match before {
                Some(_) => Vec::new(),
                None => vec![Followed::Removed(vm)],
            };
        }
        if self.removed.contains_key(&vm) {
            return Vec::new();
        }
        self.decided(record).into_iter().collect()
    }

    /// Everything that the master had decided at one moment.
    pub fn snapshot(&mut self, snapshot: &Snapshot) -> Vec<Followed> {
        let mut news = Vec::new();
        match self.cluster {
            Some(cluster) if cluster != snapshot.cluster => {
                return self.foreign(cluster, snapshot).into_iter().collect();
            }
            Some(_) => {}
            None => {
                self.cluster = Some(snapshot.cluster);
                news.push(Followed::Joined(snapshot.cluster));
            }
        }
        if snapshot.revision < self.revision {
            news.extend(self.stale(snapshot));
            return news;
        }
        self.said_stale = false;
        self.revision = snapshot.revision;
        // First what is gone: its name may be another's by now.
        let here = |vm: &VmId| snapshot.records.iter().any(|r| r.view.vm == *vm);
        let gone: Vec<VmId> = self
            .known
            .values()
            .filter(|known| snapshot.revision > known.revision && !here(&known.view.vm))
            .map(|known| known.view.vm)
            .collect();
        for vm in gone {
            self.known.remove(&vm);
            news.push(Followed::Removed(vm));
        }
        let mut records: Vec<&VmRecord> = snapshot.records.iter().collect();
        records.sort_by_key(|record| record.revision);
        for record in records {
            if !self.removed.contains_key(&record.view.vm) {
                news.extend(self.decided(record));
            }
        }
        self.removed
            .retain(|_, revision| *revision > snapshot.revision);
        news
    }

    fn decided(&mut self, record: &VmRecord) -> Option<Followed> {
        let known = self.known.get(&record.view.vm);
        if known.is_some_and(|known| known.revision >= record.revision) {
            return None;
        }
        self.known.insert(record.view.vm, record.clone());
        Some(Followed::Decided(Box::new(record.clone())))
    }

    fn stale(&mut self, snapshot: &Snapshot) -> Option<Followed> {
        if std::mem::replace(&mut self.said_stale, true) {
            return None;
        }
        Some(Followed::Stale {
            why: format!(
                "the master is at revision {}, but has been at {} before: an old record was put back, and what was decided since is lost; VMs run on as they were, and no failover is certain until the newest record is restored",
                snapshot.revision, self.revision
            ),
        })
    }

    fn foreign(&mut self, ours: ClusterId, snapshot: &Snapshot) -> Option<Followed> {
        if self.said_foreign.replace(snapshot.cluster) == Some(snapshot.cluster) {
            return None;
        }
        Some(Followed::Foreign {
            why: format!(
                "the master that answers is of cluster {}, but this host belongs to cluster {ours}: its decisions count for nothing here (is `[master]` in host.toml right, or was the master's record begun anew?)",
                snapshot.cluster
            ),
        })
    }
}
