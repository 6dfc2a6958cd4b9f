//! The agent: one per host. What it decides about a VM is [`crate::host`]'s; here it is carried out, by one thread per VM.
//!
//! ```text
//!   control ----+
//!   watch ------+--> table --> run (one thread per VM) --> slow (on the side) --> copy, process, child --> env
//!   clones -----+
//! ```

mod child;
mod clones;
mod control;
mod copy;
mod env;
mod events;
mod process;
mod run;
mod slow;
mod status;
mod table;
mod watch;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use chain::master::{LocalMaster, Master, MasterError, MasterServer, PaxosMaster, RemoteMaster};
use chain::{ReplicaServer, ServerError, ServerEvent, ServerOptions};
use checkpoint::HostId;

use crate::config::{ConfigError, HostConfig};
use env::{Env, vital};
use events::EventLog;
use table::Table;

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
    Master(#[from] MasterError),
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

/// Between attempts to listen at an address that this host does not have yet.
const ADDRESS_RETRY: Duration = Duration::from_secs(1);

/// Runs the agent until the process ends.
///
/// # Errors
/// [`AgentError`] naming what keeps it from starting.
pub fn run_agent(config: HostConfig) -> Result<(), AgentError> {
    let data_dir = config.data_dir.clone();
    make_private(&data_dir).map_err(|source| AgentError::DataDir {
        path: data_dir.clone(),
        source,
    })?;
    let serving = serve_master(&config)?;
    let (sender, server_events) = channel();
    let replicas = bind_server(&config, &sender)?;
    let listener = control::bind(&config.control)?;
    let peers = config.peers.iter().filter_map(|(name, addr)| {
        let host = HostId::new(name).ok()?;
        Some((host, *addr))
    });
    let env = Arc::new(Env {
        master: engine_asked(&config)?,
        serving,
        replicas,
        host: config.id(),
        peers: Arc::new(peers.collect()),
        events: EventLog::default(),
        config,
    });
    tracing::info!(
        "agent of host {} listens at {}",
        env.host,
        env.replicas.addr()
    );
    let table = Table::new(env.clone());
    vital("decisions", {
        let (env, table) = (env.clone(), table.clone());
        move || watch::decisions(&env, &table)
    })?;
    vital("server-events", {
        let table = table.clone();
        move || watch::server_events(&server_events, &table)
    })?;
    let service = Arc::new(control::Service::new(env, table));
    serve_control(&service, &listener)
}

/// Makes a directory that only its owner may look into: guests' disks and memory are in it.
fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    let mut permissions = std::fs::metadata(dir)?.permissions();
    if permissions.mode() & 0o077 != 0 {
        permissions.set_mode(0o700);
        std::fs::set_permissions(dir, permissions)?;
    }
    Ok(())
}

/// The chain server. At boot the agent may be faster than its network: it waits for its address, and says so.
fn bind_server(
    config: &HostConfig,
    events: &std::sync::mpsc::Sender<ServerEvent>,
) -> Result<ReplicaServer, AgentError> {
    let mut said = false;
    loop {
        let options = ServerOptions {
            host: config.id(),
            data_dir: config.data_dir.join("replicas"),
            heartbeat: Duration::from_millis(config.detection.heartbeat_ms),
            missed: config.detection.missed,
        };
        match ReplicaServer::bind(config.listen, options, events.clone()) {
            Err(ServerError::Bind { addr, source })
                if source.kind() == io::ErrorKind::AddrNotAvailable =>
            {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(
                        "waiting for this host to have the address {addr} (`listen` in host.toml)"
                    );
                }
                std::thread::sleep(ADDRESS_RETRY);
            }
            other => return Ok(other?),
        }
    }
}

/// The master, or this host's member of it, if it is to be here.
fn serve_master(config: &HostConfig) -> Result<Option<Arc<dyn Master>>, AgentError> {
    let Some(addr) = config.master.serve else {
        return Ok(None);
    };
    let members = &config.master.members;
    let engine: Arc<dyn Master> = if members.is_empty() {
        Arc::new(LocalMaster::open(&config.data_dir)?)
    } else {
        Arc::new(PaxosMaster::open(
            &config.data_dir,
            &config.id(),
            &members.0,
        )?)
    };
    MasterServer::bind(addr, engine.clone())?;
    Ok(Some(engine))
}

/// What this agent asks for decisions.
fn engine_asked(config: &HostConfig) -> Result<Arc<dyn Master>, AgentError> {
    #[cfg(feature = "etcd")]
    if !config.master.etcd.is_empty() {
        let options = chain::master::EtcdOptions {
            endpoints: config.master.etcd.clone(),
            prefix: config.master.etcd_prefix.clone(),
            user: config.master.etcd_credentials()?,
        };
        return Ok(Arc::new(chain::master::EtcdMaster::new(options)?));
    }
    Ok(Arc::new(RemoteMaster::of(&config.master.addresses())))
}

fn serve_control(
    service: &Arc<control::Service>,
    listener: &UnixListener,
) -> Result<(), AgentError> {
    for stream in listener.incoming().flatten() {
        let service = service.clone();
        let served = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || service.serve(&stream));
        if let Err(e) = served {
            tracing::warn!("starting a thread for a command: {e}");
        }
    }
    Ok(())
}
