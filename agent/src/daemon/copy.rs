//! This host's copy of a VM's disks: the one to boot from when no checkpoint of the VM is left.

use std::path::PathBuf;

use chain::{DurableStore, ReplicaStore, VmRecord};
use checkpoint::Generation;
use diskbuf::{DiskbufError, ReplicaDisks, Role};

use super::boot_files;
use super::env::Env;
use super::process::{config_of, store_options};

/// Where the disks are.
pub(super) enum DiskCopy {
    /// Those that the configuration names: the VM was started here, and has not been anywhere else since.
    Configured,
    /// Those that the VM ran on here: it had been taken over.
    Run(Vec<PathBuf>),
    /// Those of a replica that nobody can resume from: its journal brings them to one checkpoint.
    Replica(Box<ReplicaDisks>),
    /// The same, with a log that may be ahead of them.
    Logged(Box<DurableStore>),
}

impl DiskCopy {
    /// Looks for it.
    ///
    /// # Errors
    /// In words: that there is none, or none that counts.
    pub fn find(env: &Env, record: &VmRecord) -> Result<Self, String> {
        let config = config_of(record)?;
        // Before anybody is told that this host boots it.
        boot_files::ensure(env, record)?;
        let (view, shape) = (&record.view, &record.shape);
        let dir = env.config.data_dir.join("replicas").join(&view.name);
        let owner = view.owner == env.host;
        if !dir.join("activation").exists() {
            return match owner {
                true => Ok(Self::Configured),
                false => Err("this host has no copy of its disks".into()),
            };
        }
        let options = store_options(&config);
        let disks = match ReplicaDisks::open(&dir, view.vm, &shape.disks, options.durability) {
            Ok(disks) => disks,
            // Left by another VM of that name: this one has never been a replica here.
            Err(DiskbufError::OtherVm { .. }) if owner => return Ok(Self::Configured),
            Err(e) => return Err(e.to_string()),
        };
        match disks.record().map(|found| found.role) {
            Some(Role::Owner) if owner => Ok(Self::Run(disks.image_paths())),
            Some(Role::Replica) if options.durability == diskbuf::Durability::Disk => {
                drop(disks);
                let store = DurableStore::recover(&dir, view.vm, shape.clone(), options.retention)
                    .map_err(|e| e.to_string())?;
                Ok(Self::Logged(Box::new(store)))
            }
            Some(Role::Replica) => Ok(Self::Replica(Box::new(disks))),
            None if owner => Ok(Self::Configured),
            _ => Err(format!(
                "{}: this copy of its disks is not valid (it was being filled, or belongs to an owner of before); another host may have a valid one: `understudy recover {}` there",
                dir.display(),
                view.name
            )),
        }
    }

    /// The images to boot from; `None`: those of the configuration.
    ///
    /// # Errors
    /// In words: what keeps them from being brought to one checkpoint.
    pub fn open(self, generation: Generation) -> Result<Option<Vec<PathBuf>>, String> {
        match self {
            Self::Configured => Ok(None),
            Self::Run(paths) => Ok(Some(paths)),
            Self::Replica(mut disks) => {
                let epoch = disks.epoch();
                let paths = disks.activate(generation, epoch);
                paths.map(Some).map_err(|e| e.to_string())
            }
            Self::Logged(store) => {
                let handover = store.hand_over(generation).map_err(|e| e.to_string())?;
                Ok(Some(handover.disks))
            }
        }
    }
}
