//! A stock guest's configuration: an unmodified Debian kernel with a redis server (`tests/stock/README.md`).

use std::fs;
use std::path::{Path, PathBuf};

use agent::lab::Boot;

use crate::cluster::VM;
use crate::vmfile::GUEST;

/// A VM named `vm` with the stock guest, a network card on `lan` and a disk that redis logs to.
#[derive(Clone, Copy, Debug)]
pub struct StockFile {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Longest epoch.
    pub epoch_ms: u64,
}

impl StockFile {
    /// Makes the disk in `dir`; returns the text of `vm.toml`.
    ///
    /// # Panics
    /// Naming what the environment lacks, or the disk that cannot be copied.
    #[must_use]
    pub fn write(&self, dir: &Path) -> String {
        let disk = dir.join(format!("{VM}.img"));
        let empty = given("UNDERSTUDY_STOCK_DISK");
        fs::copy(&empty, &disk).unwrap_or_else(|e| panic!("copying {}: {e}", empty.display()));
        let vm = agent::lab::VmFile {
            name: VM.into(),
            number: 1,
            boot: Boot::Stock(format!(
                "kernel = \"{}\"\ninitrd = \"{}\"\ncmdline = \"console=ttyS0 quiet us.ip={GUEST}/24 us.aof=1\"\n",
                given("UNDERSTUDY_STOCK_VMLINUZ").display(),
                given("UNDERSTUDY_STOCK_INITRD").display()
            )),
            memory_mib: 256,
            vcpus: self.vcpus,
            disk_bytes: 0,
            protect: format!("epoch_ms = {}\nmin_epoch_ms = 20\n", self.epoch_ms),
        };
        vm.write(dir, dir).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// The file that a variable names.
///
/// # Panics
/// If it is not set.
#[must_use]
pub fn given(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| {
        panic!("{name} is not set: run `scripts/test --tier2`, which builds what it names (tests/stock/README.md)")
    })
}
