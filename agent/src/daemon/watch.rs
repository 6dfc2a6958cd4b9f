//! What comes from outside: the master's decisions and what the chain server notices, each put into the VM's mailbox.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use chain::ServerEvent;

use super::env::Env;
use super::run::of_server;
use super::table::Table;
use crate::host::Input;

/// How long the master may let a question for news wait.
const PERIOD: Duration = Duration::from_secs(5);
/// Between attempts to reach it.
const RETRY: Duration = Duration::from_millis(200);

/// Follows the master's decisions until the process ends.
pub(super) fn decisions(env: &Env, table: &Arc<Table>) {
    let mut revision = 0;
    let mut reachable = true;
    loop {
        // A VM that is registered while the answer is on its way is not in it, and is not gone for that.
        let known = table.known();
        match env.master.watch(revision, PERIOD) {
            Ok(snapshot) => {
                reachable = true;
                if snapshot.revision == revision {
                    continue;
                }
                revision = snapshot.revision;
                let there = |vm| snapshot.records.iter().any(|r| r.view.vm == vm);
                let gone: Vec<_> = known.into_iter().filter(|vm| !there(*vm)).collect();
                for record in snapshot.records {
                    table.decided(record);
                }
                for vm in gone {
                    table.post(vm, Input::Removed);
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

/// Passes on what the chain server notices, until it ends.
pub(super) fn server_events(events: &Receiver<ServerEvent>, table: &Table) {
    while let Ok(event) = events.recv() {
        let (vm, input) = of_server(event);
        table.post(vm, input);
    }
}
