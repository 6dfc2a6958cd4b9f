//! Requests and replies on the control socket (over [`crate::ipc`]).

use checkpoint::RequestId;
use serde::{Deserialize, Serialize};

use super::status::VmStatus;
use crate::config::{Change, Takes};
use crate::epoch::EpochStats;

/// A request with its id: an order that is given again under the same id is answered as the first time, and not carried out
/// twice.
#[derive(Debug, Serialize, Deserialize)]
pub struct Asked {
    /// Drawn by the asker.
    pub id: RequestId,
    /// What is asked.
    pub request: Request,
}

/// What can be asked of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Boot a VM on this host, unprotected for now.
    Start {
        /// Text of its `vm.toml`.
        toml: String,
        /// The file's name, for messages.
        name: String,
    },
    /// Protect a running VM of this host by these backups (its configuration's when empty).
    Protect {
        /// The VM.
        vm: String,
        /// Host names, head first.
        backups: Vec<String>,
    },
    /// A VM of this host is to have no backups any more.
    Unprotect {
        /// The VM.
        vm: String,
    },
    /// Define a VM, or give one of this host another configuration; answers with [`Reply::Applied`].
    Apply {
        /// Text of its `vm.toml`.
        toml: String,
        /// The file's name, for messages.
        name: String,
        /// Only say what would be changed.
        dry_run: bool,
    },
    /// What became of an order that was given under this id; answers as that order does.
    Outcome {
        /// The order's.
        id: RequestId,
    },
    /// Boot a VM that is off, from its newest disks, which are on this host.
    StartAgain {
        /// The VM.
        vm: String,
    },
    /// The cluster forgets a VM that is off. Its disks stay.
    Delete {
        /// The VM.
        vm: String,
    },
    /// A VM of this host is to run nowhere from now on; its disks stay its newest.
    Stop {
        /// The VM.
        vm: String,
    },
    /// The guest of a VM of this host is asked to switch itself off; answered once the VM is off.
    ShutDown {
        /// The VM.
        vm: String,
        /// How long it may take.
        timeout_s: u64,
    },
    /// The guest of a VM of this host boots again, in place; answered once it does.
    Reboot {
        /// The VM.
        vm: String,
        /// How long it may take to switch itself off; none: it is reset at once.
        timeout_s: Option<u64>,
    },
    /// What this host knows of its VMs.
    Status,
    /// A VM's epoch figures since the last such request.
    Stats {
        /// The VM.
        vm: String,
    },
    /// What the vCPUs of a VM (or standby) on this host are at.
    Inspect {
        /// The VM.
        vm: String,
    },
    /// Take the VM over on this host, which holds a replica of it.
    Failover {
        /// The VM.
        vm: String,
    },
    /// Boot a VM that runs nowhere from this host's copy of its disks, without waiting for other hosts.
    Recover {
        /// The VM.
        vm: String,
    },
    /// Planned switchover of a VM of this host to its head; answers with [`Reply::Switched`].
    HandOver {
        /// The VM.
        vm: String,
    },
    /// Kill the process of a VM of this host, to see a backup take over; answers with [`Reply::Switched`].
    Drill {
        /// The VM.
        vm: String,
    },
    /// Which checkpoints of a VM the chain's tail has; answers with [`Reply::Points`].
    Points {
        /// The VM.
        vm: String,
    },
    /// Start a clone of a VM, whose replica this host holds, from a checkpoint of the past.
    Rewind {
        /// The VM.
        vm: String,
        /// Which checkpoint.
        epoch: u64,
        /// The clone's name.
        clone: String,
        /// This host's network for its cards; none: they are connected to nothing.
        network: Option<String>,
    },
    /// Whether the master, or its member that leads, is on this host; answers with [`Reply::Leads`].
    Leads,
    /// Events after number `since` (0: all kept).
    Events {
        /// The last number seen.
        since: u64,
    },
    /// Bench: harvest the dirty log every `ms` without copying or sending (0: stop).
    HarvestOnly {
        /// The VM.
        vm: String,
        /// Period.
        ms: u64,
    },
    /// Bench and tests: change the epoch lengths.
    EpochMs {
        /// The VM.
        vm: String,
        /// Longest.
        ms: u64,
        /// Shortest with output waiting.
        min_ms: u64,
    },
}

impl Request {
    /// Whether it is to change something: then its outcome is kept under its id.
    #[must_use]
    pub fn is_order(&self) -> bool {
        !matches!(
            self,
            Self::Status
                | Self::Stats { .. }
                | Self::Inspect { .. }
                | Self::Points { .. }
                | Self::Leads
                | Self::Events { .. }
                | Self::Outcome { .. }
                | Self::HarvestOnly { .. }
                | Self::EpochMs { .. }
        )
    }
}

