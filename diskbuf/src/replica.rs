//! All mirrors of one VM at one replica: filled once, then moved from checkpoint to checkpoint, over all disks at once.
//!
//! [`ReplicaDisks::process`] appends an epoch's writes to the journal as one entry with one checksum. Later, in batches,
//! the journal is synced, its writes are done in place, the mirrors are synced, the record is replaced, and the journal
//! file is free again; the other of the two journal files takes what comes meanwhile. Whatever instant a crash picks,
//! the mirrors together with the whole entries of the journal are one complete checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::{DiskRecord, Epoch, Generation, VmId};

use crate::batch::{Batch, Worker, apply, apply_all, check_all};
use crate::error::DiskbufError;
use crate::journal::{Entry, Head, PAYLOAD_MAX};
use crate::layer::{FileLayer, LayerFile, OsLayer};
use crate::mirror::Mirror;
use crate::open::draw;
use crate::record::{ActivationRecord, RecordFile, Role, Stored};

/// When [`ReplicaDisks::process`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// When the writes are with the kernel: they survive the death of the process, and after the death of the host
    /// the mirrors are at this checkpoint or an earlier one.
    Memory,
    /// When they are on the disk.
    Disk,
}

/// Switches that break the mechanism, to see the tests notice.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mutants {
    /// Do the writes in place without syncing the journal first.
    pub no_journal_sync: bool,
    /// Believe journal entries without looking at their checksums.
    pub no_crc: bool,
    /// Write every record over the one before.
    pub one_slot: bool,
}

/// How it is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub durability: Durability,
    /// A batch begins when the journal holds so many bytes ...
    pub batch_bytes: u64,
    /// ... or its oldest entry is so old.
    pub batch_age: Duration,
    /// With so many bytes waiting and a batch under way, an epoch waits after all: memory is bounded.
    pub high_water: u64,
    /// A journal file that is free again is cut to nothing if it has grown beyond this, in bytes.
    pub journal_keep: u64,
    /// For tests: no thread, a batch goes one step at each epoch.
    pub stepped: bool,
    pub mutants: Mutants,
}

impl Options {
    pub(crate) fn new(durability: Durability) -> Self {
        Self {
            durability,
            batch_bytes: 16 << 20,
            // An activation has to bring the rest into the mirrors, so the rest is kept small.
            batch_age: Duration::from_millis(100),
            high_water: 64 << 20,
            journal_keep: 80 << 20,
            stepped: false,
            mutants: Mutants::default(),
        }
    }
}

/// While filling, the mirrors are synced about this often, in bytes.
const FILL_SYNC: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing valid: before [`ReplicaDisks::begin_full`].
    Empty,
    /// Being filled.
    Filling,
    /// At a checkpoint.
    Replica,
    /// Handed to a running VM, now or before a restart.
    Owner,
}

/// All mirrors of one VM at one replica, in one directory: `disk0.img` ..., `journal.0`, `journal.1`, `activation`.
pub struct ReplicaDisks {
    pub(crate) layer: Arc<dyn FileLayer>,
    pub(crate) dir: PathBuf,
    pub(crate) vm: VmId,
    pub(crate) sizes: Vec<u64>,
    pub(crate) options: Options,
    /// Empty while the VM runs here: then they are another process's.
    pub(crate) mirrors: Arc<Vec<Mirror>>,
    pub(crate) journals: [Arc<dyn LayerFile>; 2],
    pub(crate) record: Arc<RecordFile>,
    pub(crate) worker: Worker,
    pub(crate) state: State,
    pub(crate) epoch: Epoch,
    pub(crate) generation: Generation,
    pub(crate) salt: u64,
    /// The journal file in use, and its end.
    pub(crate) current: usize,
    pub(crate) end: u64,
    /// How long the journal files have grown.
    pub(crate) extent: [u64; 2],
    /// Number of the newest entry.
    pub(crate) seq: u64,
    /// Entries up to here are synced.
    pub(crate) durable: u64,
    /// Newest entry of the batch under way.
    pub(crate) batch_seq: u64,
    /// Entries up to here are in the mirrors.
    pub(crate) applied: u64,
    pub(crate) pending: Vec<Entry>,
    pub(crate) pending_bytes: u64,
    /// Entries of the batch under way: in the mirrors or not, nobody knows.
    pub(crate) flying: Arc<Vec<Entry>>,
    pub(crate) oldest: Option<Instant>,
    /// Bytes written while filling since the mirrors were last synced.
    pub(crate) unsynced: u64,
    pub(crate) poisoned: Option<String>,
}

