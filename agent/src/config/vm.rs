//! `vm.toml`: one virtual machine. The same file serves the plain VMM and the protected VM; a backup gets its text
//! with the VM's record, so it needs no copy of its own.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use chain::FileDigest;
use checkpoint::HostId;
use serde::{Deserialize, Serialize};

use super::{ConfigError, parse, value_error};

/// Value of `kernel` that means the embedded probe guest.
pub const BUILTIN_PROBE: &str = "builtin:probe";

/// Configuration of one VM.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's name, unique in the cluster: 1 to 64 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// Virtual CPUs, 1 to 8.
    #[serde(default = "one")]
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// End of the RAM below 4 GiB in MiB, if it is to be lower than usual (a larger hole: for tests).
    #[serde(default)]
    pub low_memory_end_mib: Option<u64>,
    /// A bzImage or ELF kernel, or `builtin:probe`.
    pub kernel: PathBuf,
    /// Which file the kernel is, whatever is at its path: noted when the VM is configured. In a file it is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_blake3: Option<FileDigest>,
    /// Initial ram disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Which file that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_blake3: Option<FileDigest>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Network cards.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// Disks.
    #[serde(default)]
    pub disk: Vec<DiskConfig>,
    /// Whether the VM has a virtio random number generator.
    #[serde(default = "yes")]
    pub rng: bool,
    /// Where the serial console's output goes: a file (appended), or standard output when absent in plain mode.
    #[serde(default)]
    pub console: Option<PathBuf>,
    /// When the guest resets itself.
    #[serde(default = "restart")]
    pub on_reboot: OnEnd,
    /// When the guest crashes: a vCPU cannot go on.
    #[serde(default = "stop")]
    pub on_crash: OnEnd,
    /// When the guest switches itself off.
    #[serde(default = "stop")]
    pub on_poweroff: OnEnd,
    /// When the storage of the host that runs the VM refuses a request of its disks, or does not answer in time.
    #[serde(default)]
    pub on_disk_error: OnDiskError,
    /// How long a request may take, in seconds; 0: as long as it takes.
    #[serde(default = "default_disk_timeout_s")]
    pub disk_timeout_s: u64,
    /// How the VM is protected.
    #[serde(default)]
    pub protect: ProtectConfig,
}

/// A file that a VM boots from.
#[derive(Debug)]
pub struct BootFile<'a> {
    /// `kernel` or `initrd`.
    pub what: &'static str,
    /// Where it is, or was when the VM was configured.
    pub path: &'a mut PathBuf,
    /// Its content, once that is known.
    pub digest: &'a mut Option<FileDigest>,
}

/// What becomes of a VM whose disk fails on the host that runs it.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum OnDiskError {
    /// A backup that has everything takes it over and does the request again; without one, as `Report`.
    #[default]
    Failover,
    /// The guest gets an I/O error.
    Report,
    /// The request waits, and is tried again every second until the disk takes it.
    Pause,
}

/// What becomes of a VM whose guest does something to itself. (libvirt's elements of the same names.)
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum OnEnd {
    /// It is reset and boots again, on the same host, in the same process, with the same backups.
    Restart,
    /// It stops. After a power-off it is off; after a reset or a crash it stays with its host, for somebody to look at.
    Stop,
}

/// One network card.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// MAC address, `52:54:00:12:34:56`.
    pub mac: String,
    /// A tap of this name on every host.
    #[serde(default)]
    pub tap: Option<String>,
    /// Or: a network that each host's configuration resolves.
    #[serde(default)]
    pub network: Option<String>,
    /// The guest's IPv4 address, if it is to be announced by gratuitous ARP after a failover (RARP always is).
    #[serde(default)]
    pub ip: Option<Ipv4Addr>,
}

/// One disk.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The raw image on the first owner.
    pub path: PathBuf,
}

/// What an ack promises.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The checkpoint is in every replica's memory.
    #[default]
    Memory,
    /// And all of it, memory and disk writes, is on every replica's disk.
    Disk,
}

/// What a VM does once its last backup is lost.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Alone {
    /// It runs on, unprotected; the master records that first, so that nothing from before is ever resumed.
    #[default]
    Run,
    /// It stands still with its output held until a backup is there and has everything.
    Freeze,
}

