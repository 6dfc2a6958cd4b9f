//! A disk in memory that keeps only what it must: for the crash tests, here and in the chain's store.
//!
//! What was not synced may be there after a crash or not, in any combination, per operation and per 512-byte sector, and
//! a sector may be half old and half new. A file whose directory was not synced may be gone. From the operation chosen
//! on, everything fails, as it would for a program that is no more.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::layer::{FileLayer, LayerFile};

/// A small generator (splitmix64): the tests print its seed.
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    #[must_use]
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    #[must_use]
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }
}

/// How a crash treats what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// All of it is lost.
    LoseAll,
    /// None is: only the program died.
    KeepAll,
    /// Any subset, with tears.
    Any,
}

#[derive(Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Len(u64),
}

#[derive(Clone, Default)]
struct Content {
    durable: Vec<u8>,
    now: Vec<u8>,
    unsynced: Vec<Op>,
    entered: bool,
}

#[derive(Default)]
struct Inner {
    files: BTreeMap<PathBuf, Content>,
    /// Removed, while the directory still has them on the disk.
    removed: BTreeMap<PathBuf, Content>,
    ops: u64,
    read: u64,
    crash_at: Option<u64>,
    syncs: u64,
    fail_sync: Option<u64>,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub struct MemDisk(Arc<Mutex<Inner>>);

struct MemFile(MemDisk, PathBuf);

fn dead() -> io::Error {
    io::Error::other("the program is dead")
}

fn put(to: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (at, end) = (offset as usize, offset as usize + data.len());
    if to.len() < end {
        to.resize(end, 0);
    }
    to[at..end].copy_from_slice(data);
}

fn play(to: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => put(to, *offset, data),
        Op::Zero(offset, len) => {
            let end = to.len().min((offset + len) as usize);
            to[end.min(*offset as usize)..end].fill(0);
        }
        Op::Len(len) => to.resize(*len as usize, 0),
    }
}

impl MemDisk {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// Operations so far (those that change anything).
    pub fn ops(&self) -> u64 {
        self.lock().ops
    }

    /// Bytes read so far.
    pub fn read(&self) -> u64 {
        self.lock().read
    }

    /// Operation number `at` (and all later ones) fails; it may have been half done.
    pub fn crash_at(&self, at: u64) {
        self.lock().crash_at = Some(at);
    }

