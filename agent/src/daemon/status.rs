//! What this host knows of its VMs, for `understudy status`.

use std::time::Duration;

use chain::ReplicaStatus;
use chain::replica::State;

use super::env::{Env, lock};
use super::run::Shown;
use super::table::Table;
use crate::control::{MemberStatus, VmStatus};
use crate::epoch::figures::Figures;
use crate::host::{Role, Summary};

/// Figures older than this say nothing about now.
const FRESH: Duration = Duration::from_secs(5);

/// All of them, clones left out.
pub(super) fn status(env: &Env, table: &Table) -> Vec<VmStatus> {
    let all = table.all();
    all.iter().filter_map(|shown| of(env, shown)).collect()
}

fn of(env: &Env, shown: &Shown) -> Option<VmStatus> {
    let summary = lock(&shown.summary).clone();
    let figures = lock(&shown.figures).filter(|(_, at)| at.elapsed() < FRESH);
    let figures = figures.map(|(figures, _)| figures).unwrap_or_default();
    let pid = lock(&shown.child).as_ref().map_or(0, |child| child.pid());
    let view = &summary.record.view;
    let base = VmStatus {
        name: view.name.clone(),
        host: env.host.to_string(),
        owner: view.owner.to_string(),
        generation: view.generation.0,
        joining: view.joining.as_ref().map(|m| m.host.to_string()),
        pid,
        ..VmStatus::default()
    };
    Some(match summary.role {
        Role::Nothing => return None,
        Role::Declined => VmStatus {
            role: "none".into(),
            state: format!("Cannot stand by: {}", summary.trouble.unwrap_or_default()),
            ..base
        },
        Role::Off => VmStatus {
            role: "off".into(),
            state: "Off; its newest disks are here".into(),
            ..base
        },
        Role::Orphan => VmStatus {
            role: "owner".into(),
            state: format!("Not running: {}", summary.trouble.unwrap_or_default()),
            ..base
        },
        Role::Owner => {
            let state = owner_state(&summary, &figures);
            let others = match summary.protected {
                true => "Serving",
                false => "Synchronising",
            };
            VmStatus {
                role: "owner".into(),
                protected: summary.protected && summary.trouble.is_none(),
                pending: summary.pending,
                lacking: summary.lacking.clone(),
                chain: members(&summary, |_| others.into()),
                state,
                epoch: figures.committed_epoch,
                lag_ms: figures.lag_ms,
                since_commit_ms: figures.since_commit_ms,
                held_p99_us: figures.held_p99_us,
                sync: figures.sync,
                failover: summary.failover,
                ..base
            }
        }
        Role::Standby => {
            let replica = env.replicas.status(view.vm);
            let state = replica_state(replica.as_ref());
            let own = env.host.to_string();
            VmStatus {
                role: "replica".into(),
                protected: replica.as_ref().is_some_and(|r| r.state.could_resume()),
                epoch: replica.as_ref().and_then(|r| r.epoch).map_or(0, |e| e.0),
                chain: members(&summary, |host| match host == own {
                    true => state.clone(),
                    false => String::new(),
                }),
                state,
                ..base
            }
        }
    })
}

fn owner_state(summary: &Summary, figures: &Figures) -> String {
    let view = &summary.record.view;
    if let Some(how) = &summary.ended {
        return format!("Not running: {how}");
    }
    match (&summary.trouble, summary.protected) {
        (Some(trouble), _) => format!("Not protected: {trouble}"),
        (None, true) => match &view.joining {
            Some(joining) => format!("Protected; {} is joining", joining.host),
            None if summary.lacking.is_empty() => match &figures.throttled {
                Some(throttled) => format!("Protected, {}", throttled.text()),
                None => "Protected".into(),
            },
            None => format!(
                "Degraded: protected by {} of {} backups; {}",
                view.chain.len(),
                view.chain.len() + summary.lacking.len(),
                lacking(summary)
            ),
        },
        (None, false) if view.chain.is_empty() && summary.lacking.is_empty() => {
            "Not protected: no backups".into()
        }
        (None, false) if view.chain.is_empty() => {
            format!("Not protected: {}", lacking(summary))
        }
        (None, false) if view.in_place() => {
            "Output held: the backups are being brought up to date".into()
        }
        (None, false) => match &figures.sync {
            Some(sync) => format!("Not protected: {}", sync.text()),
            None => "Not protected: the first checkpoint is on its way".into(),
        },
    }
}

/// Who is missing, and why.
fn lacking(summary: &Summary) -> String {
    let each = summary.lacking.iter().map(|(host, why)| match why {
        Some(why) => format!("{host} is missing: {why}"),
        None => format!("{host} is being asked"),
    });
    each.collect::<Vec<_>>().join("; ")
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
fn members(summary: &Summary, state: impl Fn(&str) -> String) -> Vec<MemberStatus> {
    let chain = summary.record.view.chain.iter();
    chain
        .map(|member| MemberStatus {
            host: member.host.to_string(),
            addr: member.addr.to_string(),
            state: state(member.host.as_str()),
        })
        .collect()
}
