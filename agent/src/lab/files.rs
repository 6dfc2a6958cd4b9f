//! The configuration files of a lab: each host's, and a VM's.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;

use super::LabError;
use super::net::{HOST_BRIDGE, repl_addr};
use crate::config::BUILTIN_PROBE;

/// Address of the first VM; the n-th has the n-th from there on.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The first VM's MAC address; the n-th ends in n.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x75, 0x73, 0x01];
/// Where agents listen for each other.
const CHAIN_PORT: u16 = 7700;
/// In programs that tests run, memory is compared with what the backups have after so many epochs.
const VERIFY_EPOCHS: u64 = 40;
/// Where the master, or its member, listens.
const MASTER_PORT: u16 = 7690;
/// What its members say to each other.
const MEMBER_PORT: u16 = 7691;

/// Who decides in a lab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Masters {
    /// A host that does nothing else.
    #[default]
    One,
    /// Three hosts that do nothing else.
    Three,
    /// The hosts themselves, three or five then, are its members.
    Hosts,
    /// An etcd server on a host of its own.
    Etcd,
}

impl Masters {
    /// Names of the hosts that are there for this only.
    #[must_use]
    pub fn hosts(self) -> &'static [&'static str] {
        match self {
            Self::One | Self::Etcd => &["m"],
            Self::Three => &["m", "n", "o"],
            Self::Hosts => &[],
        }
    }
}

/// What all hosts' files say.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostFiles<'a> {
    /// The working directory.
    pub dir: &'a Path,
    /// All hosts, those of the master last.
    pub names: &'a [String],
    /// Who decides.
    pub masters: Masters,
    /// Milliseconds between heartbeats, and heartbeats missed before a host is suspected; none: the agent's defaults.
    pub detection: Option<(u64, u32)>,
}

impl HostFiles<'_> {
    /// `host.toml` of host number `i`.
    pub fn text(&self, i: usize) -> String {
        let dir = self.dir.display();
        let name = &self.names[i];
        let peers: String = (0..self.names.len())
            .filter(|j| *j != i)
            .map(|j| format!("{} = \"{}:{CHAIN_PORT}\"\n", self.names[j], repl_addr(j)))
            .collect();
        let detection = self.detection.map_or_else(String::new, |(ms, missed)| {
            format!("\n[detection]\nheartbeat_ms = {ms}\nmissed = {missed}\n")
        });
        format!(
            "host = \"{name}\"\ndata_dir = \"{dir}/{name}\"\ncontrol = \"{dir}/{name}.sock\"\nlisten = \"{}:{CHAIN_PORT}\"\n\n\
             [master]\nbegin = true\n{}\n[peers]\n{peers}\n\
             [networks.lan]\nbridge = \"{HOST_BRIDGE}\"\ntap_prefix = \"tap\"\n{detection}",
            repl_addr(i),
            self.master(i),
        )
    }

    fn master(&self, i: usize) -> String {
        let first = match self.masters {
            Masters::Hosts => 0,
            masters => self.names.len() - masters.hosts().len(),
        };
        if self.masters == Masters::Etcd {
            return format!("etcd = [\"{}\"]\n", etcd_url(first));
        }
        let at = |j: usize, port: u16| format!("\"{}:{port}\"", repl_addr(j));
        let members = first..self.names.len();
        let all: Vec<String> = members.clone().map(|j| at(j, MASTER_PORT)).collect();
        let mut text = format!("connect = [{}]\n", all.join(", "));
        if i < first {
            return text;
        }
        text += &format!("serve = {}\n", at(i, MASTER_PORT));
        if members.len() > 1 {
            let each: Vec<String> = members
                .map(|j| format!("{} = {}", self.names[j], at(j, MEMBER_PORT)))
                .collect();
            text += &format!("members = {{ {} }}\n", each.join(", "));
        }
        text
    }
}

/// Where the etcd server on host number `i` listens.
pub(super) fn etcd_url(i: usize) -> String {
    format!("http://{}:2379", repl_addr(i))
}

/// What a VM boots.
#[derive(Clone, Debug)]
pub enum Boot {
    /// The probe guest, with a load: pages dirtied per pass, and iterations of work after each.
    Probe {
        /// Pages.
        pages: u64,
        /// Iterations.
        work: u64,
    },
    /// Lines of `vm.toml` that name a kernel.
    Stock(String),
}