/// How the VM is protected.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectConfig {
    /// Backup hosts, head of the chain first.
    #[serde(default)]
    pub backups: Vec<String>,
    /// Longest epoch, in milliseconds.
    #[serde(default = "default_epoch_ms")]
    pub epoch_ms: u64,
    /// An epoch with output waiting ends after this many milliseconds already, if nothing is in flight.
    #[serde(default)]
    pub min_epoch_ms: u64,
    /// Longest epoch of an idle guest, in milliseconds; no shorter than `epoch_ms`.
    #[serde(default = "default_idle_epoch_ms")]
    pub idle_epoch_ms: u64,
    /// Output that waits ends epochs early as long as the guest stands still for no more than this share of the time, in
    /// percent.
    #[serde(default = "default_pause_percent")]
    pub pause_percent: u32,
    /// Microseconds of a pause that may be spent on pages which are left writable, because the guest writes them all the time.
    #[serde(default = "default_pause_budget_us")]
    pub pause_budget_us: u64,
    /// A check for the doubtful: all of memory is compared with what the backups have after so many epochs (0: never). Its pause
    /// is as long as copying all of memory takes.
    #[serde(default)]
    pub verify_epochs: u64,
    /// Checkpoints under way at once; at this bound the epoch grows instead.
    #[serde(default = "default_in_flight")]
    pub max_in_flight: u32,
    /// Output held at most, in KiB; at this bound the guest's network card stops sending.
    #[serde(default = "default_output_kib")]
    pub output_limit_kib: u64,
    /// Disk writes of uncommitted epochs at most, in KiB; at this bound the guest's disk waits.
    #[serde(default = "default_disk_kib")]
    pub disk_limit_kib: u64,
    /// What an ack promises.
    #[serde(default)]
    pub durability: Durability,
    /// What the VM does once its last backup is lost.
    #[serde(default)]
    pub alone: Alone,
    /// After all hosts were lost: seconds that the owner waits for backups that do not answer and may hold a newer
    /// checkpoint, before it boots the VM from its own disks.
    #[serde(default = "default_return_wait_s")]
    pub return_wait_s: u64,
    /// Checkpoints that replicas keep to be asked for, the newest included. In memory each costs what it changed.
    #[serde(default = "default_retain")]
    pub retain: u64,
    /// And how much that may take on each replica, in MiB.
    #[serde(default = "default_retain_mib")]
    pub retain_mib: u64,
    /// Try LZ4 on pages for which a delta does not pay.
    #[serde(default = "yes")]
    pub lz4: bool,
}

impl Default for ProtectConfig {
    fn default() -> Self {
        Self {
            backups: Vec::new(),
            epoch_ms: default_epoch_ms(),
            min_epoch_ms: 0,
            idle_epoch_ms: default_idle_epoch_ms(),
            pause_percent: default_pause_percent(),
            pause_budget_us: default_pause_budget_us(),
            verify_epochs: 0,
            max_in_flight: default_in_flight(),
            output_limit_kib: default_output_kib(),
            disk_limit_kib: default_disk_kib(),
            durability: Durability::default(),
            alone: Alone::default(),
            return_wait_s: default_return_wait_s(),
            retain: default_retain(),
            retain_mib: default_retain_mib(),
            lz4: true,
        }
    }
}

fn restart() -> OnEnd {
    OnEnd::Restart
}
fn stop() -> OnEnd {
    OnEnd::Stop
}
fn default_disk_timeout_s() -> u64 {
    10
}
fn one() -> u8 {
    1
}
fn yes() -> bool {
    true
}
fn default_epoch_ms() -> u64 {
    25
}
fn default_idle_epoch_ms() -> u64 {
    250
}
fn default_pause_budget_us() -> u64 {
    2000
}
fn default_pause_percent() -> u32 {
    10
}
fn default_in_flight() -> u32 {
    3
}
fn default_output_kib() -> u64 {
    16 * 1024
}
fn default_return_wait_s() -> u64 {
    60
}
fn default_retain() -> u64 {
    1
}
fn default_retain_mib() -> u64 {
    256
}
fn default_disk_kib() -> u64 {
    64 * 1024
}

