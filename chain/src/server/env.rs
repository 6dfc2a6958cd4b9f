//! What every part of the server has at hand: its settings, its clock, and where it tells what happens.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, HostId, VmId};

use crate::kept::Kept;
use crate::mark::Mark;
use crate::replica::State;
use crate::store::{Filled, StoreError};
use crate::view::View;

/// Settings of a chain server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// This host.
    pub host: HostId,
    /// Mirrors, activation records and logs go below this directory.
    pub data_dir: PathBuf,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Silence, in heartbeat intervals, before the predecessor is suspected.
    pub missed: u32,
    /// Files in here are given to whoever knows their digest, which is their name; none: there are none.
    pub files: Option<PathBuf>,
}

/// What the server tells its agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEvent {
    /// Silence on a VM's checkpoint stream.
    Suspect {
        /// The VM.
        vm: VmId,
        /// How long, in milliseconds; 0: the owner has stopped the VM and yields it.
        silence_ms: u64,
    },
    /// A replica has declared itself failed.
    Failed {
        /// The VM.
        vm: VmId,
        /// Why.
        why: String,
    },
}

/// Why the server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address is taken or not ours.
    #[error(
        "chain server: cannot listen on {addr}: {source} (is another agent running, or is `listen` in host.toml not an address of this host?)"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("chain server: starting a thread: {0}")]
    Thread(io::Error),
    /// No replica of that VM is here.
    #[error("this host holds no replica of VM {0}")]
    Unknown(VmId),
    /// The replica has declared itself failed.
    #[error("this host's replica has failed: {0}")]
    Failed(String),
    /// The replica is still joining.
    #[error("{0}")]
    Joining(String),
    /// The replica has been waited for so long, and its disk hangs, most likely.
    #[error(
        "this host's replica is busy with its disk, for more than {} ms now: the disk hangs, or is very slow",
        .0.as_millis()
    )]
    Busy(Duration),
    /// There is another replica in that directory, whose disk hangs.
    #[error(
        "{0}: an earlier replica is still busy with its disk, which hangs: it has to come back before another one can be made"
    )]
    Hangs(String),
    /// A name that cannot be a directory's.
    #[error("a VM cannot be named {0:?}: its disks' directory bears that name")]
    Name(String),
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One replica, for `status`.
#[derive(Clone, Debug)]
pub struct ReplicaStatus {
    /// The configuration followed.
    pub view: View,
    /// Where it stands.
    pub state: State,
    /// Newest processed checkpoint; none while synchronising.
    pub epoch: Option<Epoch>,
    /// Newest checkpoint that the tail is known to have.
    pub acked: Option<Epoch>,
    /// Why it failed, if it has.
    pub failed: Option<String>,
    /// How far it has filled a joining replica, while it does.
    pub filling: Option<Filled>,
    /// Outcome of the last joining replica filled.
    pub filled: Option<Filled>,
    /// How long the frame in hand has been handled, in milliseconds; 0: none is.
    pub busy_ms: u64,
}

/// A VM's state, handed over to the process that will run it.
#[derive(Debug)]
pub struct Handover {
    /// The checkpoint.
    pub epoch: Epoch,
    /// Exactly which one: a chain whose replicas hold the same can go on from it.
    pub mark: Mark,
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// The mirrors' files.
    pub disks: Vec<PathBuf>,
    /// The image's files; the standby has them already.
    pub ram: Vec<OwnedFd>,
    /// What those after this replica may lack: see [`crate::bridge`].
    pub kept: Kept,
}

/// What a replica's driver needs of the server it belongs to.
pub(super) struct Env {
    pub(super) options: ServerOptions,
    pub(super) events: Sender<ServerEvent>,
    started: Instant,
}

impl Env {
    pub(super) fn new(options: ServerOptions, events: Sender<ServerEvent>) -> Self {
        Self {
            options,
            events,
            started: Instant::now(),
        }
    }

    /// Milliseconds since the server began.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), ServerError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
        .map_err(ServerError::Thread)
}
