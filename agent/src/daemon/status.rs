//! What this host knows of its VMs, for `understudy status`.

use std::time::Duration;

use chain::ReplicaStatus;
use chain::replica::State;
use checkpoint::HostId;

use super::env::{Env, lock};
use super::run::Shown;
use super::table::Table;
use crate::control::{Health, MemberStatus, ReplicaHealth, Role, VmStatus, Warning};
use crate::epoch::figures::Figures;
use crate::host::{self, Summary};

/// Figures older than this say nothing about now.
const FRESH: Duration = Duration::from_secs(5);

/// All of them, clones left out.
pub(super) fn status(env: &Env, table: &Table) -> Vec<VmStatus> {
    let all = table.all();
    all.iter().filter_map(|shown| of(env, shown)).collect()
}

fn of(env: &Env, shown: &Shown) -> Option<VmStatus> {
    let summary = lock(&shown.summary).clone();
    let told = lock(&shown.told).clone();
    let told = told.filter(|told| told.at.elapsed() < FRESH);
    let (figures, disks) = told.map_or_else(Default::default, |t| (t.figures, t.disks));
    let pid = lock(&shown.child).as_ref().map_or(0, |child| child.pid());
    let view = &summary.record.view;
    let base = VmStatus {
        name: view.name.clone(),
        host: env.host.to_string(),
        owner: view.owner.to_string(),
        generation: view.generation.0,
        joining: view.joining.as_ref().map(|m| m.host.to_string()),
        warnings: warnings(env, &summary, disks),
        pid,
        ..VmStatus::default()
    };
    let why = summary.trouble.clone().unwrap_or_default();
    Some(match summary.role {
        host::Role::Nothing => return None,
        host::Role::Declined => VmStatus {
            health: Health::Declined { why },
            ..base
        },
        host::Role::Off => VmStatus {
            role: Role::Off,
            health: Health::Off,
            ..base
        },
        host::Role::Orphan => VmStatus {
            role: Role::Owner,
            health: Health::NotRunning { why },
            ..base
        },
        host::Role::Owner => of_owner(base, summary, &figures),
        host::Role::Standby => of_replica(env, base, &summary),
    })
}

fn of_owner(base: VmStatus, summary: Summary, figures: &Figures) -> VmStatus {
    // Every commit came through all of them.
    let others = match summary.protected {
        true => ReplicaHealth::StandingBy,
        false => ReplicaHealth::Synchronising,
    };
    VmStatus {
        role: Role::Owner,
        protected: summary.protected && summary.trouble.is_none(),
        pending: summary.pending,
        chain: members(&summary, |_| Some(others.clone())),
        health: health(&summary, figures),
        epoch: figures.committed_epoch,
        lag_ms: figures.lag_ms,
        since_commit_ms: figures.since_commit_ms,
        held_p99_us: figures.held_p99_us,
        sync: figures.sync,
        lacking: summary.lacking,
        failover: summary.failover,
        ..base
    }
}

fn of_replica(env: &Env, base: VmStatus, summary: &Summary) -> VmStatus {
    let replica = env.replicas.status(summary.record.view.vm);
    let health = replica_health(replica.as_ref());
    VmStatus {
        role: Role::Replica,
        protected: replica.as_ref().is_some_and(|r| r.state.could_resume()),
        epoch: replica.as_ref().and_then(|r| r.epoch).map_or(0, |e| e.0),
        // This host knows of its own replica only.
        chain: members(summary, |host| (*host == env.host).then(|| health.clone())),
        health: Health::Replica(health),
        ..base
    }
}

/// An owner's.
fn health(summary: &Summary, figures: &Figures) -> Health {
    let view = &summary.record.view;
    if let Some(how) = summary.ended.clone() {
        return Health::Ended { how };
    }
    match (&summary.trouble, summary.protected) {
        (Some(why), _) => Health::Troubled { why: why.clone() },
        (None, true) if view.joining.is_some() => Health::Joining,
        (None, true) if summary.lacking.is_empty() => match figures.throttled {
            Some(throttled) => Health::Slow(throttled),
            None => Health::Protected,
        },
        (None, true) => Health::Degraded {
            backups: view.chain.len(),
            wanted: view.chain.len() + summary.lacking.len(),
        },
        (None, false) if view.chain.is_empty() => match summary.lacking.is_empty() {
            true => Health::Unprotected,
            false => Health::Alone,
        },
        (None, false) if view.in_place() => Health::OutputHeld,
        (None, false) => Health::Synchronising,
    }
}

fn replica_health(replica: Option<&ReplicaStatus>) -> ReplicaHealth {
    let Some(replica) = replica else {
        return ReplicaHealth::Absent;
    };
    if let Some(why) = replica.failed.clone() {
        return ReplicaHealth::Failed { why };
    }
    match replica.state {
        State::Serving | State::LastSurvivor => match replica.filling {
            Some(filled) => ReplicaHealth::Filling {
                pages_sent: filled.pages_sent,
                blocks_sent: filled.blocks_sent,
                blocks_equal: filled.blocks_equal,
                left_bytes: filled.left,
            },
            None => ReplicaHealth::StandingBy,
        },
        State::Joining => ReplicaHealth::Joining,
        State::Frozen => ReplicaHealth::Frozen,
        State::Offline => ReplicaHealth::Absent,
        State::Syncing | State::Failed => ReplicaHealth::Synchronising,
    }
}

/// The chain, head first.
fn members(
    summary: &Summary,
    replica: impl Fn(&HostId) -> Option<ReplicaHealth>,
) -> Vec<MemberStatus> {
    let chain = summary.record.view.chain.iter();
    chain
        .map(|member| MemberStatus {
            host: member.host.to_string(),
            addr: member.addr.to_string(),
            replica: replica(&member.host),
        })
        .collect()
}

/// FIELD H14: whoever hosts the only master must not be one whose death is to be survived. H4: a disk that fails is no secret.
fn warnings(env: &Env, summary: &Summary, disks: Vec<String>) -> Vec<Warning> {
    let view = &summary.record.view;
    let master = env.config.single_master();
    let matters = |host: &HostId| {
        let has_part = view.owner == *host || view.position(host).is_some();
        has_part && !view.chain.is_empty()
    };
    let in_chain = master.filter(matters);
    let warning = in_chain.map(|host| Warning::MasterInChain {
        host: host.to_string(),
    });
    let disks = disks.into_iter().map(|why| Warning::Disk { why });
    warning.into_iter().chain(disks).collect()
}