impl std::fmt::Debug for ReplicaDisks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicaDisks")
            .field("dir", &self.dir)
            .field("vm", &self.vm)
            .field("state", &self.state)
            .field("epoch", &self.epoch)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl Drop for ReplicaDisks {
    fn drop(&mut self) {
        // Others may have the images once no batch writes to them any more, though somebody may still be reading.
        self.worker = Worker::Stepped(None);
        self.mirrors.iter().for_each(Mirror::unlock);
    }
}

impl ReplicaDisks {
    /// Opens `dir` (made if need be) with a mirror for each of `sizes` (bytes, multiples of 512), and recovers what a
    /// crash left: whole epochs in the journal are done to the mirrors, a torn tail is cut off.
    ///
    /// # Errors
    /// [`DiskbufError::Damaged`] (or [`crate::RecordError::Damaged`]) if something durable is missing or broken,
    /// [`DiskbufError::InUse`], [`DiskbufError::OtherVm`], [`DiskbufError::OtherSize`], and what the files say.
    pub fn open(
        dir: &Path,
        vm: VmId,
        sizes: &[u64],
        durability: Durability,
    ) -> Result<Self, DiskbufError> {
        Self::open_with(Arc::new(OsLayer), dir, vm, sizes, Options::new(durability))
    }

    /// As [`ReplicaDisks::open`], on another layer and with small batches that go one step at each epoch: so that a
    /// crash test of something built on it meets every stage, and the same ones each time.
    ///
    /// # Errors
    /// As [`ReplicaDisks::open`].
    #[cfg(any(test, feature = "faulty"))]
    pub fn open_stepped(
        layer: Arc<dyn FileLayer>,
        dir: &Path,
        vm: VmId,
        sizes: &[u64],
        durability: Durability,
    ) -> Result<Self, DiskbufError> {
        let options = Options {
            batch_bytes: 9 << 10,
            batch_age: Duration::from_secs(1 << 30),
            high_water: 30 << 10,
            journal_keep: 4 << 10,
            stepped: true,
            ..Options::new(durability)
        };
        Self::open_with(layer, dir, vm, sizes, options)
    }

    /// Sizes of the disks in bytes, in order.
    #[must_use]
    pub fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    /// The newest durable record.
    #[must_use]
    pub fn record(&self) -> Option<ActivationRecord> {
        self.record.latest().map(|s| s.record)
    }

    /// The newest epoch processed; zero before the first. (The durable one, which a crash of the host may go back to
    /// with [`Durability::Memory`], is the record's or later. Epochs without disk writes leave no trace on the disk.)
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The newest generation in which something was processed, or filling begun.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Begins to fill the mirrors: what they hold is forgotten, and they are not valid until the first
    /// [`ReplicaDisks::process`].
    ///
    /// # Errors
    /// [`DiskbufError::OldGeneration`]; [`crate::MirrorError::InUse`] if a VM runs on them; what the files say.
    pub fn begin_full(&mut self, generation: Generation) -> Result<(), DiskbufError> {
        self.guard(|disks| disks.begin_filling(generation, false))
    }

    /// As [`ReplicaDisks::begin_full`], but the mirrors' content stays, for whoever fills them to leave out what is there
    /// already. Until then nobody may rely on any of it.
    ///
    /// # Errors
    /// As [`ReplicaDisks::begin_full`].
    pub fn begin_refill(&mut self, generation: Generation) -> Result<(), DiskbufError> {
        self.guard(|disks| disks.begin_filling(generation, true))
    }

