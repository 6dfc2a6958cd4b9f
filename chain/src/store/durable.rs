//! A store whose checkpoints are on the disk before they are acknowledged: [`VmStore`] with a [log](super::log).
//!
//! Order of a checkpoint: verified, logged and synced, then the disk writes are given to the mirrors. A crash in between
//! leaves mirrors that are behind the log, and recovery gives them the writes again.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use checkpoint::{CheckpointEnd, Epoch, Generation, VmId};
use diskbuf::layer::{FileLayer, OsLayer};
use diskbuf::{Durability, ReplicaDisks, Role};

use super::log::{Log, LogError, Options, gfns};
use super::query::{Files, Memory, Past};
use super::{Copying, History, ReplicaStore, Retention, StoreError, Taken, VmStore};
use crate::mark::Mark;
use crate::view::VmShape;

/// Name of the log's directory in a VM's.
const LOG_DIR: &str = "log";

/// [`VmStore`] with a log.
pub struct DurableStore {
    inner: VmStore,
    log: Log,
    retention: Retention,
    undo_bytes: u64,
    full: bool,
    /// Log or mirrors failed: they may not be at the same checkpoint any more, and take nothing until opened anew.
    failed: Option<String>,
}

fn disks_error(e: impl std::fmt::Display) -> StoreError {
    StoreError::Disks(e.to_string())
}

impl DurableStore {
    /// An empty store for a VM of `shape`, mirrors and log in `dir`. What an earlier one left there is of no account,
    /// and goes with the first checkpoint.
    ///
    /// # Errors
    /// [`StoreError`] naming image, mirrors or log.
    pub fn create(
        dir: &Path,
        vm: VmId,
        shape: VmShape,
        retention: Retention,
    ) -> Result<Self, StoreError> {
        Self::open(dir, vm, shape, retention, true)
    }

    /// The store that was in `dir`, at its newest complete checkpoint ([`DurableStore::holds`]); an empty one if there is
    /// none: never filled, filling was interrupted, or the VM has been run from it since.
    ///
    /// # Errors
    /// [`StoreError`]; above all [`LogError::Damaged`]: what was durable is not there any more, and this host must be
    /// filled anew ([`DurableStore::create`]).
    pub fn recover(
        dir: &Path,
        vm: VmId,
        shape: VmShape,
        retention: Retention,
    ) -> Result<Self, StoreError> {
        Self::open(dir, vm, shape, retention, false)
    }

    fn open(
        dir: &Path,
        vm: VmId,
        shape: VmShape,
        retention: Retention,
        fresh: bool,
    ) -> Result<Self, StoreError> {
        let disks =
            ReplicaDisks::open(dir, vm, &shape.disks, Durability::Disk).map_err(disks_error)?;
        let options = Options::new(retention);
        Self::over(Arc::new(OsLayer), dir, vm, shape, disks, options, fresh)
    }

    /// Over mirrors that are open, which also keep others out of the directory.
    pub(super) fn over(
        layer: Arc<dyn FileLayer>,
        dir: &Path,
        vm: VmId,
        shape: VmShape,
        disks: ReplicaDisks,
        options: Options,
        fresh: bool,
    ) -> Result<Self, StoreError> {
        // While the mirrors are being filled, or once a VM has run on them, there is no checkpoint.
        let valid = disks.record().is_some_and(|r| r.role == Role::Replica);
        let fresh = fresh || !valid;
        let log = Log::open(layer, &dir.join(LOG_DIR), vm, &shape.ram, options, fresh)?;
        let mut store = Self {
            inner: VmStore::over(shape, disks)?,
            log,
            retention: options.retention,
            undo_bytes: options.undo_bytes,
            full: false,
            failed: None,
        };
        if let Some(mark) = store.log.latest() {
            store.catch_up(mark)?;
        }
        Ok(store)
    }

    /// Brings image and mirrors to the log's newest checkpoint.
    fn catch_up(&mut self, newest: Mark) -> Result<(), StoreError> {
        // The mirrors note the generation in which they were written; a checkpoint's own may be an earlier one.
        let generation = self.inner.disks.generation();
        let at = self.inner.disks.epoch();
        if at > newest.epoch {
            return Err(disks_error(format!(
                "the mirrors are at checkpoint {at}, but the log ends with {newest}: its end is lost; this host has to be filled anew"
            )));
        }
        let machine = self.log.load(&mut self.inner.image)?;
        for writes in self.log.disk_writes(at) {
            let (mark, writes) = writes?;
            let done =
                self.inner
                    .disks
                    .process(mark.epoch, generation.max(mark.generation), &writes);
            done.map_err(disks_error)?;
        }
        self.inner.machine = Some((newest, machine));
        Ok(())
    }

