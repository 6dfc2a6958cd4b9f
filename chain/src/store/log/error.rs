//! Why the log of a VM cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use crate::mark::Mark;

/// Why the log of a VM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A file cannot be read or written. Final: what is on the disk is not known any more.
    #[error("checkpoint log: {what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Something durable is missing or not as it was. Only filling anew helps.
    #[error(
        "checkpoint log {} is damaged ({what}); this host has to be filled anew", path.display()
    )]
    Damaged {
        /// The file or directory.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// Another VM's, or of a VM with other memory.
    #[error("checkpoint log {} is of {found}; remove the directory to fill it anew", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What it is of.
        found: String,
    },
    /// More than one frame of the log takes.
    #[error("{0} bytes at once are more than the checkpoint log takes")]
    TooLong(usize),
    /// Something failed earlier.
    #[error("the checkpoint log failed earlier and takes nothing any more: {0}")]
    Poisoned(String),
    /// It is not kept, or not any more.
    #[error("checkpoint {0} is not in the log")]
    NotRetained(Mark),
}

impl LogError {
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { what, path, source }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.into(),
            what: what.into(),
        }
    }
}
