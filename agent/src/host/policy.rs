//! What a VM's configuration says about its life, read once.

use std::path::Path;

use chain::VmRecord;
use checkpoint::HostId;

use super::{Micros, SECOND};
use crate::config::{Alone, VmConfig};

/// As the VM's administrator wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Hosts that are to back it up, head first.
    pub backups: Vec<HostId>,
    /// Without a backup it stands still rather than run.
    pub freezes_alone: bool,
    /// How long hosts that may hold a checkpoint are waited for before the VM is booted from disks.
    pub return_wait: Micros,
}

impl Policy {
    /// That of a record. A text that this version cannot read says nothing: it was checked when the VM was defined.
    #[must_use]
    pub fn of(record: &VmRecord) -> Self {
        let name = Path::new(&record.view.name);
        let Ok(config) = VmConfig::from_text(name, &record.shape.config_toml) else {
            return Self::default();
        };
        let protect = &config.protect;
        Self {
            backups: protect
                .backups
                .iter()
                .filter_map(|name| HostId::new(name).ok())
                .collect(),
            freezes_alone: protect.alone == Alone::Freeze,
            return_wait: protect.return_wait_s * SECOND,
        }
    }

    /// The hosts that should back the VM up while `owner` runs it: those configured, then all that have had a part.
    #[must_use]
    pub fn wanted(&self, record: &VmRecord, owner: &HostId) -> Vec<HostId> {
        let mut wanted = Vec::new();
        let others = record.wanted_by(owner);
        for host in self.backups.iter().chain(&others) {
            if host != owner && !wanted.contains(host) {
                wanted.push(host.clone());
            }
        }
        wanted
    }
}