    /// The n-th sync from now fails, and what it should have written is never written.
    pub fn fail_sync(&self, n: u64) {
        let mut inner = self.lock();
        inner.fail_sync = Some(inner.syncs + n);
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// What is there after a crash now.
    pub fn after(&self, how: Crash, rng: &mut Rng) -> Self {
        let mut inner = Inner::default();
        let locked = self.lock();
        let back = locked.removed.iter().filter(|(path, _)| {
            !locked.files.contains_key(*path)
                && (how == Crash::LoseAll || how == Crash::Any && rng.below(2) == 0)
        });
        let back: Vec<_> = back.collect();
        for (path, content) in locked.files.iter().chain(back) {
            if !content.entered && (how == Crash::LoseAll || how == Crash::Any && rng.below(2) == 0)
            {
                continue;
            }
            let mut durable = content.durable.clone();
            for op in &content.unsynced {
                let fate = match how {
                    Crash::LoseAll => 0,
                    Crash::KeepAll => 1,
                    Crash::Any => rng.below(3),
                };
                match (fate, op) {
                    (0, _) => {}
                    (2, Op::Write(offset, data)) => {
                        for (i, sector) in data.chunks(512).enumerate() {
                            let at = offset + i as u64 * 512;
                            match rng.below(8) {
                                0..3 => {}
                                3 => put(&mut durable, at, &sector[..sector.len() / 2]),
                                _ => put(&mut durable, at, sector),
                            }
                        }
                    }
                    _ => play(&mut durable, op),
                }
            }
            let content = Content {
                now: durable.clone(),
                durable,
                unsynced: Vec::new(),
                entered: true,
            };
            inner.files.insert(path.clone(), content);
        }
        Self(Arc::new(Mutex::new(inner)))
    }

    /// The disk as the next program finds it: all is there, what was not synced still is not.
    pub fn killed(&self) -> Self {
        let locked = self.lock();
        let inner = Inner {
            files: locked.files.clone(),
            removed: locked.removed.clone(),
            ..Inner::default()
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    /// A file's content as a reader sees it.
    pub fn content(&self, path: &Path) -> Vec<u8> {
        self.lock()
            .files
            .get(path)
            .map_or_else(Vec::new, |c| c.now.clone())
    }

    /// A copy of the disk with one file's content changed behind everybody's back.
    pub fn with(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let disk = self.after(Crash::KeepAll, &mut Rng(0));
        {
            let mut inner = disk.lock();
            let content = inner.files.get_mut(path).expect("the file is there");
            change(&mut content.now);
            content.durable = content.now.clone();
        }
        disk
    }

    /// Removes a file behind everybody's back.
    pub fn lose(&self, path: &Path) {
        self.lock().files.remove(path);
    }

    /// The files there are.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        self.lock().files.keys().cloned().collect()
    }

    /// Counts an operation; true if the program dies in it.
    fn dies(inner: &mut Inner) -> io::Result<bool> {
        inner.ops += 1;
        match inner.crash_at {
            Some(at) if inner.ops > at => Err(dead()),
            Some(at) => Ok(inner.ops == at),
            None => Ok(false),
        }
    }
}

impl FileLayer for MemDisk {
    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn LayerFile>> {
        let mut inner = self.lock();
        if !inner.files.contains_key(path) {
            if !create {
                return Err(io::ErrorKind::NotFound.into());
            }
            let died = MemDisk::dies(&mut inner)?;
            inner.files.insert(path.into(), Content::default());
            if died {
                return Err(dead());
            }
        }
        drop(inner);
        Ok(Arc::new(MemFile(self.clone(), path.into())))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut inner = self.lock();
        if MemDisk::dies(&mut inner)? {
            return Err(dead());
        }
        for (path, content) in &mut inner.files {
            content.entered |= path.parent() == Some(dir);
        }
        inner.removed.retain(|path, _| path.parent() != Some(dir));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let inner = self.lock();
        let here = inner.files.keys().filter(|p| p.parent() == Some(dir));
        Ok(here
            .filter_map(|p| p.file_name().map(OsString::from))
            .collect())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.lock();
        let died = MemDisk::dies(&mut inner)?;
        let content = inner.files.remove(path).ok_or(io::ErrorKind::NotFound)?;
        if content.entered {
            inner.removed.insert(path.into(), content);
        }
        if died { Err(dead()) } else { Ok(()) }
    }
}

impl MemFile {
    fn change(&self, op: Op) -> io::Result<()> {
        let mut inner = self.0.lock();
        let died = MemDisk::dies(&mut inner)?;
        let content = inner.files.get_mut(&self.1).ok_or_else(dead)?;
        play(&mut content.now, &op);
        content.unsynced.push(op);
        if died { Err(dead()) } else { Ok(()) }
    }
}

impl LayerFile for MemFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut inner = self.0.lock();
        inner.read += buf.len() as u64;
        let now = &inner.files.get(&self.1).ok_or_else(dead)?.now;
        let from = now.get(offset as usize..offset as usize + buf.len());
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Op::Write(offset, data.into()))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(Op::Zero(offset, len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Op::Len(len))
    }

    fn len(&self) -> io::Result<u64> {
        let inner = self.0.lock();
        Ok(inner.files.get(&self.1).ok_or_else(dead)?.now.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.0.lock();
        if MemDisk::dies(&mut inner)? {
            return Err(dead());
        }
        inner.syncs += 1;
        let failed = inner.fail_sync == Some(inner.syncs);
        let content = inner.files.get_mut(&self.1).ok_or_else(dead)?;
        let unsynced = std::mem::take(&mut content.unsynced);
        if failed {
            // As Linux has it: the pages are marked clean all the same.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        for op in &unsynced {
            play(&mut content.durable, op);
        }
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }
}
