//! A file that is replaced as a whole or not at all, with room for the next one set aside.
//!
//! A disk that is full must not end a master: while there is room, `<name>.spare` takes up as much as the next record
//! needs. When a record finds no room, the spare makes way for it; the old record's room becomes the next spare. If even
//! that is not enough, nothing has been changed, and the caller may try again.
//!
//! A write or a sync that fails leaves unknown whether the old record or the new one is on the disk: until a later one has
//! been stored, nothing may depend on either. It may be tried again, since each attempt is a new file with all of its data
//! written anew, and each of its syncs counts for that file only. (Syncing the same file a second time would say nothing: the
//! kernel takes pages whose writing has failed for written.)

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// The spare is a multiple of this many bytes, so that a record that grows finds it large enough for a while.
const SPARE_STEP: usize = 64 << 10;

/// Why a record was not replaced.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// There is no room. The old record is in force, nothing has been lost; it may be tried again.
    #[error(
        "there is no room for it ({0}): nothing was changed; free some space in that directory"
    )]
    NoRoom(io::Error),
    /// It is unknown whether the old record or the new one is on the disk. It may be tried again.
    #[error("{0}; it is unknown what is on the disk")]
    Failed(io::Error),
}

fn is_full(e: &io::Error) -> bool {
    let code = e.raw_os_error().map(Errno::from_raw);
    matches!(code, Some(Errno::ENOSPC | Errno::EDQUOT))
}

/// The few things that are asked of a file system, so that tests can put a failing one in its place.
pub(super) trait Files: Send {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// A new file, or an old one emptied.
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Takes up room: a file of at least that length, which holds nothing.
    fn reserve(&self, path: &Path, len: u64) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// A file being written.
pub(super) trait NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
}

/// The operating system's.
#[derive(Clone, Copy, Debug)]
pub(super) struct OsFiles;

impl Files for OsFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        Ok(Box::new(File::create(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn reserve(&self, path: &Path, len: u64) -> io::Result<()> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        let there = file.metadata()?.len();
        if there >= len {
            return Ok(());
        }
        let size = i64::try_from(len).map_err(io::Error::other)?;
        match fallocate(&file, FallocateFlags::empty(), 0, size) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP) => (&file).write_all(&vec![0; len as usize]),
            Err(e) => Err(e.into()),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

impl NewFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A disk that is full is to say so now, and not when the file is synced.
        let len = i64::try_from(bytes.len()).map_err(io::Error::other)?;
        match fallocate(&*self, FallocateFlags::empty(), 0, len.max(1)) {
            Ok(()) | Err(Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Mechanisms that the tests switch off, to see them missed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mutants {
    pub no_sync: bool,
    pub no_dir_sync: bool,
    pub in_place: bool,
    pub sync_again: bool,
}

/// The file.
pub(super) struct RecordFile {
    files: Box<dyn Files>,
    dir: PathBuf,
    name: &'static str,
    mutants: Mutants,
}

impl RecordFile {
    /// `name` in `dir`.
    pub fn new(files: Box<dyn Files>, dir: &Path, name: &'static str) -> Self {
        Self::with(files, dir, name, Mutants::default())
    }

    pub fn with(files: Box<dyn Files>, dir: &Path, name: &'static str, mutants: Mutants) -> Self {
        Self {
            files,
            dir: dir.into(),
            name,
            mutants,
        }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.dir.join(self.name)
    }

    /// Its content; `None` if there is none.
    pub fn load(&self) -> io::Result<Option<Vec<u8>>> {
        match self.files.read(&self.path()) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Replaces it. A disk that is full before anything is written is no failure.
    pub fn store(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let stored = match self.replace(bytes) {
            Err(StoreError::NoRoom(_)) if self.files.remove(&self.spare()).is_ok() => {
                self.replace(bytes)
            }
            other => other,
        };
        if stored.is_ok() {
            let len = (bytes.len() / SPARE_STEP + 1) * SPARE_STEP;
            // Without one a full disk is refused sooner, no more.
            let _ = self.files.reserve(&self.spare(), len as u64);
        }
        stored
    }

    fn spare(&self) -> PathBuf {
        self.path().with_extension("spare")
    }

    fn replace(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path();
        let temporary = if self.mutants.in_place {
            path.clone()
        } else {
            path.with_extension("new")
        };
        // Up to here nothing that counts has been touched.
        let early = |e: io::Error| match is_full(&e) {
            true => StoreError::NoRoom(e),
            false => StoreError::Failed(e),
        };
        if !self.mutants.in_place {
            // Of an attempt before, which may have failed: nothing of it is used.
            let _ = self.files.remove(&temporary);
        }
        let mut file = self.files.create(&temporary).map_err(early)?;
        file.write(bytes).map_err(early)?;
        if !self.mutants.no_sync {
            let synced = file.sync();
            let synced = match self.mutants.sync_again {
                true => synced.or_else(|_| file.sync()),
                false => synced,
            };
            synced.map_err(StoreError::Failed)?;
        }
        drop(file);
        if !self.mutants.in_place {
            let renamed = self.files.rename(&temporary, &path);
            renamed.map_err(StoreError::Failed)?;
        }
        if !self.mutants.no_dir_sync {
            let synced = self.files.sync_dir(&self.dir);
            synced.map_err(StoreError::Failed)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for RecordFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RecordFile").field(&self.path()).finish()
    }
}
