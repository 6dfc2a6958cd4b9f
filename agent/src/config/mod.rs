//! The two configuration files: `host.toml` (one per host) and `vm.toml` (one per VM).
//!
//! Unknown keys are errors: a typo in a safety setting must never be silently ignored. TOML's own messages name the
//! line and the column.

mod changes;
mod epochs;
mod host;
mod master;
mod vm;

use std::path::{Path, PathBuf};

pub use changes::{Change, Takes, changes, keeping_layout};
pub use epochs::Epochs;
pub use host::{Detection, HostConfig, Network};
pub use master::{Addresses, MasterConfig, Members};
pub use vm::{
    Alone, BUILTIN_PROBE, BootFile, DiskConfig, Durability, NetConfig, OnDiskError, OnEnd,
    ProtectConfig, VmConfig, parse_mac,
};

/// Why a configuration file was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The file is not valid TOML, or has an unknown or missing key; the message names line and column.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's message, with line, column and the line itself.
        message: String,
    },
    /// The file parses, but a value cannot be right.
    #[error("{path}: {key}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

/// Reads and parses `path`, leaving value checks to the caller.
fn load<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })?;
    parse(path, &text)
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|e| ConfigError::Parse {
        path: path.into(),
        message: e.to_string().trim_end().to_string(),
    })
}

fn value_error(path: &Path, key: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Value {
        path: path.into(),
        key: key.into(),
        problem: problem.into(),
    }
}
