//! A crash at every operation of the record's writing, failures of every sync, damage at every byte.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::storage::{Identity, Record};
use crate::master::record::{Files, Mutants, NewFile, RecordFile, StoreError};

const DIR: &str = "/m";
const NAME: &str = "paxos.record";

fn record(incarnation: u64) -> Record {
    let identity = Identity {
        members: vec!["a".into(), "b".into(), "c".into()],
        me: 2,
    };
    Record {
        incarnation,
        ..Record::new(identity, checkpoint::ClusterId(7))
    }
}

/// Long enough for tears, different in every part.
fn content(n: u64) -> Vec<u8> {
    let mut record = record(n);
    let name = |i: u64| format!("{n}-{i}-{}", "x".repeat(200));
    record.identity.members.extend((0..10).map(name));
    record.to_bytes().unwrap()
}

/// One file, whatever it is called.
#[derive(Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    now: Vec<u8>,
    /// Nothing is left to be written: it has been, or it has failed, which is said once.
    clean: bool,
}

/// A file system that keeps only what it must.
#[derive(Default)]
struct Disk {
    inodes: Vec<Inode>,
    /// Names as a reader sees them, and as they are after the worst crash.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Changes of names not synced, in order.
    renames: Vec<BTreeMap<PathBuf, usize>>,
    ops: u64,
    crash_at: Option<u64>,
    fail_at: Option<u64>,
    /// Bytes that there is room for in all; everybody else's are not counted.
    room: Option<usize>,
}

impl Disk {
    fn has_room(&self, more: usize) -> io::Result<()> {
        match self.room {
            Some(room) if self.used() + more > room => {
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            _ => Ok(()),
        }
    }

    fn used(&self) -> usize {
        let used = |number: &usize| self.inodes[*number].now.len();
        self.names.values().map(used).sum()
    }
}

#[derive(Clone, Default)]
struct MemFiles(Arc<Mutex<Disk>>);

struct MemFile(MemFiles, usize);

fn dead() -> io::Error {
    io::Error::other("the program is dead")
}

impl MemFiles {
    /// Counts an operation. `Ok(true)`: it dies in it, half done. `Err`: it fails, or the program is dead already.
    fn op(disk: &mut Disk) -> io::Result<bool> {
        disk.ops += 1;
        if disk.fail_at == Some(disk.ops) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        match disk.crash_at {
            Some(at) if disk.ops > at => Err(dead()),
            Some(at) => Ok(disk.ops == at),
            None => Ok(false),
        }
    }

    /// What is there after a crash: every file lost, torn or kept; the names as of any moment since they were synced.
    fn after(&self, how: u64) -> Self {
        let disk = self.0.lock().unwrap();
        let mut after = Disk::default();
        let choices = disk.renames.len() as u64 + 1;
        after.names = match how % choices {
            0 => disk.durable_names.clone(),
            n => disk.renames[n as usize - 1].clone(),
        };
        after.durable_names = after.names.clone();
        for inode in &disk.inodes {
            let durable = match how / choices % 4 {
                0 => inode.durable.clone(),
                1 => inode.now.clone(),
                2 => inode.now[..inode.now.len() / 2].to_vec(),
                // The length is there, the second half's blocks are not.
                _ => {
                    let mut torn = inode.now.clone();
                    let half = torn.len() / 2;
                    if inode.durable != inode.now {
                        torn[half..].fill(0);
                    }
                    torn
                }
            };
            let durable = if inode.durable == inode.now {
                inode.now.clone()
            } else {
                durable
            };
            after.inodes.push(Inode {
                now: durable.clone(),
                durable,
                clean: true,
            });
        }
        Self(Arc::new(Mutex::new(after)))
    }
}

impl Files for MemFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let disk = self.0.lock().unwrap();
        let inode = disk.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(disk.inodes[*inode].now.clone())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let mut disk = self.0.lock().unwrap();
        let died = Self::op(&mut disk)?;
        let number = match disk.names.get(path).copied() {
            Some(number) => {
                disk.inodes[number].now.clear();
                disk.inodes[number].clean = false;
                number
            }
            None => {
                disk.inodes.push(Inode::default());
                let number = disk.inodes.len() - 1;
                disk.names.insert(path.into(), number);
                let names = disk.names.clone();
                disk.renames.push(names);
                number
            }
        };
        drop(disk);
        if died {
            return Err(dead());
        }
        Ok(Box::new(MemFile(self.clone(), number)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let died = Self::op(&mut disk)?;
        let number = disk.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.names.insert(to.into(), number);
        let names = disk.names.clone();
        disk.renames.push(names);
        if died { Err(dead()) } else { Ok(()) }
    }

    fn reserve(&self, path: &Path, len: u64) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.names.contains_key(path) {
            return Ok(());
        }
        disk.has_room(len as usize)?;
        let number = disk.inodes.len();
        disk.inodes.push(Inode {
            now: vec![0; len as usize],
            durable: Vec::new(),
            clean: false,
        });
        disk.names.insert(path.into(), number);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let removed = disk.names.remove(path);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if Self::op(&mut disk)? {
            return Err(dead());
        }
        disk.durable_names = disk.names.clone();
        disk.renames.clear();
        Ok(())
    }
}

