//! Opening a replica's directory, and bringing it to a complete checkpoint after a crash.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::{Epoch, Generation, VmId};

use crate::batch::{Worker, apply_all};
use crate::error::DiskbufError;
use crate::journal::{self, Wanted};
use crate::layer::FileLayer;
use crate::mirror::Mirror;
use crate::record::{RecordFile, Role, Stored};
use crate::replica::{Options, ReplicaDisks, State};

impl ReplicaDisks {
    pub(crate) fn open_with(
        layer: Arc<dyn FileLayer>,
        dir: &Path,
        vm: VmId,
        sizes: &[u64],
        options: Options,
    ) -> Result<Self, DiskbufError> {
        let at_dir = |source| DiskbufError::Directory {
            path: dir.into(),
            source,
        };
        layer.create_dir(dir).map_err(at_dir)?;
        let Some(record) = RecordFile::open(&*layer, dir, options.mutants.one_slot)? else {
            return Err(DiskbufError::InUse(dir.into()));
        };
        let stored = record.latest();
        if let Some(found) = stored.map(|s| s.record.vm).filter(|found| *found != vm) {
            return Err(DiskbufError::OtherVm {
                path: dir.into(),
                found,
                wanted: vm,
            });
        }
        let journal = |n: usize| {
            let path = dir.join(format!("journal.{n}"));
            match layer.open(&path, stored.is_none()) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Err(DiskbufError::Damaged {
                    path: dir.into(),
                    what: format!("journal.{n} is missing"),
                }),
                other => other.map_err(DiskbufError::Journal),
            }
        };
        let journals = [journal(0)?, journal(1)?];
        let [len0, len1] = journals.each_ref().map(|j| j.len());
        let extent = [
            len0.map_err(DiskbufError::Journal)?,
            len1.map_err(DiskbufError::Journal)?,
        ];
        let worker = if options.stepped {
            Worker::Stepped(None)
        } else {
            Worker::thread().map_err(at_dir)?
        };
        let state = match stored.map(|s| s.record.role) {
            None | Some(Role::Syncing) => State::Empty,
            Some(Role::Replica) => State::Replica,
            Some(Role::Owner) => State::Owner,
        };
        let mut disks = Self {
            layer,
            dir: dir.into(),
            vm,
            sizes: sizes.into(),
            options,
            mirrors: Arc::default(),
            journals,
            record: Arc::new(record),
            worker,
            state,
            epoch: stored.map_or(Epoch::ZERO, |s| s.record.epoch),
            generation: stored.map_or(Generation::ZERO, |s| s.record.generation),
            salt: 0,
            current: 0,
            end: 0,
            extent,
            seq: stored.map_or(0, |s| s.applied),
            durable: 0,
            batch_seq: 0,
            applied: stored.map_or(0, |s| s.applied),
            pending: Vec::new(),
            pending_bytes: 0,
            flying: Arc::default(),
            oldest: None,
            unsynced: 0,
            poisoned: None,
        };
        // The VM that runs (or ran) on an owner's mirrors has them locked, and wrote to them since.
        if disks.state != State::Owner {
            disks.mirrors = Arc::new(disks.open_mirrors(disks.state == State::Replica)?);
        }
        disks.layer.sync_dir(dir).map_err(at_dir)?;
        if let (State::Replica, Some(stored)) = (disks.state, stored) {
            disks.recover(stored)?;
        }
        Ok(disks)
    }

    /// Where the mirrors are, in the order of the disks, whoever has them open.
    #[must_use]
    pub fn image_paths(&self) -> Vec<PathBuf> {
        (0..self.sizes.len()).map(|n| self.image_path(n)).collect()
    }

    fn image_path(&self, n: usize) -> PathBuf {
        self.dir.join(format!("disk{n}.img"))
    }

    /// Opens and locks the mirrors; if not `valid`, their content and size mean nothing yet.
    pub(crate) fn open_mirrors(&self, valid: bool) -> Result<Vec<Mirror>, DiskbufError> {
        let mut mirrors = Vec::with_capacity(self.sizes.len());
        for (n, &wanted) in self.sizes.iter().enumerate() {
            let path = self.image_path(n);
            let (mirror, found) = if valid {
                let mirror = Mirror::open_in(&*self.layer, &path)?;
                let found = mirror.size();
                (mirror, found)
            } else {
                Mirror::claim_in(&*self.layer, &path, wanted)?
            };
            // Without any record a file of another size was not put there by us: not ours to overwrite.
            let strange = found != 0 && self.record.latest().is_none();
            if found != wanted && (valid || strange) {
                return Err(DiskbufError::OtherSize {
                    path,
                    found,
                    wanted,
                });
            }
            mirrors.push(mirror);
        }
        Ok(mirrors)
    }

    /// Brings the mirrors to the newest whole epoch of the journal.
    fn recover(&mut self, stored: Stored) -> Result<(), DiskbufError> {
        let wanted = Wanted {
            salt: stored.salt,
            vm: self.vm,
            applied: stored.applied,
            no_crc: self.options.mutants.no_crc,
        };
        let found = journal::recover(&self.journals, wanted).map_err(|e| match e {
            Ok(seq) => DiskbufError::Damaged {
                path: self.dir.clone(),
                what: format!(
                    "journal entry {seq} is broken or missing, and later ones rely on it"
                ),
            },
            Err(e) => DiskbufError::Journal(e),
        })?;
        if found.cut > 0 {
            tracing::warn!(dir = %self.dir.display(), entries = found.cut, "torn tail of the disk journal cut off");
        }
        // What was read may be in the page cache only, and not be lost between here and the mirrors' sync. A sync alone
        // would not do: after one that failed the kernel takes pages for clean that never reached the disk.
        for ((file, at), entry) in &found.run {
            self.journals[*file]
                .write_at(*at, entry.bytes())
                .map_err(DiskbufError::Journal)?;
        }
        for journal in &self.journals {
            journal.sync().map_err(DiskbufError::Journal)?;
        }
        let mut touched = vec![false; self.mirrors.len()];
        for (_, entry) in &found.run {
            apply_all(&self.mirrors, entry.payload(), &mut touched).map_err(|e| {
                DiskbufError::Damaged {
                    path: self.dir.clone(),
                    what: format!("journal entry {}: {e}", entry.head.seq),
                }
            })?;
        }
        // All of them: the writes of an earlier batch may have been done but not synced when this program was killed.
        for mirror in self.mirrors.iter() {
            mirror
                .flush()
                .map_err(|e| DiskbufError::mirror(mirror, e))?;
        }
        if let Some((_, last)) = found.run.last() {
            self.epoch = last.head.epoch;
            self.generation = last.head.generation;
        }
        self.seq = found.highest;
        self.applied = found.highest;
        self.salt = draw().map_err(DiskbufError::Journal)?;
        let record = self.stored(Role::Replica);
        Ok(self.record.write(record)?)
    }
}

/// A number that a guest cannot guess.
pub(crate) fn draw() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the pointer and the length are those of `bytes`, which outlives the call.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n == 8 {
        Ok(u64::from_le_bytes(bytes))
    } else {
        Err(io::Error::last_os_error())
    }
}
