//! The master: decides chains, owners and generations. One trait, several engines: [`LocalMaster`] for one host,
//! [`PaxosMaster`] for several, and with feature `etcd` one that keeps its decisions there.

mod client;
#[cfg(feature = "etcd")]
mod etcd;
mod local;
mod paxos;
mod server;
mod state;

use std::time::Duration;

use checkpoint::{Generation, HostId, VmId};
use serde::{Deserialize, Serialize};

pub use client::RemoteMaster;
#[cfg(feature = "etcd")]
pub use etcd::{EtcdMaster, EtcdOptions};
pub use local::LocalMaster;
pub use paxos::PaxosMaster;
pub use server::MasterServer;
pub use state::{MasterState, Rejection};

use crate::mark::Mark;
use crate::view::{Member, VmRecord, VmShape};

/// A change asked of the master. Each names the generation it is based on: compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A new VM, owned by `owner`, not protected.
    Register {
        /// Its name, free so far.
        name: String,
        /// Its first owner.
        owner: HostId,
        /// What a replica needs.
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
    /// The owner ends the VM.
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

/// What has been decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Raised by every change.
    pub revision: u64,
    /// All VMs.
    pub records: Vec<VmRecord>,
}

/// Why the master did not answer as hoped.
#[derive(Debug, thiserror::Error)]
pub enum MasterError {
    /// The change was refused; nothing has changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The master cannot be reached: nothing is known of the change.
    #[error(
        "the master at {addr} does not answer: {why} (is its agent running, and is `master.connect` in host.toml right?)"
    )]
    Unreachable {
        /// Where.
        addr: std::net::SocketAddr,
        /// Why.
        why: String,
    },
    /// The master answers, but cannot decide.
    #[error("the master at {addr} cannot decide: {why}")]
    Engine {
        /// Where.
        addr: std::net::SocketAddr,
        /// Why.
        why: String,
    },
    /// None of several masters answered as hoped.
    #[error("{}", several(.0))]
    Several(Vec<MasterError>),
    /// Another process decides from the same record.
    #[error(
        "the master's record in {dir} is in use by another process; give each agent a data directory of its own"
    )]
    InUse {
        /// The directory.
        dir: std::path::PathBuf,
    },
    /// The master's storage failed: it has stopped deciding.
    #[error("the master's record {path}: {why}")]
    Storage {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        why: String,
    },
    /// Too few members of the master answer each other, or not soon enough: nothing is known of the change.
    #[error("no decision: {answering} of {members} members of the master answer{}", majority(*answering, *members))]
    NoDecision {
        /// Members that answer the one that was asked, itself included.
        answering: usize,
        /// All.
        members: usize,
    },
    /// No member of etcd answers as hoped: nothing is known of the change.
    #[error(
        "etcd does not decide: {0} (is a majority of its members up, and is `master.etcd` in host.toml right?)"
    )]
    Etcd(String),
    /// The member of the master that was asked does not decide.
    #[error("the master: {0}")]
    Stopped(String),
    /// The master's members are not named as they must be.
    #[error("[master] members: {0}")]
    Membership(String),
    /// The master's address cannot be used.
    #[error(
        "master: cannot listen on {addr}: {why} (is another agent running, or is `master.serve` in host.toml not an address of this host?)"
    )]
    Bind {
        /// The address.
        addr: std::net::SocketAddr,
        /// Why.
        why: String,
    },
}

fn several(errors: &[MasterError]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

fn majority(answering: usize, members: usize) -> String {
    let needed = members / 2 + 1;
    if answering < needed {
        format!(", {needed} are needed")
    } else {
        ", but not in time (is one of them just taking the lead, or its disk slow?)".into()
    }
}

/// An engine. Decisions are linearizable: a proposal that was answered is seen by every later read.
pub trait Master: Send + Sync {
    /// Decides on a change; returns the VM's record after it.
    ///
    /// # Errors
    /// [`MasterError::Rejected`] if it does not fit what has been decided meanwhile.
    fn propose(&self, command: &Command) -> Result<VmRecord, MasterError>;

    /// Everything decided so far, once its revision exceeds `since`; after `timeout` whatever it is.
    ///
    /// # Errors
    /// [`MasterError::Unreachable`] or [`MasterError::Storage`].
    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError>;

    /// Whether decisions are made here: always, except by a member of several that does not lead them now.
    fn leads(&self) -> bool {
        true
    }

    /// Everything decided so far.
    ///
    /// # Errors
    /// As [`Master::watch`].
    fn read(&self) -> Result<Snapshot, MasterError> {
        self.watch(0, Duration::ZERO)
    }
}
