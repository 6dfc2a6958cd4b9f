//! The probe guest's configuration.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The guest's MAC address.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x75, 0x73, 0x01];

/// A VM named `vm` with the probe guest, a network card on `lan` and a disk.
#[derive(Clone, Copy, Debug)]
pub struct VmFile {
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
    /// Makes the disk in `dir`; returns the text of `vm.toml`.
    ///
    /// # Panics
    /// If the disk cannot be made.
    #[must_use]
    pub fn write(&self, dir: &Path) -> String {
        let disk = dir.join("vm.img");
        File::create(&disk)
            .and_then(|f| f.set_len(self.disk_bytes))
            .unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
        let Self {
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
        let mac: Vec<String> = GUEST_MAC.iter().map(|b| format!("{b:02x}")).collect();
        format!(
            r#"name = "vm"
vcpus = {vcpus}
memory_mib = {memory_mib}
kernel = "builtin:probe"
cmdline = "ip={GUEST}/24 pages={pages} work={work}"
console = "{console}"

[[net]]
mac = "{mac}"
network = "lan"
ip = "{GUEST}"

[[disk]]
path = "{disk}"

[protect]
epoch_ms = {epoch_ms}
max_in_flight = {max_in_flight}
alone = "{alone}"
retain = {retain}
durability = "{durability}"
"#,
            console = dir.join("console.log").display(),
            mac = mac.join(":"),
            disk = disk.display(),
        )
    }
}
