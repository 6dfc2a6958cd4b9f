//! After the loss of all hosts of a VM, or of one that ran it without a backup: which copy of it counts.
//!
//! A replica that still holds a complete checkpoint, because its host lived on or had it on its disk, takes the VM over as
//! after any other failure: memory and disks go on from there. Only if no replica does, the VM is booted from the disks of
//! the host that owned it last: these have everything that its guest ever flushed, and more (writes of epochs that were not
//! committed, whose output nobody has seen): they are what a crash of one machine would leave. The master decides: with its
//! decision every other copy, and every checkpoint, is void (I4, I5).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::master::Command;
use chain::{DurableStore, Held, ReplicaStore, VmRecord, look};
use checkpoint::{Generation, VmId};
use diskbuf::{DiskbufError, ReplicaDisks, Role};

use super::vms::{Orphan, Part};
use super::{Daemon, failover, lock, reconcile, repair};
use crate::config::VmConfig;
use crate::control::EventKind;

/// Between looks at the other hosts.
const PERIOD: Duration = Duration::from_millis(100);
/// Between requests to the chain's head to take it over.
const YIELD: Duration = Duration::from_secs(2);
/// Between attempts to boot.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// What the members of a chain have.
#[derive(Debug, PartialEq, Eq)]
enum Survey {
    /// One of them is going to take the VM over.
    Resumable(String),
    /// Some do not answer.
    Unknown(String),
    /// None has anything.
    Nothing,
}

fn sum_up(answers: Vec<(String, Held)>) -> Survey {
    let mut unknown = Vec::new();
    for (host, held) in answers {
        match held {
            Held::Checkpoint(mark) => {
                return Survey::Resumable(format!("{host} holds checkpoint {mark}"));
            }
            Held::Unknown(why) => unknown.push(why),
            Held::Nothing => {}
        }
    }
    match unknown.is_empty() {
        true => Survey::Nothing,
        false => Survey::Unknown(unknown.join("; ")),
    }
}

/// The master says that this host owns the VM, and there is no process of it.
pub(super) fn orphaned(daemon: &Arc<Daemon>, record: &VmRecord) {
    let vm = record.view.vm;
    let orphan = Orphan {
        record: record.clone(),
        state: "looking for a checkpoint of it".into(),
    };
    if lock(&daemon.vms).orphans.insert(vm, orphan).is_some() {
        return;
    }
    daemon.events.add(
        EventKind::Orphaned,
        &record.view.name,
        "this host owns it, but its process ended with the agent: looking for a checkpoint of it",
    );
    let daemon = daemon.clone();
    std::thread::spawn(move || {
        care(&daemon, vm);
        lock(&daemon.vms).orphans.remove(&vm);
    });
}

/// Until the VM runs somewhere.
fn care(daemon: &Arc<Daemon>, vm: VmId) {
    let begun = Instant::now();
    let (mut pause, mut next, mut yielded) = (RETRY.0, Instant::now(), None::<Instant>);
    loop {
        std::thread::sleep(PERIOD);
        let Ok(snapshot) = daemon.master.read() else {
            say(daemon, vm, "the master does not answer".into());
            continue;
        };
        let record = snapshot.records.into_iter().find(|r| r.view.vm == vm);
        let Some(record) = record.filter(|r| r.view.owner == daemon.host) else {
            return;
        };
        if lock(&daemon.vms).map.contains_key(&vm) {
            return;
        }
        let patience = match config_of(&record) {
            Ok(config) => Duration::from_secs(config.protect.return_wait_s),
            Err(_) => Duration::ZERO,
        };
        let answers = record.view.chain.iter().map(|member| {
            let host = member.host.to_string();
            (host, look(member, &record.view, &daemon.host))
        });
        match sum_up(answers.collect()) {
            Survey::Resumable(who) => {
                say(daemon, vm, format!("waiting to be taken over: {who}"));
                if yielded.is_none_or(|at| at.elapsed() >= YIELD) {
                    yielded = Some(Instant::now());
                    yield_it(daemon, &record);
                }
                continue;
            }
            Survey::Unknown(why) if begun.elapsed() < patience => {
                say(
                    daemon,
                    vm,
                    format!(
                        "waiting for other hosts, which may hold a checkpoint: {why} (`understudy recover` does not wait)"
                    ),
                );
                continue;
            }
            Survey::Unknown(_) | Survey::Nothing if Instant::now() < next => continue,
            Survey::Unknown(_) | Survey::Nothing => {}
        }
        match boot(daemon, &record) {
            Ok(()) => return,
            Err(why) => {
                let name = &record.view.name;
                daemon.events.add(EventKind::Failed, name, why.clone());
                say(daemon, vm, why);
                next = Instant::now() + pause;
                pause = RETRY.1.min(pause * 2);
            }
        }
    }
}

