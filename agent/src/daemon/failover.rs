//! The road from replica to owner: suspicion, the master's decision, activation.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use chain::master::{Command, MasterError};
use chain::{Mark, ServerEvent, View, VmRecord};
use checkpoint::{HostId, VmId};

use super::bridge::{self, Bridge};
use super::vms::Part;
use super::{Daemon, lock};
use crate::child::monotonic_us;
use crate::child::proto::{Activate, FromChild, ToChild};
use crate::config::VmConfig;
use crate::control::{EventKind, FailoverReport};

/// How long an activated VM may take to run.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often, and after which pauses, a master that does not answer is asked again.
const ATTEMPTS: u32 = 20;
const RETRY: Duration = Duration::from_millis(100);

/// Acts on what the chain server reports, until it ends.
pub(super) fn run(daemon: &Arc<Daemon>, events: &Receiver<ServerEvent>) {
    while let Ok(event) = events.recv() {
        match event {
            ServerEvent::Suspect { vm, silence_ms } => {
                let name = daemon.name_of(vm);
                let text = match silence_ms {
                    0 => "the owner does not run the VM any more and hands it over".to_string(),
                    ms => format!("silence on the checkpoint stream for {ms} ms"),
                };
                daemon.events.add(EventKind::Suspected, &name, text);
                let cause = match silence_ms {
                    0 => "handed over by its owner".to_string(),
                    ms => format!("silence for {ms} ms"),
                };
                if let Err(why) = take_over(daemon, vm, &cause, silence_ms) {
                    daemon.events.add(EventKind::Refused, &name, why);
                }
            }
            ServerEvent::Failed { vm, why } => {
                daemon.events.add(
                    EventKind::Failed,
                    &daemon.name_of(vm),
                    format!("replica failed: {why}"),
                );
            }
        }
    }
}

/// An administrator wants the VM here.
pub(super) fn by_order(daemon: &Arc<Daemon>, name: &str) -> Result<(), String> {
    let vm = {
        let mut vms = lock(&daemon.vms);
        let entry = vms.by_name(name).ok_or_else(|| {
            format!("this host holds no replica of {name:?} (`understudy status` lists them)")
        })?;
        if entry.part == Part::Owner {
            return Err(format!(
                "{name} runs on this host already; give the order to the backup that is to take over"
            ));
        }
        entry.record.view.vm
    };
    take_over(daemon, vm, "an administrator's order", 0)
}

/// The master's record says that this host owns the VM, but it holds a standby: the answer was lost.
pub(super) fn resume(daemon: &Arc<Daemon>, vm: VmId) {
    if let Err(why) = take_over(daemon, vm, "a takeover whose answer was lost", 0) {
        daemon
            .events
            .add(EventKind::Refused, &daemon.name_of(vm), why);
    }
}

