//! Why a lab does not do what it should.

use std::io;
use std::path::PathBuf;

use netbuf::netconf::{NetconfError, NsError};

use super::wait::InVain;
use crate::control::ControlError;

/// Why a lab does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// This machine lacks something.
    #[error("{0}")]
    Missing(String),
    /// The lab has no such host.
    #[error("there is no host {0:?}")]
    NoHost(String),
    /// The host is off, or stands still.
    #[error("host {0} is not running")]
    Down(String),
    /// A namespace cannot be made.
    #[error(transparent)]
    Namespace(#[from] NsError),
    /// An interface cannot be set up.
    #[error(transparent)]
    Interface(#[from] NetconfError),
    /// A file or process.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// An agent refused, or does not answer.
    #[error("host {host}: {source}")]
    Control {
        /// Whose.
        host: String,
        /// Why.
        source: ControlError,
    },
    /// A running agent said nothing.
    #[error("host {host}: its agent said nothing to `{request}` for {seconds} s")]
    Silent {
        /// Whose.
        host: String,
        /// What it was asked.
        request: String,
        /// For how long.
        seconds: u64,
    },
    /// An agent does not start.
    #[error("host {host}: {why}; its log ends with\n  {log}")]
    Agent {
        /// Whose.
        host: String,
        /// What was waited for.
        why: InVain,
        /// The log's last lines.
        log: String,
    },
    /// Something that should have come did not.
    #[error(transparent)]
    InVain(#[from] InVain),
    /// The same, with what the hosts' logs say.
    #[error("{why}\nlogs in {}, which end with{tails}", dir.display())]
    Logs {
        /// What went wrong.
        why: String,
        /// Where the logs are kept.
        dir: PathBuf,
        /// Their last lines.
        tails: String,
    },
}

impl LabError {
    /// An I/O error with what was being done.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }
}