/// Lets the chain's head take the VM over at once: it need not wait until it suspects this host. (Another member that holds a
/// checkpoint does so when its patience is over.)
fn yield_it(daemon: &Daemon, record: &VmRecord) {
    let view = &record.view;
    if let Some(head) = view.chain.first()
        && let Err(e) = chain::yield_to(head, view, &daemon.host)
    {
        tracing::warn!("{}: {e}", view.name);
    }
}

fn say(daemon: &Daemon, vm: VmId, what: String) {
    if let Some(orphan) = lock(&daemon.vms).orphans.get_mut(&vm) {
        orphan.state = what;
    }
}

fn config_of(record: &VmRecord) -> Result<VmConfig, String> {
    let name = Path::new(&record.view.name);
    VmConfig::from_text(name, &record.shape.config_toml).map_err(|e| e.to_string())
}

/// Boots the VM from this host's disks, once the master has decided that these count.
fn boot(daemon: &Arc<Daemon>, record: &VmRecord) -> Result<(), String> {
    let _changing = lock(&daemon.changing);
    let (vm, before) = (record.view.vm, &record.view);
    if lock(&daemon.vms).map.contains_key(&vm) {
        return Ok(());
    }
    let config = config_of(record)?;
    let copy = Copy::find(daemon, record, &config)?;
    let command = Command::Restart {
        vm,
        expect: before.generation,
        by: daemon.host.clone(),
    };
    let record = daemon
        .master
        .propose(&command)
        .map_err(|e| format!("not booted from this host's disks: {e}"))?;
    let disks = copy.open(record.view.generation)?;
    reconcile::boot(daemon, &config, record.clone(), disks).inspect_err(|_| {
        reconcile::drop_entry(daemon, vm);
    })?;
    let wanted = failover::wanted(daemon, &record);
    if let Some(entry) = lock(&daemon.vms).map.get_mut(&vm) {
        entry.wanted = wanted;
    }
    daemon.events.add(
        EventKind::Started,
        &before.name,
        format!(
            "booted from this host's disks in generation {}: no checkpoint of it was left",
            record.view.generation
        ),
    );
    Ok(())
}

/// This host's copy of a VM's disks.
enum Copy {
    /// Those that the configuration names: the VM was started here, and has not been anywhere else since.
    Configured,
    /// Mirrors from which the VM has been run.
    Run(Vec<PathBuf>),
    /// Mirrors at a checkpoint.
    Replica(Box<ReplicaDisks>),
    /// The same, with a log that may be ahead of them.
    Logged(Box<DurableStore>),
}

