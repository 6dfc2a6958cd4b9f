//! The activation record: what the mirrors in a directory are. Small, replaced atomically, durable once written.
//!
//! ```text
//! file `activation`, 8192 bytes: two slots of 4096 bytes; the record with number `seq` goes to slot seq % 2
//!
//!   0        512            2048     2560         4096
//!   | first  | unused (0)   | second | unused (0) |          one slot: the record twice
//!
//! one record, 512 bytes, little endian
//!    0            4           6       7        8              16               24         32        40            48
//!   | "UACT" u32 | version=2 | role  | 0 (u8) | vm, low u64 | generation u64 | epoch u64 | seq u64 | applied u64 |
//!   | salt u64 (48) | vm, high u64 (56) | 0 ... (64) | CRC32C u32 of bytes 0..508 (508) |
//!   version u16; role u8: 1 Owner, 2 Replica, 3 Syncing
//! ```
//!
//! A new record goes to the slot of the older one: first place, fdatasync, then the second place (durable with the next
//! record). So the second place tells apart what a crash may leave and what it may not: a torn first place beside a
//! second one that is older is a write that never was reported done, and the other slot counts; a broken first place
//! beside a second one that says the same number is a record that *was* durable and has been damaged, and falling
//! back to the older slot would silently turn back time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{Epoch, Generation, VmId};

use crate::layer::{FileLayer, LayerFile, OsLayer};

/// Size of one slot in bytes.
pub const SLOT: usize = 4096;
/// Size of one copy of the record in bytes.
const COPY: usize = 512;
/// Where a slot's second copy begins.
const SECOND: usize = 2048;
const MAGIC: &[u8; 4] = b"UACT";
const VERSION: u16 = 2;
/// The record's file name in a VM's directory.
pub const RECORD_FILE: &str = "activation";

/// What a host's mirrors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The disks of the running VM: checkpoint `epoch` and whatever the VM wrote since.
    Owner,
    /// A copy, at checkpoint `epoch` (or later, by what the journal holds).
    Replica,
    /// Being filled: worth nothing.
    Syncing,
}

/// What a host's mirrors are, and of when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivationRecord {
    /// The VM.
    pub vm: VmId,
    /// The generation in which this was so.
    pub generation: Generation,
    /// The checkpoint.
    pub epoch: Epoch,
    /// Owner, replica, or worth nothing.
    pub role: Role,
    /// Number of the record: every record is one higher than the one it replaces.
    pub seq: u64,
}

/// Why there is no telling what the mirrors are.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be read or written.
    #[error("activation record {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Damaged where no crash can have done it.
    #[error(
        "activation record {} is damaged ({what}); the mirrors beside it must not be used: \
         remove the directory, and this host is filled anew", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: &'static str,
    },
    /// Of another version of this program.
    #[error(
        "activation record {} has version {version}, this program reads {VERSION}: it was written by another version of \
         understudy. Run that version to stop the VM, or, if the newest disks are elsewhere, move this directory away, and \
         this host is filled anew", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// As found.
        version: u16,
    },
}

impl ActivationRecord {
    /// The newest record in a VM's directory; `None` if there never was one.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn read(dir: impl AsRef<Path>) -> Result<Option<Self>, RecordError> {
        let path = dir.as_ref().join(RECORD_FILE);
        match OsLayer.open(&path, false) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RecordError::Io { path, source }),
            Ok(file) => Ok(read(&*file, &path, false)?.map(|stored| stored.record)),
        }
    }
}

/// The record with what the journal needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub record: ActivationRecord,
    /// Journal entries up to this number are in the mirrors, durably, or are of no account.
    pub applied: u64,
    /// Journal entries with another salt are of no account.
    pub salt: u64,
}

