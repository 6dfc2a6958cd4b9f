//! The agent: one per host. Replicas for other hosts' VMs, processes for its own, and the road from one to the other.

mod bridge;
mod child;
mod control;
mod events;
mod failover;
mod reconcile;
mod repair;
mod reprotect;
mod restart;
mod rewind;
mod status;
mod switch;
mod vms;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chain::master::Master;
use chain::{ReplicaServer, ServerError, ServerOptions};
use checkpoint::{HostId, VmId};

use crate::config::{ConfigError, HostConfig};
use crate::control::EventKind;
use crate::engine::{self, EngineError, Served};
use crate::identity::{Identity, IdentityError};
use events::EventLog;
use vms::Vms;

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The chain server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The master.
    #[error(transparent)]
    Master(#[from] EngineError),
    /// The data directory is another's.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The data directory.
    #[error("data_dir {path}: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The control socket.
    #[error("control socket {path}: {source} (is another agent running?)")]
    Control {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread.
    #[error("starting a thread: {0}")]
    Thread(#[from] io::Error),
}

/// Everything the agent's threads share.
struct Daemon {
    config: HostConfig,
    host: HostId,
    master: Arc<dyn Master>,
    /// The master, or its member, on this host.
    serving: Served,
    replicas: ReplicaServer,
    vms: Mutex<Vms>,
    events: EventLog,
    identity: Mutex<Identity>,
    /// Why this host must not start VMs: until the master knows it under this identity.
    stranger: Mutex<Option<String>>,
    /// Held while the host changes what it is to a VM (reconciliation, takeover): one change at a time.
    changing: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    fn name_of(&self, vm: VmId) -> String {
        lock(&self.vms)
            .name(vm)
            .unwrap_or_else(|| format!("VM {vm}"))
    }
}

/// Runs the agent until the process ends.
///
/// # Errors
/// [`AgentError`] naming what keeps it from starting.
pub fn run_agent(config: HostConfig) -> Result<(), AgentError> {
    let data_dir = config.data_dir.clone();
    std::fs::create_dir_all(&data_dir).map_err(|source| AgentError::DataDir {
        path: data_dir.clone(),
        source,
    })?;
    let mut identity = Identity::open(&data_dir, &config.id())?;
    let serving = engine::serve(&config, &mut identity)?;
    let (sender, server_events) = channel();
    let host = config.id();
    let replicas = ReplicaServer::bind(
        config.listen,
        ServerOptions {
            host: host.clone(),
            data_dir: data_dir.join("replicas"),
            heartbeat: Duration::from_millis(config.detection.heartbeat_ms),
            missed: config.detection.missed,
        },
        sender,
    )?;
    let listener = control::bind(&config.control)?;
    let daemon = Arc::new(Daemon {
        master: engine::asked(&config)?,
        serving,
        replicas,
        host,
        vms: Mutex::default(),
        events: EventLog::default(),
        identity: Mutex::new(identity),
        stranger: Mutex::new(Some("the master has not been reached yet".into())),
        changing: Mutex::default(),
        config,
    });
    tracing::info!(
        "agent of host {} listens at {}",
        daemon.host,
        daemon.replicas.addr()
    );
    if let Some(out) = &daemon.serving.out {
        daemon
            .events
            .add(EventKind::Failed, daemon.host.as_str(), out.clone());
    }
    let reconciling = daemon.clone();
    std::thread::Builder::new()
        .name("reconcile".into())
        .spawn(move || reconcile::run(&reconciling))?;
    let failing = daemon.clone();
    std::thread::Builder::new()
        .name("failover".into())
        .spawn(move || failover::run(&failing, &server_events))?;
    let protecting = daemon.clone();
    std::thread::Builder::new()
        .name("reprotect".into())
        .spawn(move || reprotect::run(&protecting))?;
    serve_control(&daemon, &listener)
}

fn serve_control(daemon: &Arc<Daemon>, listener: &UnixListener) -> Result<(), AgentError> {
    for stream in listener.incoming().flatten() {
        let daemon = daemon.clone();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || control::serve(&daemon, &stream))?;
    }
    Ok(())
}