    fn begin_filling(&mut self, generation: Generation, keep: bool) -> Result<(), DiskbufError> {
        self.not_older(generation)?;
        if self.state == State::Owner {
            self.mirrors = Arc::new(self.open_mirrors(false)?);
        }
        self.worker.wait()?;
        self.pending.clear();
        self.flying = Arc::default();
        self.pending_bytes = 0;
        self.oldest = None;
        self.generation = generation;
        self.epoch = Epoch::ZERO;
        self.salt = draw().map_err(DiskbufError::Journal)?;
        self.record.write(self.stored(Role::Syncing))?;
        self.state = State::Filling;
        (self.current, self.end) = (0, 0);
        for mirror in self.mirrors.iter() {
            let made = if keep {
                mirror.resize()
            } else {
                mirror.clear()
            };
            made.map_err(|e| DiskbufError::mirror(mirror, e))?;
        }
        Ok(())
    }

    /// Writes content while filling.
    ///
    /// # Errors
    /// [`DiskbufError::OutOfRange`], [`DiskbufError::State`]; what the files say.
    pub fn write_full(&mut self, record: &DiskRecord<'_>) -> Result<(), DiskbufError> {
        self.guard(|disks| {
            if disks.state != State::Filling {
                return Err(DiskbufError::State(
                    "disk content outside of an initial synchronisation",
                ));
            }
            apply(&disks.mirrors, record)?;
            disks.unsynced += record.data.len() as u64;
            // Written out on the way, so that the sync at the end is short: an activation has to wait for it.
            disks.worker.poll()?;
            if disks.unsynced >= FILL_SYNC && !disks.worker.busy() {
                disks.unsynced = 0;
                let batch = disks.sync_batch(None);
                disks.worker.submit(batch)?;
            }
            Ok(())
        })
    }

    /// Takes the writes of a whole checkpoint: buffers of encoded disk records, in order. All of them or, after a crash,
    /// none count. The first one after [`ReplicaDisks::begin_full`] makes the mirrors valid.
    ///
    /// Without writes it costs no I/O. With [`Durability::Memory`] it does not wait for the disk, unless the disk has
    /// fallen behind by 64 MiB.
    ///
    /// # Errors
    /// [`DiskbufError::WrongEpoch`], [`DiskbufError::OldGeneration`], [`DiskbufError::OutOfRange`],
    /// [`DiskbufError::Malformed`], [`DiskbufError::TooLarge`]: nothing was done. Anything else is final.
    pub fn process(
        &mut self,
        epoch: Epoch,
        generation: Generation,
        writes: &[Vec<u8>],
    ) -> Result<(), DiskbufError> {
        self.guard(|disks| disks.process_inner(epoch, generation, writes))
    }

    fn process_inner(
        &mut self,
        epoch: Epoch,
        generation: Generation,
        writes: &[Vec<u8>],
    ) -> Result<(), DiskbufError> {
        self.not_older(generation)?;
        let filling = match self.state {
            State::Filling => true,
            State::Replica => false,
            State::Empty => return Err(DiskbufError::State("the disks were never filled")),
            State::Owner => return Err(DiskbufError::State("the disks belong to a running VM")),
        };
        if !filling && epoch <= self.epoch {
            return Err(DiskbufError::WrongEpoch {
                got: epoch,
                at: self.epoch,
            });
        }
        let bytes: u64 = writes.iter().map(|w| w.len() as u64).sum();
        if bytes > PAYLOAD_MAX as u64 {
            return Err(DiskbufError::TooLarge { epoch, bytes });
        }
        for write in writes {
            check_all(&self.mirrors, write)?;
        }
        self.settle()?;
        if filling {
            return self.first(epoch, generation, writes);
        }
        if bytes > 0 {
            let head = Head {
                voucher: false,
                salt: self.salt,
                seq: self.seq + 1,
                durable: self.durable,
                vm: self.vm,
                generation,
                epoch,
            };
            let entry = Entry::new(head, writes);
            self.append(&entry)?;
            self.seq += 1;
            if self.options.durability == Durability::Disk && !self.options.mutants.no_journal_sync
            {
                self.journals[self.current]
                    .sync()
                    .map_err(DiskbufError::Journal)?;
                self.durable = self.seq;
                self.append(&self.voucher())?;
            }
            self.pending_bytes += entry.bytes().len() as u64;
            self.pending.push(entry);
            self.oldest.get_or_insert_with(Instant::now);
        }
        self.epoch = epoch;
        self.generation = generation;
        self.maybe_batch()
    }

