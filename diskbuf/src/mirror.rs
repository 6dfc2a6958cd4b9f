//! A mirror: one host's copy of a VM disk, as a raw image file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layer::{FileLayer, LayerFile, OsLayer};

/// A disk's unit, in bytes (virtio 1.2, 5.2: sectors of 512 bytes whatever the block size).
pub const SECTOR: u64 = 512;

/// Why an image cannot serve as a mirror.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// There is no such file.
    #[error("disk image {} is missing; make an empty one of 1 GiB with `truncate -s 1G {}`", .0.display(), .0.display())]
    Missing(PathBuf),
    /// Not whole sectors.
    #[error(
        "disk image {} has {size} bytes, which is no multiple of 512; \
         extend it with zeros by `truncate -s {} {}`", path.display(), size.div_ceil(SECTOR) * SECTOR, path.display()
    )]
    OddSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// No bytes at all.
    #[error("disk image {} is empty; give it a size, for example `truncate -s 1G {}`", .0.display(), .0.display())]
    Empty(PathBuf),
    /// A size that was asked for and is not whole sectors, or none.
    #[error("a disk cannot have {size} bytes ({}): it takes a multiple of 512, and at least 512", path.display())]
    BadSize {
        /// The file.
        path: PathBuf,
        /// As asked for, in bytes.
        size: u64,
    },
    /// No permission to write.
    #[error(
        "disk image {} cannot be written: {source}; it must be writable by this user (`chmod u+w {}`) and not lie on a \
         read-only file system", path.display(), path.display()
    )]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A directory or other thing without content.
    #[error("disk image {} is a directory; name a file", .0.display())]
    Directory(PathBuf),
    /// Another program has it.
    #[error(
        "disk image {} is in use: another program holds its lock (two programs that write one image destroy it; \
         `fuser {}` names the other)", .0.display(), .0.display()
    )]
    InUse(PathBuf),
    /// [`Mirror::create`] found something there.
    #[error("disk image {} exists already and is not touched", .0.display())]
    Exists(PathBuf),
    /// Anything else.
    #[error("disk image {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A raw image file, locked (flock) against other programs. All methods may be called from any thread.
pub struct Mirror {
    file: Arc<dyn LayerFile>,
    path: PathBuf,
    size: u64,
    failed: AtomicBool,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror")
            .field("path", &self.path)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Mirror {
    /// Opens an image that exists, and locks it.
    ///
    /// # Errors
    /// [`MirrorError`]: missing, empty, of odd size, not writable, in use.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, MirrorError> {
        Self::open_in(&OsLayer, path.as_ref())
    }

    pub(crate) fn open_in(layer: &dyn FileLayer, path: &Path) -> Result<Self, MirrorError> {
        let (file, size) = locked(layer, path, false)?;
        if size == 0 {
            return Err(MirrorError::Empty(path.into()));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(MirrorError::OddSize {
                path: path.into(),
                size,
            });
        }
        Ok(Self::over(file, path, size))
    }

    /// Makes an image of `size` bytes (a multiple of 512, not 0), sparse, all zero, and locks it.
    ///
    /// # Errors
    /// [`MirrorError`]: there is one already (unless it is empty), bad size, no permission, no room.
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Self, MirrorError> {
        Self::create_in(&OsLayer, path.as_ref(), size)
    }