impl VmConfig {
    /// Reads and checks `path`; returns the text too, which travels with the VM's record.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file and the line and column, or the key whose value cannot be right.
    pub fn load(path: &Path) -> Result<(Self, String), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Ok((Self::from_text(path, &text)?, text))
    }

    /// Parses and checks a configuration's text; `path` is only for messages.
    ///
    /// # Errors
    /// As [`VmConfig::load`].
    pub fn from_text(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = parse(path, text)?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        HostId::new(&self.name).map_err(|e| value_error(path, "name", e.to_string()))?;
        if !(1..=8).contains(&self.vcpus) {
            return Err(value_error(
                path,
                "vcpus",
                format!("{} is not 1 to 8", self.vcpus),
            ));
        }
        if !(16..=1024 * 1024).contains(&self.memory_mib) {
            return Err(value_error(
                path,
                "memory_mib",
                format!("{} is not 16 to 1048576", self.memory_mib),
            ));
        }
        if self.net.len() + self.disk.len() + usize::from(self.rng) > 8 {
            return Err(value_error(
                path,
                "net/disk",
                "at most 8 virtio devices in all",
            ));
        }
        for (i, net) in self.net.iter().enumerate() {
            parse_mac(&net.mac).map_err(|e| value_error(path, format!("net[{i}].mac"), e))?;
            if net.tap.is_some() == net.network.is_some() {
                return Err(value_error(
                    path,
                    format!("net[{i}]"),
                    "give either `tap` or `network`",
                ));
            }
        }
        for (i, backup) in self.protect.backups.iter().enumerate() {
            let key = format!("protect.backups[{i}]");
            HostId::new(backup).map_err(|e| value_error(path, key.clone(), e.to_string()))?;
            if self.protect.backups[..i].contains(backup) {
                return Err(value_error(path, key, format!("{backup} is listed twice")));
            }
        }
        let p = &self.protect;
        for (key, value, low, high) in [
            ("protect.epoch_ms", p.epoch_ms, 1, 10_000),
            ("protect.min_epoch_ms", p.min_epoch_ms, 0, p.epoch_ms),
            ("protect.idle_epoch_ms", p.idle_epoch_ms, 1, 10_000),
            ("protect.pause_budget_us", p.pause_budget_us, 0, 1_000_000),
            ("protect.verify_epochs", p.verify_epochs, 0, 1_000_000),
            ("protect.pause_percent", u64::from(p.pause_percent), 1, 100),
            ("protect.max_in_flight", u64::from(p.max_in_flight), 1, 64),
            (
                "protect.output_limit_kib",
                p.output_limit_kib,
                128,
                4 * 1024 * 1024,
            ),
            ("protect.disk_limit_kib", p.disk_limit_kib, 2048, 512 * 1024),
            ("protect.return_wait_s", p.return_wait_s, 0, 86_400),
            ("protect.retain", p.retain, 1, 100_000),
            ("protect.retain_mib", p.retain_mib, 1, 1024 * 1024),
        ] {
            if !(low..=high).contains(&value) {
                return Err(value_error(
                    path,
                    key,
                    format!("{value} is not {low} to {high}"),
                ));
            }
        }
        Ok(())
    }

    /// Makes relative paths mean `base`. Returns whether any was relative.
    pub fn absolute_paths(&mut self, base: &Path) -> bool {
        let probe = self.is_probe();
        let kernel = (!probe).then_some(&mut self.kernel);
        let paths = kernel
            .into_iter()
            .chain(self.initrd.as_mut())
            .chain(self.console.as_mut())
            .chain(self.disk.iter_mut().map(|d| &mut d.path));
        let mut changed = false;
        for path in paths.filter(|p| p.is_relative()) {
            *path = base.join(&*path);
            changed = true;
        }
        changed
    }

    /// The files that it boots from, in a fixed order; the embedded probe guest is none.
    pub fn boot_files(&mut self) -> Vec<BootFile<'_>> {
        let probe = self.is_probe();
        let kernel = (!probe).then_some(BootFile {
            what: "kernel",
            path: &mut self.kernel,
            digest: &mut self.kernel_blake3,
        });
        let initrd = self.initrd.as_mut().map(|path| BootFile {
            what: "initrd",
            path,
            digest: &mut self.initrd_blake3,
        });
        kernel.into_iter().chain(initrd).collect()
    }

    /// Whether the VM runs the embedded probe guest.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.kernel.as_os_str() == BUILTIN_PROBE
    }
}

/// Parses `52:54:00:12:34:56`; refuses group addresses, which no network card may have.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().unwrap_or("");
        if part.len() != 2 {
            return Err(format!(
                "{text:?} is not a MAC address like 52:54:00:12:34:56"
            ));
        }
        *byte = u8::from_str_radix(part, 16)
            .map_err(|_| format!("{text:?} is not a MAC address like 52:54:00:12:34:56"))?;
    }
    if parts.next().is_some() {
        return Err(format!("{text:?} has more than six bytes"));
    }
    if mac[0] & 1 != 0 {
        return Err(format!(
            "{text:?} is a group address; clear the lowest bit of its first byte"
        ));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<VmConfig, ConfigError> {
        VmConfig::from_text(Path::new("vm.toml"), text)
    }

    #[test]
    fn a_typo_is_named_with_its_line_and_column() {
        let error = parse_text("name = \"a\"\nmemory_mib = 64\nkernel = \"k\"\nvcpu = 2\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 4, column 1"), "{error}");
        assert!(error.contains("vcpu"), "{error}");
    }

    #[test]
    fn impossible_values_name_their_key() {
        let base = "name = \"a\"\nmemory_mib = 64\nkernel = \"k\"\n";
        for (extra, key) in [
            ("vcpus = 9\n", "vcpus"),
            (
                "[[net]]\nmac = \"01:00:00:00:00:00\"\ntap = \"t\"\n",
                "net[0].mac",
            ),
            ("[[net]]\nmac = \"02:00:00:00:00:00\"\n", "net[0]"),
            (
                "[protect]\nbackups = [\"b\", \"b\"]\n",
                "protect.backups[1]",
            ),
            ("[protect]\nepoch_ms = 0\n", "protect.epoch_ms"),
        ] {
            let error = parse_text(&format!("{base}{extra}"))
                .unwrap_err()
                .to_string();
            assert!(error.contains(key), "{error} should name {key}");
        }
        assert!(parse_text(base).is_ok());
    }
}
