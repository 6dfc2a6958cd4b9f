//! A stock guest's configuration: an unmodified Debian kernel with a redis server (`tests/stock/README.md`).

use std::fs;
use std::path::{Path, PathBuf};

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
        let disk = dir.join("vm.img");
        let empty = given("UNDERSTUDY_STOCK_DISK");
        fs::copy(&empty, &disk).unwrap_or_else(|e| panic!("copying {}: {e}", empty.display()));
        format!(
            r#"name = "{VM}"
vcpus = {vcpus}
memory_mib = 256
kernel = "{kernel}"
initrd = "{initrd}"
cmdline = "console=ttyS0 quiet us.ip={GUEST}/24 us.aof=1"
console = "{console}"

[[net]]
mac = "52:54:00:75:73:02"
network = "lan"
ip = "{GUEST}"

[[disk]]
path = "{disk}"

[protect]
epoch_ms = {epoch_ms}
min_epoch_ms = 20
"#,
            vcpus = self.vcpus,
            kernel = given("UNDERSTUDY_STOCK_VMLINUZ").display(),
            initrd = given("UNDERSTUDY_STOCK_INITRD").display(),
            console = dir.join("console.log").display(),
            disk = disk.display(),
            epoch_ms = self.epoch_ms,
        )
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