    pub(crate) fn create_in(
        layer: &dyn FileLayer,
        path: &Path,
        size: u64,
    ) -> Result<Self, MirrorError> {
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(MirrorError::BadSize {
                path: path.into(),
                size,
            });
        }
        let (file, found) = locked(layer, path, true)?;
        if found != 0 {
            return Err(MirrorError::Exists(path.into()));
        }
        file.set_len(size).map_err(|e| refused(path, e))?;
        Ok(Self::over(file, path, size))
    }

    /// Opens (or makes) and locks an image whose content and size mean nothing until [`Mirror::clear`] gives it `size`
    /// bytes of zeros. Returns its present size too.
    pub(crate) fn claim_in(
        layer: &dyn FileLayer,
        path: &Path,
        size: u64,
    ) -> Result<(Self, u64), MirrorError> {
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(MirrorError::BadSize {
                path: path.into(),
                size,
            });
        }
        let (file, found) = locked(layer, path, true)?;
        Ok((Self::over(file, path, size), found))
    }

    fn over(file: Arc<dyn LayerFile>, path: &Path, size: u64) -> Self {
        Self {
            file,
            path: path.into(),
            size,
            failed: AtomicBool::new(false),
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// `InvalidInput` beyond the end; what the file says.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_at(offset, buf)
    }

    /// Writes `data` at byte `offset`; durable after [`Mirror::flush`].
    ///
    /// # Errors
    /// As [`Mirror::read_at`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_at(offset, data)
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// What the file says. A failed sync is final: the kernel may have dropped the pages it could not write, so a later
    /// sync that succeeds would prove nothing. From then on everything fails.
    pub fn flush(&self) -> io::Result<()> {
        self.check(0, 0)?;
        self.file.sync().inspect_err(|_| {
            self.failed.store(true, Ordering::Release);
        })
    }

    /// The range is of no interest any more; it reads as zero (the same on every host).
    ///
    /// # Errors
    /// As [`Mirror::read_at`].
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len)
    }

    /// The range reads as zero.
    ///
    /// # Errors
    /// As [`Mirror::read_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.file.punch(offset, len)
    }

    /// All zero, and of its size whatever it was.
    pub(crate) fn clear(&self) -> io::Result<()> {
        self.check(0, 0)?;
        self.file.set_len(0)?;
        self.file.set_len(self.size)
    }

    /// Gives the file the disk's size; its content, as far as there is any, stays, and is read from the disk from here on.
    pub(crate) fn resize(&self) -> io::Result<()> {
        self.check(0, 0)?;
        self.file.set_len(self.size)?;
        self.flush()?;
        self.file.forget_cached()
    }

    /// Whether the range is known to be zero without reading it: a hole. False where the file system cannot tell.
    #[must_use]
    pub fn is_hole(&self, offset: u64, len: u64) -> bool {
        self.check(offset, len).is_ok()
            && offset
                .checked_add(len)
                .is_some_and(|end| self.file.next_data(offset).is_ok_and(|data| data >= end))
    }

    /// The next byte from `offset` on that is not known to be zero without reading it; the disk's size if there is none.
    ///
    /// # Errors
    /// As [`Mirror::read_at`].
    pub fn next_data(&self, offset: u64) -> io::Result<u64> {
        self.check(offset, 0)?;
        Ok(self.file.next_data(offset)?.min(self.size))
    }

    /// Another program may have the image from here on, though somebody here may still be reading it.
    pub(crate) fn unlock(&self) {
        if let Err(e) = self.file.unlock() {
            tracing::warn!("disk image {}: unlocking: {e}", self.path.display());
        }
    }

    /// Whether `offset` and `len` lie within the disk.
    #[must_use]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other(format!(
                "disk image {} failed to sync earlier; what it holds is not known any more",
                self.path.display()
            )));
        }
        if !self.contains(offset, len) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "bytes {offset} to {offset}+{len} lie beyond the end of disk image {} ({} bytes)",
                    self.path.display(),
                    self.size
                ),
            ));
        }
        Ok(())
    }
}

fn refused(path: &Path, source: io::Error) -> MirrorError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::NotFound => MirrorError::Missing(path),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            MirrorError::ReadOnly { path, source }
        }
        io::ErrorKind::IsADirectory => MirrorError::Directory(path),
        _ => MirrorError::Io { path, source },
    }
}

