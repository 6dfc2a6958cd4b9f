//! The engine that keeps its decisions in an etcd cluster, which its operator runs anyway.
//!
//! Every agent decides by itself: it reads what is there, lets [`MasterState`](super::MasterState) decide, and writes the
//! result in one transaction that etcd does only if nothing has changed since (`mod_revision`). Whoever was slower reads
//! again. No lease is part of a decision: that one expires says that a host was silent, not that it is dead.

mod cluster;
mod keys;

use std::time::{Duration, Instant};

use checkpoint::ClusterId;
use tokio::runtime::Runtime;

use super::{Begin, Master, MasterError, Reply, Request, Snapshot, Wanted};
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
    /// Whether a cluster may be begun below that prefix, if there is none.
    pub begin: Begin,
}

/// The engine.
pub struct EtcdMaster {
    cluster: Cluster,
    keys: Keys,
    begin: Begin,
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
            begin: options.begin,
            runtime,
        })
    }

    /// What is there, and the revision of etcd's store that it is of.
    async fn look(&self, deadline: Instant) -> Result<(Read, i64), MasterError> {
        loop {
            let found = match self.cluster.get(&self.keys.all()).await {
                Ok((pairs, revision)) => Ok((self.keys.read(pairs)?, revision)),
                Err(e) => Err(e),
            };
            match found {
                Ok((read, revision)) if read.cluster().is_some() => return Ok((read, revision)),
                Ok(_) if self.begin == Begin::Existing => {
                    let place = format!("in etcd, below {}", self.keys.all());
                    return Err(MasterError::NotBegun { place });
                }
                // If another host is faster, its cluster is the one.
                Ok(_) => match self
                    .cluster
                    .txn(&self.keys.begin(ClusterId::random()))
                    .await
                {
                    Err(e) if Instant::now() >= deadline => return Err(e),
                    _ => {}
                },
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn decide(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError> {
        let deadline = Instant::now() + PATIENCE;
        let mut asked = false;
        let unknown = |e: MasterError, asked: bool| match asked {
            true => MasterError::Unknown {
                id: request.id,
                why: e.to_string(),
            },
            false => e,
        };
        loop {
            let found = self.look(deadline).await;
            let (read, _) = found.map_err(|e| unknown(e, asked))?;
            if !asked && !wanted.still() {
                return Err(MasterError::GivenUp);
            }
            let (reply, write) = self.keys.decide(&read, request)?;
            let Some(write) = write else {
                return Ok(reply);
            };
            asked = true;
            match self.cluster.txn(&write).await {
                Ok(Some(revision)) => return Ok(stamped(reply, revision)),
                // Somebody else was faster. What is there now decides, and so it does if nothing is known of the
                // transaction: done after all, it is recognised; to be done still, it will find that something has
                // changed.
                Ok(None) => {}
                Err(e) if Instant::now() >= deadline => return Err(unknown(e, asked)),
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
    fn request(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError> {
        self.runtime.block_on(self.decide(request, wanted))
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        self.runtime.block_on(self.wait(since, timeout))
    }
}

/// The reply with the revision that etcd has given the decision.
fn stamped(reply: Reply, revision: i64) -> Reply {
    let revision = u64::try_from(revision).unwrap_or_default();
    match reply {
        Reply::Vm(mut record) => {
            record.revision = revision;
            Reply::Vm(record)
        }
        other => other,
    }
}
