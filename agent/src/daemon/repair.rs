//! What an owner does about a replica that is lost: a chain without it, decided by the master.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use chain::Member;
use chain::master::{Command, MasterError};
use checkpoint::{Generation, HostId, VmId};

use super::vms::Part;
use super::{Daemon, lock, reconcile};
use crate::control::EventKind;

/// A host that accepts no connection for this long is lost.
const PATIENCE: Duration = Duration::from_millis(500);

/// The owner's process reports trouble with the chain of `generation`; `named` is the replica it blames, if it knows.
/// Nothing happens if all replicas answer and none is named: then it is only slow.
pub(super) fn chain_lost(
    daemon: &Arc<Daemon>,
    vm: VmId,
    generation: Generation,
    named: Option<HostId>,
    why: &str,
) {
    let Some(view) = owned_view(daemon, vm, generation) else {
        return;
    };
    let left: Vec<Member> = view
        .chain
        .iter()
        .filter(|m| Some(&m.host) != named.as_ref() && answers(m))
        .cloned()
        .collect();
    if left.len() == view.chain.len() {
        return;
    }
    let lost: Vec<&str> = view
        .chain
        .iter()
        .filter(|m| !left.contains(m))
        .map(|m| m.host.as_str())
        .collect();
    let lost = lost.join(", ");
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&vm) {
        entry.trouble = Some(format!("{lost} is lost: {why}"));
    }
    daemon.events.add(
        EventKind::ChainLost,
        &view.name,
        format!(
            "{lost} is lost in generation {generation}: {why}; {} backups left",
            left.len()
        ),
    );
    let command = Command::Reconfigure {
        vm,
        expect: generation,
        by: daemon.host.clone(),
        chain: left,
    };
    // Output stays held until the master has decided; nothing else may decide in its place.
    while owned_view(daemon, vm, generation).is_some() {
        match daemon.master.propose(&command) {
            Ok(record) => return reconcile::apply(daemon, &record),
            Err(e @ MasterError::Rejected(_)) => {
                // Somebody else was faster, perhaps a backup that took over: the decision that arrives next says so.
                return daemon.events.add(
                    EventKind::Refused,
                    &view.name,
                    format!("chain not repaired: {e}"),
                );
            }
            Err(e) => {
                tracing::warn!("{}: {e}", view.name);
                std::thread::sleep(PATIENCE);
            }
        }
    }
}

fn owned_view(daemon: &Daemon, vm: VmId, generation: Generation) -> Option<chain::View> {
    let vms = lock(&daemon.vms);
    let entry = vms.map.get(&vm)?;
    (entry.part == Part::Owner && entry.record.view.generation == generation)
        .then(|| entry.record.view.clone())
}

fn answers(member: &Member) -> bool {
    TcpStream::connect_timeout(&member.addr, PATIENCE).is_ok()
}
