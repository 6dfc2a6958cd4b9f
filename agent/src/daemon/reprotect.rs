//! Back to as many backups as wanted: hosts that return, or are spare, join the chain at its tail while it goes on; a VM
//! without any backup left is synchronised anew as soon as one answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::{Member, View};
use checkpoint::{Generation, HostId, VmId};

use super::vms::{Entry, Part};
use super::{Daemon, lock, repair};
use crate::control::EventKind;

const PERIOD: Duration = Duration::from_millis(250);
/// After a failure a host is left alone for this long at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// When to try hosts again that were lost.
#[derive(Debug, Default)]
pub(super) struct Retries(BTreeMap<HostId, (Instant, Duration)>);

impl Retries {
    /// It was lost, or could not join.
    pub fn failed(&mut self, host: &HostId) {
        let now = Instant::now();
        let entry = self.0.entry(host.clone()).or_insert((now, RETRY.0));
        entry.0 = now + entry.1;
        entry.1 = RETRY.1.min(entry.1 * 2);
    }

    fn joined(&mut self, host: &HostId) {
        self.0.remove(host);
    }

    fn due(&self, host: &HostId) -> bool {
        self.0.get(host).is_none_or(|(at, _)| Instant::now() >= *at)
    }
}

/// Looks after all VMs of this host until the process ends.
pub(super) fn run(daemon: &Arc<Daemon>) {
    loop {
        std::thread::sleep(PERIOD);
        let wanting: Vec<(View, bool, Vec<Member>)> = {
            let vms = lock(&daemon.vms);
            vms.map
                .values()
                .filter_map(|entry| {
                    let view = entry.record.view.clone();
                    Some((view, entry.frozen, missing(daemon, entry)?))
                })
                .collect()
        };
        for (view, frozen, missing) in wanting {
            let up: Vec<Member> = missing.into_iter().filter(repair::answers).collect();
            if up.is_empty() {
                continue;
            }
            if view.chain.is_empty() || frozen {
                repair::reconfigure(daemon, &view, up, None, true);
            } else {
                let joining = up.into_iter().next();
                repair::reconfigure(daemon, &view, view.chain.clone(), joining, false);
            }
        }
    }
}

/// The backups that a VM of this host should have and has not, if now is the time for one.
fn missing(daemon: &Daemon, entry: &Entry) -> Option<Vec<Member>> {
    let view = &entry.record.view;
    let settled = view.chain.is_empty() || entry.frozen || entry.protected == Some(view.generation);
    if entry.part != Part::Owner || view.joining.is_some() || !settled || entry.ended {
        return None;
    }
    let missing: Vec<Member> = entry
        .wanted
        .iter()
        .filter(|host| {
            let there = view.position(host).is_some() && !entry.frozen;
            **host != daemon.host && !there && entry.retries.due(host)
        })
        .filter_map(|host| {
            let addr = daemon.config.peers.get(host.as_str())?;
            Some(Member::new(host.clone(), *addr))
        })
        .collect();
    (!missing.is_empty()).then_some(missing)
}

/// The replica that was joining has everything: it becomes the tail.
pub(super) fn joiner_ready(daemon: &Arc<Daemon>, vm: VmId, generation: Generation) {
    let Some((view, _)) = repair::owned_view(daemon, vm, generation) else {
        return;
    };
    let Some(joining) = view.joining.clone() else {
        return;
    };
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&vm) {
        entry.retries.joined(&joining.host);
    }
    daemon.events.add(
        EventKind::Joined,
        &view.name,
        format!("{} has everything and becomes the tail", joining.host),
    );
    let mut chain = view.chain.clone();
    chain.push(joining);
    repair::reconfigure(daemon, &view, chain, None, false);
}
