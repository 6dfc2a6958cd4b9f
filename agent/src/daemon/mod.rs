//! The agent: one per host. What it decides about a VM is [`crate::host`]'s; here it is carried out, by one thread per VM.
//!
//! ```text
//!   control ----+
//!   watch ------+--> table --> run (one thread per VM) --> slow (on the side) --> copy, process, child --> env
//!   clones -----+
//! ```

mod apply;
mod boot_files;
mod calls;
mod child;
mod clones;
mod control;
mod copy;
mod env;
mod events;
mod found;
mod process;
mod run;
mod slow;
mod status;
mod table;
mod watch;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chain::{ReplicaServer, ServerError, ServerEvent, ServerOptions};
use checkpoint::HostId;

use crate::busy::once_free;
use crate::config::{ConfigError, HostConfig};
use crate::control::EventKind;
use crate::engine::{self, EngineError};
use crate::identity::{Identity, IdentityError};
use boot_files::BootFiles;
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
    let mut identity = Identity::open(&data_dir, &config.id())?;
    let serving = engine::serve(&config, &mut identity)?;
    let (sender, server_events) = channel();
    let replicas = bind_server(&config, &sender)?;
    let listener = control::bind(&config.control)?;
    let run_dir = data_dir.join("run");
    make_private(&run_dir).map_err(|source| AgentError::DataDir {
        path: run_dir.clone(),
        source,
    })?;
    let boot_dir = boot_dir(&config);
    make_private(&boot_dir).map_err(|source| AgentError::DataDir {
        path: boot_dir.clone(),
        source,
    })?;
    let found = found::scan(&run_dir, &config.id());
    let peers = config.peers.iter().filter_map(|(name, addr)| {
        let host = HostId::new(name).ok().filter(|host| *host != config.id())?;
        Some((host, *addr))
    });
    let env = Arc::new(Env {
        master: engine::asked(&config)?,
        serving,
        replicas,
        host: config.id(),
        peers: Arc::new(peers.collect()),
        events: EventLog::default(),
        found: Mutex::new(found),
        boot_files: BootFiles::new(boot_dir),
        identity: Mutex::new(identity),
        stranger: Mutex::new(Some("the master has not been reached yet".into())),
        config,
    });
    tracing::info!(
        "agent of host {} listens at {}",
        env.host,
        env.replicas.addr()
    );
    if let Some(out) = &env.serving.out {
        let events = &env.events;
        events.add(EventKind::Failed, env.host.as_str(), out.clone());
    }
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

/// Where what VMs boot from is kept.
fn boot_dir(config: &HostConfig) -> PathBuf {
    config.data_dir.join("boot")
}

fn is_taken(error: &ServerError) -> bool {
    matches!(error, ServerError::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
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
            files: Some(boot_dir(config)),
        };
        let bind = || ReplicaServer::bind(config.listen, options.clone(), events.clone());
        // An agent that was killed may not have let go of it yet.
        match once_free(is_taken, bind) {
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
