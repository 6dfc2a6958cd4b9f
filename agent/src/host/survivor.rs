//! A VM's process that has outlived its agent, before the next agent has a machine for it: what becomes of it.

use chain::View;
use chain::master::Snapshot;
use checkpoint::HostId;

use crate::child::proto::Owns;

/// What the master's decisions say of a process that was found running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate<'a> {
    /// The VM is this host's: its machine adopts the process.
    Ours,
    /// Another host owns the VM, in this configuration: the process ends.
    Elsewhere(&'a View),
    /// The VM was deleted, and its process not told: it ends.
    Deleted,
    /// The master has never known the VM, or does not any more without having been told to: its record may be lost, and the
    /// VM with it must not be. The process is left alone.
    Unknown,
}

impl<'a> Fate<'a> {
    /// What the decisions up to `snapshot` say of the process that is described by `owns`, on this host.
    ///
    /// Revisions of one cluster only grow. So a master that is as new as the record that the process was started by knew
    /// the VM once, and has been told to forget it if it does not now; an older one has lost decisions.
    #[must_use]
    pub fn of(owns: &Owns, here: &HostId, snapshot: &'a Snapshot) -> Self {
        let record = snapshot.records.iter().find(|r| r.view.vm == owns.vm);
        let Some(view) = record.map(|record| &record.view) else {
            let knew = snapshot.cluster == owns.registered.cluster
                && snapshot.revision >= owns.registered.revision;
            return match knew {
                true => Self::Deleted,
                false => Self::Unknown,
            };
        };
        match view.owner == *here {
            true => Self::Ours,
            false => Self::Elsewhere(view),
        }
    }
}
