//! The control socket's serving side.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use chain::master::Command;
use chain::{Member, Query};
use checkpoint::{Epoch, HostId};

use super::vms::{Entry, Part};
use super::{AgentError, Daemon, failover, lock, reconcile, restart, rewind, status, switch};
use crate::child::proto::ToChild;
use crate::config::VmConfig;
use crate::control::{Point, Reply, Request};
use crate::ipc;

/// How long a VM process may take to answer a question.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long its vCPUs may take to stop for an inspection: they are given 10 s before they are called stuck.
const INSPECT_PATIENCE: Duration = Duration::from_secs(30);

/// Binds the control socket, replacing one that nobody listens at any more.
pub(super) fn bind(path: &Path) -> Result<UnixListener, AgentError> {
    let fail = |source| AgentError::Control {
        path: path.into(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && UnixStream::connect(path).is_err();
    if stale {
        std::fs::remove_file(path).map_err(fail)?;
    }
    UnixListener::bind(path).map_err(fail)
}

/// Serves one connection.
pub(super) fn serve(daemon: &Arc<Daemon>, stream: &UnixStream) {
    while let Ok((request, _)) = ipc::recv::<Request>(stream) {
        let reply = answer(daemon, request).unwrap_or_else(Reply::Error);
        if ipc::send(stream, &reply, &[]).is_err() {
            return;
        }
    }
}

fn answer(daemon: &Arc<Daemon>, request: Request) -> Result<Reply, String> {
    match request {
        Request::Start { toml, name } => reconcile::start_vm(daemon, &toml, &name)?,
        Request::Protect { vm, backups } => protect(daemon, &vm, backups)?,
        Request::Stop { vm } => stop(daemon, &vm)?,
        Request::Status => return Ok(Reply::Status(status::status(daemon))),
        Request::Stats { vm } => {
            let (sender, receiver) = channel();
            let child = {
                let mut vms = lock(&daemon.vms);
                let entry = owned(vms.by_name(&vm), &vm)?;
                entry.waiting.stats.push(sender);
                entry.child.clone()
            };
            child.send(&ToChild::TakeStats).map_err(|e| e.to_string())?;
            let stats = receiver
                .recv_timeout(PATIENCE)
                .map_err(|_| "the VM's process does not answer".to_string())?;
            return Ok(Reply::Stats(Box::new(stats)));
        }
        Request::Inspect { vm } => return inspect(daemon, &vm).map(Reply::Vcpus),
        Request::Failover { vm } => failover::by_order(daemon, &vm)?,
        Request::Recover { vm } => restart::by_order(daemon, &vm)?,
        Request::HandOver { vm } => return switch::hand_over(daemon, &vm).map(Reply::Switched),
        Request::Drill { vm } => return switch::drill(daemon, &vm).map(Reply::Switched),
        Request::Leads => {
            let leads = daemon
                .serving
                .engine
                .as_ref()
                .is_some_and(|master| master.leads());
            return Ok(Reply::Leads(leads));
        }
        Request::Rewind {
            vm,
            epoch,
            clone,
            network,
        } => rewind::rewind(daemon, &vm, Epoch(epoch), &clone, network.as_deref())?,
        Request::Points { vm } => return points(daemon, &vm).map(Reply::Points),
        Request::Events { since } => return Ok(Reply::Events(daemon.events.since(since))),
        Request::HarvestOnly { vm, ms } => tell(daemon, &vm, &ToChild::HarvestOnly { ms })?,
        Request::EpochMs { vm, ms, min_ms } => tell(daemon, &vm, &ToChild::EpochMs { ms, min_ms })?,
    }
    Ok(Reply::Ok)
}

pub(super) fn owned<'a>(entry: Option<&'a mut Entry>, name: &str) -> Result<&'a mut Entry, String> {
    match entry {
        Some(entry) if entry.part == Part::Owner => Ok(entry),
        Some(entry) => Err(format!(
            "{name} runs on {}; ask that host's agent",
            entry.record.view.owner
        )),
        None => Err(format!(
            "no VM named {name:?} runs on this host (`understudy status` lists them)"
        )),
    }
}

/// What the vCPUs of a VM or of a standby on this host are at.
fn inspect(daemon: &Daemon, name: &str) -> Result<Vec<vmm::VcpuReport>, String> {
    let (sender, receiver) = channel();
    let child = {
        let mut vms = lock(&daemon.vms);
        let entry = vms.by_name(name).ok_or_else(|| {
            format!("no VM named {name:?} is on this host (`understudy status` lists them)")
        })?;
        entry.waiting.inspected.push(sender);
        entry.child.clone()
    };
    child.send(&ToChild::Inspect).map_err(|e| e.to_string())?;
    receiver
        .recv_timeout(INSPECT_PATIENCE)
        .map_err(|_| "the VM's process does not answer".to_string())?
}

