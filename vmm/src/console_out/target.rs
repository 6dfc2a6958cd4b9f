//! The file, FIFO, pipe or terminal behind a console.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Milliseconds between looks at whether the console was closed meanwhile.
const LOOK_MS: u16 = 100;

/// What is written to.
pub enum Target {
    /// A path that was opened here.
    Opened(Opened),
    /// This process's standard output, whose flags belong to whoever started the process.
    Stdout,
}

/// A path and what it was opened as.
pub struct Opened {
    path: PathBuf,
    file: File,
    /// Rotation's bound in bytes; none for what is not a regular file.
    rotate_at: Option<u64>,
}

impl Target {
    /// Opens `path`, rotated at `rotate_at` bytes if it is a regular file.
    pub fn file(path: &Path, rotate_at: u64) -> io::Result<Target> {
        let file = open(path)?;
        let regular = file.metadata()?.is_file();
        Ok(Target::Opened(Opened {
            path: path.to_owned(),
            file,
            rotate_at: regular.then_some(rotate_at),
        }))
    }

    /// Standard output.
    pub fn stdout() -> Target {
        Target::Stdout
    }

    /// Writes all of `bytes`, waiting for a reader if there has to be one, until `closed` says that nobody needs it.
    pub fn write(&mut self, bytes: &[u8], closed: impl Fn() -> bool) -> io::Result<()> {
        match self {
            Target::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Target::Opened(opened) => {
                opened.keep_current(bytes.len() as u64)?;
                opened.write(bytes, closed)
            }
        }
    }
}

impl Opened {
    /// Rotates a file that is full, and opens the path again if it names another file by now.
    fn keep_current(&mut self, more: u64) -> io::Result<()> {
        let Some(limit) = self.rotate_at else {
            return Ok(());
        };
        let ours = self.file.metadata()?;
        let same = std::fs::metadata(&self.path)
            .is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino()));
        if same && (ours.len() == 0 || ours.len() + more <= limit) {
            return Ok(());
        }
        if same {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            std::fs::rename(&self.path, old)?;
        }
        self.file = open(&self.path)?;
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8], closed: impl Fn() -> bool) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if closed() {
                        return Err(e);
                    }
                    let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut fds, PollTimeout::from(LOOK_MS));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Opens without ever waiting: a FIFO that is opened for both directions needs no reader.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC);
    match options.clone().read(true).open(path) {
        // A file that may be written and not read.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => options.open(path),
        other => other,
    }
}