/// An agent's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Ok,
    /// Not done, and why.
    Error(String),
    /// Nobody knows yet whether it will have been done.
    Unknown {
        /// To ask with.
        id: RequestId,
        /// In words.
        why: String,
    },
    /// Answer to [`Request::Apply`].
    Applied(Applied),
    /// Another host owns the VM now.
    Switched(Switched),
    /// Answer to [`Request::Leads`].
    Leads(bool),
    /// Answer to [`Request::Points`], oldest first.
    Points(Vec<Point>),
    /// Answer to [`Request::Status`].
    Status(Vec<VmStatus>),
    /// Answer to [`Request::Stats`].
    Stats(Box<EpochStats>),
    /// Answer to [`Request::Inspect`].
    Vcpus(Vec<vmm::VcpuReport>),
    /// Answer to [`Request::Events`].
    Events(Vec<Event>),
}

/// What a configuration has changed, or would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The VM.
    pub vm: String,
    /// There was none of that name: it is defined now.
    pub defined: bool,
    /// The VM runs, so that not everything could be changed.
    pub runs: bool,
    /// What differs; of a new VM nothing.
    pub changes: Vec<Change>,
}

impl Applied {
    /// What stays as it was.
    pub fn left(&self) -> impl Iterator<Item = &Change> {
        let left = |change: &&Change| self.runs && change.takes == Takes::WhileOff;
        self.changes.iter().filter(left)
    }
}

/// A checkpoint that the chain's tail has.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Its epoch.
    pub epoch: u64,
    /// The generation it was sent in.
    pub generation: u64,
    /// Its digest.
    pub digest: u32,
}

/// A VM that this host gave away.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Switched {
    /// Who owns it now.
    pub owner: String,
    /// The new generation.
    pub generation: u64,
    /// Milliseconds from the order, or from the kill, until the master had decided.
    pub decided_ms: f64,
}

/// One failover, in CLOCK_MONOTONIC microseconds of the host that took over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// The VM.
    pub vm: String,
    /// Why: silence, or an administrator's order.
    pub cause: String,
    /// The new generation.
    pub generation: u64,
    /// The checkpoint resumed from.
    pub epoch: u64,
    /// Silence on the checkpoint stream before the suspicion, milliseconds.
    pub silence_ms: u64,
    /// Suspected, the replica frozen.
    pub suspected_us: u64,
    /// The master has decided.
    pub decided_us: u64,
    /// Memory and mirrors at the checkpoint, the standby told.
    pub handed_us: u64,
    /// vCPU and device state restored.
    pub restored_us: u64,
    /// The guest runs.
    pub running_us: u64,
}

/// What kind of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// A VM was started here.
    Started,
    /// The first checkpoint of a configuration is committed.
    Protected,
    /// A standby for a VM is instantiated and waiting.
    StandbyReady,
    /// Silence on a checkpoint stream.
    Suspected,
    /// The master gave this host the VM.
    Decided,
    /// The VM runs here now.
    Activated,
    /// The master gave the VM to another host, or refused.
    Refused,
    /// The owner lost (part of) its chain.
    ChainLost,
    /// A replica that was joining a chain has everything.
    Joined,
    /// This host gave its VM away, by an administrator's wish.
    HandedOver,
    /// A clone was started from a checkpoint of the past.
    Cloned,
    /// This host's VM was superseded and has been stopped.
    Superseded,
    /// This host's replica is back, with what it held before its agent was started again.
    Returned,
    /// A VM's process that outlived its agent is this agent's now.
    Adopted,
    /// This host owns a VM that runs nowhere: its process ended with the agent.
    Orphaned,
    /// The guest ended.
    GuestEnded,
    /// The VM is off, by somebody's wish.
    PoweredOff,
    /// The VM has no backups any more, by somebody's wish.
    Unprotected,
    /// The VM's configuration was changed.
    Changed,
    /// The guest was reset and boots again in place.
    Rebooted,
    /// The owner's own disk refuses, or does not answer, requests.
    DiskTrouble,
    /// A tap, its bridge or its link is not as it should be, or has been put right.
    Network,
    /// The VM is less safe, or slower, than it was asked to be.
    Degraded,
    /// Something failed.
    Failed,
}

/// One event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Number, ascending from 1.
    pub number: u64,
    /// CLOCK_MONOTONIC, microseconds.
    pub at_us: u64,
    /// What.
    pub kind: EventKind,
    /// The VM.
    pub vm: String,
    /// In words.
    pub text: String,
}
