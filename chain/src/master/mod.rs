//! The master: decides chains, owners and generations. One trait, several engines: [`LocalMaster`] for one host,
//! [`PaxosMaster`] for several, and with feature `etcd` one that keeps its decisions there.

mod client;
mod command;
#[cfg(feature = "etcd")]
mod etcd;
mod follower;
mod local;
mod paxos;
mod record;
mod server;
mod state;
mod wanted;

use std::net::SocketAddr;
use std::time::Duration;

use checkpoint::{HostId, HostUuid, RequestId};

pub use client::RemoteMaster;
pub use command::{
    Begin, Command, DisksFrom, HostRecord, Order, Outcome, Reply, Request, Snapshot,
};
#[cfg(feature = "etcd")]
pub use etcd::{EtcdMaster, EtcdOptions};
pub use follower::{Followed, Follower};
pub use local::LocalMaster;
pub use paxos::PaxosMaster;
pub use server::MasterServer;
pub use state::{CHAIN_MAX, MasterState, Rejection};
pub use wanted::Wanted;

use crate::view::VmRecord;

/// Why the master did not answer as hoped.
#[derive(Debug, thiserror::Error)]
pub enum MasterError {
    /// The change was refused; nothing has changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// It may have been carried out, or not: [`Master::outcome`] says which.
    #[error("unknown whether it was done: {why} (request {id}: ask again)")]
    Unknown {
        /// The request.
        id: RequestId,
        /// Why nothing is known.
        why: String,
    },
    /// It was done before.
    #[error(
        "the change was done, as revision {revision}, but later ones hide what was answered; ask for the VM's record"
    )]
    Superseded {
        /// The master's revision then.
        revision: u64,
    },
    /// Whoever asked does not wait any more: nothing was done.
    #[error("whoever asked has given up")]
    GivenUp,
    /// There is no record, and none may be begun.
    #[error(
        "there is no master's record {place}: it has been lost, or what it is on is not mounted. A new cluster is begun by order only, with `understudy init`; a cluster that exists needs its record back"
    )]
    NotBegun {
        /// Where it should be.
        place: String,
    },
    /// The master cannot be reached: nothing was asked of it.
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
    /// The master's record cannot be written: it decides nothing until it can.
    #[error("the master's record {path}: {why}")]
    Storage {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        why: String,
    },
    /// There is no room for the master's record: it decides nothing until there is.
    #[error("the master's record {path}: {why}")]
    NoRoom {
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
    /// Carries a request out, if it is `wanted` still when its turn comes; one that was answered before is answered the
    /// same and not carried out again.
    ///
    /// # Errors
    /// [`MasterError::Rejected`] if it does not fit what has been decided meanwhile. [`MasterError::Unknown`] if it may have
    /// been carried out and may not.
    fn request(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError>;

    /// Everything decided so far, once its revision exceeds `since`; after `timeout` whatever it is.
    ///
    /// # Errors
    /// [`MasterError::Unreachable`] or [`MasterError::Storage`].
    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError>;

    /// Whether decisions are made here: always, except by a member of several that does not lead them now.
    fn leads(&self) -> bool {
        true
    }

    /// What keeps it from deciding here, in words; `None`: nothing that it knows of.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Everything decided so far.
    ///
    /// # Errors
    /// As [`Master::watch`].
    fn read(&self) -> Result<Snapshot, MasterError> {
        self.watch(0, Duration::ZERO)
    }

    /// Decides on a change; returns the VM's record after it.
    ///
    /// # Errors
    /// As [`Master::request`].
    fn propose(&self, command: &Command) -> Result<VmRecord, MasterError> {
        let request = Request::new(Order::Vm(command.clone()));
        match self.request(&request, &Wanted::always())? {
            Reply::Vm(record) => Ok(*record),
            Reply::Done { revision } => Err(MasterError::Superseded { revision }),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a host known, under an identity of its own.
    ///
    /// # Errors
    /// [`Rejection::HostTaken`] if another has that name; else as [`Master::request`].
    fn enroll(
        &self,
        host: &HostId,
        id: HostUuid,
        addr: SocketAddr,
    ) -> Result<HostRecord, MasterError> {
        let host = host.clone();
        self.about_host(Order::Enroll { host, id, addr })
    }

    /// A host is gone for good: another may take its name. Returns what it was.
    ///
    /// # Errors
    /// [`Rejection::UnknownHost`]; else as [`Master::request`].
    fn forget(&self, host: &HostId) -> Result<HostRecord, MasterError> {
        self.about_host(Order::Forget { host: host.clone() })
    }

    #[doc(hidden)]
    fn about_host(&self, order: Order) -> Result<HostRecord, MasterError> {
        match self.request(&Request::new(order), &Wanted::always())? {
            Reply::Host(record) => Ok(record),
            Reply::Done { revision } => Err(MasterError::Superseded { revision }),
            other => Err(unexpected(&other)),
        }
    }

    /// What became of a request. If it has not been carried out, it never will be.
    ///
    /// # Errors
    /// As [`Master::request`].
    fn outcome(&self, request: RequestId) -> Result<Outcome, MasterError> {
        let ask = Request::new(Order::Settle { request });
        match self.request(&ask, &Wanted::always())? {
            Reply::Outcome(outcome) => Ok(outcome),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(reply: &Reply) -> MasterError {
    MasterError::Stopped(format!("unexpected answer {reply:?}"))
}
