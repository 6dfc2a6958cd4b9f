//! The master as this host has it: the engine that it serves, if it serves one, and the one that its agent asks.

use std::path::Path;
use std::sync::Arc;

use chain::master::{
    Begin, LocalMaster, Master, MasterError, MasterServer, PaxosMaster, RemoteMaster,
};

use crate::config::{ConfigError, HostConfig};
use crate::identity::{Identity, IdentityError};

/// Why the master's half of this host did not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data directory is another's.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The engine.
    #[error(transparent)]
    Master(#[from] MasterError),
}

fn permission(config: &HostConfig) -> Begin {
    match config.master.begin {
        true => Begin::New,
        false => Begin::Existing,
    }
}

/// The master's half of this host.
#[derive(Default)]
pub struct Served {
    /// The master, or its member, if there is one here.
    pub engine: Option<Arc<dyn Master>>,
    /// Why the member that should be here is not: the others decide without it, and this host is a backup as before.
    pub out: Option<String>,
}

impl Served {
    /// What keeps the master from deciding here, in words.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let engine = self.engine.as_ref();
        self.out
            .clone()
            .or_else(|| engine.and_then(|e| e.trouble()))
    }
}

/// Starts the master, or its member, that the configuration has this host serve. A member whose record is damaged is left
/// out, with the reason.
///
/// # Errors
/// [`EngineError`]: this host must not run like this.
pub fn serve(config: &HostConfig, identity: &mut Identity) -> Result<Served, EngineError> {
    match open(config, identity) {
        Ok(engine) => Ok(Served { engine, out: None }),
        Err(EngineError::Master(e @ MasterError::Storage { .. }))
            if !config.master.members.is_empty() =>
        {
            let out = format!("this host's member of the master is out: {e}");
            tracing::error!("{out}");
            Ok(Served {
                engine: None,
                out: Some(out),
            })
        }
        Err(e) => Err(e),
    }
}

fn open(
    config: &HostConfig,
    identity: &mut Identity,
) -> Result<Option<Arc<dyn Master>>, EngineError> {
    let Some(addr) = config.master.serve else {
        return Ok(None);
    };
    let (dir, begin) = (config.data_dir.as_path(), permission(config));
    let members = &config.master.members;
    let (engine, cluster): (Arc<dyn Master>, _) = if members.is_empty() {
        identity.check_record(has(dir, LocalMaster::RECORD))?;
        let engine = LocalMaster::open(dir, begin)?;
        let cluster = Some(engine.cluster());
        (Arc::new(engine), cluster)
    } else {
        identity.check_record(has(dir, PaxosMaster::RECORD))?;
        let engine = PaxosMaster::open(dir, &config.id(), &members.0, begin)?;
        let cluster = engine.cluster();
        (Arc::new(engine), cluster)
    };
    if let Some(cluster) = cluster {
        identity.join(cluster)?;
    }
    identity.has_record()?;
    MasterServer::bind(addr, engine.clone())?;
    Ok(Some(engine))
}

/// Unknown counts as there: opening it says what is wrong.
fn has(dir: &Path, record: &str) -> bool {
    dir.join(record).try_exists().unwrap_or(true)
}

/// What this host's agent asks for decisions.
///
/// # Errors
/// [`EngineError`] from the configuration, or from starting etcd's client.
pub fn asked(config: &HostConfig) -> Result<Arc<dyn Master>, EngineError> {
    #[cfg(feature = "etcd")]
    if !config.master.etcd.is_empty() {
        let options = chain::master::EtcdOptions {
            endpoints: config.master.etcd.clone(),
            prefix: config.master.etcd_prefix.clone(),
            user: config.master.etcd_credentials()?,
            begin: permission(config),
        };
        return Ok(Arc::new(chain::master::EtcdMaster::new(options)?));
    }
    Ok(Arc::new(RemoteMaster::of(&config.master.addresses())))
}