    /// The first checkpoint after filling.
    fn first(
        &mut self,
        epoch: Epoch,
        generation: Generation,
        writes: &[Vec<u8>],
    ) -> Result<(), DiskbufError> {
        let mut touched = vec![false; self.mirrors.len()];
        for write in writes {
            apply_all(&self.mirrors, write, &mut touched)?;
        }
        self.epoch = epoch;
        self.generation = generation;
        self.state = State::Replica;
        self.worker.wait()?;
        self.batch_seq = self.seq;
        self.unsynced = 0;
        let batch = self.sync_batch(Some(self.stored(Role::Replica)));
        match self.options.durability {
            Durability::Memory => self.worker.submit(batch),
            Durability::Disk => batch.run(),
        }
    }

    /// The mirrors, in the order of the disks; none while a VM runs on them. What was processed since the last
    /// [`ReplicaDisks::flush`] may not be in them yet.
    #[must_use]
    pub fn mirrors(&self) -> &[Mirror] {
        &self.mirrors
    }

    /// The mirrors, for reading beside this owner of theirs, at whatever moment: what a batch writes meanwhile may be read
    /// half old and half new, and nothing that is read once the disks have been activated or closed is of any use.
    #[must_use]
    pub fn share(&self) -> Arc<Vec<Mirror>> {
        self.mirrors.clone()
    }