/// Asks the chain's tail, wherever it is; any host of the cluster may.
fn points(daemon: &Daemon, name: &str) -> Result<Vec<Point>, String> {
    let snapshot = daemon.master.read().map_err(|e| e.to_string())?;
    let record = snapshot
        .records
        .iter()
        .find(|r| r.view.name == name)
        .ok_or_else(|| format!("the master knows no VM named {name:?}"))?;
    let everything = Query::Range(Epoch::ZERO, Epoch(u64::MAX));
    let vm = record.view.vm;
    let marks = chain::query(
        daemon.master.as_ref(),
        vm,
        &daemon.host,
        everything,
        PATIENCE,
    )
    .map_err(|e| e.to_string())?;
    Ok(marks
        .iter()
        .map(|mark| Point {
            epoch: mark.epoch.0,
            generation: mark.generation.0,
            digest: mark.digest,
        })
        .collect())
}

fn tell(daemon: &Daemon, vm: &str, message: &ToChild) -> Result<(), String> {
    let child = owned(lock(&daemon.vms).by_name(vm), vm)?.child.clone();
    child.send(message).map_err(|e| e.to_string())
}

fn protect(daemon: &Arc<Daemon>, name: &str, backups: Vec<String>) -> Result<(), String> {
    let view = {
        let mut vms = lock(&daemon.vms);
        owned(vms.by_name(name), name)?.record.view.clone()
    };
    let backups = if backups.is_empty() {
        let mut vms = lock(&daemon.vms);
        let entry = owned(vms.by_name(name), name)?;
        VmConfig::from_text(Path::new(name), &entry.record.shape.config_toml)
            .map_err(|e| e.to_string())?
            .protect
            .backups
    } else {
        backups
    };
    if backups.is_empty() {
        return Err(format!(
            "{name}: no backups are named, neither here nor in its configuration's [protect] backups"
        ));
    }
    let chain = backups
        .iter()
        .map(|backup| {
            let addr = daemon.config.peers.get(backup).copied().ok_or_else(|| {
                let known: Vec<&str> = daemon.config.peers.keys().map(String::as_str).collect();
                format!("backup {backup:?} is not among this host's peers ({}): add it to [peers] in host.toml", known.join(", "))
            })?;
            // A backup that nobody can reach would only be found out while the VM waits for it.
            std::net::TcpStream::connect_timeout(&addr, Duration::from_secs(2))
                .map_err(|e| format!("backup {backup} at {addr} cannot be reached: {e} (is its agent running?)"))?;
            Ok(Member::new(HostId::new(backup).map_err(|e| e.to_string())?, addr))
        })
        .collect::<Result<Vec<_>, String>>()?;
    let wanted: Vec<HostId> = chain.iter().map(|m| m.host.clone()).collect();
    let command = Command::Reconfigure {
        vm: view.vm,
        expect: view.generation,
        by: daemon.host.clone(),
        chain,
        joining: None,
        anew: true,
    };
    reconcile::decide(daemon, view.vm, view.generation, &command).map_err(|e| e.to_string())?;
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&view.vm) {
        entry.wanted.clone_from(&wanted);
    }
    // The hosts of the new chain are noted with it; this forgets those that are not wanted any more.
    let choose = Command::Choose {
        vm: view.vm,
        by: daemon.host.clone(),
        backups: wanted,
    };
    if let Err(e) = daemon.master.propose(&choose) {
        tracing::warn!("{name}: hosts that it had before may join again: {e}");
    }
    Ok(())
}

fn stop(daemon: &Arc<Daemon>, name: &str) -> Result<(), String> {
    if rewind::stop(daemon, name) {
        return Ok(());
    }
    let view = {
        let mut vms = lock(&daemon.vms);
        match vms.orphan(name) {
            Some(orphan) => orphan.record.view.clone(),
            None => owned(vms.by_name(name), name)?.record.view.clone(),
        }
    };
    let command = Command::Remove {
        vm: view.vm,
        expect: view.generation,
        by: daemon.host.clone(),
    };
    daemon.master.propose(&command).map_err(|e| e.to_string())?;
    let _changing = lock(&daemon.changing);
    let entry = lock(&daemon.vms).map.remove(&view.vm);
    if let Some(entry) = entry {
        entry.child.kill();
    }
    Ok(())
}
