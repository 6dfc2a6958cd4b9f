//! The single-node engine: the state in one file, replaced atomically.
//!
//! ```text
//! | magic "UMASTER2" | length u32 | CRC32C u32 | bincode MasterState |      all little endian
//! ```
//!
//! A change is decided once the new file is synced and renamed over the old one and the directory is synced. A failed
//! sync leaves unknown what is on the disk: the engine then stops deciding for good.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::codec;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{Command, Master, MasterError, MasterState, Snapshot};
use crate::view::VmRecord;

const MAGIC: &[u8; 8] = b"UMASTER2";
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
    state: MasterState,
    poisoned: Option<String>,
}

impl LocalMaster {
    /// Opens the record `master.record` in `dir`, or begins with none.
    ///
    /// # Errors
    /// [`MasterError::Storage`] if the record is damaged or cannot be read: a master that forgot its decisions could
    /// give a VM to two owners, so it does not start. [`MasterError::InUse`] if another process decides from it.
    pub fn open(dir: &Path) -> Result<Self, MasterError> {
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
        let state = match fs::read(&path) {
            Ok(bytes) => parse(&bytes).map_err(|why| {
                fail(format!("{why}; restore it from a backup, or remove it only if no VM of this cluster runs"))
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => MasterState::default(),
            Err(e) => return Err(fail(e.to_string())),
        };
        Ok(Self {
            _lock: lock,
            path,
            inner: Mutex::new(Inner {
                state,
                poisoned: None,
            }),
            changed: Condvar::new(),
        })
    }

    fn store(&self, state: &MasterState) -> io::Result<()> {
        let body = codec::to_bytes(state, LIMIT).map_err(io::Error::other)?;
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(MAGIC)?;
        file.write_all(&(body.len() as u32).to_le_bytes())?;
        file.write_all(&crc32c::crc32c(&body).to_le_bytes())?;
        file.write_all(&body)?;
        file.sync_data()?;
        fs::rename(&temporary, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }

    fn storage(&self, why: &str) -> MasterError {
        MasterError::Storage {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
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

fn parse(bytes: &[u8]) -> Result<MasterState, String> {
    let (header, body) = bytes.split_at_checked(HEADER).ok_or("it is cut off")?;
    if header.starts_with(&MAGIC[..7]) && header[7] != MAGIC[7] {
        return Err("it was written by another version of this program".into());
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
    fn propose(&self, command: &Command) -> Result<VmRecord, MasterError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &inner.poisoned {
            return Err(self.storage(why));
        }
        let mut next = inner.state.clone();
        let record = next.apply(command)?;
        if next != inner.state {
            if let Err(e) = self.store(&next) {
                let why = format!(
                    "{e}; it is unknown what is on the disk, so this master has stopped deciding"
                );
                inner.poisoned = Some(why.clone());
                return Err(self.storage(&why));
            }
            inner.state = next;
            self.changed.notify_all();
        }
        Ok(record)
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(why) = &inner.poisoned {
                return Err(self.storage(why));
            }
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
    use crate::view::VmShape;
    use checkpoint::HostId;

    fn register(name: &str) -> Command {
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: "x".repeat(100),
        };
        Command::Register {
            name: name.into(),
            owner: HostId::new("a").unwrap(),
            shape,
        }
    }

    #[test]
    fn decisions_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let master = LocalMaster::open(dir.path()).unwrap();
        master.propose(&register("one")).unwrap();
        let before = master.read().unwrap();
        drop(master);
        assert_eq!(
            LocalMaster::open(dir.path()).unwrap().read().unwrap(),
            before
        );
    }

    #[test]
    fn a_damaged_record_is_never_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        LocalMaster::open(dir.path())
            .unwrap()
            .propose(&register("one"))
            .unwrap();
        let path = dir.path().join("master.record");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            let error = LocalMaster::open(dir.path())
                .expect_err("damage must be found")
                .to_string();
            assert!(error.contains("master.record"), "{error}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(LocalMaster::open(dir.path()).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_a_crash_left_half_written_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let master = LocalMaster::open(dir.path()).unwrap();
        master.propose(&register("one")).unwrap();
        let before = master.read().unwrap();
        drop(master);
        let good = fs::read(dir.path().join("master.record")).unwrap();
        for cut in 0..good.len() {
            fs::write(dir.path().join("master.new"), &good[..cut]).unwrap();
            let master = LocalMaster::open(dir.path()).unwrap();
            assert_eq!(master.read().unwrap(), before);
        }
        // And the next decision is taken over it.
        let master = LocalMaster::open(dir.path()).unwrap();
        master.propose(&register("two")).unwrap();
        assert_eq!(master.read().unwrap().records.len(), 2);
    }

    #[test]
    fn i4_only_one_engine_decides_from_a_record() {
        let dir = tempfile::tempdir().unwrap();
        let first = LocalMaster::open(dir.path()).unwrap();
        let error = LocalMaster::open(dir.path()).unwrap_err();
        assert!(matches!(error, MasterError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("data directory"), "{error}");
        drop(first);
        LocalMaster::open(dir.path()).unwrap();
    }

    #[test]
    fn a_failed_write_stops_the_master_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let master = LocalMaster::open(dir.path()).unwrap();
        // A directory in the temporary file's place makes the write fail, also for root.
        fs::create_dir(dir.path().join("master.new")).unwrap();
        assert!(matches!(
            master.propose(&register("one")),
            Err(MasterError::Storage { .. })
        ));
        fs::remove_dir(dir.path().join("master.new")).unwrap();
        assert!(matches!(
            master.propose(&register("one")),
            Err(MasterError::Storage { .. })
        ));
        assert!(matches!(master.read(), Err(MasterError::Storage { .. })));
    }
}
