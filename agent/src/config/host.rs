//! `host.toml`: what one host of the cluster is called, where it listens, and whom it knows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use checkpoint::HostId;
use serde::{Deserialize, Serialize};

use super::master::MasterConfig;
use super::{ConfigError, load, value_error};

/// Configuration of one `understudy agent`, with what the file leaves to be found out.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// This host's name, unique in the cluster: 1 to 64 of `[A-Za-z0-9._-]`.
    pub host: String,
    /// Where mirrors, activation records and the master's record live.
    pub data_dir: PathBuf,
    /// The Unix socket that the command line talks to.
    pub control: PathBuf,
    /// Address and port of the chain server.
    pub listen: SocketAddr,
    /// The configuration service.
    pub master: MasterConfig,
    /// Other hosts by name, with their chain servers' addresses.
    pub peers: BTreeMap<String, SocketAddr>,
    /// Networks that VMs can be attached to, by name.
    pub networks: BTreeMap<String, Network>,
    /// How soon silence becomes suspicion.
    pub detection: Detection,
    /// How long a VM's process waits for its agent to come back, in seconds, before a backup is asked to take over.
    pub agent_return_s: u64,
}

/// The file as it is written: the same one may be given to all hosts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostFile {
    /// Without it: as the command line says, or the machine's host name up to its first dot.
    host: Option<String>,
    data_dir: PathBuf,
    #[serde(default = "default_control")]
    control: PathBuf,
    /// Without it: this host's entry in `peers`.
    listen: Option<SocketAddr>,
    master: MasterConfig,
    /// All hosts; this one may be among them.
    #[serde(default)]
    peers: BTreeMap<String, SocketAddr>,
    #[serde(default)]
    networks: BTreeMap<String, Network>,
    #[serde(default)]
    detection: Detection,
    #[serde(default = "default_agent_return_s")]
    agent_return_s: u64,
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
impl Detection {
    /// After so long without a sign of life a host is suspected. What else is waited for is never less patient: a host that
    /// is allowed to be late with one is with the other.
    #[must_use]
    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms * u64::from(self.missed))
    }
}

fn default_heartbeat_ms() -> u64 {
    10
}
fn default_missed() -> u32 {
    8
}

impl HostFile {
    /// What this host is called.
    fn name(&self, path: &Path, given: Option<&str>) -> Result<HostId, ConfigError> {
        let (name, key) = match (given, &self.host) {
            (Some(name), _) => (name.to_string(), "--host"),
            (None, Some(name)) => (name.clone(), "host"),
            (None, None) => {
                let machine = nix::unistd::gethostname().map_err(|e| {
                    value_error(
                        path,
                        "host",
                        format!("is missing, and the machine has none: {e}"),
                    )
                })?;
                let name = machine.to_string_lossy();
                let short = name.split('.').next().unwrap_or_default();
                (short.to_string(), "host")
            }
        };
        HostId::new(&name).map_err(|e| value_error(path, key, e.to_string()))
    }

    /// Where this host listens.
    fn listen(&self, path: &Path, host: &HostId) -> Result<SocketAddr, ConfigError> {
        match (self.listen, self.peers.get(host.as_str()).copied()) {
            (Some(listen), Some(entry)) if !meets(listen, entry) => Err(value_error(
                path,
                format!("peers.{host}"),
                format!(
                    "is this host itself, which the others would look for at {entry}, but `listen` is {listen}: make them the same, or leave `listen` out"
                ),
            )),
            (Some(listen), _) => Ok(listen),
            (None, Some(entry)) => Ok(entry),
            (None, None) => {
                let names: Vec<&str> = self.peers.keys().map(String::as_str).collect();
                Err(value_error(
                    path,
                    "listen",
                    format!(
                        "is missing, and [peers] ({}) does not name this host, {host}: is that its name (`host`, --host)?",
                        names.join(", ")
                    ),
                ))
            }
        }
    }
}

/// Whether who connects to `entry` reaches who listens at `listen`.
fn meets(listen: SocketAddr, entry: SocketAddr) -> bool {
    listen.port() == entry.port() && (listen.ip() == entry.ip() || listen.ip().is_unspecified())
}

