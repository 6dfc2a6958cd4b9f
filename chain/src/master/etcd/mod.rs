//! The engine that keeps its decisions in an etcd cluster, which its operator runs anyway.
//!
//! Every agent decides by itself: it reads what is there, lets [`MasterState`](super::MasterState) decide, and writes the
//! result in one transaction that etcd does only if nothing has changed since (`mod_revision`). Whoever was slower reads
//! again. No lease is part of a decision: that one expires says that a host was silent, not that it is dead.

mod cluster;
mod keys;

use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use super::{Command, Master, MasterError, Snapshot};
use crate::view::VmRecord;
use cluster::Cluster;
use keys::{Keys, Read};

/// How long a decision or a read may take; then nothing is known of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between attempts while no member answers as hoped.
const RETRY: Duration = Duration::from_millis(50);

/// Where etcd is.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Its members' client URLs, `http://host:2379`.
    pub endpoints: Vec<String>,
    /// What the master's keys begin with.
    pub prefix: String,
    /// Name and password, if it asks for them.
    pub user: Option<(String, String)>,
}

/// The engine.
pub struct EtcdMaster {
    cluster: Cluster,
    keys: Keys,
    /// Its thread keeps the connections alive between calls.
    runtime: Runtime,
}

impl std::fmt::Debug for EtcdMaster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdMaster")
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl EtcdMaster {
    /// An engine; etcd is first asked when it is used.
    ///
    /// # Errors
    /// [`MasterError::Stopped`] if its thread cannot be started.
    pub fn new(options: EtcdOptions) -> Result<Self, MasterError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("etcd")
            .enable_all()
            .build()
            .map_err(|e| MasterError::Stopped(format!("starting a thread: {e}")))?;
        Ok(Self {
            cluster: Cluster::new(options.endpoints, options.user),
            keys: Keys::new(&options.prefix),
            runtime,
        })
    }

    /// What is there, and the revision of etcd's store that it is of.
    async fn look(&self, deadline: Instant) -> Result<(Read, i64), MasterError> {
        loop {
            match self.cluster.get(&self.keys.all()).await {
                Ok((pairs, revision)) => return Ok((self.keys.read(pairs)?, revision)),
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn decide(&self, command: &Command) -> Result<VmRecord, MasterError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (read, _) = self.look(deadline).await?;
            let (record, write) = self.keys.decide(&read, command)?;
            let Some(write) = write else {
                return Ok(record);
            };
            match self.cluster.txn(&write).await {
                Ok(true) => return Ok(record),
                // Somebody else was faster. What is there now decides, and so it does if nothing is known of the
                // transaction: done after all, it is recognised; to be done still, it will find that something has
                // changed.
                Ok(false) => {}
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn wait(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let end = Instant::now() + timeout;
        loop {
            let (read, revision) = self.look(Instant::now() + PATIENCE).await?;
            let left = end.saturating_duration_since(Instant::now());
            if read.revision > since || left.is_zero() {
                return Ok(read.snapshot());
            }
            let key = self.keys.changed();
            // If it cannot be watched, it is read again.
            if self
                .cluster
                .changed(&key, revision + 1, left)
                .await
                .is_err()
            {
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

impl Master for EtcdMaster {
    fn propose(&self, command: &Command) -> Result<VmRecord, MasterError> {
        self.runtime.block_on(self.decide(command))
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        self.runtime.block_on(self.wait(since, timeout))
    }
}
