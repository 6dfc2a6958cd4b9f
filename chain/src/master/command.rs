//! What can be asked of the master, and what it answers.

use std::net::SocketAddr;

use checkpoint::{ClusterId, Epoch, Generation, HostId, HostUuid, RequestId, VmId};
use serde::{Deserialize, Serialize};

use super::Rejection;
use crate::mark::Mark;
use crate::view::{Life, Member, VmRecord, VmShape};

/// A change of one VM. Each but the first names the generation it is based on: compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A new VM, owned by `owner`, not protected.
    Register {
        /// Its id, drawn by the asker: no other VM of this cluster has it, nor its short form.
        vm: VmId,
        /// Its name, free so far.
        name: String,
        /// Its first owner, where its disks are.
        owner: HostId,
        /// What a replica needs.
        shape: VmShape,
        /// Whether the owner is about to boot it, or only defines it.
        life: Life,
    },
    /// A VM that is off is about to be booted by `by`, its owner from now on.
    Start {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// Who boots it.
        by: HostId,
        /// From which disks.
        from: DisksFrom,
    },
    /// The VM does not run any more, by somebody's wish: its owner's disks are its newest, and nobody may resume it. What
    /// replicas hold does not count from here on; its history begins anew at its next start.
    PowerOff {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// The owner.
        by: HostId,
        /// The last checkpoint that was committed, if there was one.
        at: Option<Epoch>,
    },
    /// A changed configuration, of the same name. What a replica lays out (memory, processors, disks) can change only
    /// while the VM is off.
    Update {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// The owner.
        by: HostId,
        /// What is to be from now on.
        shape: VmShape,
    },
    /// The owner's wish for another chain; empty: not protected any more.
    Reconfigure {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// The owner, who alone may ask.
        by: HostId,
        /// The new chain, head first. In place it is what is left of the old one in its order, and perhaps the
        /// replica that was joining at its end.
        chain: Vec<Member>,
        /// A replica for the tail to fill; no member of the chain.
        joining: Option<Member>,
        /// Begin anew: what replicas hold does not count any more, because output may flow before the chain is filled.
        /// Otherwise the owner goes on holding and the chain goes on from what it has.
        anew: bool,
    },
    /// A replica asks for ownership. The replicas after it stay; those before it may hold more than it has, which is no
    /// part of the VM's history any more.
    TakeOver {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// A member of that generation's chain, frozen.
        by: HostId,
        /// The checkpoint it resumes from.
        at: Mark,
    },
    /// The owner ends the VM: the cluster forgets it.
    Remove {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// The owner.
        by: HostId,
    },
    /// An administrator chooses the hosts that the VM is to have as backups from now on. Changes nothing at once.
    Choose {
        /// The VM.
        vm: VmId,
        /// The owner.
        by: HostId,
        /// The others.
        backups: Vec<HostId>,
    },
    /// Nobody can resume the VM any more: `by`, the owner or a member of the chain, boots it from its own disks. From
    /// here on no checkpoint and no other disk counts.
    Restart {
        /// The VM.
        vm: VmId,
        /// The generation it is based on.
        expect: Generation,
        /// Who boots it.
        by: HostId,
    },
}

impl Command {
    /// The VM that is to change.
    #[must_use]
    pub fn vm(&self) -> VmId {
        match self {
            Self::Register { vm, .. }
            | Self::Start { vm, .. }
            | Self::PowerOff { vm, .. }
            | Self::Update { vm, .. }
            | Self::Reconfigure { vm, .. }
            | Self::TakeOver { vm, .. }
            | Self::Remove { vm, .. }
            | Self::Choose { vm, .. }
            | Self::Restart { vm, .. } => *vm,
        }
    }
}

/// Which disks a VM is started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DisksFrom {
    /// The newest, which this host has.
    Newest,
    /// A complete copy of the newest, made while the VM was off in this very generation.
    Copied,
    /// Older ones: an administrator gives up what only the newest have.
    Older,
}

/// Anything that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// A change of a VM.
    Vm(Command),
    /// An agent makes its host known, at each of its starts.
    Enroll {
        /// Its name.
        host: HostId,
        /// Its own identity: a second one under the same name is refused.
        id: HostUuid,
        /// Its chain server.
        addr: SocketAddr,
    },
    /// A host is gone for good: another may take its name.
    Forget {
        /// Its name.
        host: HostId,
    },
    /// Whether that request was carried out. If it was not, it never will be.
    Settle {
        /// The request.
        request: RequestId,
    },
}

/// An order with a name: asked again under the same id it is answered as the first time and not carried out twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// What is asked for.
    pub order: Order,
}

impl Request {
    /// A new one.
    #[must_use]
    pub fn new(order: Order) -> Self {
        Self {
            id: RequestId::random(),
            order,
        }
    }
}

/// What an order is answered with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The VM's record after the change; after a removal the last one, with the removal's revision.
    Vm(Box<VmRecord>),
    /// The host as it is known, or was.
    Host(HostRecord),
    /// It was done before, with that revision; later changes hide what was answered then.
    Done {
        /// The master's revision then.
        revision: u64,
    },
    /// What became of a request.
    Outcome(Outcome),
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was carried out.
    Done {
        /// The master's revision then.
        revision: u64,
    },
    /// It was refused; nothing has changed.
    Refused(Rejection),
    /// The master has never seen it, and will not carry it out any more. (Or it has been forgotten: only so many are
    /// remembered.)
    Never,
}

/// A host of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Its name.
    pub host: HostId,
    /// Its own identity.
    pub id: HostUuid,
    /// Its chain server.
    pub addr: SocketAddr,
    /// The master's revision when it was enrolled under this identity.
    pub since: u64,
}

/// What has been decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Whose decisions these are.
    pub cluster: ClusterId,
    /// Raised by every change.
    pub revision: u64,
    /// All VMs.
    pub records: Vec<VmRecord>,
    /// All hosts.
    pub hosts: Vec<HostRecord>,
}

/// Whether a master without a record may begin one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// No: where there is no record, one has been lost, or its directory is not mounted.
    Existing,
    /// Yes: by order of an administrator, who sets a new cluster up. A record that is there is used as it is.
    New,
}