impl NewFile for MemFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.0.0.lock().unwrap();
        let died = MemFiles::op(&mut disk)?;
        disk.has_room(bytes.len())?;
        let end = if died { bytes.len() / 3 } else { bytes.len() };
        disk.inodes[self.1].now.extend_from_slice(&bytes[..end]);
        disk.inodes[self.1].clean = false;
        if died { Err(dead()) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.0.0.lock().unwrap();
        let done = MemFiles::op(&mut disk);
        let inode = &mut disk.inodes[self.1];
        let dirty = !std::mem::replace(&mut inode.clean, true);
        if done? {
            return Err(dead());
        }
        if dirty {
            inode.durable = inode.now.clone();
        }
        Ok(())
    }
}

fn open(files: &MemFiles, mutants: Mutants) -> RecordFile {
    RecordFile::with(Box::new(files.clone()), Path::new(DIR), NAME, mutants)
}

/// What is wrong after a crash when `promised` was the last one stored and `tried` the last one begun.
fn check(files: &MemFiles, promised: u64, tried: u64, checked: bool) -> Result<u64, String> {
    let loaded = open(files, Mutants::default()).load();
    let found = match loaded.map_err(|e| e.to_string())? {
        None => 0,
        Some(bytes) => {
            let record = Record::parse_with(&bytes, checked)?;
            let n = record.incarnation;
            if bytes != content(n) {
                return Err("what is there was never written".into());
            }
            n
        }
    };
    if found < promised || found > tried {
        return Err(format!(
            "{promised} was promised, {tried} begun, {found} is there"
        ));
    }
    Ok(found)
}

/// All crash points and ways to crash, then a second life and another crash; the complaints, and the points.
fn sweep(mutants: Mutants) -> (Vec<String>, u64) {
    let (mut complaints, mut points) = (Vec::new(), 0);
    for at in 1.. {
        let mut ended = false;
        for how in 0..12 {
            let files = MemFiles::default();
            files.0.lock().unwrap().crash_at = Some(at);
            let mut file = open(&files, mutants);
            let stored = (1..=3).take_while(|n| file.store(&content(*n)).is_ok());
            let stored = stored.count() as u64;
            ended |= stored == 3;
            let after = files.after(how);
            let found = match check(&after, stored, (stored + 1).min(3), true) {
                Ok(found) => found,
                Err(why) => {
                    complaints.push(format!("operation {at}, {how}: {why}"));
                    continue;
                }
            };
            after.0.lock().unwrap().crash_at = Some(1 + how);
            let mut file = open(&after, mutants);
            let stored = if file.store(&content(found + 1)).is_ok() {
                found + 1
            } else {
                found
            };
            for how in 0..12 {
                if let Err(why) = check(&after.after(how), stored, found + 1, true) {
                    complaints.push(format!("second life: operation {at}, {how}: {why}"));
                }
            }
        }
        points = at;
        if ended {
            break;
        }
        assert!(at < 100, "the life must end");
    }
    (complaints, points)
}

#[test]
fn a_crash_at_any_operation_leaves_one_whole_record_that_forgets_nothing() {
    let (complaints, points) = sweep(Mutants::default());
    assert!(complaints.is_empty(), "{complaints:#?}");
    assert!(points > 12, "only {points} crash points");
}

#[test]
fn without_the_files_sync_the_checker_complains() {
    let mutants = Mutants {
        no_sync: true,
        ..Mutants::default()
    };
    let (complaints, _) = sweep(mutants);
    let damaged = |c: &String| c.contains("damaged") || c.contains("cut off");
    assert!(complaints.iter().any(damaged), "{complaints:?}");
}

