//! What is decided on a VM: a function of the records that are and of the command.

use std::collections::BTreeMap;

use checkpoint::{Epoch, Generation, HostId, VmId};

use super::Rejection;
use super::chains::{check_chain, check_in_place, entered, same};
use crate::mark::Mark;
use crate::master::{Command, DisksFrom};
use crate::view::{DiskPlace, History, Life, Member, View, VmRecord, VmShape};

/// The VM's record after a command.
pub(super) enum Decided {
    /// It was carried out before: nothing changes.
    Before(VmRecord),
    /// What is to be, but for its revision. After a removal the last record.
    Now(VmRecord),
}

type Vms = BTreeMap<VmId, VmRecord>;
type Decision = Result<Decided, Rejection>;

pub(super) fn decide(vms: &Vms, command: &Command) -> Decision {
    if let Command::Register {
        vm,
        name,
        owner,
        shape,
        life,
    } = command
    {
        return register(vms, *vm, name, owner, shape, *life);
    }
    let vm = command.vm();
    let record = vms.get(&vm).ok_or(Rejection::Unknown(vm))?;
    match command {
        Command::Register { .. } => unreachable!("answered above"),
        Command::Start {
            expect, by, from, ..
        } => start(record, *expect, by, *from),
        Command::PowerOff { expect, by, at, .. } => power_off(record, *expect, by, *at),
        Command::Update {
            expect, by, shape, ..
        } => update(record, *expect, by, shape),
        Command::Reconfigure {
            expect,
            by,
            chain,
            joining,
            anew,
            ..
        } => reconfigure(record, *expect, by, chain, joining.as_ref(), *anew),
        Command::TakeOver { expect, by, at, .. } => take_over(record, *expect, by, *at),
        Command::Choose { by, backups, .. } => choose(record, by, backups),
        Command::Restart { expect, by, .. } => restart(record, *expect, by),
        Command::Remove { expect, by, .. } => {
            owned(&record.view, *expect, by)?;
            Ok(Decided::Now(record.clone()))
        }
    }
}

fn register(
    vms: &Vms,
    vm: VmId,
    name: &str,
    owner: &HostId,
    shape: &VmShape,
    life: Life,
) -> Decision {
    if let Some(there) = vms.values().find(|r| r.view.name == name) {
        let repeated = there.view.vm == vm
            && there.view.owner == *owner
            && there.shape == *shape
            && there.life == life
            && there.view.generation == Generation(1);
        if repeated {
            return Ok(Decided::Before(there.clone()));
        }
        let owner = there.view.owner.clone();
        return Err(Rejection::NameTaken(name.into(), owner));
    }
    if vm == VmId::NIL || vms.keys().any(|other| other.short() == vm.short()) {
        return Err(Rejection::IdTaken(vm));
    }
    let generation = Generation(1);
    let view = View {
        vm,
        name: name.into(),
        generation,
        owner: owner.clone(),
        chain: Vec::new(),
        joining: None,
        history: History::new(generation),
    };
    Ok(Decided::Now(VmRecord {
        view,
        shape: shape.clone(),
        hosts: vec![owner.clone()],
        revision: 0,
        life,
        disks: DiskPlace {
            host: owner.clone(),
            generation,
            epoch: None,
        },
    }))
}

fn start(record: &VmRecord, expect: Generation, by: &HostId, from: DisksFrom) -> Decision {
    let view = &record.view;
    if record.life == Life::On {
        if began(view, expect, by) {
            return Ok(Decided::Before(record.clone()));
        }
        in_generation(view, expect)?;
        return Err(Rejection::On {
            vm: view.vm,
            owner: view.owner.clone(),
        });
    }
    in_generation(view, expect)?;
    if from == DisksFrom::Newest && record.disks.host != *by {
        return Err(Rejection::DisksElsewhere {
            vm: view.vm,
            by: by.clone(),
            disks: record.disks.host.clone(),
        });
    }
    Ok(alone(record, expect, by, Life::On, None))
}

fn power_off(record: &VmRecord, expect: Generation, by: &HostId, at: Option<Epoch>) -> Decision {
    let repeated =
        record.life == Life::Off && began(&record.view, expect, by) && record.disks.epoch == at;
    if repeated {
        return Ok(Decided::Before(record.clone()));
    }
    owned(&record.view, expect, by)?;
    on(record)?;
    Ok(alone(record, expect, by, Life::Off, at))
}

fn update(record: &VmRecord, expect: Generation, by: &HostId, shape: &VmShape) -> Decision {
    let view = &record.view;
    if view.generation == expect.next() && view.owner == *by && record.shape == *shape {
        return Ok(Decided::Before(record.clone()));
    }
    owned(view, expect, by)?;
    let laid_out = |shape: &VmShape| (shape.ram.clone(), shape.vcpus, shape.disks.clone());
    if record.life == Life::On && laid_out(&record.shape) != laid_out(shape) {
        return Err(Rejection::InUse(view.vm));
    }
    let mut next = record.clone();
    next.shape = shape.clone();
    next.view.generation = expect.next();
    if next.view.chain.is_empty() {
        next.view.history = History::new(next.view.generation);
    }
    Ok(Decided::Now(next))
}

