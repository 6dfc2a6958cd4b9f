//! Clones of a VM from checkpoints of the past: `understudy rewind`. A clone is a VM process of its own on a host that holds
//! a replica; the master knows nothing of it, nobody protects it, and it ends with the agent. Its disks stay.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chain::view::History;
use chain::{Rewound, View, VmRecord};
use checkpoint::{Epoch, Generation, HostId, VmId};

use super::child::ChildHandle;
use super::env::{Env, lock};
use super::process::{config_of, start_message};
use crate::child::proto::{Activate, FromChild, Role, TapSpec, ToChild};
use crate::config::VmConfig;
use crate::control::{self, EventKind, Health, VmStatus};

/// How long a clone may take to run.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running clone.
struct CloneVm {
    of: String,
    epoch: Epoch,
    child: Arc<ChildHandle>,
    dir: PathBuf,
    /// Why it does not run any more.
    ended: Option<String>,
}

impl CloneVm {
    /// As `status` shows it.
    fn status(&self, name: &str, host: &HostId) -> VmStatus {
        VmStatus {
            name: name.into(),
            host: host.to_string(),
            role: control::Role::Clone,
            owner: host.to_string(),
            health: Health::Clone {
                of: self.of.clone(),
                epoch: self.epoch.0,
                ended: self.ended.clone(),
            },
            epoch: self.epoch.0,
            pid: self.child.pid(),
            ..VmStatus::default()
        }
    }
}

/// The clones of this host, by name.
pub(super) struct Clones {
    env: Arc<Env>,
    map: Mutex<BTreeMap<String, CloneVm>>,
}

impl Clones {
    pub fn new(env: Arc<Env>) -> Arc<Self> {
        Arc::new(Self {
            env,
            map: Mutex::default(),
        })
    }

    /// As `status` shows them.
    pub fn status(&self) -> Vec<VmStatus> {
        let map = lock(&self.map);
        let all = map.iter();
        all.map(|(name, clone)| clone.status(name, &self.env.host))
            .collect()
    }

    /// Starts a clone of the VM whose replica is here.
    ///
    /// # Errors
    /// In words; nothing is left of the clone then.
    pub fn rewind(
        self: &Arc<Self>,
        record: &VmRecord,
        epoch: Epoch,
        clone: &str,
        network: Option<&str>,
    ) -> Result<(), String> {
        HostId::new(clone).map_err(|e| format!("--as {clone:?}: {e}"))?;
        let parent = self.env.config.data_dir.join("clones");
        let dir = parent.join(clone);
        if lock(&self.map).contains_key(clone) {
            return Err(format!(
                "a VM named {clone:?} is on this host already; choose another name"
            ));
        }
        let failed = |e: std::io::Error| {
            format!(
                "{}: {e} (left by an earlier clone of that name? Remove it if its disks are not needed)",
                dir.display()
            )
        };
        std::fs::create_dir_all(&parent).map_err(failed)?;
        std::fs::create_dir(&dir).map_err(failed)?;
        let result = self.start(record, epoch, clone, network, &dir);
        if result.is_err() {
            lock(&self.map).remove(clone);
            let _ = std::fs::remove_dir_all(&dir);
        }
        result
    }

