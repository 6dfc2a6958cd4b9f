//! Talking to etcd's members: whichever answers. Each operation is tried at one member after the other, within a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, Txn, TxnOp, WatchOptions,
};
use tokio::time::timeout;

use super::keys::{Pair, Write};
use crate::master::MasterError;

/// How long one member may take to connect, or to answer.
const ATTEMPT: Duration = Duration::from_millis(1500);

pub(super) struct Cluster {
    endpoints: Vec<String>,
    options: ConnectOptions,
    /// A connection to each member that has answered.
    clients: Mutex<Vec<Option<Client>>>,
    /// The member that answered last.
    current: AtomicUsize,
}

impl Cluster {
    pub fn new(endpoints: Vec<String>, user: Option<(String, String)>) -> Self {
        // A member that has no leader says so, rather than let everybody wait.
        let mut options = ConnectOptions::new()
            .with_connect_timeout(ATTEMPT)
            .with_keep_alive(Duration::from_secs(2), Duration::from_secs(2))
            .with_require_leader(true);
        if let Some((name, password)) = user {
            options = options.with_user(name, password);
        }
        Self {
            clients: Mutex::new(vec![None; endpoints.len()]),
            current: AtomicUsize::new(0),
            endpoints,
            options,
        }
    }

    /// Everything below `prefix`, linearizably, and the revision of etcd's store it was read at.
    pub async fn get(&self, prefix: &str) -> Result<(Vec<Pair>, i64), MasterError> {
        self.any(async |client: &mut Client| {
            let options = GetOptions::new().with_prefix();
            let answer = client.get(prefix, Some(options)).await?;
            let revision = answer.header().map_or(0, |header| header.revision());
            let mut pairs = Vec::new();
            for pair in answer.kvs() {
                pairs.push(Pair {
                    key: pair.key_str()?.into(),
                    value: pair.value().into(),
                    mod_revision: pair.mod_revision(),
                });
            }
            Ok((pairs, revision))
        })
        .await
    }

    /// The revision in which it was done; `None` if it was not. An error leaves that unknown; done twice it cannot be, since it changes what it compares.
    pub async fn txn(&self, write: &Write) -> Result<Option<i64>, MasterError> {
        let compare = write.compare.iter().map(|(key, revision)| {
            Compare::mod_revision(key.as_str(), CompareOp::Equal, *revision)
        });
        let put = write.put.iter();
        let put = put.map(|(key, value)| TxnOp::put(key.as_str(), value.as_slice(), None));
        let delete = write.delete.iter();
        let delete = delete.map(|key| TxnOp::delete(key.as_str(), None));
        let txn = Txn::new()
            .when(compare.collect::<Vec<_>>())
            .and_then(put.chain(delete).collect::<Vec<_>>());
        self.any(async |client: &mut Client| {
            let answer = client.txn(txn.clone()).await?;
            let revision = answer.header().map_or(0, |header| header.revision());
            Ok(answer.succeeded().then_some(revision))
        })
        .await
    }

    /// Waits until `key` is written in `from` or a later revision, or until that cannot be told (the connection ended, or etcd
    /// has forgotten that revision): it is to be read again then.
    pub async fn changed(&self, key: &str, from: i64, within: Duration) -> Result<(), MasterError> {
        let mut stream = self
            .any(async |client: &mut Client| {
                let options = WatchOptions::new().with_start_revision(from);
                client.watch(key, Some(options)).await
            })
            .await?;
        let _ = timeout(within, async {
            while let Ok(Some(answer)) = stream.message().await {
                if answer.canceled() || !answer.events().is_empty() {
                    return;
                }
            }
        })
        .await;
        Ok(())
    }

    /// One pass over the members, beginning with the one that answered last.
    async fn any<T>(
        &self,
        what: impl AsyncFn(&mut Client) -> Result<T, Error>,
    ) -> Result<T, MasterError> {
        let (count, first) = (self.endpoints.len(), self.current.load(Ordering::Relaxed));
        let mut trouble = Vec::new();
        for at in (0..count).map(|i| (first + i) % count) {
            let begun = Instant::now();
            let attempt = timeout(ATTEMPT, async {
                let mut client = self.client(at).await?;
                what(&mut client).await
            });
            let why = match attempt.await {
                Ok(Ok(value)) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(value);
                }
                Ok(Err(e)) => e.to_string(),
                Err(_) => format!("no answer for {} ms", begun.elapsed().as_millis()),
            };
            self.clients()[at] = None;
            trouble.push(format!("{}: {why}", self.endpoints[at]));
        }
        Err(MasterError::Etcd(trouble.join("; ")))
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Vec<Option<Client>>> {
        self.clients
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn client(&self, at: usize) -> Result<Client, Error> {
        if let Some(client) = self.clients()[at].clone() {
            return Ok(client);
        }
        // One client for each member: the library's balancer would hold requests back for members that are gone.
        let client = Client::connect([&self.endpoints[at]], Some(self.options.clone())).await?;
        self.clients()[at] = Some(client.clone());
        Ok(client)
    }
}
