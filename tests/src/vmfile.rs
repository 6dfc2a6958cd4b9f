//! The probe guest's configuration.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The guest's MAC address.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x75, 0x73, 0x01];

/// A VM with the probe guest, a network card on `lan` and a disk.
#[derive(Clone, Copy, Debug)]
pub struct VmFile {
    /// The first is named `vm` and has [`GUEST`]'s address; another one n `vm<n>`, with the n-th address from there on.
    pub number: u8,
    /// Guest memory.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Pages dirtied per pass.
    pub pages: u64,
    /// Iterations of work after each page.
    pub work: u64,
    /// Longest epoch.
    pub epoch_ms: u64,
    /// Checkpoints under way at most.
    pub max_in_flight: u32,
    /// What it does without a backup: run or freeze.
    pub alone: &'static str,
    /// Checkpoints kept.
    pub retain: u64,
    /// What an ack promises: memory or disk.
    pub durability: &'static str,
    /// Size of its disk.
    pub disk_bytes: u64,
}

impl Default for VmFile {
    fn default() -> Self {
        Self {
            number: 1,
            memory_mib: 64,
            vcpus: 1,
            pages: 128,
            work: 20_000,
            epoch_ms: 25,
            max_in_flight: 3,
            alone: "run",
            retain: 1,
            durability: "memory",
            disk_bytes: 8 << 20,
        }
    }
}

impl VmFile {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        match self.number {
            1 => crate::VM.into(),
            n => format!("{}{n}", crate::VM),
        }
    }

    /// Its address.
    #[must_use]
    pub fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(GUEST.to_bits() + u32::from(self.number) - 1)
    }

    /// Makes the disk in `dir`; returns the text of `vm.toml`.
    ///
    /// # Panics
    /// If the disk cannot be made.
    #[must_use]
    pub fn write(&self, dir: &Path) -> String {
        let name = self.name();
        let disk = dir.join(format!("{name}.img"));
        File::create(&disk)
            .and_then(|f| f.set_len(self.disk_bytes))
            .unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
        let Self {
            number,
            memory_mib,
            vcpus,
            pages,
            work,
            epoch_ms,
            max_in_flight,
            alone,
            retain,
            durability,
            disk_bytes: _,
        } = self;
        let mut mac = GUEST_MAC;
        mac[5] = *number;
        let ip = self.ip();
        let console = match number {
            1 => "console.log".into(),
            _ => format!("{name}.console.log"),
        };
        let mac: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
        format!(
            r#"name = "{name}"
vcpus = {vcpus}
memory_mib = {memory_mib}
kernel = "builtin:probe"
cmdline = "ip={ip}/24 pages={pages} work={work}"
console = "{console}"

[[net]]
mac = "{mac}"
network = "lan"
ip = "{ip}"

[[disk]]
path = "{disk}"

[protect]
epoch_ms = {epoch_ms}
max_in_flight = {max_in_flight}
alone = "{alone}"
retain = {retain}
durability = "{durability}"
"#,
            console = dir.join(console).display(),
            mac = mac.join(":"),
            disk = disk.display(),
        )
    }
}
