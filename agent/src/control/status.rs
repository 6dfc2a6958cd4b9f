//! What one host knows of one VM. Everything here is data; what it is called is [`super::words`]'s.

use serde::{Deserialize, Serialize};

use super::FailoverReport;
use crate::epoch::figures::{SyncFigures, Throttled};

/// The part that a host has in a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The VM is its own, whether it runs or not.
    Owner,
    /// It holds a replica.
    Replica,
    /// The VM is off, and its newest disks are there.
    Off,
    /// It runs a clone of a VM.
    Clone,
    /// None, though it should hold a replica.
    #[default]
    None,
}

/// How a VM is, as one host sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Owner: any one host may die.
    Protected,
    /// The same, and one more backup is being filled ([`VmStatus::joining`]).
    Joining,
    /// The same, and the guest waits for its chain, which takes less than it writes.
    Slow(Throttled),
    /// Owner: protected by fewer backups than were asked for ([`VmStatus::lacking`] has the others).
    Degraded {
        /// By so many.
        backups: usize,
        /// Of so many.
        wanted: usize,
    },
    /// Owner, after a takeover: protected, and output is held until the backups have what they lacked.
    OutputHeld,
    /// Owner: the first checkpoint is on its way ([`VmStatus::sync`] says how far it is).
    Synchronising,
    /// Owner: no backups are wanted.
    Unprotected,
    /// Owner: none of the backups that are wanted is there ([`VmStatus::lacking`] has them).
    Alone,
    /// Owner: not protected, for this cause.
    Troubled {
        /// In words.
        why: String,
    },
    /// The guest has ended.
    Ended {
        /// In words.
        how: String,
    },
    /// It is this host's and has no process.
    NotRunning {
        /// What is being done about it, in words.
        why: String,
    },
    /// Nobody runs it, by somebody's wish.
    Off,
    /// This host should hold a replica, and cannot.
    Declined {
        /// In words.
        why: String,
    },
    /// This host holds a replica.
    Replica(ReplicaHealth),
    /// A clone, which nobody backs up.
    Clone {
        /// Of this VM.
        of: String,
        /// From this checkpoint on.
        epoch: u64,
        /// How its guest ended, if it has.
        ended: Option<String>,
    },
    /// Nothing is known.
    #[default]
    Unknown,
}

/// How a replica is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaHealth {
    /// It could take the VM over now.
    StandingBy,
    /// The same, and it fills the one that joins.
    Filling {
        /// Pages sent so far.
        pages_sent: u64,
        /// Disk blocks sent so far.
        blocks_sent: u64,
        /// Disk blocks that were there already.
        blocks_equal: u64,
        /// Bytes left to look at.
        left_bytes: u64,
    },
    /// It is being filled by the tail, while the others go on.
    Joining,
    /// It is being filled with a chain that begins.
    Synchronising,
    /// It holds still while the master decides on a takeover.
    Frozen,
    /// It gave itself up rather than acknowledge what it does not hold.
    Failed {
        /// In words.
        why: String,
    },
    /// There is none.
    Absent,
}

/// Something that does not keep a VM from being what it should be, and will when the wrong host dies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Warning {
    /// The only master of the cluster is on a host that has a part in the VM: if that host dies nobody decides who takes over,
    /// or which chain is left, and output is held until it is back.
    MasterInChain {
        /// The host.
        host: String,
    },
    /// A disk of the VM fails on the host that runs it, or does not answer.
    Disk {
        /// In words.
        why: String,
    },
}

/// One replica as its host or the owner sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Host name.
    pub host: String,
    /// Chain server.
    pub addr: String,
    /// What is known of its replica on this host, if anything is.
    pub replica: Option<ReplicaHealth>,
}

/// One VM as one host sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Name.
    pub name: String,
    /// The host that answers.
    pub host: String,
    /// Its part.
    pub role: Role,
    /// Whether a host may die without the VM being lost.
    pub protected: bool,
    /// How it is, as far as this host knows.
    pub health: Health,
    /// Something is under way that makes the VM safer, or finds out why it cannot be.
    pub pending: bool,
    /// Owner: hosts that should back the VM up and do not, with the reason as far as it is known.
    pub lacking: Vec<(String, Option<String>)>,
    /// What will matter when the wrong host dies.
    pub warnings: Vec<Warning>,
    /// Owner.
    pub owner: String,
    /// Chain, head first.
    pub chain: Vec<MemberStatus>,
    /// The host that is being filled to become the chain's tail.
    pub joining: Option<String>,
    /// Generation.
    pub generation: u64,
    /// Newest epoch that is safe, as this host knows it.
    pub epoch: u64,
    /// Process id of the VM or standby on that host, 0 if none.
    pub pid: u32,
    /// Owner: milliseconds that the oldest checkpoint under way has been waiting for its commit; 0: none is.
    pub lag_ms: u64,
    /// Owner: milliseconds since the last commit.
    pub since_commit_ms: Option<u64>,
    /// Owner: how long output was held, in microseconds: 99th percentile, the highest of the last some hundred epochs.
    pub held_p99_us: u64,
    /// Owner: how far the first synchronisation of its chain is, during it.
    pub sync: Option<SyncFigures>,
    /// The last failover to this host.
    pub failover: Option<FailoverReport>,
}
