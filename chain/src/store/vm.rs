//! Image, mirrors and machine state of one VM, and how a checkpoint gets into them.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{CheckpointEnd, Epoch, Generation, Stage, StageError, StageLimits, VmId, Whole};
use checkpoint::{MachineState, Page, PageBitmap, disk_records};
use diskbuf::{Durability, Mirror, ReplicaDisks};

use super::copy::{Copy, Cut};
use super::out::{CopiedOut, CopyOut};
use super::query::{Files, Past};
use super::{Changes, Copying, ReplicaStore, Source, StoreError, Taken};
use crate::image::Image;
use crate::mark::Mark;
use crate::view::VmShape;

/// Disk writes of one epoch that a replica takes, in bytes: what a journal entry holds. An owner's limit is lower.
const DISK_LIMIT: u64 = 1 << 30;

/// Image, mirrors and machine state of one VM at one replica.
#[derive(Debug)]
pub struct VmStore {
    pub(super) shape: VmShape,
    pub(super) image: Image,
    pub(super) disks: ReplicaDisks,
    pub(super) machine: Option<(Mark, Vec<u8>)>,
    open: Option<(Stage, bool)>,
    prepared: Option<Vec<u8>>,
    copy: Option<Copy>,
    out: Option<CopyOut>,
    /// For the copy that was begun last: whether this is still what it was begun of.
    out_alive: Arc<AtomicBool>,
}

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
        let disks = ReplicaDisks::open(dir, vm, &shape.disks, durability)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        Self::over(shape, disks)
    }

    /// An empty store over mirrors that are open.
    pub(super) fn over(shape: VmShape, disks: ReplicaDisks) -> Result<Self, StoreError> {
        Ok(Self {
            image: Image::new(&shape.ram)?,
            shape,
            disks,
            machine: None,
            open: None,
            prepared: None,
            copy: None,
            out: None,
            out_alive: Arc::default(),
        })
    }

    /// The RAM files for a standby.
    #[must_use]
    pub fn ram_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.image.fds()
    }

    /// The first half of `prepare`: checks that what arrived is whole. Nothing has changed yet.
    pub(super) fn verify(&mut self, end: &CheckpointEnd) -> Result<Whole, StoreError> {
        let (stage, _) = self.open.take().ok_or(StoreError::NotOpen)?;
        let whole = stage.finish(end)?;
        let epoch = whole.epoch;
        MachineState::decode(&whole.machine)
            .map_err(|source| StoreError::Machine { epoch, source })?;
        Ok(whole)
    }

    /// The second half: the disk writes.
    pub(super) fn process(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        whole: Whole,
    ) -> Result<(), StoreError> {
        if let Some(out) = &mut self.out {
            out.before_disk(&whole.disk, &self.disks);
        }
        self.disks
            .process(epoch, generation, &whole.disk)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        if let Some(copy) = &mut self.copy {
            copy.disk_changed(whole.disk);
        }
        self.prepared = Some(whole.machine);
        Ok(())
    }
}

impl VmStore {
    /// Begins to copy out what `past` is made from.
    pub(super) fn copy_past(&mut self, past: Past, files: Files) -> Result<(), StoreError> {
        if self.out.is_some() {
            return Err(StoreError::CopyBusy);
        }
        let alive = Arc::new(AtomicBool::new(true));
        let shape = &self.shape;
        let out = CopyOut::new(past, &shape.ram, &shape.disks, files, alive.clone())?;
        (self.out, self.out_alive) = (Some(out), alive);
        Ok(())
    }

    fn open(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        full: bool,
        keep_disks: bool,
    ) -> Result<(), StoreError> {
        self.image.discard();
        self.prepared = None;
        if full {
            self.copy = None;
            self.out = None;
            self.out_alive.store(false, Ordering::Release);
            self.machine = None;
            self.image.reset()?;
            let begun = match keep_disks {
                true => self.disks.begin_refill(generation),
                false => self.disks.begin_full(generation),
            };
            begun.map_err(|e| StoreError::Disks(e.to_string()))?;
        }
        let ram: u64 = self.shape.ram.iter().map(|r| r.len).sum();
        let limits = StageLimits {
            pages: ram + ram / 128 + (1 << 20),
            disk: DISK_LIMIT,
        };
        self.open = Some((Stage::new(epoch, limits), full));
        Ok(())
    }
}

/// What [`ReplicaStore`] does with whatever store is built on this one.
impl VmStore {
    /// The mirrors, for reading without a lock on this store.
    pub(crate) fn mirrors(&self) -> Arc<Vec<Mirror>> {
        self.disks.share()
    }

    pub(super) fn begin_copy(&mut self) -> Result<Copying, StoreError> {
        if self.machine.is_none() {
            return Err(StoreError::Empty);
        }
        let memory = self.image.reader()?;
        self.copy = Some(Copy::new(&self.shape.ram));
        let source = Source::new(&self.shape.ram, memory, self.disks.share());
        Ok(Copying(source))
    }

    pub(super) fn end_copy(&mut self) {
        self.copy = None;
    }

