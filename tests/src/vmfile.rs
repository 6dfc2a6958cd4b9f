//! The probe guest's configuration.

use std::net::Ipv4Addr;
use std::path::Path;

use agent::lab::Boot;
pub use agent::lab::{GUEST, GUEST_MAC};

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
            disk_bytes,
        } = *self;
        let vm = agent::lab::VmFile {
            name: self.name(),
            number,
            boot: Boot::Probe { pages, work },
            memory_mib,
            vcpus,
            disk_bytes,
            protect: format!(
                "epoch_ms = {epoch_ms}\nmax_in_flight = {max_in_flight}\nalone = \"{alone}\"\nretain = {retain}\ndurability = \"{durability}\"\n"
            ),
        };
        vm.write(dir, dir).unwrap_or_else(|e| panic!("{e}"))
    }
}
