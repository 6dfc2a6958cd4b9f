//! What all parts of an agent share. Nothing here changes, or it locks itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chain::ReplicaServer;
use chain::master::Master;
use checkpoint::{HostId, VmId};

use super::boot_files::BootFiles;
use super::events::EventLog;
use super::found::Found;
use crate::config::HostConfig;
use crate::engine::Served;
use crate::identity::Identity;

/// Of one agent.
pub(super) struct Env {
    pub config: HostConfig,
    pub host: HostId,
    /// The other hosts' chain servers.
    pub peers: Arc<BTreeMap<HostId, SocketAddr>>,
    pub master: Arc<dyn Master>,
    /// The master, or its member, on this host.
    pub serving: Served,
    pub replicas: ReplicaServer,
    pub events: EventLog,
    pub identity: Mutex<Identity>,
    /// Why this host must not start VMs: until the master knows it under this identity.
    pub stranger: Mutex<Option<String>>,
    /// Kernels and initrds, by content.
    pub boot_files: BootFiles,
    /// VM processes that an agent before this one has left running.
    pub found: Mutex<BTreeMap<VmId, Found>>,
}

impl Env {
    /// Where VM processes wait for an agent.
    pub fn run_dir(&self) -> PathBuf {
        self.config.data_dir.join("run")
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panics ends the process (see `vital`), so a poisoned lock is never met.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process if the thread that holds it panics.
struct Vital(&'static str);

impl Drop for Vital {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("the agent cannot go on without its thread {:?}", self.0);
            std::process::abort();
        }
    }
}

/// Starts a thread that the agent cannot do without: if it panics the process ends, and whoever watches over it starts it
/// again. A VM that its agent silently hears no more is worse.
///
/// # Errors
/// When there is no thread to be had.
pub(super) fn vital(
    name: &'static str,
    run: impl FnOnce() + Send + 'static,
) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let _vital = Vital(name);
            run();
        })
        .map(drop)
}