    fn start(
        self: &Arc<Self>,
        record: &VmRecord,
        epoch: Epoch,
        clone: &str,
        network: Option<&str>,
        dir: &Path,
    ) -> Result<(), String> {
        let (env, view, shape) = (&self.env, &record.view, &record.shape);
        let mut config = config_of(record)?;
        let number = free_number();
        let taps = taps(env, &config, network, number)?;
        config.name = clone.into();
        config.console = Some(dir.join("console.log"));
        config.protect.backups = Vec::new();
        let rewound = env.replicas.rewind(view.vm, shape, epoch, dir);
        let Rewound {
            mark,
            machine,
            ram,
            disks,
        } = rewound.map_err(|e| e.to_string())?;
        let role = Role::Standby {
            disk_sizes: shape.disks.clone(),
        };
        let mut start = start_message(env, &config, record, role)?;
        start.taps = taps;
        let (sender, reports) = channel();
        let (reporting, named) = (self.clone(), clone.to_string());
        let fds: Vec<_> = ram.iter().map(AsRawFd::as_raw_fd).collect();
        let child = ChildHandle::start(&start, &fds, move |message| {
            reporting.report(&named, message.as_ref());
            let _ = sender.send(message);
        })
        .map_err(|e| format!("starting the clone's process: {e}"))?;
        let entry = CloneVm {
            of: view.name.clone(),
            epoch,
            child: child.clone(),
            dir: dir.into(),
            ended: None,
        };
        lock(&self.map).insert(clone.into(), entry);
        let activate = Activate {
            view: alone(&env.host, clone),
            mark,
            machine,
            disks,
        };
        child
            .send(&ToChild::Activate(Box::new(activate)))
            .map_err(|e| format!("the clone's process is gone: {e}"))?;
        runs(&reports)?;
        let text = format!(
            "{clone} runs from checkpoint {mark}, its disks in {}",
            dir.display()
        );
        env.events.add(EventKind::Cloned, &view.name, text);
        Ok(())
    }

    /// What a clone's process says after it has begun to run.
    fn report(&self, clone: &str, message: Option<&FromChild>) {
        let how = match message {
            Some(FromChild::GuestEnded { how, .. }) => how.clone(),
            Some(FromChild::Fatal(why) | FromChild::GiveUp { why }) => why.clone(),
            None => "its process has ended".into(),
            Some(_) => return,
        };
        if let Some(entry) = lock(&self.map).get_mut(clone)
            && entry.ended.is_none()
        {
            let events = &self.env.events;
            events.add(EventKind::GuestEnded, clone, how.clone());
            entry.ended = Some(how);
        }
    }

    /// Ends a clone, if there is one of that name; its disks stay.
    pub fn stop(&self, name: &str) -> bool {
        let Some(clone) = lock(&self.map).remove(name) else {
            return false;
        };
        clone.child.kill();
        let text = format!("clone stopped; its disks stay in {}", clone.dir.display());
        self.env.events.add(EventKind::GuestEnded, name, text);
        true
    }
}

/// Waits until the clone runs.
fn runs(reports: &Receiver<Option<FromChild>>) -> Result<(), String> {
    loop {
        match reports.recv_timeout(PATIENCE) {
            Ok(Some(FromChild::Activated { .. })) => return Ok(()),
            Ok(Some(FromChild::Fatal(why))) => return Err(why),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                return Err("the clone's process ended, or did not run in time".into());
            }
        }
    }
}

/// The configuration of a VM that nobody knows of.
fn alone(host: &HostId, name: &str) -> View {
    View {
        vm: VmId::random(),
        name: name.into(),
        generation: Generation(1),
        owner: host.clone(),
        chain: Vec::new(),
        joining: None,
        history: History::default(),
    }
}

/// A number that no other clone of this agent bears.
fn free_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One tap for each card: on a network's bridge, or alone.
fn taps(
    env: &Env,
    config: &VmConfig,
    network: Option<&str>,
    number: u32,
) -> Result<Vec<TapSpec>, String> {
    let bridge = match network {
        None => None,
        Some(name) => {
            // The guest goes on with the addresses that are in its memory.
            if config
                .net
                .iter()
                .any(|card| card.network.as_deref() == Some(name))
            {
                return Err(format!(
                    "--network {name}: the VM itself is on it, and the clone has its MAC and IP addresses; name another network"
                ));
            }
            let found = env.config.networks.get(name).ok_or_else(|| {
                format!("--network {name}: this host's configuration has none of that name: add [networks.{name}]")
            })?;
            found.bridge.clone()
        }
    };
    Ok((0..config.net.len())
        .map(|i| TapSpec {
            name: format!("usc{number}n{i}"),
            bridge: bridge.clone(),
        })
        .collect())
}
