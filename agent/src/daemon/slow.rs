//! What takes its time: questions to the master and to other hosts, new processes, disks that are looked for. Each is a
//! function that returns its outcome; [`run`](super::run) calls it on a thread of its own.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chain::master::{Command, MasterError};
use chain::{
    ClientError, Held, Kept, Mark, Member, ProbeError, Progress, StoreOptions, View, VmRecord,
};
use checkpoint::HostId;
use diskbuf::{DiskbufError, ReplicaDisks};

use super::boot_files;
use super::child::ChildHandle;
use super::env::Env;
use super::process::{can_run, config_of, start_message, store_options};
use crate::child::proto::{FromChild, Role};
use crate::control::EventKind;
use crate::host::{Health, Loss, Refusal};

/// A replica that commits wait for may have one piece of a checkpoint in hand for this long, or for four times the silence
/// after which a host is suspected.
const HANGS: Duration = Duration::from_secs(1);
/// A host that does not answer for this long is lost, or for twice that silence.
const ANSWER_PATIENCE: Duration = Duration::from_millis(250);
/// The same, for the head that a new owner's output waits for.
const HEAD_PATIENCE: Duration = Duration::from_millis(200);
/// How long the replicas that are left may take to hear of a takeover and to connect to each other.
const BRIDGE_PATIENCE: Duration = Duration::from_secs(2);
const BRIDGE_RETRY: Duration = Duration::from_millis(3);
/// How long the process before may take to be gone: its taps and images are needed.
const GONE_PATIENCE: Duration = Duration::from_secs(60);

/// Asks the master.
pub(super) fn propose(env: &Env, command: &Command) -> Result<VmRecord, Refusal> {
    env.master.propose(command).map_err(|e| match e {
        MasterError::Rejected(why) => Refusal::Rejected(why.to_string()),
        other => Refusal::Unknown(other.to_string()),
    })
}

/// How long a host may take to answer: so long, or twice the silence after which it would be suspected.
fn patience(env: &Env, at_least: Duration) -> Duration {
    at_least.max(2 * env.config.detection.silence())
}

/// Whether these hosts are well; all are asked at once.
pub(super) fn probe(env: &Env, view: &View, members: &[Member]) -> Vec<(HostId, Health)> {
    let patience = patience(env, ANSWER_PATIENCE);
    let hangs_ms = HANGS.max(4 * env.config.detection.silence()).as_millis() as u64;
    each(members, |member| {
        let (vm, generation) = (view.vm, view.generation);
        match chain::probe(member, vm, generation, &env.host, patience) {
            Err(e) => Health::Silent(e.to_string()),
            Ok(alive) => match alive.replica {
                Some(Progress {
                    failed: Some(why), ..
                }) => Health::Declines(format!("its replica has failed: {why}")),
                Some(Progress {
                    declined: Some(why),
                    ..
                }) => Health::Declines(format!("cannot stand by: {why}")),
                Some(Progress { busy_ms: ms, .. }) if ms > 0 => Health::Busy { ms, hangs_ms },
                _ => Health::Answers,
            },
        }
    })
}

/// What the members of a chain hold; all are asked at once.
pub(super) fn survey(env: &Env, view: &View) -> Vec<(HostId, Held)> {
    each(&view.chain, |member| chain::look(member, view, &env.host))
}

/// `ask` of each member, at the same time: one that does not answer delays no other.
fn each<T: Send>(members: &[Member], ask: impl Fn(&Member) -> T + Sync) -> Vec<(HostId, T)> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = members
            .iter()
            .map(|member| {
                let ask = &ask;
                let thread = std::thread::Builder::new().name("ask-host".into());
                (member, thread.spawn_scoped(scope, move || ask(member)))
            })
            .collect();
        asked
            .into_iter()
            .map(|(member, thread)| {
                let answer = thread.ok().and_then(|thread| thread.join().ok());
                // Without a thread it takes longer.
                (member.host.clone(), answer.unwrap_or_else(|| ask(member)))
            })
            .collect()
    })
}

/// Tells the chain's head that its owner does not run the VM any more.
pub(super) fn yield_to_head(env: &Env, view: &View) {
    if let Some(head) = view.chain.first()
        && let Err(e) = chain::yield_to(head, view, &env.host)
    {
        tracing::warn!("{}: {e}", view.name);
    }
}

/// Brings the chain of `view` up to what this new owner resumed from. Given up once `followed` is another generation.
pub(super) fn bridge(
    env: &Env,
    view: &View,
    mark: Mark,
    kept: &Kept,
    followed: &AtomicU64,
) -> Result<(), Loss> {
    let loss = |host, why, unfit| Loss {
        generation: view.generation,
        host,
        unfit,
        why,
    };
    let deadline = Instant::now() + BRIDGE_PATIENCE;
    if let Some(head) = view.chain.first()
        && let Err(e @ ProbeError::Silent { .. }) = chain::probe(
            head,
            view.vm,
            view.generation,
            &env.host,
            patience(env, HEAD_PATIENCE),
        )
    {
        // A host that is stopped takes connections; each would be waited for.
        return Err(loss(Some(head.host.clone()), e.to_string(), false));
    }
    while followed.load(Ordering::Acquire) == view.generation.0 {
        match chain::bridge(&env.host, view, mark, kept) {
            Ok(()) => return Ok(()),
            Err(e @ ClientError::Unfit { .. }) => return Err(loss(None, e.to_string(), true)),
            Err(ClientError::Peer { host, why, .. }) if Instant::now() >= deadline => {
                return Err(loss(Some(host), why, false));
            }
            Err(e) if Instant::now() >= deadline => return Err(loss(None, e.to_string(), true)),
            Err(e) => {
                tracing::debug!("{}: chain not up to date yet: {e}", view.name);
                std::thread::sleep(BRIDGE_RETRY);
            }
        }
    }
    Err(loss(None, "the configuration has changed".into(), false))
}