impl HostConfig {
    /// Reads and checks `path`.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file and the line and column, or the key whose value cannot be right.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_as(path, None)
    }

    /// As [`HostConfig::load`], for the host `name`, whatever the file calls it.
    ///
    /// # Errors
    /// As [`HostConfig::load`].
    pub fn load_as(path: &Path, name: Option<&str>) -> Result<Self, ConfigError> {
        let file: HostFile = load(path)?;
        let host = file.name(path, name)?;
        let listen = file.listen(path, &host)?;
        let mut config = Self {
            host: host.to_string(),
            data_dir: file.data_dir,
            control: file.control,
            listen,
            master: file.master,
            peers: file.peers,
            networks: file.networks,
            detection: file.detection,
            agent_return_s: file.agent_return_s,
        };
        config.peers.remove(host.as_str());
        config.master.derive(path, &host)?;
        config.check(path, &host)?;
        Ok(config)
    }

    fn check(&self, path: &Path, host: &HostId) -> Result<(), ConfigError> {
        self.master.check(path, host)?;
        for (name, addr) in &self.peers {
            HostId::new(name)
                .map_err(|e| value_error(path, format!("peers.{name}"), e.to_string()))?;
            if meets(self.listen, *addr) && self.listen.ip() == addr.ip() {
                return Err(value_error(
                    path,
                    format!("peers.{name}"),
                    format!(
                        "has this host's own address, {addr}: is {host} not the name of this host, or the address another?"
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

    /// The host of the cluster's only master, if there is only one and it is on a host that is known.
    #[must_use]
    pub fn single_master(&self) -> Option<HostId> {
        let master = &self.master;
        if !master.members.is_empty() || !master.etcd.is_empty() {
            return None;
        }
        if let Some(host) = &master.host {
            return HostId::new(host).ok();
        }
        if master.serve.is_some() {
            return Some(self.id());
        }
        let at = master.addresses().first()?.ip();
        let mut peers = self.peers.iter();
        let (host, _) = peers.find(|(_, peer)| !at.is_loopback() && peer.ip() == at)?;
        HostId::new(host).ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "data_dir = \"/d\"\n[peers]\na = \"10.0.0.1:7700\"\nb = \"10.0.0.2:7700\"\nc = \"10.0.0.3:7700\"\n[master]\n";
    const THREE: &str = "connect = [\"10.0.0.1:7690\", \"10.0.0.2:7690\", \"10.0.0.3:7690\"]\nmembers = { a = \"10.0.0.1:7691\", b = \"10.0.0.2:7691\", c = \"10.0.0.3:7691\" }\n";

    fn load(text: &str, name: Option<&str>) -> Result<HostConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.toml");
        std::fs::write(&path, text).unwrap();
        HostConfig::load_as(&path, name).map_err(|e| e.to_string())
    }

    #[test]
    fn i4_one_file_fits_all_hosts() {
        let text = format!("{ALL}{THREE}");
        for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
            let config = load(&text, Some(name)).unwrap();
            assert_eq!(config.id(), HostId::new(name).unwrap());
            let at = |port: u16| SocketAddr::from(([10, 0, 0, 1 + i as u8], port));
            assert_eq!(config.listen, at(7700));
            assert_eq!(config.master.serve, Some(at(7690)));
            assert_eq!(config.master.addresses()[0], at(7690), "its own first");
            assert_eq!(config.peers.len(), 2);
            assert!(!config.peers.contains_key(name));
        }
        // One that is no member only asks.
        let four = text.replace("[master]", "d = \"10.0.0.4:7700\"\n[master]");
        let config = load(&four, Some("d")).unwrap();
        assert_eq!((config.master.serve, config.peers.len()), (None, 3));
        // A single master, on one of them.
        let text = format!("{ALL}host = \"c\"\nconnect = \"10.0.0.3:7690\"\n");
        let serve = |name| load(&text, Some(name)).unwrap().master.serve;
        assert_eq!(serve("a"), None);
        assert_eq!(serve("c"), Some("10.0.0.3:7690".parse().unwrap()));
    }

    #[test]
    fn h14_the_host_of_a_single_master_is_known() {
        let single = |text: &str, name| load(text, Some(name)).unwrap().single_master();
        let c = Some(HostId::new("c").unwrap());
        let named = format!("{ALL}host = \"c\"\nconnect = \"10.0.0.3:7690\"\n");
        let by_address = format!("{ALL}connect = \"10.0.0.3:7690\"\n");
        for name in ["a", "c"] {
            assert_eq!(single(&named, name), c);
        }
        assert_eq!(single(&by_address, "a"), c);
        assert_eq!(single(&format!("{ALL}{THREE}"), "a"), None);
        let elsewhere = format!("{ALL}connect = \"10.0.0.99:7690\"\n");
        assert_eq!(single(&elsewhere, "a"), None);
    }

    #[test]
    fn i4_the_name_is_given_or_the_files_or_the_machines() {
        let machine = nix::unistd::gethostname().unwrap();
        let machine = machine.to_str().unwrap().split('.').next().unwrap();
        let text = format!("listen = \"10.0.0.9:7700\"\n{ALL}connect = \"10.0.0.3:7690\"\n");
        assert_eq!(load(&text, None).unwrap().host, machine);
        let named = format!("host = \"b\"\n{}", text.replace("10.0.0.9", "10.0.0.2"));
        assert_eq!(load(&named, None).unwrap().host, "b");
        let said = load(&named, Some("a")).unwrap_err();
        assert!(
            said.contains("peers.a") && said.contains("10.0.0.1:7700"),
            "{said}"
        );
        let said = load(&text, Some("../a")).unwrap_err();
        assert!(said.contains("--host"), "{said}");
    }

    #[test]
    fn i4_what_does_not_fit_is_named() {
        let connect = "connect = \"10.0.0.3:7690\"\n";
        let ambiguous = THREE.replace("10.0.0.2:7690", "10.0.0.1:7692");
        for (text, name, names) in [
            (
                format!("listen = \"10.0.0.1:7701\"\n{ALL}{connect}"),
                "a",
                &["peers.a", "10.0.0.1:7700", "10.0.0.1:7701"][..],
            ),
            (
                format!("{ALL}{connect}"),
                "x",
                &["listen", "a, b, c", "this host, x"],
            ),
            (
                format!("listen = \"10.0.0.2:7700\"\n{ALL}{connect}"),
                "x",
                &["peers.b", "own address", "x"],
            ),
            (
                format!("{ALL}{ambiguous}"),
                "a",
                &["master.serve", "2 addresses"],
            ),
            (
                format!("{ALL}{ambiguous}"),
                "b",
                &["master.serve", "b is one of the members"],
            ),
            (
                format!("{ALL}host = \"c\"\n{THREE}"),
                "a",
                &["master.host", "single"],
            ),
        ] {
            let said = load(&text, Some(name)).unwrap_err();
            for name in names {
                assert!(said.contains(name), "{text}{said}");
            }
        }
        // Any address of the host will do to listen at, if the port is right.
        let all = format!("listen = \"0.0.0.0:7700\"\n{ALL}{connect}");
        load(&all, Some("a")).unwrap();
    }
}