/// A VM with a network card on `lan` and perhaps a disk.
#[derive(Clone, Debug)]
pub struct VmFile {
    /// Its name.
    pub name: String,
    /// 1 for the first: the address is [`GUEST`]'s then, and goes on from there.
    pub number: u8,
    /// What it boots.
    pub boot: Boot,
    /// Guest memory.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Size of a new disk; 0: an image that is there already, or none.
    pub disk_bytes: u64,
    /// Lines of `[protect]`.
    pub protect: String,
}

impl VmFile {
    /// A small probe guest with a disk of 8 MiB, the `number`-th.
    #[must_use]
    pub fn probe(name: impl Into<String>, number: u8) -> Self {
        Self {
            name: name.into(),
            number,
            boot: Boot::Probe {
                pages: 128,
                work: 20_000,
            },
            memory_mib: 64,
            vcpus: 1,
            disk_bytes: 8 << 20,
            protect: "epoch_ms = 25\n".into(),
        }
    }

    /// Its address.
    #[must_use]
    pub fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(GUEST.to_bits() + u32::from(self.number) - 1)
    }

    /// Its MAC address, as its configuration says it.
    #[must_use]
    pub fn mac(&self) -> String {
        let mut mac = GUEST_MAC;
        mac[5] = self.number;
        let bytes: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
        bytes.join(":")
    }

    /// Where its console goes.
    #[must_use]
    pub fn console(&self) -> String {
        match self.number {
            1 => "console.log".into(),
            _ => format!("{}.console.log", self.name),
        }
    }

    /// Makes the disk `NAME.img` in `disks`, if it is to be a new one; returns the text of `vm.toml`. The console goes
    /// to `dir`.
    ///
    /// # Errors
    /// If the disk cannot be made.
    pub fn write(&self, dir: &Path, disks: &Path) -> Result<String, LabError> {
        let disk = disks.join(format!("{}.img", self.name));
        if self.disk_bytes > 0 {
            File::create(&disk)
                .and_then(|f| f.set_len(self.disk_bytes))
                .map_err(|e| LabError::io(disk.display().to_string(), e))?;
        }
        let Self {
            name,
            vcpus,
            memory_mib,
            ..
        } = self;
        let ip = self.ip();
        let boot = match &self.boot {
            Boot::Probe { pages, work } => format!(
                "kernel = \"{BUILTIN_PROBE}\"\ncmdline = \"ip={ip}/24 pages={pages} work={work}\"\n"
            ),
            Boot::Stock(lines) => lines.clone(),
        };
        let mut text = format!(
            "name = \"{name}\"\nvcpus = {vcpus}\nmemory_mib = {memory_mib}\n{boot}console = \"{}\"\n\n\
             [[net]]\nmac = \"{}\"\nnetwork = \"lan\"\nip = \"{ip}\"\n",
            dir.join(self.console()).display(),
            self.mac(),
        );
        if disk.exists() {
            text += &format!("\n[[disk]]\npath = \"{}\"\n", disk.display());
        }
        text += &format!("\n[protect]\n{}", self.protect);
        // Programs that tests run are built so; benches measure without.
        if cfg!(debug_assertions) && !self.protect.contains("verify_epochs") {
            text += &format!("verify_epochs = {VERIFY_EPOCHS}\n");
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{HostConfig, VmConfig};

    #[test]
    fn every_file_is_one_that_the_program_takes() {
        let dir = tempfile::tempdir().unwrap();
        for (masters, hosts) in [(Masters::One, 3), (Masters::Three, 2), (Masters::Hosts, 3)] {
            let own = (0..hosts).map(|i| char::from(b'a' + i).to_string());
            let names: Vec<String> = own
                .chain(masters.hosts().iter().map(|n| (*n).into()))
                .collect();
            let files = HostFiles {
                dir: dir.path(),
                names: &names,
                masters,
                detection: Some((10, 30)),
            };
            for (i, name) in names.iter().enumerate() {
                let path = dir.path().join("host.toml");
                std::fs::write(&path, files.text(i)).unwrap();
                let config = HostConfig::load(&path).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(&config.host, name);
            }
        }
        let vm = VmFile::probe("vm7", 7);
        let text = vm.write(dir.path(), dir.path()).unwrap();
        let config = VmConfig::from_text(Path::new("vm.toml"), &text).unwrap();
        assert_eq!(config.net[0].ip, Some(Ipv4Addr::new(10, 77, 0, 8)));
        assert_eq!(config.disk.len(), 1);
    }
}