    /// The number of the newest writes processed, for [`ReplicaDisks::in_mirrors`].
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.seq
    }

    /// Whether the mirrors have everything up to `newest`; if not, sees to it that they will. Does not wait.
    ///
    /// # Errors
    /// What the files say: final.
    pub fn in_mirrors(&mut self, newest: u64) -> Result<bool, DiskbufError> {
        self.guard(|disks| {
            disks.settle()?;
            if disks.worker.busy() {
                return Ok(disks.applied >= newest);
            }
            if disks.applied < newest && disks.state == State::Replica && !disks.pending.is_empty()
            {
                let record = disks.stored(Role::Replica);
                let batch = disks.take_batch(record)?;
                disks.worker.submit(batch)?;
                return Ok(false);
            }
            Ok(true)
        })
    }

    /// Brings everything processed so far into the mirrors, durably.
    ///
    /// # Errors
    /// What the files say: final.
    pub fn flush(&mut self) -> Result<(), DiskbufError> {
        self.guard(|disks| {
            disks.wait()?;
            if disks.state == State::Replica && !disks.pending.is_empty() {
                let record = disks.stored(Role::Replica);
                disks.take_batch(record)?.run()?;
                disks.settle()?;
            }
            Ok(())
        })
    }

    /// Makes the mirrors those of a running VM: they are at checkpoint `epoch`, which must be the newest processed, all
    /// writes are in them, and the record says so durably. Gives up the locks, so that the VM's process can open
    /// the images, which are returned in the order of the disks.
    ///
    /// # Errors
    /// [`DiskbufError::WrongEpoch`], [`DiskbufError::OldGeneration`], [`DiskbufError::State`]: nothing was done.
    /// Anything else is final.
    pub fn activate(
        &mut self,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<Vec<PathBuf>, DiskbufError> {
        self.guard(|disks| disks.activate_inner(generation, epoch))
    }

    fn activate_inner(
        &mut self,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<Vec<PathBuf>, DiskbufError> {
        self.not_older(generation)?;
        if self.state != State::Replica {
            return Err(DiskbufError::State(
                "only a filled replica's disks can be activated",
            ));
        }
        if epoch != self.epoch {
            return Err(DiskbufError::WrongEpoch {
                got: epoch,
                at: self.epoch,
            });
        }
        self.wait()?;
        self.generation = generation;
        let record = self.stored(Role::Owner);
        self.take_batch(record)?.run()?;
        self.state = State::Owner;
        let mirrors = std::mem::take(&mut self.mirrors);
        mirrors.iter().for_each(Mirror::unlock);
        Ok(mirrors.iter().map(|m| m.path().into()).collect())
    }

    /// Begins a batch if it is time.
    fn maybe_batch(&mut self) -> Result<(), DiskbufError> {
        let old = |o: Instant| o.elapsed() >= self.options.batch_age;
        let due = self.pending_bytes >= self.options.batch_bytes || self.oldest.is_some_and(old);
        if self.pending.is_empty() || !due {
            return Ok(());
        }
        if self.worker.busy() {
            if self.pending_bytes < self.options.high_water {
                return Ok(());
            }
            self.wait()?;
        }
        let record = self.stored(Role::Replica);
        let batch = self.take_batch(record)?;
        self.worker.submit(batch)
    }

    /// Syncs the mirrors, and then replaces the record, if one is given.
    fn sync_batch(&self, record: Option<Stored>) -> Batch {
        Batch {
            journal: None,
            voucher: None,
            entries: Arc::default(),
            mirrors: self.mirrors.clone(),
            sync_all: true,
            file: self.record.clone(),
            record,
        }
    }

    /// Everything pending, and the switch to the other journal file. Only while no batch is under way.
    fn take_batch(&mut self, record: Stored) -> Result<Batch, DiskbufError> {
        let journal = &self.journals[self.current];
        let unsynced = self.durable < self.seq && !self.pending.is_empty();
        self.batch_seq = self.seq;
        self.flying = Arc::new(std::mem::take(&mut self.pending));
        let voucher = unsynced.then(|| (journal.clone(), self.end, self.voucher()));
        let batch = Batch {
            journal: (unsynced && !self.options.mutants.no_journal_sync).then(|| journal.clone()),
            voucher,
            entries: self.flying.clone(),
            mirrors: self.mirrors.clone(),
            sync_all: false,
            file: self.record.clone(),
            record: Some(record),
        };
        self.pending_bytes = 0;
        self.oldest = None;
        self.current ^= 1;
        self.end = 0;
        if std::mem::take(&mut self.extent[self.current]) > self.options.journal_keep {
            self.journals[self.current]
                .set_len(0)
                .map_err(DiskbufError::Journal)?;
        }
        Ok(batch)
    }

    /// Notices a batch that has ended.
    fn settle(&mut self) -> Result<(), DiskbufError> {
        self.worker.poll()?;
        if !self.worker.busy() {
            self.applied = self.applied.max(self.batch_seq);
            self.durable = self.durable.max(self.batch_seq);
            self.flying = Arc::default();
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), DiskbufError> {
        self.worker.wait()?;
        self.settle()
    }

    fn append(&mut self, entry: &Entry) -> Result<(), DiskbufError> {
        self.journals[self.current]
            .write_at(self.end, entry.bytes())
            .map_err(DiskbufError::Journal)?;
        self.end += entry.bytes().len() as u64;
        let extent = &mut self.extent[self.current];
        *extent = self.end.max(*extent);
        Ok(())
    }

    /// Says that all entries so far are synced.
    fn voucher(&self) -> Entry {
        let head = Head {
            voucher: true,
            salt: self.salt,
            seq: self.seq,
            durable: self.seq,
            vm: self.vm,
            generation: self.generation,
            epoch: self.epoch,
        };
        Entry::new(head, &[])
    }

    pub(crate) fn stored(&self, role: Role) -> Stored {
        Stored {
            record: ActivationRecord {
                vm: self.vm,
                generation: self.generation,
                epoch: self.epoch,
                role,
                seq: 0,
            },
            applied: self.seq,
            salt: self.salt,
        }
    }

    fn not_older(&self, got: Generation) -> Result<(), DiskbufError> {
        let at = self.generation;
        if got < at {
            return Err(DiskbufError::OldGeneration { got, at });
        }
        Ok(())
    }

    /// After a failure that leaves the disk in doubt nothing is done any more.
    fn guard<T>(
        &mut self,
        what: impl FnOnce(&mut Self) -> Result<T, DiskbufError>,
    ) -> Result<T, DiskbufError> {
        if let Some(why) = &self.poisoned {
            return Err(DiskbufError::Poisoned(why.clone()));
        }
        let result = what(self);
        if let Err(e) = &result
            && !e.harmless()
        {
            self.poisoned = Some(e.to_string());
        }
        result
    }
}
