//! What this host is to each VM: owner, standby, or nothing any more.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use chain::VmRecord;
use checkpoint::{Generation, HostId, VmId};
use vmm::VcpuReport;

use super::bridge::Bridge;
use super::child::ChildHandle;
use super::reprotect::Retries;
use super::rewind::Clone;
use crate::child::proto::FromChild;
use crate::config::{Alone, VmConfig};
use crate::control::{FailoverReport, VmStatus};
use crate::epoch::EpochStats;
use crate::epoch::figures::Figures;

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
    /// Owner: how it is doing, and when its process said so.
    pub figures: Option<(Figures, Instant)>,
    /// Owner: the hosts that should back it up, in order of preference; none: nobody has asked for protection.
    pub wanted: Vec<HostId>,
    /// Owner: hosts that were lost.
    pub retries: Retries,
    /// New owner: what its chain may lack.
    pub bridge: Option<Bridge>,
    /// Owner: the generation it has asked the master for, until it knows the outcome.
    pub proposing: Option<Generation>,
    /// Owner: it stands still, because its last backup is lost.
    pub frozen: bool,
    /// The guest, or its process, has ended.
    pub ended: bool,
    /// Who waits for an answer of the process.
    pub waiting: Waiting,
}

impl Entry {
    /// A VM that this host has just been given a part in.
    pub fn new(record: VmRecord, part: Part, child: Arc<ChildHandle>) -> Self {
        Self {
            record,
            part,
            child,
            protected: None,
            trouble: None,
            failover: None,
            figures: None,
            wanted: Vec::new(),
            retries: Retries::default(),
            bridge: None,
            proposing: None,
            frozen: false,
            ended: false,
            waiting: Waiting::default(),
        }
    }

    /// Whether it stands still rather than run without a backup.
    pub fn freezes_alone(&self) -> bool {
        let view = &self.record.view;
        VmConfig::from_text(Path::new(&view.name), &self.record.shape.config_toml)
            .is_ok_and(|config| config.protect.alone == Alone::Freeze)
    }

    /// Whether the chain holds this VM's history, so that what is left of it can go on in place.
    pub fn chain_is_filled(&self) -> bool {
        let since = self.record.view.history.since;
        self.bridge.is_some() || self.protected.is_some_and(|then| then >= since)
    }
}

/// Answers that somebody waits for.
#[derive(Default)]
pub(super) struct Waiting {
    pub stats: Vec<Sender<EpochStats>>,
    pub inspected: Vec<Sender<Result<Vec<VcpuReport>, String>>>,
    pub activated: Option<Sender<FromChild>>,
    pub handed_over: Option<Sender<checkpoint::Epoch>>,
}

/// A VM that this host owns and that runs nowhere.
pub(super) struct Orphan {
    pub record: VmRecord,
    /// What is being done about it, in words.
    pub state: String,
}

impl Orphan {
    /// As `status` shows it.
    pub fn status(&self, host: &HostId) -> VmStatus {
        let view = &self.record.view;
        VmStatus {
            name: view.name.clone(),
            host: host.to_string(),
            role: "owner".into(),
            state: format!("Not running: {}", self.state),
            owner: view.owner.to_string(),
            generation: view.generation.0,
            ..VmStatus::default()
        }
    }
}

/// All VMs here.
#[derive(Default)]
pub(super) struct Vms {
    pub map: BTreeMap<VmId, Entry>,
    pub orphans: BTreeMap<VmId, Orphan>,
    /// By name.
    pub clones: BTreeMap<String, Clone>,
}

impl Vms {
    pub fn name(&self, vm: VmId) -> Option<String> {
        self.map.get(&vm).map(|e| e.record.view.name.clone())
    }

    /// A VM of that name that this host owns and that runs nowhere.
    pub fn orphan(&self, name: &str) -> Option<&Orphan> {
        let mut all = self.orphans.iter();
        all.find(|(vm, o)| o.record.view.name == name && !self.map.contains_key(vm))
            .map(|(_, orphan)| orphan)
    }

    pub fn by_name(&mut self, name: &str) -> Option<&mut Entry> {
        self.map.values_mut().find(|e| e.record.view.name == name)
    }
}