fn take_over(daemon: &Arc<Daemon>, vm: VmId, cause: &str, silence_ms: u64) -> Result<(), String> {
    let _changing = lock(&daemon.changing);
    let suspected_us = monotonic_us();
    let (view, child) = {
        let vms = lock(&daemon.vms);
        let entry = vms
            .map
            .get(&vm)
            .filter(|e| e.part == Part::Standby)
            .ok_or("no replica of it is here")?;
        (entry.record.view.clone(), entry.child.clone())
    };
    // Frozen before asking: whatever the tail acks from now on was forwarded by this replica before (I2, I5).
    let held = daemon.replicas.freeze(vm).map_err(|e| e.to_string())?;
    let record = ask(daemon, &view, held)?;
    let decided_us = monotonic_us();
    daemon.events.add(
        EventKind::Decided,
        &view.name,
        format!(
            "the master has given it to this host in generation {}",
            record.view.generation
        ),
    );
    let mut handover = daemon
        .replicas
        .hand_over(&record.view)
        .map_err(|e| e.to_string())?;
    let mark = handover.mark;
    let bridge = record.view.in_place().then(|| Bridge {
        mark,
        kept: Arc::new(std::mem::take(&mut handover.kept)),
    });
    let (sender, activated) = channel();
    {
        let mut vms = lock(&daemon.vms);
        let entry = vms.map.get_mut(&vm).ok_or("its standby is gone")?;
        entry.wanted = wanted(daemon, &record);
        entry.record = record.clone();
        entry.part = Part::Owner;
        entry.bridge = bridge.clone();
        entry.waiting.activated = Some(sender);
    }
    let handed_us = monotonic_us();
    let activate = Activate {
        view: record.view.clone(),
        mark,
        machine: handover.machine,
        disks: handover.disks,
    };
    child
        .send(&ToChild::Activate(Box::new(activate)))
        .map_err(|e| format!("the standby's process is gone: {e}"))?;
    if let Some(bridge) = bridge {
        bridge::start(daemon, &record.view, bridge);
    }
    let FromChild::Activated {
        restored_us,
        running_us,
        ..
    } = activated
        .recv_timeout(PATIENCE)
        .map_err(|_| "the standby's process ended, or did not resume the VM in time".to_string())?
    else {
        return Err("the standby's process answered unexpectedly".into());
    };
    let report = FailoverReport {
        vm: view.name.clone(),
        cause: cause.into(),
        generation: record.view.generation.0,
        epoch: mark.epoch.0,
        silence_ms,
        suspected_us,
        decided_us,
        handed_us,
        restored_us,
        running_us,
    };
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&vm) {
        entry.failover = Some(report);
    }
    daemon.events.add(
        EventKind::Activated,
        &view.name,
        format!(
            "runs here from checkpoint {} on, {:.1} ms after the suspicion",
            mark.epoch,
            (running_us - suspected_us) as f64 / 1000.0
        ),
    );
    Ok(())
}

/// Asks the master for the VM, resuming from `held`. As long as nothing is known of its decision the replica stays frozen:
/// what it took meanwhile would be no part of the history that the master may have noted.
fn ask(daemon: &Daemon, view: &View, held: Mark) -> Result<VmRecord, String> {
    let command = Command::TakeOver {
        vm: view.vm,
        expect: view.generation,
        by: daemon.host.clone(),
        at: held,
    };
    let mut attempts = 0;
    let record = loop {
        match daemon.master.propose(&command) {
            Ok(record) => break record,
            Err(e) if matches!(e, MasterError::Rejected(_)) || attempts == ATTEMPTS => {
                // If it was granted after all, the master's next record says so, and what this replica has then still
                // includes everything acknowledged.
                let _ = daemon.replicas.unfreeze(view.vm);
                return Err(format!("not taken over: {e}"));
            }
            Err(e) => {
                attempts += 1;
                tracing::warn!("{}: {e}", view.name);
                std::thread::sleep(RETRY);
            }
        }
    };
    if record.view.chain.is_empty() || record.view.history.contains(held) {
        return Ok(record);
    }
    // Granted earlier, from an earlier checkpoint, without this host's knowing: the others may hold what does not count
    // any more, so they are filled anew.
    let command = Command::Reconfigure {
        vm: view.vm,
        expect: record.view.generation,
        by: daemon.host.clone(),
        chain: record.view.chain.clone(),
        joining: None,
        anew: true,
    };
    daemon
        .master
        .propose(&command)
        .map_err(|e| format!("not taken over: {e}"))
}

/// The hosts that should back the VM up from now on: those of its configuration, and all that have had a part.
pub(super) fn wanted(daemon: &Daemon, record: &VmRecord) -> Vec<HostId> {
    let configured = VmConfig::from_text(Path::new(&record.view.name), &record.shape.config_toml)
        .map(|config| config.protect.backups)
        .unwrap_or_default();
    let configured = configured.iter().filter_map(|name| HostId::new(name).ok());
    let mut wanted = Vec::new();
    for host in configured.chain(record.wanted_by(&daemon.host)) {
        if host != daemon.host && !wanted.contains(&host) {
            wanted.push(host);
        }
    }
    wanted
}
