//! After a takeover the replicas that are left may lack the last checkpoints that the new owner had as a replica and nobody
//! acknowledged. They are brought up to date here, while the VM runs already with its output held; then the owner's
//! process goes on with the chain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::{ClientError, Kept, Mark, View};

use super::repair::{self, Trouble};
use super::{Daemon, lock};
use crate::child::proto::ToChild;

/// How long the replicas that are left may take to hear of the takeover and to connect to each other.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(3);

/// What a new owner has that its chain may lack.
#[derive(Clone)]
pub(super) struct Bridge {
    /// The checkpoint it resumed from.
    pub mark: Mark,
    /// What it had not seen acknowledged.
    pub kept: Arc<Kept>,
}

/// Brings the chain of `view` up to date in the background, and then gives it to the owner's process.
pub(super) fn start(daemon: &Arc<Daemon>, view: &View, bridge: Bridge) {
    let (daemon, view) = (daemon.clone(), view.clone());
    std::thread::spawn(move || {
        if let Err(trouble) = run(&daemon, &view, &bridge) {
            repair::chain_lost(&daemon, view.vm, &trouble);
        }
    });
}

fn run(daemon: &Daemon, view: &View, bridge: &Bridge) -> Result<(), Trouble> {
    let trouble = |named, why, unfit| Trouble {
        generation: view.generation,
        named,
        why,
        unfit,
    };
    let deadline = Instant::now() + PATIENCE;
    while repair::owned_view(daemon, view.vm, view.generation).is_some() {
        match chain::bridge(&daemon.host, view, bridge.mark, &bridge.kept) {
            Ok(()) => {
                give(daemon, view);
                return Ok(());
            }
            Err(e @ ClientError::Unfit { .. }) => return Err(trouble(None, e.to_string(), true)),
            Err(ClientError::Peer { host, why, .. }) if Instant::now() >= deadline => {
                return Err(trouble(Some(host), why, false));
            }
            Err(e) if Instant::now() >= deadline => {
                return Err(trouble(None, e.to_string(), true));
            }
            Err(e) => {
                tracing::debug!("{}: chain not up to date yet: {e}", view.name);
                std::thread::sleep(RETRY);
            }
        }
    }
    Ok(())
}

fn give(daemon: &Daemon, view: &View) {
    let child = {
        let mut vms = lock(&daemon.vms);
        let Some(entry) = vms.map.get_mut(&view.vm) else {
            return;
        };
        if entry.record.view.generation != view.generation {
            return;
        }
        entry.bridge = None;
        entry.child.clone()
    };
    if let Err(e) = child.send(&ToChild::Protect(Box::new(view.clone()))) {
        tracing::warn!("{}: the VM's process is gone: {e}", view.name);
    }
}
