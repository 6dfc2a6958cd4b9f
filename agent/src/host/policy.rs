//! What a VM's configuration says about its life, read once.

use std::path::Path;

use chain::VmRecord;
use checkpoint::HostId;

use super::{Micros, SECOND};
use crate::config::{Alone, Epochs, VmConfig};

/// As the VM's administrator wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// How long epochs are, if its configuration can be read.
    pub epochs: Option<Epochs>,
    /// Hosts that are to back it up, head first.
    pub backups: Vec<HostId>,
    /// Without a backup it stands still rather than run.
    pub freezes_alone: bool,
    /// How long hosts that may hold a checkpoint are waited for before the VM is booted from disks.
    pub return_wait: Micros,
}

impl Policy {
    /// That of a record.
    #[must_use]
    pub fn of(record: &VmRecord) -> Self {
        Self::of_text(&record.view.name, &record.shape.config_toml)
    }

    /// That of a configuration's text. One that this version cannot read says nothing: it was checked when the VM was
    /// defined.
    #[must_use]
    pub fn of_text(name: &str, text: &str) -> Self {
        let Ok(config) = VmConfig::from_text(Path::new(name), text) else {
            return Self::default();
        };
        let protect = &config.protect;
        Self {
            epochs: Some(Epochs::of(protect)),
            backups: protect
                .backups
                .iter()
                .filter_map(|name| HostId::new(name).ok())
                .collect(),
            freezes_alone: protect.alone == Alone::Freeze,
            return_wait: protect.return_wait_s * SECOND,
        }
    }

    /// The hosts that should back the VM up while `owner` runs it: all that have had a part since an administrator chose,
    /// those configured first. Nobody backs up a VM whose protection was not asked for, or was ended.
    #[must_use]
    pub fn wanted(&self, record: &VmRecord, owner: &HostId) -> Vec<HostId> {
        let others = record.wanted_by(owner);
        let configured = self.backups.iter().filter(|host| others.contains(host));
        let mut wanted: Vec<HostId> = configured.cloned().collect();
        wanted.extend(
            others
                .iter()
                .filter(|host| !self.backups.contains(host))
                .cloned(),
        );
        wanted
    }

    /// The configured backups while `owner` runs it, who may be one of them.
    #[must_use]
    pub fn backups_but(&self, owner: &HostId) -> Vec<HostId> {
        let others = self.backups.iter().filter(|host| *host != owner);
        others.cloned().collect()
    }
}
