//! What comes from outside: the master's decisions and what the chain server notices, each put into the VM's mailbox.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use chain::master::{Followed, Follower, Snapshot};
use chain::{ServerEvent, VmRecord};

use super::env::{Env, lock};
use super::run::of_server;
use super::table::Table;
use crate::control::EventKind;
use crate::host::{Fate, Input};

/// How long the master may let a question for news wait.
const PERIOD: Duration = Duration::from_secs(5);
/// Between looks at a master that is another cluster's, older than it was, or does not take this host.
const STRANGE: Duration = Duration::from_secs(1);
/// Between looks for files that are not needed any more, at least.
const SWEEP: Duration = Duration::from_secs(3600);
/// Between attempts to reach it.
const RETRY: Duration = Duration::from_millis(200);

/// Follows the master's decisions until the process ends.
pub(super) fn decisions(env: &Env, table: &Arc<Table>) {
    let mut follower = Follower::new(lock(&env.identity).cluster());
    let mut reachable = true;
    // What this host's VMs have been told.
    let mut told = None;
    let mut swept = None;
    loop {
        let asked = match told {
            Some(_) => env.master.watch(follower.revision(), PERIOD),
            // What there is, even if that is nothing: this host is to be known before anything is decided.
            None => env.master.read(),
        };
        match asked {
            Ok(snapshot) => {
                reachable = true;
                let before = follower.revision();
                follow(env, table, follower.snapshot(&snapshot));
                let ours = follower.cluster() == Some(snapshot.cluster);
                if !ours || snapshot.revision < before {
                    std::thread::sleep(STRANGE);
                } else if enrolled(env) && told != Some(snapshot.revision) {
                    told = Some(snapshot.revision);
                    give_up(env, &snapshot);
                    for record in &snapshot.records {
                        table.decided(record.clone());
                    }
                    if swept.is_none_or(|at: Instant| at.elapsed() >= SWEEP) {
                        swept = Some(Instant::now());
                        sweep(env, &snapshot.records);
                    }
                }
            }
            Err(e) => {
                if std::mem::replace(&mut reachable, false) {
                    tracing::warn!("{e}");
                }
                std::thread::sleep(RETRY);
            }
        }
    }
}

/// Kernels and initrds that no VM boots from any more.
fn sweep(env: &Env, records: &[VmRecord]) {
    // A VM whose process runs here and which the master does not know may have lost its record only.
    if !lock(&env.found).is_empty() {
        return;
    }
    if let Err(e) = env.boot_files.sweep(records) {
        tracing::warn!("removing kernels and initrds that no VM names: {e}");
    }
}

/// Processes found running whose VM is another host's by now, or was deleted, end. One that the master knows nothing of is
/// left alone.
fn give_up(env: &Env, snapshot: &Snapshot) {
    let mut found = lock(&env.found);
    found.retain(|vm, process| {
        let (pid, here) = (process.pid, env.host.as_str());
        let (name, text) = match Fate::of(&process.owns, &env.host, snapshot) {
            Fate::Ours => return true,
            Fate::Unknown => {
                if !std::mem::replace(&mut process.said, true) {
                    let text = format!("process {pid} runs VM {vm}, which the master does not know: left alone");
                    env.events.add(EventKind::Failed, here, text);
                }
                return true;
            }
            Fate::Elsewhere(view) => (
                view.name.as_str(),
                format!(
                    "{} owns it in generation {}: its process, found running here, is stopped",
                    view.owner, view.generation
                ),
            ),
            Fate::Deleted => (
                here,
                format!("VM {vm} was deleted while there was no agent here: process {pid}, found running, is stopped"),
            ),
        };
        process.kill();
        env.events.add(EventKind::Superseded, name, text);
        false
    });
}

fn follow(env: &Env, table: &Table, news: Vec<Followed>) {
    for news in news {
        let why = match news {
            // What is decided is taken from the snapshot, once the master knows this host.
            Followed::Decided(_) => continue,
            Followed::Removed(vm) => {
                table.post(vm, Input::Removed);
                continue;
            }
            Followed::Joined(cluster) => match lock(&env.identity).join(cluster) {
                Ok(()) => continue,
                Err(e) => e.to_string(),
            },
            Followed::Stale { why } | Followed::Foreign { why } => why,
        };
        env.events.add(EventKind::Failed, env.host.as_str(), why);
    }
}

/// Whether the master knows this host under its identity; asks it to, if it has not.
fn enrolled(env: &Env) -> bool {
    if lock(&env.stranger).is_none() {
        return true;
    }
    let id = lock(&env.identity).id();
    let enrolled = env.master.enroll(&env.host, id, env.config.listen);
    let why = enrolled.as_ref().err().map(ToString::to_string);
    let before = std::mem::replace(&mut *lock(&env.stranger), why.clone());
    if let Some(why) = why {
        if before.as_ref() != Some(&why) {
            env.events.add(EventKind::Failed, env.host.as_str(), why);
        }
        std::thread::sleep(STRANGE);
    }
    enrolled.is_ok()
}

/// Passes on what the chain server notices, until it ends.
pub(super) fn server_events(events: &Receiver<ServerEvent>, table: &Table) {
    while let Ok(event) = events.recv() {
        let (vm, input) = of_server(event);
        table.post(vm, input);
    }
}
