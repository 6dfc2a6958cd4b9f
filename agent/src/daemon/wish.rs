//! Which hosts a VM of this host should have as backups, kept on this host's disk: after the loss of all hosts the master's
//! record may name none of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use checkpoint::HostId;

use super::Daemon;

fn path(daemon: &Daemon, vm: &str) -> PathBuf {
    daemon.config.data_dir.join("backups").join(vm)
}

/// Notes it. If that fails, the VM is protected all the same; only after a restart an administrator has to ask for it again.
pub(super) fn note(daemon: &Daemon, vm: &str, hosts: &[HostId]) {
    let path = path(daemon, vm);
    let replace = || -> io::Result<()> {
        let dir = path.parent().ok_or(io::ErrorKind::NotFound)?;
        fs::create_dir_all(dir)?;
        let new = dir.join(format!(".{vm}.new"));
        let mut file = File::create(&new)?;
        for host in hosts {
            writeln!(file, "{host}")?;
        }
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(dir)?.sync_all()
    };
    if let Err(e) = replace() {
        tracing::warn!("{}: {e}", path.display());
    }
}

/// What was noted last.
pub(super) fn noted(daemon: &Daemon, vm: &str) -> Vec<HostId> {
    let text = fs::read_to_string(path(daemon, vm)).unwrap_or_default();
    let names = text.lines().filter_map(|line| HostId::new(line).ok());
    names.filter(|host| *host != daemon.host).collect()
}

/// The VM is no more.
pub(super) fn forget(daemon: &Daemon, vm: &str) {
    let _ = fs::remove_file(path(daemon, vm));
}
