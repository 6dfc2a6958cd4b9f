//! The VM of the demo and the benches.

use std::fs;
use std::path::Path;

use crate::cli::DemoArgs;
use crate::lab::{Boot, GUEST, Lab, VmFile};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Its name.
pub const VM: &str = "demo";
/// Size of the probe guest's disk.
const DISK: u64 = 16 << 20;

/// A probe guest.
#[must_use]
pub fn probe(memory_mib: u64, vcpus: u8, (pages, work): (u64, u64), epoch_ms: u64) -> VmFile {
    VmFile {
        boot: Boot::Probe { pages, work },
        memory_mib,
        vcpus,
        disk_bytes: DISK,
        protect: format!("epoch_ms = {epoch_ms}\n"),
        ..VmFile::probe(VM, 1)
    }
}

/// What the command line asks for.
///
/// # Errors
/// When a file is not there, or a disk image cannot be copied.
pub fn of(args: &DemoArgs, lab: &Lab) -> Outcome<VmFile> {
    let load = (args.pages, args.work);
    let mut vm = probe(args.memory_mib, args.vcpus, load, args.epoch_ms);
    let Some(kernel) = &args.kernel else {
        return Ok(vm);
    };
    let whole = |path: &Path| fs::canonicalize(path).map_err(|e| named(path, e));
    let mut boot = format!("kernel = \"{}\"\n", whole(kernel)?.display());
    if let Some(initrd) = &args.initrd {
        boot += &format!("initrd = \"{}\"\n", whole(initrd)?.display());
    }
    let cmdline = args
        .cmdline
        .clone()
        .unwrap_or_else(|| format!("console=ttyS0 quiet us.ip={GUEST}/24"));
    boot += &format!("cmdline = {}\n", toml::Value::String(cmdline));
    vm.boot = Boot::Stock(boot);
    vm.disk_bytes = 0;
    if let Some(disk) = &args.disk {
        let copy = lab.disks_of("a").join(format!("{VM}.img"));
        fs::copy(disk, &copy).map_err(|e| named(disk, e))?;
    }
    Ok(vm)
}

fn named(path: &Path, e: std::io::Error) -> String {
    format!("{}: {e}", path.display())
}