impl Stored {
    fn encode(&self) -> [u8; COPY] {
        let mut out = [0; COPY];
        let role = match self.record.role {
            Role::Owner => 1,
            Role::Replica => 2,
            Role::Syncing => 3,
        };
        out[0..4].copy_from_slice(MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = role;
        let (low, high) = self.record.vm.halves();
        let words = [
            low,
            self.record.generation.0,
            self.record.epoch.0,
            self.record.seq,
            self.applied,
            self.salt,
            high,
        ];
        for (place, word) in out[8..64].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[..COPY - 4]);
        out[COPY - 4..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Copy {
        let word = |at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(w)
        };
        if bytes.iter().all(|b| *b == 0) {
            return Copy::Blank;
        }
        let crc = crc32c::crc32c(&bytes[..COPY - 4]).to_le_bytes();
        if bytes[..4] != *MAGIC || bytes[COPY - 4..] != crc {
            return Copy::Broken;
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Copy::Version(version);
        }
        let role = match bytes[6] {
            1 => Role::Owner,
            2 => Role::Replica,
            3 => Role::Syncing,
            _ => return Copy::Broken,
        };
        Copy::Good(Self {
            record: ActivationRecord {
                vm: VmId::from_halves(word(8), word(56)),
                generation: Generation(word(16)),
                epoch: Epoch(word(24)),
                seq: word(32),
                role,
            },
            applied: word(40),
            salt: word(48),
        })
    }
}

enum Copy {
    Blank,
    Broken,
    Version(u16),
    Good(Stored),
}

/// Reads both slots and decides. See the module's head for what a crash may leave behind.
fn read(file: &dyn LayerFile, path: &Path, one_slot: bool) -> Result<Option<Stored>, RecordError> {
    let io = |source| RecordError::Io {
        path: path.into(),
        source,
    };
    let damaged = |what| RecordError::Damaged {
        path: path.into(),
        what,
    };
    let mut bytes = [0u8; 2 * SLOT];
    let len = file.len().map_err(io)?.min(2 * SLOT as u64) as usize;
    file.read_at(0, &mut bytes[..len]).map_err(io)?;
    let mut best: Option<Stored> = None;
    let mut second_best: Option<u64> = None;
    for slot in 0..2 {
        let base = slot * SLOT;
        let first = Stored::decode(&bytes[base..base + COPY]);
        let second = Stored::decode(&bytes[base + SECOND..base + SECOND + COPY]);
        for copy in [&first, &second] {
            if let Copy::Version(version) = copy {
                return Err(RecordError::Version {
                    path: path.into(),
                    version: *version,
                });
            }
        }
        if let Copy::Good(stored) = first {
            if stored.record.seq % 2 != slot as u64 && !one_slot {
                return Err(damaged("a record lies in the wrong slot"));
            }
            if best.is_none_or(|b| b.record.seq < stored.record.seq) {
                best = Some(stored);
            }
        }
        if let Copy::Good(stored) = second {
            second_best = second_best.max(Some(stored.record.seq));
        }
    }
    match (best, second_best) {
        // The second place is written only after the first is durable.
        (Some(best), Some(second)) if second > best.record.seq => {
            Err(damaged("its newest entry is broken"))
        }
        (None, Some(_)) => Err(damaged("both entries are broken")),
        (Some(best), _) => Ok(Some(best)),
        // Number 1 lies in slot 1, and it is durable before number 2 is begun in slot 0.
        (None, None) if bytes[..SLOT].iter().any(|b| *b != 0) => {
            Err(damaged("both entries are broken"))
        }
        // A first record that was torn while being written: nothing was ever claimed.
        (None, None) => Ok(None),
    }
}

/// The record's file. One writer at a time.
pub(crate) struct RecordFile {
    file: Arc<dyn LayerFile>,
    path: PathBuf,
    latest: Mutex<Option<Stored>>,
    /// Mutant for tests: the newest record is overwritten by the next.
    one_slot: bool,
}

impl RecordFile {
    /// Opens (or makes) the file in `dir`, locks it and reads it. `Ok(None)`: another program has the directory.
    pub(crate) fn open(
        layer: &dyn FileLayer,
        dir: &Path,
        one_slot: bool,
    ) -> Result<Option<Self>, RecordError> {
        let path = dir.join(RECORD_FILE);
        let io = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let file = layer.open(&path, true).map_err(io)?;
        if !file.try_lock().map_err(io)? {
            return Ok(None);
        }
        let latest = read(&*file, &path, one_slot)?;
        // What was read may lie in the page cache only (this program was killed, not the host), and others will be
        // overwritten on the strength of it. Written again, as a sync alone does nothing for pages that an earlier,
        // failed one left marked as clean.
        if let Some(stored) = latest {
            let slot = if one_slot { 0 } else { stored.record.seq % 2 };
            file.write_at(slot * SLOT as u64, &stored.encode())
                .map_err(io)?;
        }
        file.sync().map_err(io)?;
        let latest = Mutex::new(latest);
        Ok(Some(Self {
            file,
            path,
            latest,
            one_slot,
        }))
    }

    /// The newest durable record.
    pub(crate) fn latest(&self) -> Option<Stored> {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the record and waits until that is durable. The number is assigned here.
    pub(crate) fn write(&self, mut stored: Stored) -> Result<(), RecordError> {
        let io = |source| RecordError::Io {
            path: self.path.clone(),
            source,
        };
        stored.record.seq = self.latest().map_or(1, |l| l.record.seq + 1);
        let bytes = stored.encode();
        let slot = if self.one_slot {
            0
        } else {
            stored.record.seq % 2
        };
        let base = slot * SLOT as u64;
        self.file.write_at(base, &bytes).map_err(io)?;
        self.file.sync().map_err(io)?;
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(stored);
        // Not waited for: see the module's head.
        self.file.write_at(base + SECOND as u64, &bytes).map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i1_an_older_record_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let file = RecordFile::open(&OsLayer, dir.path(), false)
            .unwrap()
            .unwrap();
        let record = ActivationRecord {
            vm: VmId(0x0123_4567_89ab_4cde_8f01_2345_6789_abcd),
            generation: Generation(3),
            epoch: Epoch(9),
            role: Role::Replica,
            seq: 1,
        };
        let stored = Stored {
            record,
            applied: 1,
            salt: 2,
        };
        file.write(stored).unwrap();
        drop(file);
        assert_eq!(ActivationRecord::read(dir.path()).unwrap(), Some(record));
        let path = dir.path().join(RECORD_FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        for at in [SLOT, SLOT + SECOND] {
            let copy = &mut bytes[at..at + COPY];
            copy[4] = 1;
            let crc = crc32c::crc32c(&copy[..COPY - 4]);
            copy[COPY - 4..].copy_from_slice(&crc.to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let said = ActivationRecord::read(dir.path()).unwrap_err().to_string();
        assert!(
            said.contains("version 1") && said.contains("move this"),
            "{said}"
        );
    }
}
