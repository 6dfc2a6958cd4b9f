//! The single-node engine: the state in one file, replaced atomically.
//!
//! ```text
//! | magic "UMASTER3" | length u32 | CRC32C u32 | bincode MasterState |      all little endian
//! ```
//!
//! A change is decided once the new file is synced and renamed over the old one and the directory is synced. A failed
//! sync leaves unknown which of the two is on the disk, and whoever asked is told so: nothing more is decided until the old
//! one has been written anew, and with it that the change was not made. While there is no room for the new file, changes are
//! refused.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{ClusterId, codec};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::record::{OsFiles, RecordFile, StoreError};
use super::{Begin, Master, MasterError, MasterState, Reply, Request, Snapshot, Wanted};

const MAGIC: &[u8; 8] = b"UMASTER3";
const HEADER: usize = 16;
const LIMIT: usize = 64 << 20;

/// The engine.
#[derive(Debug)]
pub struct LocalMaster {
    /// Held while this engine lives: two that decide from one record would give a VM to two owners.
    _lock: Flock<File>,
    path: PathBuf,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    file: RecordFile,
    state: MasterState,
    /// Why there was no room for the last record that was to be written.
    no_room: Option<String>,
    /// Why it is unknown what is on the disk: this state, or the one after it.
    unsettled: Option<String>,
}

impl LocalMaster {
    /// The record's name in its directory.
    pub const RECORD: &str = RECORD;