#[test]
fn without_the_directorys_sync_the_checker_complains() {
    let mutants = Mutants {
        no_dir_sync: true,
        ..Mutants::default()
    };
    let (complaints, _) = sweep(mutants);
    assert!(
        complaints.iter().any(|c| c.contains("promised")),
        "{complaints:?}"
    );
}

#[test]
fn written_in_place_the_checker_complains() {
    let mutants = Mutants {
        in_place: true,
        ..Mutants::default()
    };
    let (complaints, _) = sweep(mutants);
    assert!(!complaints.is_empty());
}

/// Each operation in turn fails, once or for a while; then one succeeds: what the file says it stored has to be there, whatever
/// a crash leaves, and before that the old record or the new one.
fn fail_each(mutants: Mutants) -> Vec<String> {
    let mut complaints = Vec::new();
    for (at, times) in (1..=5).flat_map(|at| [(at, 1), (at, 3)]) {
        let files = MemFiles::default();
        let mut file = open(&files, mutants);
        file.store(&content(1)).unwrap();
        let mut stored = 1;
        for n in 2..2 + times {
            let fail_at = files.0.lock().unwrap().ops + at;
            files.0.lock().unwrap().fail_at = Some(fail_at);
            if file.store(&content(n)).is_ok() {
                stored = n;
            }
            for how in 0..48 {
                if let Err(why) = check(&files.after(how), stored, n, true) {
                    complaints.push(format!("operation {at} failed, {how}: {why}"));
                }
            }
        }
        files.0.lock().unwrap().fail_at = None;
        if let Err(e) = file.store(&content(9)) {
            complaints.push(format!("after operation {at} had failed: {e}"));
            continue;
        }
        for how in 0..48 {
            if let Err(why) = check(&files.after(how), 9, 9, true) {
                complaints.push(format!("after operation {at} had failed, {how}: {why}"));
            }
        }
    }
    complaints
}

#[test]
fn a_failed_operation_leaves_the_old_record_or_the_new_one_and_may_be_tried_again() {
    assert_eq!(fail_each(Mutants::default()), Vec::<String>::new());
    let mutants = Mutants {
        sync_again: true,
        ..Mutants::default()
    };
    assert!(!fail_each(mutants).is_empty());
}

#[test]
fn h10_a_full_disk_changes_nothing_and_is_over_when_there_is_room() {
    let files = MemFiles::default();
    let mut file = open(&files, Mutants::default());
    file.store(&content(1)).unwrap();
    let fill = |files: &MemFiles, more: usize| {
        let mut disk = files.0.lock().unwrap();
        disk.room = Some(disk.used() + more);
    };
    // Full to the last byte: what was set aside is enough, again and again.
    fill(&files, 0);
    for n in 2..20 {
        file.store(&content(n)).unwrap();
        assert_eq!(check(&files, n, n, true), Ok(n));
    }
    // Somebody takes even that. (Whether it is a file or free again depends on the records' lengths.)
    let spare = PathBuf::from(DIR).join("paxos.spare");
    let _ = files.remove(&spare);
    fill(&files, 0);
    for _ in 0..3 {
        let said = file.store(&content(20)).unwrap_err();
        assert!(matches!(said, StoreError::NoRoom(_)), "{said}");
        assert_eq!(check(&files, 19, 19, true), Ok(19));
    }
    for how in 0..12 {
        assert_eq!(check(&files.after(how), 19, 19, true), Ok(19));
    }
    files.0.lock().unwrap().room = None;
    file.store(&content(20)).unwrap();
    assert_eq!(check(&files, 20, 20, true), Ok(20));
}

/// Bits whose change goes unnoticed.
fn unnoticed(checked: bool) -> usize {
    let good = content(5);
    let mut count = 0;
    for at in 0..good.len() {
        for bit in [0, 4, 7] {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            count += usize::from(Record::parse_with(&bad, checked).is_ok());
        }
    }
    for cut in 0..good.len() {
        count += usize::from(Record::parse_with(&good[..cut], checked).is_ok());
    }
    count
}

#[test]
fn i7_damage_at_any_byte_is_found() {
    assert_eq!(unnoticed(true), 0);
    assert!(unnoticed(false) > 1000, "without the checksum it is not");
}