    fn guard<T>(
        &mut self,
        what: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if let Some(why) = &self.failed {
            return Err(LogError::Poisoned(why.clone()).into());
        }
        let result = what(self);
        if let Err(e) = &result
            && e.damages()
        {
            self.failed = Some(e.to_string());
        }
        result
    }

    fn prepare_all(
        &mut self,
        generation: Generation,
        mark: Mark,
        end: &CheckpointEnd,
    ) -> Result<(), StoreError> {
        let whole = self.inner.verify(end)?;
        let undo = if self.full {
            None
        } else if whole.disk.is_empty() {
            Some(Vec::new())
        } else if self.retention.keeps_past() {
            let disks = &self.inner.disks;
            disks
                .pre_images(&whole.disk, self.undo_bytes)
                .map_err(disks_error)?
        } else {
            None
        };
        self.log.commit(mark, end, undo.as_deref())?;
        self.inner.process(generation, mark.epoch, whole)?;
        Ok(self.log.retain()?)
    }

    /// The RAM files for a standby.
    #[must_use]
    pub fn ram_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.inner.ram_fds()
    }

    #[cfg(test)]
    pub(super) fn image(&self) -> &crate::image::Image {
        &self.inner.image
    }

    #[cfg(test)]
    pub(super) fn machine_bytes(&self) -> Vec<u8> {
        let machine = self.inner.machine.as_ref();
        machine.map_or_else(Vec::new, |(_, machine)| machine.clone())
    }

    /// Bytes that the log takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.log.bytes()
    }
}

impl ReplicaStore for DurableStore {
    fn base(&self) -> Option<&VmStore> {
        Some(&self.inner)
    }

    fn base_mut(&mut self) -> Option<&mut VmStore> {
        Some(&mut self.inner)
    }

    fn begin(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        full: bool,
    ) -> Result<(), StoreError> {
        if !full && self.log.latest().is_none() {
            return Err(StoreError::Empty);
        }
        self.guard(|store| {
            store.full = full;
            store.log.begin(full)?;
            store.inner.begin(generation, epoch, full)
        })
    }

    fn begin_install(&mut self, generation: Generation, epoch: Epoch) -> Result<(), StoreError> {
        self.guard(|store| {
            store.full = true;
            store.log.begin(true)?;
            store.inner.begin_install(generation, epoch)
        })
    }

    fn pages(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.guard(|store| {
            store.inner.pages(payload)?;
            if !store.full {
                return Ok(store.log.pages(payload)?);
            }
            for gfn in gfns(payload) {
                store.log.base_page(gfn, store.inner.image.page(gfn)?)?;
            }
            Ok(())
        })
    }

    fn disk(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.guard(|store| {
            store.inner.disk(payload)?;
            if store.full {
                // Straight into the mirrors, which are being filled too.
                return Ok(());
            }
            Ok(store.log.disk(payload)?)
        })
    }

    fn machine(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.guard(|store| {
            store.inner.machine(payload)?;
            Ok(store.log.machine(payload)?)
        })
    }

    fn prepare(
        &mut self,
        generation: Generation,
        mark: Mark,
        end: &CheckpointEnd,
    ) -> Result<(), StoreError> {
        self.guard(|store| store.prepare_all(generation, mark, end))
    }

    fn commit(&mut self, mark: Mark) {
        self.inner.commit(mark);
    }

    fn copy_begin(&mut self) -> Result<Copying, StoreError> {
        self.guard(|store| store.inner.begin_copy())
    }

    fn holds(&self) -> Option<Mark> {
        self.inner.holds()
    }

    fn machine_state(&self) -> Option<&[u8]> {
        self.inner.machine_state()
    }

    fn history(&mut self) -> Option<&mut dyn History> {
        Some(self)
    }

    fn out_begin(&mut self, mark: Mark, files: Files) -> Result<(), StoreError> {
        self.guard(|store| {
            let past = store.past(mark)?;
            store.inner.copy_past(past, files)
        })
    }

    fn hand_over(self: Box<Self>, generation: Generation) -> Result<Taken, StoreError> {
        let handover = Box::new(self.inner).hand_over(generation);
        // What is being folded is of no use any more. It stops at its next step, and the VM does not wait for that.
        self.log.abandon();
        handover
    }
}

impl History for DurableStore {
    fn range(&self) -> Vec<Mark> {
        self.log.range()
    }

    fn past(&mut self, mark: Mark) -> Result<Past, StoreError> {
        let reader = self.log.reader(mark).map_err(|e| match e {
            LogError::NotRetained(mark) => StoreError::NotRetained(mark),
            e => e.into(),
        })?;
        Ok(Past {
            mark,
            memory: Memory::Log(reader),
        })
    }

    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.inner
            .disks
            .read(disk, offset, buf)
            .map_err(disks_error)
    }
}