impl Copy {
    fn find(daemon: &Daemon, record: &VmRecord, config: &VmConfig) -> Result<Self, String> {
        let (view, shape) = (&record.view, &record.shape);
        let dir = daemon.config.data_dir.join("replicas").join(&view.name);
        let owner = view.owner == daemon.host;
        if !dir.join("activation").exists() {
            return match owner {
                true => Ok(Self::Configured),
                false => Err("this host has no copy of its disks".into()),
            };
        }
        let options = reconcile::store_options(config);
        let disks = match ReplicaDisks::open(&dir, view.vm, &shape.disks, options.durability) {
            Ok(disks) => disks,
            // Left by another VM of that name: this one has never been a replica here.
            Err(DiskbufError::OtherVm { .. }) if owner => return Ok(Self::Configured),
            Err(e) => return Err(e.to_string()),
        };
        match disks.record().map(|found| found.role) {
            Some(Role::Owner) if owner => Ok(Self::Run(disks.image_paths())),
            Some(Role::Replica) if options.durability == diskbuf::Durability::Disk => {
                drop(disks);
                let store = DurableStore::recover(&dir, view.vm, shape.clone(), options.retention)
                    .map_err(|e| e.to_string())?;
                Ok(Self::Logged(Box::new(store)))
            }
            Some(Role::Replica) => Ok(Self::Replica(Box::new(disks))),
            None if owner => Ok(Self::Configured),
            _ => Err(format!(
                "{}: this copy of its disks is not valid (it was being filled, or belongs to an owner of before); another host may have a valid one: `understudy recover {}` there",
                dir.display(),
                view.name
            )),
        }
    }

    /// The images to boot from; `None`: those of the configuration.
    fn open(self, generation: Generation) -> Result<Option<Vec<PathBuf>>, String> {
        match self {
            Self::Configured => Ok(None),
            Self::Run(paths) => Ok(Some(paths)),
            Self::Replica(mut disks) => {
                let epoch = disks.epoch();
                let paths = disks.activate(generation, epoch);
                paths.map(Some).map_err(|e| e.to_string())
            }
            Self::Logged(store) => {
                let handover = store.hand_over(generation).map_err(|e| e.to_string())?;
                Ok(Some(handover.disks))
            }
        }
    }
}

/// An administrator does not want to wait: from this host's copy, now.
pub(super) fn by_order(daemon: &Arc<Daemon>, name: &str) -> Result<(), String> {
    let orphan = lock(&daemon.vms).orphan(name).map(|o| o.record.clone());
    if let Some(record) = orphan {
        return boot(daemon, &record);
    }
    let (record, part) = {
        let mut vms = lock(&daemon.vms);
        let entry = vms.by_name(name).ok_or_else(|| {
            format!("this host has no copy of {name:?} (`understudy status` lists what it has)")
        })?;
        (entry.record.clone(), entry.part)
    };
    let view = &record.view;
    if part == Part::Owner {
        return Err(format!("{name} runs on this host already"));
    }
    let replica = daemon.replicas.status(view.vm);
    if replica.is_some_and(|replica| replica.state.could_resume()) {
        return Err(format!(
            "this host holds a complete checkpoint of {name}: `understudy failover {name}` resumes it from there"
        ));
    }
    let owner = daemon.config.peers.get(view.owner.as_str());
    let member = owner.map(|addr| chain::Member::new(view.owner.clone(), *addr));
    if member.as_ref().is_some_and(repair::answers) {
        return Err(format!(
            "{}, which owns {name}, is up: it resumes or boots it itself; `understudy status` there says how far it is",
            view.owner
        ));
    }
    daemon.replicas.remove(view.vm, view.generation);
    reconcile::drop_entry(daemon, view.vm);
    boot(daemon, &record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use chain::Mark;
    use checkpoint::Epoch;

    #[test]
    fn only_if_nobody_can_have_a_checkpoint_the_disks_count() {
        let mark = Mark {
            generation: Generation(3),
            epoch: Epoch(9),
            digest: 1,
            held: true,
        };
        let answers = |list: &[(&str, Held)]| {
            let list = list
                .iter()
                .map(|(host, held)| ((*host).into(), held.clone()));
            sum_up(list.collect())
        };
        let unknown = Held::Unknown("b: refused".into());
        assert_eq!(answers(&[]), Survey::Nothing);
        let none = [("b", Held::Nothing), ("c", Held::Nothing)];
        assert_eq!(answers(&none), Survey::Nothing);
        let some = [("b", unknown.clone()), ("c", Held::Checkpoint(mark))];
        assert!(matches!(answers(&some), Survey::Resumable(who) if who.starts_with("c ")));
        let down = [("b", unknown), ("c", Held::Nothing)];
        assert_eq!(answers(&down), Survey::Unknown("b: refused".into()));
    }
}
