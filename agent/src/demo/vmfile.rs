//! The demo VM's configuration.

use std::fs::{self, File};

use super::cluster::{Cluster, GUEST};
use crate::cli::DemoArgs;
use crate::config::BUILTIN_PROBE;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Size of the probe guest's disk.
const DISK: u64 = 16 << 20;
/// The guest's MAC address.
pub const MAC: &str = "52:54:00:75:73:01";

/// A probe guest's configuration.
///
/// # Errors
/// When its disk cannot be made.
pub fn probe(
    cluster: &Cluster,
    memory_mib: u64,
    vcpus: u8,
    load: (u64, u64),
    epoch_ms: u64,
) -> Outcome<String> {
    let disk = cluster.dir().join("demo.img");
    File::create(&disk)?.set_len(DISK)?;
    let (pages, work) = load;
    Ok(text(
        cluster,
        memory_mib,
        vcpus,
        &format!(
            "kernel = \"{BUILTIN_PROBE}\"\ncmdline = \"ip={GUEST}/24 pages={pages} work={work}\"\n"
        ),
        Some(&disk),
        epoch_ms,
    ))
}

/// The configuration that the command line asks for.
///
/// # Errors
/// When a disk image cannot be copied.
pub fn write(cluster: &Cluster, args: &DemoArgs) -> Outcome<String> {
    let Some(kernel) = &args.kernel else {
        return probe(
            cluster,
            args.memory_mib,
            args.vcpus,
            (args.pages, args.work),
            args.epoch_ms,
        );
    };
    let mut boot = format!(
        "kernel = \"{}\"\n",
        fs::canonicalize(kernel)
            .map_err(|e| named(kernel, e))?
            .display()
    );
    if let Some(initrd) = &args.initrd {
        boot += &format!(
            "initrd = \"{}\"\n",
            fs::canonicalize(initrd)
                .map_err(|e| named(initrd, e))?
                .display()
        );
    }
    let cmdline = args
        .cmdline
        .clone()
        .unwrap_or_else(|| format!("console=ttyS0 quiet us.ip={GUEST}/24"));
    boot += &format!("cmdline = {}\n", toml::Value::String(cmdline));
    let disk = match &args.disk {
        Some(disk) => {
            let copy = cluster.dir().join("demo.img");
            fs::copy(disk, &copy).map_err(|e| named(disk, e))?;
            Some(copy)
        }
        None => None,
    };
    Ok(text(
        cluster,
        args.memory_mib,
        args.vcpus,
        &boot,
        disk.as_deref(),
        args.epoch_ms,
    ))
}

fn named(path: &std::path::Path, e: std::io::Error) -> String {
    format!("{}: {e}", path.display())
}

fn text(
    cluster: &Cluster,
    memory_mib: u64,
    vcpus: u8,
    boot: &str,
    disk: Option<&std::path::Path>,
    epoch_ms: u64,
) -> String {
    let console = cluster.dir().join("console.log");
    let mut text = format!(
        "name = \"demo\"\nvcpus = {vcpus}\nmemory_mib = {memory_mib}\n{boot}console = \"{}\"\n\n[[net]]\nmac = \"{MAC}\"\nnetwork = \"lan\"\nip = \"{GUEST}\"\n",
        console.display()
    );
    if let Some(disk) = disk {
        text += &format!("\n[[disk]]\npath = \"{}\"\n", disk.display());
    }
    text + &format!("\n[protect]\nepoch_ms = {epoch_ms}\n")
}
