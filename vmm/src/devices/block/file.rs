//! A plain raw image file as a disk, for a machine that nobody protects.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::backend::{BlockBackend, SECTOR};

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be opened for reading and writing.
    #[error("disk image {path}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Not a whole number of sectors.
    #[error(
        "disk image {path} has {size} bytes, not a multiple of 512; enlarge it with: truncate -s {up} {path}"
    )]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size, bytes.
        size: u64,
        /// The next size that would do, bytes.
        up: u64,
    },
    /// Nothing in it.
    #[error("disk image {path} is empty; give it a size with: truncate -s 1G {path}")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// A directory or a device.
    #[error("disk image {path} is not a regular file")]
    NotAFile {
        /// The image.
        path: PathBuf,
    },
}

/// A raw image in a file.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
    id: [u8; 20],
}

impl FileDisk {
    /// Opens the image at `path` for reading and writing; its size is fixed from then on.
    ///
    /// # Errors
    /// [`ImageError`], with the remedy where there is one.
    pub fn open(path: impl AsRef<Path>) -> Result<FileDisk, ImageError> {
        let path = path.as_ref();
        let named = |source| ImageError::Open {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(named)?;
        let meta = file.metadata().map_err(named)?;
        if !meta.is_file() {
            return Err(ImageError::NotAFile {
                path: path.to_owned(),
            });
        }
        let size = meta.len();
        if size == 0 {
            return Err(ImageError::Empty {
                path: path.to_owned(),
            });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(ImageError::OddSize {
                path: path.to_owned(),
                size,
                up: size.saturating_add(SECTOR - size % SECTOR),
            });
        }
        let mut id = [0; 20];
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let len = name.len().min(id.len());
        id[..len].copy_from_slice(&name[..len]);
        Ok(FileDisk { file, size, id })
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{len} bytes at {offset} are beyond a disk of {} bytes",
                    self.size
                ),
            )),
        }
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (at, len) = (
            libc::off_t::try_from(offset).map_err(bad)?,
            libc::off_t::try_from(len).map_err(bad)?,
        );
        // SAFETY: a system call on our own descriptor with numbers only.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, len) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn write_out_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0u8; 64 << 10];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeroes.len() as u64);
            self.file
                .write_all_at(&zeroes[..n as usize], offset + done)?;
            done += n;
        }
        Ok(())
    }
}

const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

impl BlockBackend for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(PUNCH, offset, len) {
            // A file system without holes keeps the blocks; a discard promises nothing.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(PUNCH, offset, len) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.write_out_zeroes(offset, len)
            }
            other => other,
        }
    }

    fn id(&self) -> [u8; 20] {
        self.id
    }
}