    fn copy(&mut self) -> Result<&mut Copy, StoreError> {
        self.copy.as_mut().ok_or(StoreError::CopyInterrupted)
    }

    /// What has been committed since the copy's last round began; `fresh` notes what follows.
    pub(crate) fn copy_changes(&mut self, fresh: Changes) -> Result<Changes, StoreError> {
        self.copy()?.changes(fresh)
    }

    /// The newest disk writes, which have to be in the mirrors before a round reads these.
    pub(crate) fn newest_writes(&self) -> u64 {
        self.disks.newest()
    }

    /// Whether they are. Does not wait.
    pub(crate) fn in_mirrors(&mut self, newest: u64) -> Result<bool, StoreError> {
        self.disks
            .in_mirrors(newest)
            .map_err(|e| StoreError::Disks(e.to_string()))
    }

    /// What is left of the copy is from here on what it is now, at the newest checkpoint.
    pub(crate) fn copy_cut(&mut self, spare: PageBitmap) -> Result<Cut, StoreError> {
        let (gfns, writes) = self.copy()?.cut(spare)?;
        let (mark, machine) = self.machine.clone().ok_or(StoreError::Empty)?;
        Ok(Cut {
            mark,
            machine,
            gfns,
            writes,
        })
    }

    /// Reads pages of the cut, at most [`super::CUT_PAGES`].
    pub(crate) fn cut_pages(
        &mut self,
        gfns: &[u64],
        out: &mut Vec<Page>,
    ) -> Result<(), StoreError> {
        let copy = self.copy.as_mut().ok_or(StoreError::CopyInterrupted)?;
        copy.cut_pages(gfns, &self.image, out)
    }

    pub(super) fn out_next(&mut self, limit: usize) -> Result<bool, StoreError> {
        let out = self.out.as_mut().ok_or(StoreError::CopyInterrupted)?;
        let copied = out.next(limit, &self.image, &self.disks);
        if copied.is_err() {
            self.out = None;
        }
        copied
    }

    pub(super) fn out_end(&mut self) -> Option<CopiedOut> {
        self.out.take().map(CopyOut::end)
    }
}

impl ReplicaStore for VmStore {
    fn base(&self) -> Option<&VmStore> {
        Some(self)
    }

    fn base_mut(&mut self) -> Option<&mut VmStore> {
        Some(self)
    }

    fn begin(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        full: bool,
    ) -> Result<(), StoreError> {
        self.open(generation, epoch, full, false)
    }

    fn begin_install(&mut self, generation: Generation, epoch: Epoch) -> Result<(), StoreError> {
        self.open(generation, epoch, true, true)
    }

    fn pages(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let (stage, full) = self.open.as_mut().ok_or(StoreError::NotOpen)?;
        stage.count_pages(payload)?;
        if *full {
            self.image.write(payload)?;
        } else {
            self.image.stage(payload)?;
        }
        Ok(())
    }

    fn disk(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let (stage, full) = self.open.as_mut().ok_or(StoreError::NotOpen)?;
        for record in disk_records(payload) {
            let record = record.map_err(StageError::from)?;
            let size = self.shape.disks.get(usize::from(record.disk));
            let end = record.offset.checked_add(u64::from(record.len));
            if end.is_none_or(|end| size.is_none_or(|size| end > *size)) {
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
            stage.count_disk(payload)?;
        } else {
            stage.add_disk(payload.to_vec())?;
        }
        Ok(())
    }

    fn machine(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let (stage, _) = self.open.as_mut().ok_or(StoreError::NotOpen)?;
        Ok(stage.add_machine(payload)?)
    }

    fn prepare(
        &mut self,
        generation: Generation,
        mark: Mark,
        end: &CheckpointEnd,
    ) -> Result<(), StoreError> {
        let whole = self.verify(end)?;
        self.process(generation, mark.epoch, whole)
    }

    fn commit(&mut self, mark: Mark) {
        if let Some(machine) = self.prepared.take() {
            if let Some(copy) = &mut self.copy {
                let image = &self.image;
                image.staged().for_each(|gfn| copy.before_page(gfn, image));
            }
            if let Some(out) = &mut self.out {
                out.before_pages(self.image.staged(), &self.image);
            }
            self.image.apply();
            self.machine = Some((mark, machine));
        }
    }

    fn holds(&self) -> Option<Mark> {
        self.machine.as_ref().map(|(mark, _)| *mark)
    }

    fn machine_state(&self) -> Option<&[u8]> {
        self.machine.as_ref().map(|(_, machine)| machine.as_slice())
    }

    fn hand_over(mut self: Box<Self>, generation: Generation) -> Result<Taken, StoreError> {
        self.image.discard();
        let (mark, machine) = self.machine.take().ok_or(StoreError::Empty)?;
        let disks = self
            .disks
            .activate(generation, mark.epoch)
            .map_err(|e| StoreError::Disks(e.to_string()))?;
        let ram = self
            .image
            .fds()
            .into_iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<Result<_, _>>()?;
        Ok(Taken {
            mark,
            machine,
            disks,
            ram,
        })
    }
}
