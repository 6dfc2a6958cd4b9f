//! Which store a VM gets.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use checkpoint::VmId;
use diskbuf::Durability;

use super::{DurableStore, MemoryStore, ReplicaStore, Retention, StoreError};
use crate::view::VmShape;

/// How a replica keeps a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// What an acknowledgement promises. [`Durability::Memory`]: the checkpoint is in this host's memory.
    /// [`Durability::Disk`]: all of it, memory and machine state as well, is on this host's disk.
    pub durability: Durability,
    /// How much of the past is kept.
    pub retention: Retention,
}

impl From<Durability> for StoreOptions {
    /// In memory only the newest checkpoint, which costs nothing; on the disk, where they are logged anyway, some more.
    fn from(durability: Durability) -> Self {
        let retention = match durability {
            Durability::Memory => Retention::NEWEST,
            Durability::Disk => Retention {
                checkpoints: 64,
                bytes: 256 << 20,
            },
        };
        Self {
            durability,
            retention,
        }
    }
}

/// Makes an empty store for a VM of `shape` in `dir`; its RAM files for the standby come with it.
///
/// # Errors
/// [`StoreError`] naming image, mirrors or log.
pub fn create(
    dir: &Path,
    vm: VmId,
    shape: VmShape,
    options: StoreOptions,
) -> Result<(Box<dyn ReplicaStore>, Vec<OwnedFd>), StoreError> {
    let StoreOptions {
        durability,
        retention,
    } = options;
    match durability {
        Durability::Memory => {
            let store = MemoryStore::new(dir, vm, shape, durability, retention)?;
            let fds = owned(store.ram_fds())?;
            Ok((Box::new(store), fds))
        }
        Durability::Disk => {
            let store = DurableStore::create(dir, vm, shape, retention)?;
            let fds = owned(store.ram_fds())?;
            Ok((Box::new(store), fds))
        }
    }
}

/// Opens the store that a host that was down has in `dir`, at its newest complete checkpoint; an empty one if there is none,
/// as always when its checkpoints were in memory only.
///
/// # Errors
/// [`StoreError`]; if it is damaged, the host has to be filled anew ([`create`]).
pub fn reopen(
    dir: &Path,
    vm: VmId,
    shape: VmShape,
    options: StoreOptions,
) -> Result<(Box<dyn ReplicaStore>, Vec<OwnedFd>), StoreError> {
    if options.durability == Durability::Memory {
        return create(dir, vm, shape, options);
    }
    let store = DurableStore::recover(dir, vm, shape, options.retention)?;
    let fds = owned(store.ram_fds())?;
    Ok((Box::new(store), fds))
}

fn owned(fds: Vec<BorrowedFd<'_>>) -> io::Result<Vec<OwnedFd>> {
    fds.into_iter().map(|fd| fd.try_clone_to_owned()).collect()
}
