//! A VM's move to another host by an administrator's wish: planned, without losing anything and with one short pause; or
//! as a drill, by really killing its process.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use chain::View;

use super::vms::Entry;
use super::{Daemon, control, lock};
use crate::child::proto::ToChild;
use crate::control::{EventKind, Switched};

/// How long the guest's last epoch may take to be committed.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long the head may take to ask the master for the VM.
const TAKE_PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);

fn protected(entry: &Entry, name: &str) -> Result<View, String> {
    let view = &entry.record.view;
    if view.chain.is_empty() || entry.protected != Some(view.generation) {
        return Err(format!(
            "{name} is not protected: there is nobody to take it over (`understudy protect {name}`)"
        ));
    }
    Ok(view.clone())
}

/// The guest stops at the end of an epoch, its head takes it over; this host joins the chain again.
pub(super) fn hand_over(daemon: &Arc<Daemon>, name: &str) -> Result<Switched, String> {
    let begun = Instant::now();
    let (sender, handed_over) = channel();
    let (view, child) = {
        let mut vms = lock(&daemon.vms);
        let entry = control::owned(vms.by_name(name), name)?;
        let view = protected(entry, name)?;
        entry.waiting.handed_over = Some(sender);
        (view, entry.child.clone())
    };
    let order = |message| {
        child
            .send(&message)
            .map_err(|e| format!("the VM's process is gone: {e}"))
    };
    order(ToChild::HandOver)?;
    let stopped = handed_over.recv_timeout(STOP_PATIENCE);
    if let Ok(epoch) = stopped {
        let text = format!(
            "stopped at checkpoint {epoch}, for {} to take over",
            view.chain[0].host
        );
        daemon.events.add(EventKind::HandedOver, name, text);
        if let Some(switched) = wait_for_another(daemon, &view, begun) {
            return Ok(switched);
        }
    }
    // Whoever asks from now on is refused or fences this host; either way one of them runs.
    order(ToChild::RunOn)?;
    Err(match stopped {
        Ok(_) => format!(
            "{} has not taken {name} over; it runs on here",
            view.chain[0].host
        ),
        Err(_) => format!("{name}'s last checkpoint was not committed in time; it runs on here"),
    })
}

/// Kills the VM's process, as a crash would, and waits for a backup to take over.
pub(super) fn drill(daemon: &Arc<Daemon>, name: &str) -> Result<Switched, String> {
    let (view, child) = {
        let mut vms = lock(&daemon.vms);
        let entry = control::owned(vms.by_name(name), name)?;
        (protected(entry, name)?, entry.child.clone())
    };
    let text = "an administrator's drill: its process is killed";
    daemon.events.add(EventKind::HandedOver, name, text);
    let begun = Instant::now();
    child.kill();
    wait_for_another(daemon, &view, begun).ok_or_else(|| {
        format!(
            "nobody has taken {name} over within {} s: look at its backups (`understudy events` there)",
            TAKE_PATIENCE.as_secs()
        )
    })
}

fn wait_for_another(daemon: &Daemon, view: &View, begun: Instant) -> Option<Switched> {
    let deadline = Instant::now() + TAKE_PATIENCE;
    while Instant::now() < deadline {
        if let Ok(snapshot) = daemon.master.read()
            && let Some(record) = snapshot.records.iter().find(|r| r.view.vm == view.vm)
            && record.view.owner != daemon.host
        {
            return Some(Switched {
                owner: record.view.owner.to_string(),
                generation: record.view.generation.0,
                decided_ms: begun.elapsed().as_secs_f64() * 1000.0,
            });
        }
        // The chain was changed meanwhile: the head that was asked is not the head any more.
        let vms = lock(&daemon.vms);
        let now = vms.map.get(&view.vm).map(|e| &e.record.view);
        if now.is_some_and(|v| v.generation != view.generation && v.owner == daemon.host) {
            return None;
        }
        drop(vms);
        std::thread::sleep(POLL);
    }
    None
}
