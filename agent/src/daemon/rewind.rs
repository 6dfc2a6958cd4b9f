//! Clones of a VM from checkpoints of the past: `understudy rewind`. A clone is a VM process of its own on a host that holds
//! a replica; the master knows nothing of it, nobody protects it, and it ends with the agent. Its disks stay.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use chain::view::History;
use chain::{Rewound, View, VmRecord};
use checkpoint::{Epoch, Generation, HostId, VmId};

use super::child::ChildHandle;
use super::vms::Part;
use super::{Daemon, lock, reconcile};
use crate::child::proto::{Activate, FromChild, Role, TapSpec, ToChild};
use crate::config::VmConfig;
use crate::control::{EventKind, VmStatus};

/// How long a clone may take to run.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running clone.
pub(super) struct Clone {
    of: String,
    epoch: Epoch,
    child: Arc<ChildHandle>,
    dir: PathBuf,
    /// Why it does not run any more.
    ended: Option<String>,
}

impl Clone {
    /// As `status` shows it.
    pub fn status(&self, name: &str, host: &HostId) -> VmStatus {
        let from = format!(
            "clone of {} at checkpoint {}, not protected",
            self.of, self.epoch
        );
        VmStatus {
            name: name.into(),
            host: host.to_string(),
            role: "clone".into(),
            owner: host.to_string(),
            state: match &self.ended {
                Some(how) => format!("Ended: {how}; {from}"),
                None => from,
            },
            epoch: self.epoch.0,
            pid: self.child.pid(),
            ..VmStatus::default()
        }
    }
}

/// Starts a clone.
pub(super) fn rewind(
    daemon: &Arc<Daemon>,
    name: &str,
    epoch: Epoch,
    clone: &str,
    network: Option<&str>,
) -> Result<(), String> {
    HostId::new(clone).map_err(|e| format!("--as {clone:?}: {e}"))?;
    let record = replica_of(daemon, name)?;
    let parent = daemon.config.data_dir.join("clones");
    let dir = parent.join(clone);
    {
        let mut vms = lock(&daemon.vms);
        if vms.by_name(clone).is_some() || vms.clones.contains_key(clone) {
            return Err(format!(
                "a VM named {clone:?} is on this host already; choose another name"
            ));
        }
    }
    let failed = |e: std::io::Error| {
        format!(
            "{}: {e} (left by an earlier clone of that name? Remove it if its disks are not needed)",
            dir.display()
        )
    };
    std::fs::create_dir_all(&parent).map_err(failed)?;
    std::fs::create_dir(&dir).map_err(failed)?;
    let result = start(daemon, &record, epoch, clone, network, &dir);
    if result.is_err() {
        lock(&daemon.vms).clones.remove(clone);
        let _ = std::fs::remove_dir_all(&dir);
    }
    result
}

/// The record of a VM whose replica is here.
fn replica_of(daemon: &Daemon, name: &str) -> Result<VmRecord, String> {
    let mut vms = lock(&daemon.vms);
    let Some(entry) = vms.by_name(name) else {
        return Err(format!(
            "this host holds no replica of {name:?} (`understudy status` lists what it has)"
        ));
    };
    if entry.part == Part::Owner {
        let chain = entry.record.view.chain.iter();
        let hosts: Vec<&str> = chain.map(|m| m.host.as_str()).collect();
        return Err(match hosts.is_empty() {
            true => format!("{name} runs here and has no backups: nobody keeps its past"),
            false => format!(
                "{name} runs here; its past is kept by its backups: give the order on {}",
                hosts.join(" or ")
            ),
        });
    }
    Ok(entry.record.clone())
}

fn start(
    daemon: &Arc<Daemon>,
    record: &VmRecord,
    epoch: Epoch,
    clone: &str,
    network: Option<&str>,
    dir: &Path,
) -> Result<(), String> {
    let (view, shape) = (&record.view, &record.shape);
    let mut config = VmConfig::from_text(Path::new(&view.name), &shape.config_toml)
        .map_err(|e| e.to_string())?;
    let number = free_number();
    let taps = taps(daemon, &config, network, number)?;
    config.name = clone.into();
    config.console = Some(dir.join("console.log"));
    config.protect.backups = Vec::new();
    let toml = toml::to_string(&config).map_err(|e| e.to_string())?;
    let Rewound {
        mark,
        machine,
        ram,
        disks,
    } = daemon
        .replicas
        .rewind(view.vm, shape, epoch, dir)
        .map_err(|e| e.to_string())?;
    let role = Role::Standby {
        disk_sizes: shape.disks.clone(),
    };
    let mut start = reconcile::start_message(daemon, &config, &toml, view.vm, role)?;
    start.taps = taps;
    let (sender, reports) = channel();
    let (reporting, named) = (daemon.clone(), clone.to_string());
    let fds: Vec<_> = ram.iter().map(AsRawFd::as_raw_fd).collect();
    let child = ChildHandle::start(&start, &fds, move |message| {
        report(&reporting, &named, message.as_ref());
        let _ = sender.send(message);
    })
    .map_err(|e| format!("starting the clone's process: {e}"))?;
    let entry = Clone {
        of: view.name.clone(),
        epoch,
        child: child.clone(),
        dir: dir.into(),
        ended: None,
    };
    lock(&daemon.vms).clones.insert(clone.into(), entry);
    let activate = Activate {
        view: View {
            vm: VmId::random(),
            name: clone.into(),
            generation: Generation(1),
            owner: daemon.host.clone(),
            chain: Vec::new(),
            joining: None,
            history: History::default(),
        },
        mark,
        machine,
        disks,
    };
    child
        .send(&ToChild::Activate(Box::new(activate)))
        .map_err(|e| format!("the clone's process is gone: {e}"))?;
    loop {
        match reports.recv_timeout(PATIENCE) {
            Ok(Some(FromChild::Activated { .. })) => break,
            Ok(Some(FromChild::Fatal(why))) => return Err(why),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                return Err("the clone's process ended, or did not run in time".into());
            }
        }
    }
    daemon.events.add(
        EventKind::Cloned,
        &view.name,
        format!(
            "{clone} runs from checkpoint {mark}, its disks in {}",
            dir.display()
        ),
    );
    Ok(())
}

/// What a clone's process says after it has begun to run.
fn report(daemon: &Daemon, clone: &str, message: Option<&FromChild>) {
    let how = match message {
        Some(FromChild::GuestEnded { how, .. }) => how.clone(),
        Some(FromChild::Fatal(why)) => why.clone(),
        None => "its process has ended".into(),
        Some(_) => return,
    };
    if let Some(entry) = lock(&daemon.vms).clones.get_mut(clone)
        && entry.ended.is_none()
    {
        daemon.events.add(EventKind::GuestEnded, clone, how.clone());
        entry.ended = Some(how);
    }
}

/// A number that no other clone of this agent bears.
fn free_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One tap for each card: on a network's bridge, or alone.
fn taps(
    daemon: &Daemon,
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
            let found = daemon.config.networks.get(name).ok_or_else(|| {
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

/// Ends a clone, if there is one of that name; its disks stay.
pub(super) fn stop(daemon: &Daemon, name: &str) -> bool {
    let Some(clone) = lock(&daemon.vms).clones.remove(name) else {
        return false;
    };
    clone.child.kill();
    daemon.events.add(
        EventKind::GuestEnded,
        name,
        format!("clone stopped; its disks stay in {}", clone.dir.display()),
    );
    true
}
