//! The master's decisions as a deterministic state machine: the same orders in the same order give the same state on
//! every replica of the master.

mod chains;
mod recent;
mod rejection;
#[cfg(test)]
mod tests;
mod vms;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use checkpoint::{ClusterId, HostId, HostUuid, RequestId, VmId};
use serde::{Deserialize, Serialize};

use super::{Command, HostRecord, Order, Outcome, Reply, Request, Snapshot};
use crate::view::VmRecord;
#[cfg(feature = "etcd")]
pub(super) use recent::RECENT_MAX;
use recent::Recent;

pub use chains::CHAIN_MAX;
pub use rejection::Rejection;

/// Everything the master knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterState {
    cluster: ClusterId,
    revision: u64,
    vms: BTreeMap<VmId, VmRecord>,
    hosts: BTreeMap<HostId, HostRecord>,
    recent: Recent,
}

impl MasterState {
    /// Of a cluster in which nothing has been decided.
    #[must_use]
    pub fn new(cluster: ClusterId) -> Self {
        Self {
            cluster,
            ..Self::default()
        }
    }

    /// For an engine that keeps each record by itself: the state that these records are.
    #[cfg(feature = "etcd")]
    pub(super) fn of(
        cluster: ClusterId,
        revision: u64,
        records: Vec<VmRecord>,
        hosts: Vec<HostRecord>,
        recent: Vec<(RequestId, Outcome)>,
    ) -> Self {
        let mut state = Self::new(cluster);
        state.revision = revision;
        state.vms = records.into_iter().map(|r| (r.view.vm, r)).collect();
        state.hosts = hosts.into_iter().map(|h| (h.host.clone(), h)).collect();
        for (id, outcome) in recent {
            state.recent.note(id, outcome);
        }
        state
    }

    /// Which cluster's this is, if it has not been decided yet.
    pub(super) fn begin(&mut self, cluster: ClusterId) {
        if self.cluster == ClusterId::NIL {
            self.cluster = cluster;
        }
    }

    /// Whose decisions these are; nil before the first.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The state as its clients see it.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            cluster: self.cluster,
            revision: self.revision,
            records: self.vms.values().cloned().collect(),
            hosts: self.hosts.values().cloned().collect(),
        }
    }

    /// Raised by every change.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether the two differ in more than which requests were refused: only then there is something to be made durable.
    /// (A refusal that is forgotten is decided on again, and its asker has been told or asks again.)
    pub(super) fn has_decided_since(&self, before: &Self) -> bool {
        self.revision != before.revision || self.cluster != before.cluster
    }

    /// Carries a request out, once.
    ///
    /// # Errors
    /// [`Rejection`]; nothing has changed then but that it is remembered.
    pub fn answer(&mut self, request: &Request) -> Result<Reply, Rejection> {
        if let Order::Settle { request: about } = &request.order {
            return Ok(Reply::Outcome(self.settle(*about)));
        }
        match self.recent.get(request.id) {
            Some(Outcome::Refused(rejection)) => return Err(rejection.clone()),
            Some(Outcome::Never) => return Err(Rejection::Expired),
            Some(Outcome::Done { revision }) => return Ok(self.again(&request.order, *revision)),
            None => {}
        }
        let result = self.order(&request.order);
        let outcome = match &result {
            Ok(Reply::Vm(record)) => Outcome::Done {
                revision: record.revision,
            },
            Ok(_) => Outcome::Done {
                revision: self.revision,
            },
            Err(rejection) => Outcome::Refused(rejection.clone()),
        };
        self.recent.note(request.id, outcome);
        result
    }

    fn settle(&mut self, about: RequestId) -> Outcome {
        if let Some(outcome) = self.recent.get(about) {
            return outcome.clone();
        }
        self.recent.note(about, Outcome::Never);
        Outcome::Never
    }

    /// What an order was answered that was carried out then.
    fn again(&self, order: &Order, revision: u64) -> Reply {
        let record = match order {
            Order::Vm(command) => self.vms.get(&command.vm()),
            _ => None,
        };
        if let Some(record) = record.filter(|record| record.revision == revision) {
            return Reply::Vm(Box::new(record.clone()));
        }
        if let Order::Enroll { host, id, .. } = order
            && let Some(known) = self.hosts.get(host).filter(|known| known.id == *id)
        {
            return Reply::Host(known.clone());
        }
        Reply::Done { revision }
    }

    fn order(&mut self, order: &Order) -> Result<Reply, Rejection> {
        match order {
            Order::Vm(command) => self.apply(command).map(Box::new).map(Reply::Vm),
            Order::Enroll { host, id, addr } => self.enroll(host, *id, *addr).map(Reply::Host),
            Order::Forget { host } => {
                let known = self.hosts.remove(host);
                let known = known.ok_or_else(|| Rejection::UnknownHost(host.clone()))?;
                self.revision += 1;
                Ok(Reply::Host(known))
            }
            Order::Settle { request } => Ok(Reply::Outcome(self.settle(*request))),
        }
    }

    /// Applies one command. A repeated command (its answer was lost) is answered as the first time.
    ///
    /// # Errors
    /// [`Rejection`]; nothing has changed then.
    pub fn apply(&mut self, command: &Command) -> Result<VmRecord, Rejection> {
        let mut record = match vms::decide(&self.vms, command)? {
            vms::Decided::Before(record) => return Ok(record),
            vms::Decided::Now(record) => record,
        };
        self.revision += 1;
        record.revision = self.revision;
        match command {
            Command::Remove { vm, .. } => drop(self.vms.remove(vm)),
            _ => drop(self.vms.insert(record.view.vm, record.clone())),
        }
        Ok(record)
    }

    fn enroll(
        &mut self,
        host: &HostId,
        id: HostUuid,
        addr: SocketAddr,
    ) -> Result<HostRecord, Rejection> {
        let known = self.hosts.get(host);
        if let Some(known) = known
            && known.id != id
        {
            return Err(Rejection::HostTaken {
                host: host.clone(),
                there: known.addr,
                here: addr,
            });
        }
        if let Some(known) = known
            && known.addr == addr
        {
            return Ok(known.clone());
        }
        let since = known.map(|known| known.since);
        self.revision += 1;
        let record = HostRecord {
            host: host.clone(),
            id,
            addr,
            since: since.unwrap_or(self.revision),
        };
        self.hosts.insert(host.clone(), record.clone());
        Ok(record)
    }
}
