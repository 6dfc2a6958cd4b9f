//! `host.toml`: what one host of the cluster is called, where it listens, and whom it knows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use checkpoint::HostId;
use serde::{Deserialize, Serialize};

use super::master::MasterConfig;
use super::{ConfigError, load, value_error};

/// Configuration of one `understudy agent`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// This host's name, unique in the cluster: 1 to 64 of `[A-Za-z0-9._-]`.
    pub host: String,
    /// Where mirrors, activation records and the master's record live.
    pub data_dir: PathBuf,
    /// The Unix socket that the command line talks to.
    #[serde(default = "default_control")]
    pub control: PathBuf,
    /// Address and port of the chain server.
    pub listen: SocketAddr,
    /// The configuration service.
    pub master: MasterConfig,
    /// Other hosts by name, with their chain servers' addresses.
    #[serde(default)]
    pub peers: BTreeMap<String, SocketAddr>,
    /// Networks that VMs can be attached to, by name.
    #[serde(default)]
    pub networks: BTreeMap<String, Network>,
    /// How soon silence becomes suspicion.
    #[serde(default)]
    pub detection: Detection,
    /// How long a VM's process waits for its agent to come back, in seconds, before a backup is asked to take over.
    #[serde(default = "default_agent_return_s")]
    pub agent_return_s: u64,
}

/// How a VM's network card is attached on this host.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// An existing bridge to put the tap on; without it the tap stands alone.
    #[serde(default)]
    pub bridge: Option<String>,
    /// The tap's name is this, then eight hex digits of the VM's id and the card's number: at most 15 bytes in all.
    #[serde(default = "default_tap_prefix")]
    pub tap_prefix: String,
}

/// Longest prefix: eight digits, `n` and a card's number follow, and the kernel takes 15 bytes.
const TAP_PREFIX_MAX: usize = 5;

/// Failure detection on the data path.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Detection {
    /// A sender with nothing else to say sends a heartbeat this often, in milliseconds.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// Suspicion after this many heartbeats' time of silence.
    #[serde(default = "default_missed")]
    pub missed: u32,
}

impl Default for Detection {
    fn default() -> Self {
        Self {
            heartbeat_ms: default_heartbeat_ms(),
            missed: default_missed(),
        }
    }
}

fn default_control() -> PathBuf {
    "/run/understudy/control.sock".into()
}
fn default_agent_return_s() -> u64 {
    30
}
fn default_tap_prefix() -> String {
    "us".into()
}
fn default_heartbeat_ms() -> u64 {
    10
}
fn default_missed() -> u32 {
    8
}

impl HostConfig {
    /// Reads and checks `path`.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file and the line and column, or the key whose value cannot be right.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = load(path)?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let host = HostId::new(&self.host).map_err(|e| value_error(path, "host", e.to_string()))?;
        self.master.check(path, &host)?;
        for (name, addr) in &self.peers {
            HostId::new(name)
                .map_err(|e| value_error(path, format!("peers.{name}"), e.to_string()))?;
            if name == &self.host {
                return Err(value_error(
                    path,
                    format!("peers.{name}"),
                    format!(
                        "is this host itself; list only the others (its own address is `listen`, not {addr})"
                    ),
                ));
            }
        }
        if self.detection.heartbeat_ms == 0 || self.detection.heartbeat_ms > 10_000 {
            return Err(value_error(
                path,
                "detection.heartbeat_ms",
                "must be 1 to 10000",
            ));
        }
        if self.detection.missed < 2 || self.detection.missed > 1000 {
            return Err(value_error(path, "detection.missed", "must be 2 to 1000"));
        }
        for (name, network) in &self.networks {
            if network.tap_prefix.is_empty() || network.tap_prefix.len() > TAP_PREFIX_MAX {
                return Err(value_error(
                    path,
                    format!("networks.{name}.tap_prefix"),
                    format!("must be 1 to {TAP_PREFIX_MAX} bytes"),
                ));
            }
        }
        Ok(())
    }

    /// This host's id. The name was checked when the file was read.
    ///
    /// # Panics
    /// Never for a configuration that [`HostConfig::load`] returned.
    #[must_use]
    pub fn id(&self) -> HostId {
        HostId::new(&self.host).expect("checked when the configuration was read")
    }
}
