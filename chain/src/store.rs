//! What a replica keeps of a VM: image, mirrors, machine state; and how a checkpoint gets into it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use checkpoint::{
    CheckpointEnd, Epoch, Generation, Stage, StageError, StageLimits, VmId, disk_records,
};
use diskbuf::{Durability, ReplicaDisks};

use crate::image::{Image, ImageError};
use crate::view::VmShape;

/// Why a replica cannot go on with a VM.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The memory image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The checkpoint.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The mirrors.
    #[error("mirrors: {0}")]
    Disks(String),
    /// A disk record outside the VM's disks.
    #[error("a write to disk {disk} at {offset}+{len}, which the VM does not have")]
    DiskRange {
        /// The disk.
        disk: u16,
        /// Where.
        offset: u64,
        /// How long.
        len: u32,
    },
    /// There is no checkpoint to resume from.
    #[error("this replica holds no complete checkpoint")]
    Empty,
    /// The machine state does not decode.
    #[error("checkpoint {epoch}: {source}")]
    Machine {
        /// The epoch.
        epoch: Epoch,
        /// Why.
        source: checkpoint::MachineError,
    },
    /// The operating system.
    #[error("duplicating a descriptor: {0}")]
    Descriptor(#[from] std::io::Error),
    /// The end marker does not decode.
    #[error("a checkpoint's end marker: {0}")]
    End(checkpoint::CodecError),
    /// Messages out of order.
    #[error("no checkpoint is open")]
    NotOpen,
}

/// Image, mirrors and machine state of one VM at one replica.
#[derive(Debug)]
pub struct VmStore {
    shape: VmShape,
    image: Image,
    disks: ReplicaDisks,
    machine: Option<(Epoch, Vec<u8>)>,
    open: Option<(Stage, bool)>,
}

/// A VM's state, handed over to the process that will run it.
#[derive(Debug)]
pub struct Handover {
    /// The checkpoint.
    pub epoch: Epoch,
    /// Encoded machine state.
    pub machine: Vec<u8>,
    /// The mirrors' files.
    pub disks: Vec<PathBuf>,
    /// The image's files; the standby has them already.
    pub ram: Vec<OwnedFd>,
}

/// Disk writes of one epoch that a replica takes, in bytes: what a journal entry holds. An owner's limit is lower.
const DISK_LIMIT: u64 = 1 << 30;

impl VmStore {
    /// An empty store for a VM of `shape`, its mirrors in `dir`.
    ///
    /// # Errors
    /// [`StoreError`] naming image or mirrors.
    pub fn new(
        dir: &Path,
        vm: VmId,
        shape: VmShape,
        durability: Durability,
    ) -> Result<Self, StoreError> {
        let image = Image::new(&shape.ram)?;
        let disks = ReplicaDisks::open(dir, vm, &shape.disks, durability)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        Ok(Self {
            shape,
            image,
            disks,
            machine: None,
            open: None,
        })
    }

    /// The RAM files for a standby.
    #[must_use]
    pub fn ram_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.image.fds()
    }

    /// Begins a checkpoint; a half received one is dropped.
    ///
    /// # Errors
    /// [`StoreError`]; the replica has failed then.
    pub fn begin(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        full: bool,
    ) -> Result<(), StoreError> {
        self.image.discard();
        if full {
            self.machine = None;
            self.image.reset()?;
            self.disks
                .begin_full(generation)
                .map_err(|e| StoreError::Disks(e.to_string()))?;
        }
        let ram: u64 = self.shape.ram.iter().map(|r| r.len).sum();
        let limits = StageLimits {
            pages: ram + ram / 128 + (1 << 20),
            disk: DISK_LIMIT,
        };
        self.open = Some((Stage::new(epoch, limits), full));
        Ok(())
    }

    /// Takes page records.
    ///
    /// # Errors
    /// As [`VmStore::begin`].
    pub fn pages(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let (stage, full) = self.open.as_mut().ok_or(StoreError::NotOpen)?;
        stage.count_pages(payload)?;
        if *full {
            self.image.write(payload)?
        } else {
            self.image.stage(payload)?
        }
        Ok(())
    }

    /// Takes disk records: held until the checkpoint is whole.
    ///
    /// # Errors
    /// As [`VmStore::begin`].
    pub fn disk(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let (stage, full) = self.open.as_mut().ok_or(StoreError::NotOpen)?;
        for record in disk_records(payload) {
            let record = record.map_err(StageError::from)?;
            let size = self
                .shape
                .disks
                .get(usize::from(record.disk))
                .copied()
                .unwrap_or(0);
            if record.offset + u64::from(record.len) > size {
                return Err(StoreError::DiskRange {
                    disk: record.disk,
                    offset: record.offset,
                    len: record.len,
                });
            }
            if *full {
                self.disks
                    .write_full(&record)
                    .map_err(|e| StoreError::Disks(e.to_string()))?;
            }
        }
        if *full {
            stage.count_disk(payload)?
        } else {
            stage.add_disk(payload.to_vec())?
        }
        Ok(())
    }

    /// Takes a piece of the machine state.
    ///
    /// # Errors
    /// As [`VmStore::begin`].
    pub fn machine(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        Ok(self
            .open
            .as_mut()
            .ok_or(StoreError::NotOpen)?
            .0
            .add_machine(payload)?)
    }

    /// The checkpoint is complete: verify that it is whole and process it. Before this returns `Ok` the store is at the
    /// previous checkpoint (or, for a full one, at none); afterwards at this one.
    ///
    /// # Errors
    /// As [`VmStore::begin`].
    pub fn process(
        &mut self,
        generation: Generation,
        end: &CheckpointEnd,
    ) -> Result<Epoch, StoreError> {
        let (stage, _) = self.open.take().ok_or(StoreError::NotOpen)?;
        let whole = stage.finish(end)?;
        checkpoint::MachineState::decode(&whole.machine).map_err(|source| StoreError::Machine {
            epoch: whole.epoch,
            source,
        })?;
        self.disks
            .process(whole.epoch, generation, &whole.disk)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        self.image.apply();
        self.machine = Some((whole.epoch, whole.machine));
        Ok(whole.epoch)
    }

    /// Makes memory and mirrors ready to be run from, as the owner's of `generation`.
    ///
    /// # Errors
    /// [`StoreError::Empty`] without a complete checkpoint; otherwise as [`VmStore::begin`].
    pub fn hand_over(mut self, generation: Generation) -> Result<Handover, StoreError> {
        self.image.discard();
        let (epoch, machine) = self.machine.take().ok_or(StoreError::Empty)?;
        let disks = self
            .disks
            .activate(generation, epoch)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        let ram = self
            .image
            .fds()
            .into_iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<Result<_, _>>()?;
        Ok(Handover {
            epoch,
            machine,
            disks,
            ram,
        })
    }
}
