//! A store that keeps a VM's past in memory: for each checkpoint what it replaced, within a bound. The newest
//! checkpoint is the image itself; an earlier one is a copy of it with the newer ones taken back.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;

use checkpoint::{CheckpointEnd, EncoderOptions, Epoch, Generation, PageEncoder, VmId};
use diskbuf::Durability;

use super::query::{Back, Files, Memory, Past};
use super::{History, ReplicaStore, Retention, StoreError, Taken, VmStore};
use crate::mark::Mark;
use crate::view::VmShape;

/// What leads from the checkpoint after it back to one.
struct Step {
    mark: Mark,
    machine: Vec<u8>,
    /// Page records, deltas against the checkpoint after it.
    pages: Vec<u8>,
    disk: Vec<u8>,
}

impl Step {
    fn bytes(&self) -> u64 {
        (self.machine.len() + self.pages.len() + self.disk.len()) as u64
    }
}

/// [`VmStore`] with a past in memory.
pub struct MemoryStore {
    inner: VmStore,
    retention: Retention,
    encoder: PageEncoder,
    past: VecDeque<Step>,
    bytes: u64,
    full: bool,
    /// What the prepared checkpoint's disk writes replace; `None`: too much to keep.
    disk: Option<Vec<u8>>,
}

impl MemoryStore {
    /// An empty store for a VM of `shape`, its mirrors in `dir`.
    ///
    /// # Errors
    /// [`StoreError`] naming image or mirrors.
    pub fn new(
        dir: &Path,
        vm: VmId,
        shape: VmShape,
        durability: Durability,
        retention: Retention,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            inner: VmStore::new(dir, vm, shape, durability)?,
            retention,
            encoder: PageEncoder::new(EncoderOptions { lz4: false }),
            past: VecDeque::new(),
            bytes: 0,
            full: false,
            disk: None,
        })
    }

    /// The RAM files for a standby.
    #[must_use]
    pub fn ram_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.inner.ram_fds()
    }

    /// Bytes that the past takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn forget(&mut self) {
        self.past.clear();
        self.bytes = 0;
    }

    fn keep(&mut self, step: Step) {
        self.bytes += step.bytes();
        self.past.push_back(step);
        while self.past.len() >= self.retention.checkpoints || self.bytes > self.retention.bytes {
            let Some(oldest) = self.past.pop_front() else {
                break;
            };
            self.bytes -= oldest.bytes();
        }
    }
}

impl ReplicaStore for MemoryStore {
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
        self.full = full;
        if full {
            self.forget();
        }
        self.inner.begin(generation, epoch, full)
    }

    fn begin_install(&mut self, generation: Generation, epoch: Epoch) -> Result<(), StoreError> {
        self.full = true;
        self.forget();
        self.inner.begin_install(generation, epoch)
    }

    fn pages(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.inner.pages(payload)
    }

    fn disk(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.inner.disk(payload)
    }

    fn machine(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.inner.machine(payload)
    }

    fn prepare(
        &mut self,
        generation: Generation,
        mark: Mark,
        end: &CheckpointEnd,
    ) -> Result<(), StoreError> {
        let whole = self.inner.verify(end)?;
        self.disk = None;
        if self.retention.keeps_past() && !self.full {
            let limit = self.retention.bytes;
            self.disk = self
                .inner
                .disks
                .pre_images(&whole.disk, limit)
                .map_err(|e| StoreError::Disks(e.to_string()))?;
        }
        self.inner.process(generation, mark.epoch, whole)
    }

    fn commit(&mut self, mark: Mark) {
        if self.retention.keeps_past() && !self.full {
            let pages = self.inner.image.reverse(&mut self.encoder);
            match (self.disk.take(), pages, &self.inner.machine) {
                (Some(disk), Ok(pages), Some((mark, machine))) => {
                    let step = Step {
                        mark: *mark,
                        machine: machine.clone(),
                        pages,
                        disk,
                    };
                    self.keep(step);
                }
                _ => self.forget(),
            }
        }
        self.inner.commit(mark);
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
        let past = self.past(mark)?;
        self.inner.copy_past(past, files)
    }

    fn hand_over(self: Box<Self>, generation: Generation) -> Result<Taken, StoreError> {
        Box::new(self.inner).hand_over(generation)
    }
}

impl History for MemoryStore {
    fn range(&self) -> Vec<Mark> {
        let newest = self.inner.machine.as_ref().map(|(mark, _)| *mark);
        self.past.iter().map(|s| s.mark).chain(newest).collect()
    }

    fn past(&mut self, mark: Mark) -> Result<Past, StoreError> {
        let (newest, machine) = self.inner.machine.as_ref().ok_or(StoreError::Empty)?;
        let from = match self.past.iter().position(|s| s.mark == mark) {
            Some(from) => from,
            None if *newest == mark => self.past.len(),
            None => return Err(StoreError::NotRetained(mark)),
        };
        let steps = || self.past.range(from..).rev();
        let back = Back {
            machine: self.past.get(from).map_or(machine, |s| &s.machine).clone(),
            pages: steps().map(|step| step.pages.clone()).collect(),
            disk: steps().map(|step| step.disk.clone()).collect(),
        };
        Ok(Past {
            mark,
            memory: Memory::Newest(back),
        })
    }

    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.inner
            .disks
            .read(disk, offset, buf)
            .map_err(|e| StoreError::Disks(e.to_string()))
    }
}
