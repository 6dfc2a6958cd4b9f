//! The road from replica to owner: suspicion, the master's decision, activation.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use chain::ServerEvent;
use chain::master::{Command, MasterError};
use checkpoint::VmId;

use super::vms::Part;
use super::{Daemon, lock};
use crate::child::monotonic_us;
use crate::child::proto::{Activate, FromChild, ToChild};
use crate::control::{EventKind, FailoverReport};

/// How long an activated VM may take to run.
const PATIENCE: Duration = Duration::from_secs(20);

/// Acts on what the chain server reports, until it ends.
pub(super) fn run(daemon: &Arc<Daemon>, events: &Receiver<ServerEvent>) {
    while let Ok(event) = events.recv() {
        match event {
            ServerEvent::Suspect { vm, silence_ms } => {
                let name = daemon.name_of(vm);
                daemon.events.add(
                    EventKind::Suspected,
                    &name,
                    format!("silence on the checkpoint stream for {silence_ms} ms"),
                );
                let cause = format!("silence for {silence_ms} ms");
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
    daemon.replicas.freeze(vm).map_err(|e| e.to_string())?;
    let command = Command::TakeOver {
        vm,
        expect: view.generation,
        by: daemon.host.clone(),
    };
    let record = match daemon.master.propose(&command) {
        Ok(record) => record,
        Err(e) => {
            if !matches!(e, MasterError::Rejected(_)) {
                // Nothing is known of the decision: stay frozen would lose the replica, going on is safe, because a
                // replica that was granted ownership without knowing it is told so by its next watch.
                tracing::warn!("{}: {e}", view.name);
            }
            let _ = daemon.replicas.unfreeze(vm);
            return Err(format!("not taken over: {e}"));
        }
    };
    let decided_us = monotonic_us();
    daemon.events.add(
        EventKind::Decided,
        &view.name,
        format!(
            "the master has given it to this host in generation {}",
            record.view.generation
        ),
    );
    let handover = daemon
        .replicas
        .hand_over(&record.view)
        .map_err(|e| e.to_string())?;
    let (sender, activated) = channel();
    {
        let mut vms = lock(&daemon.vms);
        let entry = vms.map.get_mut(&vm).ok_or("its standby is gone")?;
        entry.record = record.clone();
        entry.part = Part::Owner;
        entry.waiting.activated = Some(sender);
    }
    let handed_us = monotonic_us();
    let epoch = handover.epoch;
    let activate = Activate {
        view: record.view.clone(),
        epoch,
        machine: handover.machine,
        disks: handover.disks,
    };
    child
        .send(&ToChild::Activate(Box::new(activate)))
        .map_err(|e| format!("the standby's process is gone: {e}"))?;
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
        epoch: epoch.0,
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
            "runs here from checkpoint {epoch} on, {:.1} ms after the suspicion",
            (running_us - suspected_us) as f64 / 1000.0
        ),
    );
    Ok(())
}
