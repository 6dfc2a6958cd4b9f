//! What an owner does about a replica that is lost: a chain without it, decided by the master. What is left goes on in
//! place, with output held all the time, if it holds this VM's history; otherwise it begins anew.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use chain::master::{Command, MasterError};
use chain::{Member, View};
use checkpoint::{Generation, HostId, VmId};

use super::vms::Part;
use super::{Daemon, lock, reconcile};
use crate::child::proto::ToChild;
use crate::control::EventKind;

/// A host that accepts no connection for this long is lost.
const PATIENCE: Duration = Duration::from_millis(500);

/// Trouble with a chain, as the owner's process reports it.
#[derive(Debug)]
pub(super) struct Trouble {
    /// The configuration.
    pub generation: Generation,
    /// The replica it blames, if it knows.
    pub named: Option<HostId>,
    /// Why.
    pub why: String,
    /// What the replica named holds cannot be gone on from; if none is named, the whole chain's.
    pub unfit: bool,
}

/// Acts on it. Nothing happens if all replicas answer and none is named: then the chain is only slow.
pub(super) fn chain_lost(daemon: &Arc<Daemon>, vm: VmId, trouble: &Trouble) {
    let Some((view, in_place)) = owned_view(daemon, vm, trouble.generation) else {
        return;
    };
    if lock(&daemon.vms).map.get(&vm).is_some_and(|e| e.frozen) {
        return;
    }
    let kept = |m: &&Member| Some(&m.host) != trouble.named.as_ref() && answers(m);
    let left: Vec<Member> = view.chain.iter().filter(kept).cloned().collect();
    let joining = view.joining.as_ref().filter(kept).cloned();
    let anew = !in_place || (trouble.unfit && trouble.named.is_none());
    let lost: Vec<&str> = view
        .chain
        .iter()
        .chain(&view.joining)
        .filter(|m| !left.contains(m) && joining.as_ref() != Some(m))
        .map(|m| m.host.as_str())
        .collect();
    if lost.is_empty() && !(trouble.unfit && trouble.named.is_none()) {
        return;
    }
    let only_the_joining = left.len() == view.chain.len() && !lost.is_empty();
    let (lost, why, generation) = (lost.join(", "), &trouble.why, trouble.generation);
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&vm) {
        if !only_the_joining {
            entry.trouble = Some(match lost.is_empty() {
                true => why.clone(),
                false => format!("{lost} is lost: {why}"),
            });
        }
        for member in view.chain.iter().chain(&view.joining) {
            if !left.contains(member) && joining.as_ref() != Some(member) {
                entry.retries.failed(&member.host);
            }
        }
    }
    let text = match lost.is_empty() {
        true => format!("the chain of generation {generation} has to begin anew: {why}"),
        false => format!(
            "{lost} is lost in generation {generation}: {why}; {} backups left",
            left.len()
        ),
    };
    daemon.events.add(EventKind::ChainLost, &view.name, text);
    if left.is_empty() && in_place && freeze(daemon, vm) {
        return;
    }
    reconfigure(daemon, &view, left, joining.filter(|_| !anew), anew);
}

/// A VM that is not to run without a backup stands still; the master's record stays as it is.
fn freeze(daemon: &Daemon, vm: VmId) -> bool {
    let mut vms = lock(&daemon.vms);
    let Some(entry) = vms.map.get_mut(&vm) else {
        return false;
    };
    if !entry.freezes_alone() {
        return false;
    }
    entry.frozen = true;
    entry.trouble = Some("frozen: its last backup is lost, and protect.alone is \"freeze\"".into());
    if let Err(e) = entry.child.send(&ToChild::Freeze) {
        tracing::warn!("{}: the VM's process is gone: {e}", entry.record.view.name);
    }
    true
}

/// Asks the master for another chain of a VM owned by this host, and follows its decision. Output stays held until it has
/// decided; nothing else may decide in its place.
pub(super) fn reconfigure(
    daemon: &Arc<Daemon>,
    view: &View,
    chain: Vec<Member>,
    joining: Option<Member>,
    anew: bool,
) {
    let joining = joining.filter(|_| !chain.is_empty());
    let command = Command::Reconfigure {
        vm: view.vm,
        expect: view.generation,
        by: daemon.host.clone(),
        chain,
        joining,
        anew,
    };
    while owned_view(daemon, view.vm, view.generation).is_some() {
        match reconcile::decide(daemon, view.vm, view.generation, &command) {
            Ok(()) => return,
            Err(e @ MasterError::Rejected(_)) => {
                // Somebody else was faster, perhaps a backup that took over: the decision that arrives next says so.
                return daemon.events.add(
                    EventKind::Refused,
                    &view.name,
                    format!("chain not changed: {e}"),
                );
            }
            Err(e) => {
                tracing::warn!("{}: {e}", view.name);
                std::thread::sleep(PATIENCE);
            }
        }
    }
}

/// The configuration, if it is still the one in force here, and whether its chain holds this VM's history.
pub(super) fn owned_view(
    daemon: &Daemon,
    vm: VmId,
    generation: Generation,
) -> Option<(View, bool)> {
    let vms = lock(&daemon.vms);
    let entry = vms.map.get(&vm)?;
    let view = &entry.record.view;
    (entry.part == Part::Owner && view.generation == generation && !entry.ended)
        .then(|| (view.clone(), entry.chain_is_filled()))
}

/// Whether a host is up, as far as a connection tells.
pub(super) fn answers(member: &Member) -> bool {
    TcpStream::connect_timeout(&member.addr, PATIENCE).is_ok()
}
