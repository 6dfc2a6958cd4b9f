//! What this host is to each VM: owner, standby, or nothing any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use chain::VmRecord;
use checkpoint::{Generation, VmId};
use vmm::VcpuReport;

use super::child::ChildHandle;
use crate::child::proto::FromChild;
use crate::control::FailoverReport;
use crate::epoch::EpochStats;

/// This host's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// It runs the VM.
    Owner,
    /// It holds a replica, and a standby waits.
    Standby,
}

/// One VM here.
pub(super) struct Entry {
    pub record: VmRecord,
    pub part: Part,
    pub child: Arc<ChildHandle>,
    /// Owner: the generation whose first checkpoint is committed.
    pub protected: Option<Generation>,
    /// Owner: why it is not protected.
    pub trouble: Option<String>,
    pub failover: Option<FailoverReport>,
    /// Who waits for an answer of the process.
    pub waiting: Waiting,
}

/// Answers that somebody waits for.
#[derive(Default)]
pub(super) struct Waiting {
    pub stats: Vec<Sender<EpochStats>>,
    pub inspected: Vec<Sender<Result<Vec<VcpuReport>, String>>>,
    pub activated: Option<Sender<FromChild>>,
}

/// All VMs here.
#[derive(Default)]
pub(super) struct Vms {
    pub map: BTreeMap<VmId, Entry>,
}

impl Vms {
    pub fn name(&self, vm: VmId) -> Option<String> {
        self.map.get(&vm).map(|e| e.record.view.name.clone())
    }

    pub fn by_name(&mut self, name: &str) -> Option<&mut Entry> {
        self.map.values_mut().find(|e| e.record.view.name == name)
    }
}