fn locked(
    layer: &dyn FileLayer,
    path: &Path,
    create: bool,
) -> Result<(Arc<dyn LayerFile>, u64), MirrorError> {
    let file = layer.open(path, create).map_err(|e| refused(path, e))?;
    if !file.try_lock().map_err(|e| refused(path, e))? {
        return Err(MirrorError::InUse(path.into()));
    }
    let size = file.len().map_err(|e| refused(path, e))?;
    Ok((file, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(e: &MirrorError) -> String {
        e.to_string()
    }

    #[test]
    fn refusals_name_the_file_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        let name = path.display().to_string();

        let missing = Mirror::open(&path).unwrap_err();
        assert!(matches!(missing, MirrorError::Missing(_)));
        assert!(message(&missing).contains(&format!("truncate -s 1G {name}")));
        assert!(!path.exists(), "opening makes nothing");

        std::fs::write(&path, [1; 700]).unwrap();
        let odd = Mirror::open(&path).unwrap_err();
        assert!(matches!(odd, MirrorError::OddSize { size: 700, .. }));
        assert!(message(&odd).contains("700 bytes"));
        assert!(message(&odd).contains(&format!("truncate -s 1024 {name}")));
        assert_eq!(
            std::fs::read(&path).unwrap(),
            [1; 700],
            "and is not touched"
        );

        assert!(matches!(
            Mirror::create(&path, 1024),
            Err(MirrorError::Exists(_))
        ));
        assert!(matches!(
            Mirror::create(dir.path().join("e.img"), 1000),
            Err(MirrorError::BadSize { size: 1000, .. })
        ));
        std::fs::write(&path, []).unwrap();
        assert!(matches!(Mirror::open(&path), Err(MirrorError::Empty(_))));
        assert!(matches!(
            Mirror::open(dir.path()),
            Err(MirrorError::Directory(_))
        ));
        // Root may write anything, so the kernel's answer is made up here.
        for kind in [
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::ReadOnlyFilesystem,
        ] {
            let read_only = refused(&path, kind.into());
            assert!(matches!(read_only, MirrorError::ReadOnly { .. }));
            assert!(message(&read_only).contains(&format!("chmod u+w {name}")));
        }
    }

    #[test]
    fn one_program_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        let mirror = Mirror::create(&path, 4096).unwrap();
        assert!(matches!(Mirror::open(&path), Err(MirrorError::InUse(_))));
        drop(mirror);
        assert_eq!(Mirror::open(&path).unwrap().size(), 4096);
    }

    #[test]
    fn ranges_are_checked_and_zeroes_are_zero() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = Mirror::create(dir.path().join("d.img"), 1 << 20).unwrap();
        mirror.write_at(0, &[5; 8192]).unwrap();
        mirror.discard(512, 1024).unwrap();
        mirror.write_zeroes(4096, 4096).unwrap();
        mirror.write_zeroes(0, 0).unwrap();
        mirror.flush().unwrap();
        let mut got = [9; 8192];
        mirror.read_at(0, &mut got).unwrap();
        for (at, byte) in got.iter().enumerate() {
            let zero = (512..1536).contains(&at) || at >= 4096;
            assert_eq!(*byte, if zero { 0 } else { 5 }, "byte {at}");
        }
        for (offset, len) in [
            (1 << 20, 1),
            ((1 << 20) - 1, 2),
            (u64::MAX, 1),
            (u64::MAX, u64::MAX),
        ] {
            let failed = mirror.write_zeroes(offset, len).unwrap_err();
            assert_eq!(failed.kind(), io::ErrorKind::InvalidInput);
        }
        let failed = mirror.write_at(u64::MAX, &[0; 512]).unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::InvalidInput);
        assert!(mirror.read_at((1 << 20) - 1, &mut [0; 2]).is_err());
    }

    #[test]
    fn holes_are_seen_where_the_file_system_tells() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = Mirror::create(dir.path().join("d.img"), 1 << 20).unwrap();
        mirror.write_at(256 << 10, &[5; 512]).unwrap();
        assert!(!mirror.is_hole(256 << 10, 64 << 10), "data");
        assert!(!mirror.is_hole(0, 1 << 20), "data in the middle");
        assert!(!mirror.is_hole((1 << 20) - 512, 1024), "beyond the end");
        // What a hole is taken for must be one: without this the two above say little.
        for at in (0..1 << 20)
            .step_by(64 << 10)
            .filter(|at| mirror.is_hole(*at, 64 << 10))
        {
            let mut got = vec![1; 64 << 10];
            mirror.read_at(at, &mut got).unwrap();
            assert!(got.iter().all(|byte| *byte == 0), "at {at}");
        }
        mirror.write_zeroes(256 << 10, 64 << 10).unwrap();
        let tells = mirror.is_hole(512 << 10, 64 << 10);
        assert_eq!(mirror.is_hole(256 << 10, 64 << 10), tells);
    }

    #[test]
    fn a_failed_sync_is_final() {
        let disk = crate::faulty::MemDisk::default();
        let mirror = Mirror::create_in(&disk, Path::new("/d.img"), 4096).unwrap();
        mirror.write_at(0, &[1; 512]).unwrap();
        disk.fail_sync(1);
        assert!(mirror.flush().is_err());
        assert!(mirror.flush().is_err(), "the next one would prove nothing");
        assert!(mirror.write_at(0, &[1; 512]).is_err());
        assert!(mirror.read_at(0, &mut [0; 512]).is_err());
    }
}
