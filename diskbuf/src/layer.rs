//! The few file operations that the promises of this crate and of the chain's store rest on, behind a trait, so that
//! tests can put a disk underneath that loses what was not synced and tears what was being written.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::unistd::{Whence, lseek};

/// A place with files.
pub trait FileLayer: Send + Sync {
    /// Makes the directory with its parents; no error if it is there.
    ///
    /// # Errors
    /// The kernel's answer.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Opens for reading and writing; makes an empty file first if `create` and there is none.
    ///
    /// # Errors
    /// The kernel's answer; [`io::ErrorKind::NotFound`] if there is none and it was not to be made.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn LayerFile>>;
    /// Names of the files in `dir`, in any order; none if there is no such directory.
    ///
    /// # Errors
    /// The kernel's answer.
    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>>;
    /// Removes a file. Durable only after [`FileLayer::sync_dir`]: until then a crash may bring it back.
    ///
    /// # Errors
    /// The kernel's answer.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the directory's entries durable.
    ///
    /// # Errors
    /// The kernel's answer.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// An open file. Operations at positions only, so that threads can share it.
#[allow(clippy::len_without_is_empty)] // A length in bytes that may fail, not a collection's.
pub trait LayerFile: Send + Sync {
    /// Fills `buf` from `offset`; [`io::ErrorKind::UnexpectedEof`] at the file's end.
    ///
    /// # Errors
    /// The kernel's answer.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`; durable only after [`LayerFile::sync`].
    ///
    /// # Errors
    /// The kernel's answer.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes the range read as zero and frees its blocks where the file system can.
    ///
    /// # Errors
    /// The kernel's answer.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Cuts off or extends (sparse) to `len` bytes.
    ///
    /// # Errors
    /// The kernel's answer.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Length in bytes.
    ///
    /// # Errors
    /// The kernel's answer.
    fn len(&self) -> io::Result<u64>;
    /// fdatasync: content and length are durable afterwards. After an error nothing may be assumed of the file.
    ///
    /// # Errors
    /// The kernel's answer.
    fn sync(&self) -> io::Result<()>;
    /// Lets later reads come from the disk: what the page cache shows may never have got there, if a sync failed before.
    /// To be called after a sync; where there is no cache it does nothing.
    ///
    /// # Errors
    /// The kernel's answer.
    fn forget_cached(&self) -> io::Result<()> {
        Ok(())
    }
    /// The next byte from `offset` on that is not known to be zero without reading it; the file's length if there is none.
    ///
    /// # Errors
    /// The kernel's answer.
    fn next_data(&self, offset: u64) -> io::Result<u64> {
        Ok(offset)
    }
    /// Takes the exclusive lock, until the file is closed; false if another open file has it.
    ///
    /// # Errors
    /// The kernel's answer.
    fn try_lock(&self) -> io::Result<bool>;
    /// Gives the lock up, though the file stays open.
    ///
    /// # Errors
    /// The kernel's answer.
    fn unlock(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The machine's own files.
pub struct OsLayer;

struct OsFile(File);

impl FileLayer for OsLayer {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(dir)?;
        match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.sync_dir(parent),
            _ => self.sync_dir(Path::new(".")),
        }
    }

    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn LayerFile>> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(create)
            .truncate(false);
        Ok(Arc::new(OsFile(options.open(path)?)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        match std::fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?.map(|entry| Ok(entry?.file_name())).collect(),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

impl LayerFile for OsFile {
    fn next_data(&self, offset: u64) -> io::Result<u64> {
        let at = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match lseek(&self.0, at, Whence::SeekData) {
            Ok(found) => Ok(u64::try_from(found).unwrap_or(offset)),
            Err(Errno::ENXIO) => self.len(),
            // Not every file system knows.
            Err(_) => Ok(offset),
        }
    }

    fn forget_cached(&self) -> io::Result<()> {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        Ok(posix_fadvise(&self.0, 0, 0, advice)?)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let signed =
            |v: u64| i64::try_from(v).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.0, hole, signed(offset)?, signed(len)?) {
            // Not every file system has holes; zeros by hand read the same.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                let zeros = vec![0; 1 << 20];
                let (mut at, end) = (offset, offset + len);
                while at < end {
                    let n = (end - at).min(1 << 20) as usize;
                    self.0.write_all_at(&zeros[..n], at)?;
                    at += n as u64;
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        // Seeking also tells the size of a block device, whose metadata says 0.
        (&self.0).seek(SeekFrom::End(0))
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn try_lock(&self) -> io::Result<bool> {
        match self.0.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }

    fn unlock(&self) -> io::Result<()> {
        self.0.unlock()
    }
}
