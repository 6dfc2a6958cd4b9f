//! Makes this host be to each VM what the master has decided.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::master::{Command, Followed, Follower, MasterError};
use chain::{Life, Retention, StoreOptions, VmRecord, VmShape};
use checkpoint::{Generation, VmId};

use super::child::ChildHandle;
use super::vms::{Entry, Part};
use super::{Daemon, bridge, failover, lock, repair, reprotect, restart};
use crate::child::proto::{FromChild, Role, Start, TapSpec, ToChild};
use crate::child::{open_disks, shape_of};
use crate::config::{Durability, VmConfig};
use crate::control::EventKind;
use crate::fault::{self, Fault};

const WATCH: Duration = Duration::from_secs(5);
/// How long an order to start a VM waits for the master to know this host.
const ENROLLED_WITHIN: Duration = Duration::from_secs(10);

/// Follows the master's decisions until the process ends.
pub(super) fn run(daemon: &Arc<Daemon>) {
    let mut follower = Follower::new(lock(&daemon.identity).cluster());
    let (mut reachable, mut applied) = (true, None);
    loop {
        let before = follower.revision();
        // A host that is not known yet has something to say first, and to look whose master it is.
        let known = lock(&daemon.stranger).is_none();
        let wait = if known { WATCH } else { Duration::ZERO };
        match daemon.master.watch(before, wait) {
            Ok(snapshot) => {
                reachable = true;
                let news = follower.snapshot(&snapshot);
                let ours =
                    follower.cluster() == Some(snapshot.cluster) && snapshot.revision >= before;
                follow(daemon, news);
                if !ours {
                    std::thread::sleep(Duration::from_secs(1));
                } else if enrolled(daemon) && applied != Some(snapshot.revision) {
                    applied = Some(snapshot.revision);
                    for record in &snapshot.records {
                        apply(daemon, record);
                    }
                }
            }
            Err(e) => {
                if std::mem::replace(&mut reachable, false) {
                    tracing::warn!("{e}");
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

fn follow(daemon: &Daemon, news: Vec<Followed>) {
    for news in news {
        let why = match news {
            Followed::Decided(_) => continue,
            Followed::Removed(vm) => {
                forget(daemon, vm);
                continue;
            }
            Followed::Joined(cluster) => match lock(&daemon.identity).join(cluster) {
                Ok(()) => continue,
                Err(e) => e.to_string(),
            },
            Followed::Stale { why } | Followed::Foreign { why } => why,
        };
        tracing::error!("{why}");
        daemon
            .events
            .add(EventKind::Failed, daemon.host.as_str(), why);
    }
}

/// Whether the master knows this host under its identity; asks it to, if it has not.
fn enrolled(daemon: &Daemon) -> bool {
    if lock(&daemon.stranger).is_none() {
        return true;
    }
    let id = lock(&daemon.identity).id();
    let enrolled = daemon.master.enroll(&daemon.host, id, daemon.config.listen);
    let why = enrolled.as_ref().err().map(ToString::to_string);
    let before = std::mem::replace(&mut *lock(&daemon.stranger), why.clone());
    if let Some(why) = why {
        if before.as_ref() != Some(&why) {
            tracing::error!("{why}");
            daemon
                .events
                .add(EventKind::Failed, daemon.host.as_str(), why);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    enrolled.is_ok()
}

/// Brings one VM in line with `record`, unless this host has gone further already.
pub(super) fn apply(daemon: &Arc<Daemon>, record: &VmRecord) {
    let _changing = lock(&daemon.changing);
    apply_locked(daemon, record);
}

/// As [`apply`], by a caller that holds `changing`.
pub(super) fn apply_locked(daemon: &Arc<Daemon>, record: &VmRecord) {
    let view = &record.view;
    let known = lock(&daemon.vms)
        .map
        .get(&view.vm)
        .map(|e| (e.part, e.record.view.generation));
    if known.is_some_and(|(_, generation)| generation >= view.generation) {
        return;
    }
    let mine = view.owner == daemon.host;
    let member = view.holds(&daemon.host);
    match known {
        Some((Part::Owner, _)) if mine => {
            let (child, bridge) = {
                let mut vms = lock(&daemon.vms);
                let Some(entry) = vms.map.get_mut(&view.vm) else {
                    return;
                };
                entry.record = record.clone();
                entry.trouble = None;
                entry.proposing = None;
                entry.frozen = false;
                if !view.in_place() {
                    entry.bridge = None;
                }
                (entry.child.clone(), entry.bridge.clone())
            };
            if let Some(bridge) = bridge {
                return bridge::start(daemon, view, bridge);
            }
            if let Err(e) = child.send(&ToChild::Protect(Box::new(view.clone()))) {
                daemon.events.add(
                    EventKind::Failed,
                    &view.name,
                    format!("the VM's process is gone: {e}"),
                );
            }
        }
        Some((Part::Owner, _)) => {
            drop_entry(daemon, view.vm);
            daemon.events.add(
                EventKind::Superseded,
                &view.name,
                format!(
                    "{} owns it in generation {}: stopped here",
                    view.owner, view.generation
                ),
            );
            if member {
                become_standby(daemon, record);
            }
        }
        Some((Part::Standby, _)) if member => {
            if daemon.replicas.adopt(view.clone()).is_ok()
                && let Some(entry) = lock(&daemon.vms).map.get_mut(&view.vm)
            {
                entry.record = record.clone();
            }
        }
        Some((Part::Standby, _)) if mine => {
            // Granted to this host, but the answer to the takeover that asked for it was lost: ask again, the master
            // answers a repeated question as it did the first time.
            let (daemon, vm) = (daemon.clone(), view.vm);
            std::thread::spawn(move || failover::resume(&daemon, vm));
        }
        Some((Part::Standby, _)) => {
            daemon.replicas.remove(view.vm, view.generation);
            drop_entry(daemon, view.vm);
        }
        None if mine => restart::orphaned(daemon, record),
        None if member => become_standby(daemon, record),
        None => {}
    }
}

/// Asks the master for a change of a VM that this host owns, and follows its decision.
///
/// # Errors
/// The master's. If it is a rejection, somebody else was faster; what has been decided is followed then.
pub(super) fn decide(
    daemon: &Arc<Daemon>,
    vm: VmId,
    expect: Generation,
    command: &Command,
) -> Result<(), MasterError> {
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&vm) {
        // Replicas may hear of it before this host does, and refuse what it sends meanwhile.
        entry.proposing = Some(expect.next());
    }
    match daemon.master.propose(command) {
        Ok(record) => {
            apply(daemon, &record);
            Ok(())
        }
        Err(e) => {
            if matches!(e, MasterError::Rejected(_))
                && let Ok(snapshot) = daemon.master.read()
            {
                let record = snapshot.records.iter().find(|r| r.view.vm == vm);
                record.into_iter().for_each(|r| apply(daemon, r));
            }
            Err(e)
        }
    }
}

pub(super) fn drop_entry(daemon: &Daemon, vm: VmId) {
    let entry = lock(&daemon.vms).map.remove(&vm);
    if let Some(entry) = entry {
        entry.child.kill();
    }
}

/// A VM that the master does not know any more.
fn forget(daemon: &Daemon, vm: VmId) {
    let _changing = lock(&daemon.changing);
    let known = lock(&daemon.vms)
        .map
        .get(&vm)
        .map(|e| e.record.view.generation);
    if let Some(generation) = known {
        daemon.replicas.remove(vm, generation.next());
        drop_entry(daemon, vm);
    }
}

fn taps(daemon: &Daemon, config: &VmConfig, vm: VmId) -> Result<Vec<TapSpec>, String> {
    config
        .net
        .iter()
        .enumerate()
        .map(|(i, card)| {
            if let Some(name) = &card.tap {
                return Ok(TapSpec { name: name.clone(), bridge: None });
            }
            let wanted = card.network.clone().unwrap_or_default();
            let network = daemon.config.networks.get(&wanted).ok_or_else(|| {
                format!("{}: net[{i}]: network {wanted:?} is not in host {}'s configuration: add [networks.{wanted}]", config.name, daemon.host)
            })?;
            Ok(TapSpec { name: format!("{}{:08x}n{i}", network.tap_prefix, vm.short()), bridge: network.bridge.clone() })
        })
        .collect()
}

pub(super) fn start_message(
    daemon: &Daemon,
    config: &VmConfig,
    toml: &str,
    vm: VmId,
    role: Role,
) -> Result<Start, String> {
    Ok(Start {
        config_toml: toml.to_string(),
        config_name: format!("{}.toml", config.name),
        taps: taps(daemon, config, vm)?,
        role,
        heartbeat_ms: daemon.config.detection.heartbeat_ms,
        host: daemon.host.clone(),
    })
}

/// Boots a VM on this host, registered with the master before its first instruction.
pub(super) fn start_vm(daemon: &Arc<Daemon>, toml: &str, name: &str) -> Result<(), String> {
    let config = VmConfig::from_text(Path::new(name), toml).map_err(|e| e.to_string())?;
    let shape: VmShape = {
        let disks = open_disks(&config).map_err(|e| e.to_string())?;
        shape_of(&config, toml, &disks).map_err(|e| e.to_string())?
    };
    taps(daemon, &config, VmId::NIL)?;
    let deadline = Instant::now() + ENROLLED_WITHIN;
    while let Some(why) = lock(&daemon.stranger).clone() {
        if Instant::now() > deadline {
            return Err(why);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _changing = lock(&daemon.changing);
    let register = Command::Register {
        vm: VmId::random(),
        name: config.name.clone(),
        owner: daemon.host.clone(),
        shape,
        life: Life::On,
    };
    let record = daemon
        .master
        .propose(&register)
        .map_err(|e| e.to_string())?;
    let vm = record.view.vm;
    let result = boot(daemon, &config, record.clone(), None);
    if result.is_err() {
        let remove = Command::Remove {
            vm,
            expect: record.view.generation,
            by: daemon.host.clone(),
        };
        if let Err(e) = daemon.master.propose(&remove) {
            tracing::warn!("{}: removing it from the master's record: {e}", config.name);
        }
        drop_entry(daemon, vm);
    }
    result
}

/// Boots a VM that this host owns, from `disks` or from those that its configuration names. By a caller that holds
/// `changing`.
pub(super) fn boot(
    daemon: &Arc<Daemon>,
    config: &VmConfig,
    record: VmRecord,
    disks: Option<Vec<PathBuf>>,
) -> Result<(), String> {
    let vm = record.view.vm;
    let toml = &record.shape.config_toml;
    let cpu = record.shape.cpu.clone();
    let start = start_message(daemon, config, toml, vm, Role::Boot { disks, cpu })?;
    let (sender, ready) = std::sync::mpsc::channel();
    let reporting = daemon.clone();
    let child = ChildHandle::start(&start, &[], move |message| match message {
        Some(FromChild::Ready) => drop(sender.send(Ok(()))),
        Some(FromChild::Fatal(why)) => {
            let _ = sender.send(Err(why.clone()));
            report(&reporting, vm, Some(FromChild::Fatal(why)));
        }
        other => report(&reporting, vm, other),
    })
    .map_err(|e| format!("starting the VM's process: {e}"))?;
    let entry = Entry::new(record, Part::Owner, child);
    lock(&daemon.vms).map.insert(vm, entry);
    match ready.recv_timeout(Duration::from_secs(60)) {
        Ok(Ok(())) => {
            daemon
                .events
                .add(EventKind::Started, &config.name, "runs, not protected yet");
            Ok(())
        }
        Ok(Err(why)) => Err(why),
        Err(_) => Err(format!(
            "{}: its process ended, or did not boot within a minute",
            config.name
        )),
    }
}

fn become_standby(daemon: &Arc<Daemon>, record: &VmRecord) {
    if let Err(why) = try_standby(daemon, record) {
        daemon.events.add(
            EventKind::Failed,
            &record.view.name,
            format!("cannot stand by: {why}"),
        );
        daemon
            .replicas
            .decline(record.view.vm, record.view.generation, why);
    }
}

/// A VM goes on with the processor that it booted with, wherever that is.
fn can_run(shape: &VmShape) -> Result<(), String> {
    let mut here = vmm::host_cpu().map_err(|e| e.to_string())?;
    if fault::is(Fault::Processor) {
        here.words.retain(|word| word.function != 7);
    }
    match shape.cpu.lacking(&here) {
        None => Ok(()),
        Some(what) => Err(format!(
            "{what}; the VM may use it, so this host cannot resume it. Name other backups, or start the VM on the host with the \
             lesser processor: hosts with a better one of the same make can back it up"
        )),
    }
}

fn try_standby(daemon: &Arc<Daemon>, record: &VmRecord) -> Result<(), String> {
    let (view, shape) = (&record.view, &record.shape);
    let config = VmConfig::from_text(Path::new(&view.name), &shape.config_toml)
        .map_err(|e| e.to_string())?;
    can_run(shape)?;
    let ram = open_replica(daemon, record, store_options(&config))?;
    let role = Role::Standby {
        disk_sizes: shape.disks.clone(),
    };
    let start = start_message(daemon, &config, &shape.config_toml, view.vm, role)?;
    let fds: Vec<_> = ram.iter().map(AsRawFd::as_raw_fd).collect();
    let (vm, reporting) = (view.vm, daemon.clone());
    let child = ChildHandle::start(&start, &fds, move |message| report(&reporting, vm, message))
        .map_err(|e| format!("starting the standby's process: {e}"))?;
    let entry = Entry::new(record.clone(), Part::Standby, child);
    lock(&daemon.vms).map.insert(vm, entry);
    Ok(())
}

/// How replicas of that VM keep it.
pub(super) fn store_options(config: &VmConfig) -> StoreOptions {
    let durability = match config.protect.durability {
        Durability::Memory => diskbuf::Durability::Memory,
        Durability::Disk => diskbuf::Durability::Disk,
    };
    let retention = Retention {
        checkpoints: usize::try_from(config.protect.retain).unwrap_or(usize::MAX),
        bytes: config.protect.retain_mib << 20,
    };
    StoreOptions {
        durability,
        retention,
    }
}

/// The replica of a VM that this host has not had since its agent was started. A member may have had one before that: if it
/// is whole, and still part of the VM's history, the VM can be resumed from it.
fn open_replica(
    daemon: &Daemon,
    record: &VmRecord,
    options: StoreOptions,
) -> Result<Vec<OwnedFd>, String> {
    let (view, shape) = (&record.view, &record.shape);
    let name = &view.name;
    if view.position(&daemon.host).is_some() {
        let reopened = daemon.replicas.reopen(view.clone(), shape.clone(), options);
        match reopened {
            Ok((ram, held)) => {
                if let Some(mark) = held {
                    let text = format!("this host's replica is back, with checkpoint {mark}");
                    daemon.events.add(EventKind::Returned, name, text);
                }
                return Ok(ram);
            }
            Err(e) => {
                let text = format!("what was left of this host's replica is of no use: {e}");
                daemon.events.add(EventKind::Failed, name, text);
            }
        }
    }
    daemon
        .replicas
        .create(view.clone(), shape.clone(), options)
        .map_err(|e| e.to_string())
}

/// A report of a VM's process.
fn report(daemon: &Arc<Daemon>, vm: VmId, message: Option<FromChild>) {
    let name = daemon.name_of(vm);
    let mut vms = lock(&daemon.vms);
    let Some(entry) = vms.map.get_mut(&vm) else {
        return;
    };
    match message {
        Some(FromChild::Ready) => {
            daemon.events.add(
                EventKind::StandbyReady,
                &name,
                "the standby is instantiated and waits",
            );
        }
        Some(message @ FromChild::Activated { .. }) => {
            if let Some(waiting) = entry.waiting.activated.take() {
                let _ = waiting.send(message);
            }
        }
        Some(FromChild::Protected {
            generation,
            epoch,
            sync_ms,
            sync,
        }) => {
            entry.protected = Some(generation);
            entry.trouble = None;
            let had = sync.filter(|sync| sync.disk_equal > 0).map(|sync| {
                let (had, total) = (sync.disk_equal >> 20, sync.disk_total >> 20);
                format!("; of the disks' {total} MiB, {had} MiB were there already")
            });
            let text = format!(
                "protected from checkpoint {epoch} on (generation {generation}, synchronised in {sync_ms} ms{})",
                had.unwrap_or_default()
            );
            daemon.events.add(EventKind::Protected, &name, text);
        }
        Some(FromChild::Figures(figures)) => {
            entry.figures = Some((figures, Instant::now()));
        }
        Some(FromChild::Stats(stats)) => {
            for waiting in entry.waiting.stats.drain(..) {
                let _ = waiting.send((*stats).clone());
            }
        }
        Some(FromChild::HandedOver { epoch }) => {
            if let Some(waiting) = entry.waiting.handed_over.take() {
                let _ = waiting.send(epoch);
            }
        }
        Some(FromChild::Inspected(reports)) => {
            for waiting in entry.waiting.inspected.drain(..) {
                let _ = waiting.send(reports.clone());
            }
        }
        Some(FromChild::Refused { generation }) => {
            let own = entry
                .record
                .view
                .generation
                .max(entry.proposing.unwrap_or_default());
            if generation <= own {
                // This owner's own next configuration; if it turns out to be another's, the master's record says so.
                return;
            }
            if let Err(e) = entry.child.send(&ToChild::Fence) {
                tracing::warn!("{name}: the VM's process is gone: {e}");
            }
            let text = format!(
                "a replica follows generation {generation}: the VM has stopped and dropped its held output"
            );
            daemon.events.add(EventKind::Superseded, &name, text);
        }
        Some(FromChild::ChainLost {
            generation,
            host,
            why,
            unfit,
        }) => {
            let daemon = daemon.clone();
            drop(vms);
            let trouble = repair::Trouble {
                generation,
                named: host,
                why,
                unfit,
            };
            // It asks hosts and the master; the VM process's further reports must not wait for that.
            std::thread::spawn(move || repair::chain_lost(&daemon, vm, &trouble));
        }
        Some(FromChild::JoinerReady { generation }) => {
            let daemon = daemon.clone();
            drop(vms);
            std::thread::spawn(move || reprotect::joiner_ready(&daemon, vm, generation));
        }
        Some(FromChild::GuestEnded { how, .. }) => {
            entry.ended = true;
            daemon.events.add(EventKind::GuestEnded, &name, how);
        }
        Some(FromChild::Said { kind, text }) => daemon.events.add(kind, &name, text),
        Some(FromChild::GiveUp { why } | FromChild::Fatal(why)) => {
            entry.trouble = Some(why.clone());
            daemon.events.add(EventKind::Failed, &name, why);
        }
        None => {
            daemon
                .events
                .add(EventKind::Failed, &name, "the VM's process has ended");
            entry.child.kill();
            entry.ended = true;
            if entry.part == Part::Owner {
                entry.trouble = Some("its process has ended".into());
                return;
            }
            // A replica whose standby is gone could not resume the VM: better that the owner knows it is lost.
            let generation = entry.record.view.generation;
            vms.map.remove(&vm);
            drop(vms);
            daemon.replicas.remove(vm, generation);
        }
    }
}