    /// Opens the record `master.record` in `dir`; where there is none, `begin` says whether one may be begun.
    ///
    /// # Errors
    /// [`MasterError::NotBegun`] if there is no record and none may be begun. [`MasterError::Storage`] if the record is damaged or cannot be read: a master that forgot its decisions could
    /// give a VM to two owners, so it does not start. [`MasterError::InUse`] if another process decides from it.
    pub fn open(dir: &Path, begin: Begin) -> Result<Self, MasterError> {
        let path = dir.join(RECORD);
        let fail = |why: String| MasterError::Storage {
            path: path.clone(),
            why,
        };
        let lock = lock_dir(dir, &path)?;
        let members = dir.join("paxos.record");
        if members.exists() {
            return Err(MasterError::Storage {
                path: members,
                why: "it is that of one of several members of a master: what they decided would be forgotten; name `[master] members` as before, or remove it only if no VM of this cluster runs".into(),
            });
        }
        let mut file = RecordFile::new(Box::new(OsFiles), dir, RECORD);
        let state = match file.load().map_err(|e| fail(e.to_string()))? {
            Some(bytes) => parse(&bytes).map_err(|why| {
                fail(format!("{why}; restore it from a backup, or remove it only if no VM of this cluster runs"))
            })?,
            None if begin == Begin::Existing => {
                let place = path.display().to_string();
                return Err(MasterError::NotBegun { place });
            }
            None => MasterState::new(ClusterId::random()),
        };
        // The first record; afterwards what was read may be in the page cache only.
        let bytes = encode(&state).map_err(fail)?;
        let no_room = match file.store(&bytes) {
            Ok(()) => None,
            // The old one is there.
            Err(e @ StoreError::NoRoom(_)) if path.exists() => Some(e.to_string()),
            Err(e) => return Err(fail(e.to_string())),
        };
        Ok(Self {
            _lock: lock,
            path,
            inner: Mutex::new(Inner {
                file,
                state,
                no_room,
                unsettled: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// Whose decisions these are.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.state.cluster()
    }

    /// Writes what is decided once more if a failure has left unknown whether that is what is on the disk: else it could be
    /// said of a request that it was never carried out, which the disk says was.
    fn settle(&self, inner: &mut Inner) -> Result<(), MasterError> {
        if inner.unsettled.is_none() {
            return Ok(());
        }
        let bytes = encode(&inner.state).map_err(|why| self.storage(&why))?;
        let stored = inner.file.store(&bytes);
        stored.map_err(|e| self.storage(&undecided(&e)))?;
        inner.unsettled = None;
        tracing::info!("master: {} can be written again", self.path.display());
        Ok(())
    }

    fn no_room(&self, why: &str) -> MasterError {
        MasterError::NoRoom {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }

    fn storage(&self, why: &str) -> MasterError {
        MasterError::Storage {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
}

fn undecided(e: &StoreError) -> String {
    format!("{e}: nothing is decided until it can be written again")
}

/// The record's name.
pub(super) const RECORD: &str = "master.record";

/// Makes `dir`, so that it lasts, and locks it: one engine decides from it, of whatever kind. `path` is the record, for
/// errors.
pub(super) fn lock_dir(dir: &Path, path: &Path) -> Result<Flock<File>, MasterError> {
    let fail = |why: String| MasterError::Storage {
        path: path.into(),
        why,
    };
    fs::create_dir_all(dir).map_err(|e| fail(e.to_string()))?;
    let lock = File::create(dir.join("master.lock")).map_err(|e| fail(e.to_string()))?;
    let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        Errno::EWOULDBLOCK => MasterError::InUse { dir: dir.into() },
        other => fail(format!("locking it: {other}")),
    })?;
    // The directory itself has to survive as well.
    if let Some(parent) = dir.canonicalize().ok().as_deref().and_then(Path::parent) {
        let synced = File::open(parent).and_then(|parent| parent.sync_all());
        synced.map_err(|e| fail(e.to_string()))?;
    }
    Ok(lock)
}

fn encode(state: &MasterState) -> Result<Vec<u8>, String> {
    let body = codec::to_bytes(state, LIMIT).map_err(|e| e.to_string())?;
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    out.extend_from_slice(&body);
    Ok(out)
}

fn parse(bytes: &[u8]) -> Result<MasterState, String> {
    let (header, body) = bytes.split_at_checked(HEADER).ok_or("it is cut off")?;
    if header.starts_with(&MAGIC[..7]) && header[7] != MAGIC[7] {
        return Err(
            "it was written by another version of understudy: run that one, or, to begin a new cluster with this one, stop all VMs, move the data directories away and use `understudy init`"
                .into(),
        );
    }
    if &header[..8] != MAGIC {
        return Err("it is not a master's record".into());
    }
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if word(8) as usize != body.len() || word(12) != crc32c::crc32c(body) {
        return Err("it is damaged (its checksum is wrong)".into());
    }
    codec::from_bytes(body, LIMIT).map_err(|e| e.to_string())
}

impl Master for LocalMaster {
    fn request(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.settle(&mut inner)?;
        // Asked with the lock held: a decision that the disk delays must not make those behind it come too late.
        if !wanted.still() {
            return Err(MasterError::GivenUp);
        }
        let mut next = inner.state.clone();
        let reply = next.answer(request);
        if next.has_decided_since(&inner.state) {
            let bytes = encode(&next).map_err(|why| self.storage(&why))?;
            match inner.file.store(&bytes) {
                Ok(()) => inner.no_room = None,
                Err(e @ StoreError::NoRoom(_)) => {
                    inner.no_room = Some(e.to_string());
                    return Err(self.no_room(&e.to_string()));
                }
                Err(e) => {
                    let why = undecided(&e);
                    inner.unsettled = Some(why.clone());
                    return Err(MasterError::Unknown {
                        id: request.id,
                        why: self.storage(&why).to_string(),
                    });
                }
            }
            self.changed.notify_all();
        }
        inner.state = next;
        Ok(reply?)
    }

    fn trouble(&self) -> Option<String> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let unsettled = inner.unsettled.as_ref().map(|why| self.storage(why));
        let no_room = inner.no_room.as_ref().map(|why| self.no_room(why));
        unsettled.or(no_room).map(|e| e.to_string())
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = Instant::now();
            if inner.state.revision() > since || now >= deadline {
                return Ok(inner.state.snapshot());
            }
            inner = self
                .changed
                .wait_timeout(inner, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::master::Command;
    use crate::view::{Life, VmShape};
    use checkpoint::{HostId, VmId};

    fn register(name: &str) -> Command {
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: "x".repeat(100),
        };
        Command::Register {
            vm: VmId(name.bytes().fold(1, |n, b| n * 31 + u128::from(b))),
            name: name.into(),
            owner: HostId::new("a").unwrap(),
            shape,
            life: Life::On,
        }
    }

    #[test]
    fn decisions_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
        master.propose(&register("one")).unwrap();
        let before = master.read().unwrap();
        drop(master);
        assert_eq!(
            LocalMaster::open(dir.path(), Begin::New)
                .unwrap()
                .read()
                .unwrap(),
            before
        );
    }

    #[test]
    fn a_damaged_record_is_never_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        LocalMaster::open(dir.path(), Begin::New)
            .unwrap()
            .propose(&register("one"))
            .unwrap();
        let path = dir.path().join("master.record");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            let error = LocalMaster::open(dir.path(), Begin::New)
                .expect_err("damage must be found")
                .to_string();
            assert!(error.contains("master.record"), "{error}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(
                LocalMaster::open(dir.path(), Begin::New).is_err(),
                "cut at {at}"
            );
        }
    }

    #[test]
    fn what_a_crash_left_half_written_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
        master.propose(&register("one")).unwrap();
        let before = master.read().unwrap();
        drop(master);
        let good = fs::read(dir.path().join("master.record")).unwrap();
        for cut in 0..good.len() {
            fs::write(dir.path().join("master.new"), &good[..cut]).unwrap();
            let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
            assert_eq!(master.read().unwrap(), before);
        }
        // And the next decision is taken over it.
        let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
        master.propose(&register("two")).unwrap();
        assert_eq!(master.read().unwrap().records.len(), 2);
    }

    #[test]
    fn i4_only_one_engine_decides_from_a_record() {
        let dir = tempfile::tempdir().unwrap();
        let first = LocalMaster::open(dir.path(), Begin::New).unwrap();
        let error = LocalMaster::open(dir.path(), Begin::New).unwrap_err();
        assert!(matches!(error, MasterError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("data directory"), "{error}");
        drop(first);
        LocalMaster::open(dir.path(), Begin::New).unwrap();
    }

    #[test]
    fn a_failed_write_decides_nothing_and_is_over_when_the_disk_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
        // A directory in the temporary file's place makes the write fail, also for root.
        fs::create_dir(dir.path().join("master.new")).unwrap();
        assert!(matches!(
            master.propose(&register("one")),
            Err(MasterError::Unknown { .. })
        ));
        assert!(matches!(
            master.propose(&register("two")),
            Err(MasterError::Storage { .. })
        ));
        assert!(master.trouble().unwrap().contains("master.record"));
        assert_eq!(master.read().unwrap().records, []);
        fs::remove_dir(dir.path().join("master.new")).unwrap();
        master.propose(&register("two")).unwrap();
        assert_eq!(master.trouble(), None);
        let decided = master.read().unwrap();
        assert_eq!(decided.records.len(), 1, "what failed was not decided");
        drop(master);
        let again = LocalMaster::open(dir.path(), Begin::Existing).unwrap();
        assert_eq!(again.read().unwrap(), decided);
    }
}
