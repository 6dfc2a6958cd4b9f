//! What this host knows of its VMs, for `understudy status`.

use std::time::Duration;

use chain::ReplicaStatus;
use chain::replica::State;

use super::vms::{Entry, Part};
use super::{Daemon, lock};
use crate::control::{MemberStatus, VmStatus};
use crate::epoch::figures::Figures;

/// Figures older than this say nothing about now.
const FRESH: Duration = Duration::from_secs(5);

/// All of them.
pub(super) fn status(daemon: &Daemon) -> Vec<VmStatus> {
    let vms = lock(&daemon.vms);
    let orphans = vms
        .orphans
        .iter()
        .filter(|(vm, _)| !vms.map.contains_key(vm));
    let orphans = orphans.map(|(_, orphan)| orphan.status(&daemon.host));
    vms.map
        .values()
        .map(|entry| {
            let replica = daemon.replicas.status(entry.record.view.vm);
            of(daemon, entry, replica)
        })
        .chain(orphans)
        .chain(
            vms.clones
                .iter()
                .map(|(name, clone)| clone.status(name, &daemon.host)),
        )
        .collect()
}

fn of(daemon: &Daemon, entry: &Entry, replica: Option<ReplicaStatus>) -> VmStatus {
    let view = &entry.record.view;
    let figures = entry.figures.filter(|(_, at)| at.elapsed() < FRESH);
    let figures = figures.map(|(figures, _)| figures).unwrap_or_default();
    let (role, protected, state, epoch) = match entry.part {
        Part::Owner => {
            let protected = is_protected(entry);
            let state = owner_state(entry, protected, &figures);
            let safe = protected && entry.trouble.is_none();
            ("owner", safe, state, figures.committed_epoch)
        }
        Part::Standby => {
            let stands_by = replica.as_ref().is_some_and(|r| r.state.could_resume());
            let epoch = replica.as_ref().and_then(|r| r.epoch);
            let state = replica_state(replica.as_ref());
            ("replica", stands_by, state, epoch.map_or(0, |e| e.0))
        }
    };
    VmStatus {
        name: view.name.clone(),
        host: daemon.host.to_string(),
        role: role.into(),
        protected,
        owner: view.owner.to_string(),
        chain: members(daemon, entry, &state, protected),
        state,
        joining: view.joining.as_ref().map(|m| m.host.to_string()),
        generation: view.generation.0,
        epoch,
        pid: entry.child.pid(),
        lag_ms: figures.lag_ms,
        since_commit_ms: figures.since_commit_ms,
        held_p99_us: figures.held_p99_us,
        sync: figures.sync,
        failover: entry.failover.clone(),
    }
}

fn is_protected(entry: &Entry) -> bool {
    let view = &entry.record.view;
    entry.protected == Some(view.generation) && !view.chain.is_empty()
}

fn owner_state(entry: &Entry, protected: bool, figures: &Figures) -> String {
    let view = &entry.record.view;
    match (&entry.trouble, protected) {
        (Some(trouble), _) => format!("Not protected: {trouble}"),
        (None, true) => match &view.joining {
            Some(joining) => format!("Protected; {} is joining", joining.host),
            None => "Protected".into(),
        },
        (None, false) if view.chain.is_empty() => "Not protected: no backups".into(),
        (None, false) if view.in_place() => {
            "Output held: the backups are being brought up to date".into()
        }
        (None, false) => match &figures.sync {
            Some(sync) => format!("Not protected: {}", sync.text()),
            None => "Not protected: the first checkpoint is on its way".into(),
        },
    }
}

fn replica_state(replica: Option<&ReplicaStatus>) -> String {
    match replica.map(|r| (r.state, r.failed.clone())) {
        Some((_, Some(why))) => format!("Replica failed: {why}"),
        Some((State::Serving | State::LastSurvivor, _)) => match replica.and_then(|r| r.filling) {
            Some(filled) => format!(
                "Standing by; fills a joining replica: {} pages and {} disk blocks sent, {} it had, {} MiB left",
                filled.pages_sent,
                filled.blocks_sent,
                filled.blocks_equal,
                filled.left >> 20
            ),
            None => "Standing by".into(),
        },
        Some((State::Joining, _)) => "Joining".into(),
        Some((State::Frozen, _)) => "Frozen for a takeover".into(),
        Some((State::Offline, _)) | None => "No replica".into(),
        Some((State::Syncing | State::Failed, _)) => "Synchronising".into(),
    }
}

/// The chain, head first. This host knows its own replica's state; an owner knows of the others that they serve, if it is
/// protected, since every commit came through all of them.
fn members(daemon: &Daemon, entry: &Entry, own: &str, protected: bool) -> Vec<MemberStatus> {
    let others = match (entry.part, protected) {
        (Part::Owner, true) => "Serving",
        (Part::Owner, false) => "Synchronising",
        (Part::Standby, _) => "",
    };
    let chain = entry.record.view.chain.iter();
    chain
        .map(|member| MemberStatus {
            host: member.host.to_string(),
            addr: member.addr.to_string(),
            state: match member.host == daemon.host {
                true => own.into(),
                false => others.into(),
            },
        })
        .collect()
}
