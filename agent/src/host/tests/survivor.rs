//! A VM's process that has outlived its agent, and the next agent, which may know less than it.

use super::*;
use crate::child::proto::{Owns, Registered};
use crate::host::Fate;
use chain::master::Snapshot;
use checkpoint::ClusterId;

/// What the owner's process on host a says of itself in this generation.
pub(super) fn owns(generation: Generation, protected: Option<Generation>) -> Owns {
    Owns {
        vm: VmId(1),
        host: host("a"),
        registered: Registered {
            cluster: ClusterId::NIL,
            revision: 1,
        },
        generation,
        protected,
        ended: None,
        frozen: None,
    }
}

impl Bench {
    /// Another agent, which has heard of the VM as it was at first only; the newest record.
    fn begins_with_an_old_record(&mut self, life: Life) -> VmRecord {
        let newest = self.record();
        let mut old = newest.clone();
        old.view.generation = Generation(1);
        old.view.chain.clear();
        (old.life, old.revision) = (life, 1);
        self.machine = Machine::new(host("a"), Self::peers(), &old);
        self.step(Input::Decided(old));
        newest
    }

    /// Its process says that b is lost in this generation.
    fn loses_b(&mut self, generation: Generation) {
        self.step(Input::Report(Report::Lost(Loss {
            generation,
            host: Some(host("b")),
            unfit: false,
            why: "its connection ended".into(),
        })));
    }
}

#[test]
fn what_a_process_loses_before_its_new_agent_knows_of_the_chain_is_lost_all_the_same() {
    let mut b = Bench::protected(&["b", "c"]);
    let newest = b.begins_with_an_old_record(Life::On);
    let generation = newest.view.generation;
    b.step(Input::Adopted(Some(owns(generation, Some(generation)))));
    for _ in 0..2 {
        b.loses_b(generation);
    }
    b.step(Input::Decided(newest));
    b.go_on(&["c"]);
    assert_eq!(b.chain(), ["c"]);
}

#[test]
fn a_process_that_stands_still_in_a_newer_configuration_is_known_to_once_that_is_heard_of() {
    let mut b = Bench::protected(&["b"]);
    let newest = b.begins_with_an_old_record(Life::On);
    let generation = newest.view.generation;
    let frozen = Some(generation);
    b.step(Input::Adopted(Some(Owns {
        frozen,
        ..owns(generation, Some(generation))
    })));
    b.step(Input::Decided(newest.clone()));
    b.pass(SECOND);
    // It is protected anew, as one that stands still.
    b.go_on(&["b", "c"]);
    assert!(b.machine.generation() > newest.view.generation);
    assert!(b.machine.view().history.since > newest.view.history.since);
}

#[test]
fn the_process_of_a_vm_that_was_deleted_ends_and_one_whose_record_was_lost_is_left_alone() {
    let (master, record) = Bench::registered();
    let mut owns = owns(Generation(1), None);
    owns.vm = record.view.vm;
    owns.registered.revision = record.revision;
    let with = |records: &[VmRecord], revision| Snapshot {
        records: records.to_vec(),
        revision,
        ..master.snapshot()
    };
    let now = record.revision;
    let all = with(std::slice::from_ref(&record), now);
    let (after, before) = (with(&[], now + 1), with(&[], now - 1));
    let fate = |owns: &Owns, here: &str, snapshot| Fate::of(owns, &host(here), snapshot);
    assert_eq!(fate(&owns, "a", &all), Fate::Ours);
    assert_eq!(fate(&owns, "b", &all), Fate::Elsewhere(&record.view));
    assert_eq!(fate(&owns, "a", &after), Fate::Deleted);
    // A master that was set back, and another cluster's, know nothing of it.
    assert_eq!(fate(&owns, "a", &before), Fate::Unknown);
    owns.registered.cluster = ClusterId::random();
    assert_eq!(fate(&owns, "a", &after), Fate::Unknown);
}

/// The simulation's seed 29279: a VM without a backup stood still for good when its configuration was changed meanwhile.
#[test]
fn a_vm_that_stands_still_runs_on_with_a_chain_that_goes_on_in_place() {
    let mut b = Bench::freezing();
    b.order(Order::Protect {
        backups: vec![host("b")],
    });
    b.go_on(&["b"]);
    let lost = |b: &mut Bench| {
        b.loses_b(b.machine.generation());
        b.take();
        let silent = Health::Silent("no route".into());
        b.step(Input::Probed(vec![(host("b"), silent)]));
        b.take().contains(&Effect::Tell(Tell::Freeze))
    };
    assert!(lost(&mut b));
    // The chain is asked for once more: its process is told, and is to lift the freeze.
    let mut record = b.record();
    record.view.generation = record.view.generation.next();
    b.step(Input::Decided(record.clone()));
    assert!(b.take().contains(&Effect::Tell(Tell::Protect(record.view))));
    assert!(lost(&mut b), "it is not the loss from before");
}

/// It ran on unprotected as soon as one attempt to protect it again had failed.
#[test]
fn a_vm_that_is_not_to_run_alone_does_not_when_an_attempt_to_protect_it_again_fails() {
    for fails in [
        Report::AttemptFailed {
            generation: Generation(3),
            why: "a disk".into(),
        },
        Report::Lost(Loss {
            generation: Generation(3),
            host: Some(host("b")),
            unfit: false,
            why: "it declines".into(),
        }),
    ] {
        let mut b = Bench::freezing();
        b.order(Order::Protect {
            backups: vec![host("b")],
        });
        b.go_on(&["b"]);
        let silent = || vec![(host("b"), Health::Silent("no route".into()))];
        b.loses_b(b.machine.generation());
        b.step(Input::Probed(silent()));
        b.pass(2 * SECOND);
        b.step(Input::Probed(vec![(host("b"), Health::Answers)]));
        b.decide();
        assert_eq!(
            (b.machine.generation(), b.chain().len()),
            (Generation(3), 1)
        );
        b.take();
        b.step(Input::Report(fails));
        b.step(Input::Probed(silent()));
        b.pass(SECOND / 2);
        assert!(!b.decide(), "{:?}", b.out);
        b.pass(100 * SECOND);
        b.go_on(&["b"]);
        assert!(b.machine.summary().protected && b.chain() == ["b"]);
    }
}

/// The simulation's seed 43482: it booted a second time, beside a chain that the master knew it to have.
#[test]
fn what_an_old_record_calls_off_is_not_booted_because_it_was_started_since() {
    for runs in [false, true] {
        let mut b = Bench::protected(&["b"]);
        let newest = b.begins_with_an_old_record(Life::Off);
        let mut found = owns(Generation(0), None);
        found.registered.revision = 2;
        b.step(Input::Adopted(runs.then_some(found)));
        assert_eq!(b.take().contains(&Effect::Kill), !runs);
        b.step(Input::Decided(newest.clone()));
        let effects = b.take();
        assert!(!effects.iter().any(|e| matches!(e, Effect::Boot(..))));
        match runs {
            true => assert!(effects.contains(&Effect::Tell(Tell::Protect(newest.view)))),
            false => assert!(effects.contains(&Effect::FindProcess)),
        }
    }
}
