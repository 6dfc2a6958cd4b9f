//! Whose data a `data_dir` holds: the file `identity` in it, written once and replaced atomically.
//!
//! ```toml
//! host = "alpha"                                      # the host's name
//! id = "0b5c6a3e-3c0e-4f0e-9a57-7f3b1a1f2c4d"         # drawn when its agent first started
//! cluster = "d3c1f0aa-52b4-4c1b-8f0e-0e6a3f1b9c77"    # once it is known
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use checkpoint::{ClusterId, HostId, HostUuid};
use serde::{Deserialize, Serialize};

/// The file's name.
const NAME: &str = "identity";
const HEAD: &str = "# Whose data this directory holds. Written by understudy; not to be edited or copied to another host.\n";

/// Why a data directory must not be used by this agent.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It is not what this program writes.
    #[error(
        "{path}: {why}; restore it from a backup. Without it nobody can tell whose disks these are: remove it only if this host holds no VM that is needed"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another host's.
    #[error(
        "{path}: this data_dir is host {there}'s, but `host` in the configuration is {here}: name the data_dir that belongs to {here}, or call this host {there} as before"
    )]
    OtherHost {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        there: HostId,
        /// Who asks.
        here: HostId,
    },
    /// Another cluster's.
    #[error(
        "{path}: this data_dir belongs to cluster {there}, the master is of cluster {here}: is `[master]` in the configuration right, and is this its data_dir? To give this host to another cluster, move the data_dir away"
    )]
    OtherCluster {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        there: ClusterId,
        /// The master's.
        here: ClusterId,
    },
    /// The master's record was here once.
    #[error(
        "{path}: this data_dir belongs to cluster {cluster}, but the master's record is not in it: restore it, or mount what it is on. To begin a new cluster, move the data_dir away first"
    )]
    RecordLost {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        cluster: ClusterId,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    host: HostId,
    id: HostUuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<ClusterId>,
    /// A master's record has been begun or found here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    master: bool,
}

/// The mark of a data directory.
#[derive(Clone, Debug)]
pub struct Identity {
    path: PathBuf,
    content: Content,
}

impl Identity {
    /// Reads the mark in `dir`, or makes one for `host`.
    ///
    /// # Errors
    /// [`IdentityError::OtherHost`], or the file is damaged or cannot be read or written.
    pub fn open(dir: &Path, host: &HostId) -> Result<Self, IdentityError> {
        let path = dir.join(NAME);
        let content = match fs::read_to_string(&path) {
            Ok(text) => toml::from_str::<Content>(&text).map_err(|e| IdentityError::Damaged {
                path: path.clone(),
                why: e.message().to_string(),
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let new = Self {
                    path,
                    content: Content {
                        host: host.clone(),
                        id: HostUuid::random(),
                        cluster: None,
                        master: false,
                    },
                };
                new.store(&new.content)?;
                return Ok(new);
            }
            Err(source) => return Err(IdentityError::Io { path, source }),
        };
        if content.host != *host {
            return Err(IdentityError::OtherHost {
                path,
                there: content.host,
                here: host.clone(),
            });
        }
        Ok(Self { path, content })
    }

    /// This host's own identity.
    #[must_use]
    pub fn id(&self) -> HostUuid {
        self.content.id
    }

    /// The cluster it belongs to, once that is known.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.content.cluster
    }

    /// The master that this host follows is of that cluster.
    ///
    /// # Errors
    /// [`IdentityError::OtherCluster`] if the directory is another's; [`IdentityError::Io`] if that cannot be noted.
    pub fn join(&mut self, cluster: ClusterId) -> Result<(), IdentityError> {
        match self.content.cluster {
            Some(there) if there == cluster => Ok(()),
            Some(there) => Err(IdentityError::OtherCluster {
                path: self.path.clone(),
                there,
                here: cluster,
            }),
            None => self.note(Content {
                cluster: Some(cluster),
                ..self.content.clone()
            }),
        }
    }

    /// Before the master's record is opened: whether one that was here before is missing now. `found`: it is there.
    ///
    /// # Errors
    /// [`IdentityError::RecordLost`].
    pub fn check_record(&self, found: bool) -> Result<(), IdentityError> {
        match self.content.cluster {
            Some(cluster) if self.content.master && !found => Err(IdentityError::RecordLost {
                path: self.path.clone(),
                cluster,
            }),
            _ => Ok(()),
        }
    }

    /// A master's record is here from now on.
    ///
    /// # Errors
    /// [`IdentityError::Io`].
    pub fn has_record(&mut self) -> Result<(), IdentityError> {
        if self.content.master {
            return Ok(());
        }
        self.note(Content {
            master: true,
            ..self.content.clone()
        })
    }

    fn note(&mut self, content: Content) -> Result<(), IdentityError> {
        self.store(&content)?;
        self.content = content;
        Ok(())
    }

    fn store(&self, content: &Content) -> Result<(), IdentityError> {
        let body = toml::to_string(content).unwrap_or_else(|e| unreachable!("names and ids: {e}"));
        self.replace(format!("{HEAD}{body}").as_bytes())
            .map_err(|source| IdentityError::Io {
                path: self.path.clone(),
                source,
            })
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    #[test]
    fn i1_i2_a_data_dir_is_one_hosts_and_one_clusters() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Identity::open(dir.path(), &host("a")).unwrap();
        assert_eq!(first.cluster(), None);
        let (ours, other) = (ClusterId::random(), ClusterId::random());
        first.join(ours).unwrap();
        let mut again = Identity::open(dir.path(), &host("a")).unwrap();
        assert_eq!((again.id(), again.cluster()), (first.id(), Some(ours)));
        again.join(ours).unwrap();
        let said = again.join(other).unwrap_err().to_string();
        assert!(
            said.contains(&ours.to_string()) && said.contains(&other.to_string()),
            "{said}"
        );
        let said = Identity::open(dir.path(), &host("b"))
            .unwrap_err()
            .to_string();
        assert!(said.contains("host a's") && said.contains("is b"), "{said}");
        let elsewhere = tempfile::tempdir().unwrap();
        let second = Identity::open(elsewhere.path(), &host("a")).unwrap();
        assert_ne!(second.id(), first.id());
    }

    #[test]
    fn h17_a_record_that_was_here_once_is_missed() {
        let dir = tempfile::tempdir().unwrap();
        let mut identity = Identity::open(dir.path(), &host("a")).unwrap();
        identity.check_record(false).unwrap();
        let cluster = ClusterId::random();
        identity.join(cluster).unwrap();
        identity.check_record(false).unwrap();
        identity.has_record().unwrap();
        let identity = Identity::open(dir.path(), &host("a")).unwrap();
        identity.check_record(true).unwrap();
        let said = identity.check_record(false).unwrap_err().to_string();
        assert!(said.contains(&cluster.to_string()), "{said}");
    }

    #[test]
    fn what_is_no_mark_is_not_taken_for_one_that_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "host = \"a\"\n", "host = \"a\"\nid = \"7\"\n", "\u{0}"] {
            fs::write(dir.path().join(NAME), text).unwrap();
            let said = Identity::open(dir.path(), &host("a")).unwrap_err();
            assert!(matches!(said, IdentityError::Damaged { .. }), "{said}");
        }
    }
}
