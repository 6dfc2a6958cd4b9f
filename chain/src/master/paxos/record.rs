//! A file that is replaced as a whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The few things that are asked of a file system, so that tests can put a failing one in its place.
pub(super) trait Files: Send {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// A new file, or an old one emptied.
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
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

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

impl NewFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
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
    pub go_on_after_failure: bool,
}

/// The file.
pub(super) struct RecordFile {
    files: Box<dyn Files>,
    dir: PathBuf,
    name: &'static str,
    failed: bool,
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
            failed: false,
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

    /// Replaces it. After a failure it is unknown what is on the disk, and a later success would say nothing about the
    /// data whose sync failed: every later call fails as well.
    pub fn store(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.failed && !self.mutants.go_on_after_failure {
            return Err(io::Error::other("an earlier write has failed"));
        }
        let stored = self.replace(bytes);
        self.failed |= stored.is_err();
        stored
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let path = self.path();
        let temporary = if self.mutants.in_place {
            path.clone()
        } else {
            path.with_extension("new")
        };
        let mut file = self.files.create(&temporary)?;
        file.write(bytes)?;
        if !self.mutants.no_sync {
            file.sync()?;
        }
        drop(file);
        if !self.mutants.in_place {
            self.files.rename(&temporary, &path)?;
        }
        if !self.mutants.no_dir_sync {
            self.files.sync_dir(&self.dir)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for RecordFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RecordFile").field(&self.path()).finish()
    }
}