fn reconfigure(
    record: &VmRecord,
    expect: Generation,
    by: &HostId,
    chain: &[Member],
    joining: Option<&Member>,
    anew: bool,
) -> Decision {
    let view = &record.view;
    let repeated = record.life == Life::On
        && view.generation == expect.next()
        && view.owner == *by
        && same(&view.chain, chain)
        && same(
            view.joining.as_slice(),
            joining.map_or(&[], std::slice::from_ref),
        )
        && (!anew || view.history.since == view.generation);
    if repeated {
        return Ok(Decided::Before(record.clone()));
    }
    owned(view, expect, by)?;
    on(record)?;
    check_chain(by, chain, joining)?;
    if !anew {
        check_in_place(view, chain)?;
    } else if joining.is_some() {
        let why = "a replica can join once the chain is filled, not before";
        return Err(Rejection::Chain(why.into()));
    }
    let mut next = view.clone();
    next.generation = expect.next();
    if anew || chain.is_empty() {
        next.history = History::new(next.generation);
    }
    next.chain = entered(chain, view, anew, next.generation);
    next.joining = joining.map(|member| Member {
        since: next.generation,
        ..member.clone()
    });
    Ok(Decided::Now(record.entering(next)))
}

fn take_over(record: &VmRecord, expect: Generation, by: &HostId, at: Mark) -> Decision {
    let view = &record.view;
    let vm = view.vm;
    if record.life == Life::On && view.generation == expect.next() && view.owner == *by {
        return Ok(Decided::Before(record.clone()));
    }
    in_generation(view, expect)?;
    on(record)?;
    let by = by.clone();
    let Some(position) = view.position(&by) else {
        return Err(Rejection::NotMember { vm, by });
    };
    if !view.history.contains(at) {
        return Err(Rejection::Outdated { vm, by, at });
    }
    let mut next = view.clone();
    next.generation = expect.next();
    next.owner = by.clone();
    next.joining = None;
    next.chain.drain(..=position);
    if next.chain.is_empty() {
        next.history = History::new(next.generation);
    } else {
        next.history.fork(expect, at.epoch);
    }
    let mut record = record.entering(next);
    record.disks = DiskPlace {
        host: by,
        generation: expect.next(),
        epoch: None,
    };
    Ok(Decided::Now(record))
}

fn choose(record: &VmRecord, by: &HostId, backups: &[HostId]) -> Decision {
    owned(&record.view, record.view.generation, by)?;
    let mut hosts = vec![by.clone()];
    hosts.extend(backups.iter().filter(|host| *host != by).cloned());
    if record.hosts == hosts {
        return Ok(Decided::Before(record.clone()));
    }
    Ok(Decided::Now(VmRecord {
        hosts,
        ..record.clone()
    }))
}

fn restart(record: &VmRecord, expect: Generation, by: &HostId) -> Decision {
    let view = &record.view;
    if record.life == Life::On && began(view, expect, by) {
        return Ok(Decided::Before(record.clone()));
    }
    in_generation(view, expect)?;
    on(record)?;
    if view.owner != *by && view.position(by).is_none() {
        return Err(Rejection::NotMember {
            vm: view.vm,
            by: by.clone(),
        });
    }
    Ok(alone(record, expect, by, Life::On, None))
}

/// `by` has the VM for itself: no checkpoint and no other host's disk counts any more.
fn alone(
    record: &VmRecord,
    expect: Generation,
    by: &HostId,
    life: Life,
    at: Option<Epoch>,
) -> Decided {
    let generation = expect.next();
    let mut next = record.entering(View {
        generation,
        owner: by.clone(),
        chain: Vec::new(),
        joining: None,
        history: History::new(generation),
        ..record.view.clone()
    });
    next.life = life;
    next.disks = DiskPlace {
        host: by.clone(),
        generation,
        epoch: at,
    };
    Decided::Now(next)
}

/// Whether [`alone`] may have decided this, on `expect`.
fn began(view: &View, expect: Generation, by: &HostId) -> bool {
    view.generation == expect.next()
        && view.owner == *by
        && view.chain.is_empty()
        && view.history.since == view.generation
}

fn on(record: &VmRecord) -> Result<(), Rejection> {
    match record.life {
        Life::On => Ok(()),
        Life::Off => Err(Rejection::Off {
            vm: record.view.vm,
            disks: record.disks.host.clone(),
        }),
    }
}

fn in_generation(view: &View, expected: Generation) -> Result<(), Rejection> {
    if view.generation == expected {
        return Ok(());
    }
    Err(Rejection::Generation {
        vm: view.vm,
        expected,
        actual: view.generation,
        owner: view.owner.clone(),
    })
}

fn owned(view: &View, expected: Generation, by: &HostId) -> Result<(), Rejection> {
    in_generation(view, expected)?;
    if view.owner == *by {
        return Ok(());
    }
    Err(Rejection::NotOwner {
        vm: view.vm,
        by: by.clone(),
        owner: view.owner.clone(),
    })
}