/// What a process tells its agent; `None`: it has ended.
pub(super) type Reports = Box<dyn Fn(Option<FromChild>) + Send>;

/// Makes, or reopens, this host's replica and starts the process that waits with it.
pub(super) fn stand_by(
    env: &Env,
    record: &VmRecord,
    before: Option<&ChildHandle>,
    reports: Reports,
) -> Result<Arc<ChildHandle>, String> {
    wait_gone(before)?;
    let config = config_of(record)?;
    let shape = &record.shape;
    can_run(shape)?;
    has_room(shape.ram.iter().map(|range| range.len).sum())?;
    boot_files::ensure(env, record)?;
    let ram = open_replica(env, record, store_options(&config))?;
    let role = Role::Standby {
        disk_sizes: shape.disks.clone(),
    };
    let start = start_message(env, &config, record, role)?;
    let fds: Vec<_> = ram.iter().map(AsRawFd::as_raw_fd).collect();
    ChildHandle::start(&start, &fds, reports)
        .map_err(|e| format!("starting the standby's process: {e}"))
}

/// Starts a process that boots a VM of this host, from `disks` or from those that its configuration names.
pub(super) fn boot(
    env: &Env,
    record: &VmRecord,
    disks: Option<Vec<PathBuf>>,
    before: Option<&ChildHandle>,
    reports: Reports,
) -> Result<Arc<ChildHandle>, String> {
    wait_gone(before)?;
    let config = config_of(record)?;
    boot_files::ensure(env, record)?;
    let role = Role::Boot {
        disks,
        cpu: record.shape.cpu.clone(),
    };
    let start = start_message(env, &config, record, role)?;
    ChildHandle::start(&start, &[], reports).map_err(|e| format!("starting the VM's process: {e}"))
}

/// Until the process that was killed is gone.
pub(super) fn wait_gone(before: Option<&ChildHandle>) -> Result<(), String> {
    match before {
        Some(process) if !process.wait_gone(GONE_PATIENCE) => Err(format!(
            "the VM's process of before ({}) cannot be ended: it waits for a disk, most likely (`ps` shows state D)",
            process.pid()
        )),
        _ => Ok(()),
    }
}

/// A backup promises memory that it has.
fn has_room(ram: u64) -> Result<(), String> {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib << 10);
    match available {
        Some(available) if available < ram => Err(format!(
            "the VM has {} MiB of memory, and only {} MiB are available here: name another backup, or make room",
            ram >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// The replica of a VM that this host has not had since its agent was started. A member may have had one before that: if it
/// is whole, and still part of the VM's history, the VM can be resumed from it.
fn open_replica(
    env: &Env,
    record: &VmRecord,
    options: StoreOptions,
) -> Result<Vec<OwnedFd>, String> {
    let (view, shape) = (&record.view, &record.shape);
    let name = &view.name;
    put_aside(env, record, options)?;
    if view.position(&env.host).is_some() {
        match env.replicas.reopen(view.clone(), shape.clone(), options) {
            Ok((ram, held)) => {
                if let Some(mark) = held {
                    let text = format!("this host's replica is back, with checkpoint {mark}");
                    env.events.add(EventKind::Returned, name, text);
                }
                return Ok(ram);
            }
            Err(e) => {
                let text = format!("what was left of this host's replica is of no use: {e}");
                env.events.add(EventKind::Failed, name, text);
            }
        }
    }
    let created = env.replicas.create(view.clone(), shape.clone(), options);
    created.map_err(|e| e.to_string())
}

/// What another VM of that name has left here, or this one when its disks were of other sizes, is put aside: it is in nobody's
/// way, and is not lost.
fn put_aside(env: &Env, record: &VmRecord, options: StoreOptions) -> Result<(), String> {
    let (view, shape) = (&record.view, &record.shape);
    let replicas = env.config.data_dir.join("replicas");
    let dir = replicas.join(&view.name);
    if !dir.join("activation").exists() {
        return Ok(());
    }
    let why = match ReplicaDisks::open(&dir, view.vm, &shape.disks, options.durability) {
        Err(e @ (DiskbufError::OtherVm { .. } | DiskbufError::OtherSize { .. })) => e.to_string(),
        _ => return Ok(()),
    };
    let free = (1..1000)
        .map(|n| replicas.join(format!("{}.aside-{n}", view.name)))
        .find(|path| !path.exists())
        .ok_or_else(|| format!("{}: too much was put aside already", dir.display()))?;
    std::fs::rename(&dir, &free)
        .map_err(|e| format!("{}: cannot be put aside: {e}", dir.display()))?;
    let text = format!("{why}: put aside as {}", free.display());
    env.events.add(EventKind::Returned, &view.name, text);
    Ok(())
}
