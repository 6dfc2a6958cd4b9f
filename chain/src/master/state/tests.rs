//! What the master grants, and what it refuses.

use checkpoint::{Generation, HostId, VmId};

use super::*;
use crate::mark::Mark;
use crate::view::{Life, Member, VmShape};

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn member(name: &str) -> Member {
    Member::new(host(name), "127.0.0.1:1".parse().unwrap())
}

fn mark(generation: u64, epoch: u64) -> Mark {
    Mark {
        generation: Generation(generation),
        epoch: checkpoint::Epoch(epoch),
        digest: 0,
    }
}

fn reconfigure(vm: VmId, expect: u64, by: &str, chain: &[&str], anew: bool) -> Command {
    Command::Reconfigure {
        vm,
        expect: Generation(expect),
        by: host(by),
        chain: chain.iter().map(|name| member(name)).collect(),
        joining: None,
        anew,
    }
}

fn take(vm: VmId, expect: u64, by: &str, at: Mark) -> Command {
    Command::TakeOver {
        vm,
        expect: Generation(expect),
        by: host(by),
        at,
    }
}

fn hosts(record: &VmRecord) -> Vec<&str> {
    record.view.chain.iter().map(|m| m.host.as_str()).collect()
}

fn protected() -> (MasterState, VmId) {
    let mut state = MasterState::default();
    let shape = VmShape {
        ram: vec![],
        vcpus: 1,
        cpu: Default::default(),
        disks: vec![],
        config_toml: String::new(),
    };
    let vm = state
        .apply(&Command::Register {
            vm: VmId(7),
            name: "web".into(),
            owner: host("a"),
            shape,
            life: Life::On,
        })
        .unwrap()
        .view
        .vm;
    state
        .apply(&reconfigure(vm, 1, "a", &["b", "c", "d"], true))
        .unwrap();
    (state, vm)
}

#[test]
fn whoever_has_had_a_part_is_wanted_back_until_an_administrator_chooses() {
    let (mut state, vm) = protected();
    state.apply(&take(vm, 2, "b", mark(2, 7))).unwrap();
    let record = state.apply(&take(vm, 3, "c", mark(2, 7))).unwrap();
    assert_eq!(hosts(&record), ["d"], "the chain has forgotten them");
    let wanted = record.wanted_by(&host("c"));
    assert_eq!(wanted, ["a", "b", "d"].map(host));
    let choose = |by, backups: &[&str]| Command::Choose {
        vm,
        by: host(by),
        backups: backups.iter().map(|name| host(name)).collect(),
    };
    assert!(state.apply(&choose("b", &["d"])).is_err(), "not the owner");
    let record = state.apply(&choose("c", &["d"])).unwrap();
    assert_eq!(record.wanted_by(&host("c")), [host("d")]);
    assert_eq!(
        record.view.generation,
        Generation(4),
        "nothing else has changed"
    );
    let revision = state.revision();
    state.apply(&choose("c", &["d"])).unwrap();
    assert_eq!(state.revision(), revision);
}

#[test]
fn i4_of_two_copies_that_claim_to_be_valid_only_one_is() {
    let restart = |vm, expect, by| Command::Restart {
        vm,
        expect: Generation(expect),
        by: host(by),
    };
    let copies = |vm| {
        [
            restart(vm, 2, "a"),
            restart(vm, 2, "b"),
            restart(vm, 2, "d"),
            take(vm, 2, "b", mark(2, 7)),
            take(vm, 2, "c", mark(2, 6)),
        ]
    };
    for first in 0..5 {
        let (mut state, vm) = protected();
        let copies = copies(vm);
        let granted = state.apply(&copies[first]).unwrap();
        assert_eq!(granted.view.generation, Generation(3));
        for (i, other) in copies.iter().enumerate() {
            let answer = state.apply(other);
            // Asked again, as if the answer had been lost, it is the same one; a takeover counts as asked again
            // whoever's disk it was to be.
            match answer {
                Ok(again) => assert_eq!(again, granted, "{i} after {first}"),
                Err(Rejection::Generation { .. }) => assert_ne!(i, first),
                Err(e) => panic!("{e}"),
            }
        }
    }
    let (mut state, vm) = protected();
    let stranger = state.apply(&restart(vm, 2, "z"));
    assert!(matches!(stranger, Err(Rejection::NotMember { .. })));
    let record = state.apply(&restart(vm, 2, "a")).unwrap();
    assert!(record.view.chain.is_empty() && !record.view.history.contains(mark(2, 7)));
}

#[test]
fn i4_of_two_takeovers_in_one_generation_only_one_is_granted() {
    let (mut state, vm) = protected();
    let record = state.apply(&take(vm, 2, "b", mark(2, 7))).unwrap();
    assert_eq!(
        (record.view.generation, record.view.owner.clone()),
        (Generation(3), host("b"))
    );
    assert_eq!(hosts(&record), ["c", "d"]);
    let late = state.apply(&take(vm, 2, "c", mark(2, 7)));
    assert!(matches!(late, Err(Rejection::Generation { .. })));
    // The old owner can decide nothing any more.
    let old = state.apply(&reconfigure(vm, 2, "a", &[], false));
    assert!(matches!(old, Err(Rejection::Generation { .. })));
    let old = state.apply(&reconfigure(vm, 3, "a", &[], false));
    assert!(matches!(old, Err(Rejection::NotOwner { .. })));
}

#[test]
fn i5_a_takeover_leaves_replicas_before_it_out_and_cuts_what_they_had_more() {
    let (mut state, vm) = protected();
    let record = state.apply(&take(vm, 2, "c", mark(2, 7))).unwrap();
    assert_eq!(hosts(&record), ["d"]);
    assert!(record.view.in_place());
    assert!(record.view.history.contains(mark(2, 7)));
    assert!(!record.view.history.contains(mark(2, 8)));
    // What is no part of the history cannot be resumed.
    let outdated = state.apply(&take(vm, 3, "d", mark(2, 8)));
    assert!(matches!(outdated, Err(Rejection::Outdated { .. })));
    let record = state.apply(&take(vm, 3, "d", mark(2, 6))).unwrap();
    // The last one: nothing is left that an owner could go on with.
    assert!(record.view.chain.is_empty());
    assert!(!record.view.history.contains(mark(2, 6)));
}

#[test]
fn a_repeated_command_is_answered_as_the_first_time() {
    let (mut state, vm) = protected();
    let joining = Command::Reconfigure {
        vm,
        expect: Generation(2),
        by: host("a"),
        chain: vec![member("b"), member("c")],
        joining: Some(member("e")),
        anew: false,
    };
    for command in [joining, take(vm, 3, "b", mark(2, 7))] {
        let first = state.apply(&command).unwrap();
        let revision = state.revision();
        assert_eq!(state.apply(&command).unwrap(), first);
        assert_eq!(state.revision(), revision);
    }
}

#[test]
fn only_a_member_may_take_over_and_only_a_possible_chain_is_taken() {
    let (mut state, vm) = protected();
    let stranger = state.apply(&take(vm, 2, "x", mark(2, 7)));
    assert!(matches!(stranger, Err(Rejection::NotMember { .. })));
    for chain in [&["a"][..], &["b", "b"]] {
        let result = state.apply(&reconfigure(vm, 2, "a", chain, true));
        assert!(matches!(result, Err(Rejection::Chain(_))), "{chain:?}");
    }
    // In place: no other order, nobody new, and nothing to go on from without a chain.
    for chain in [&["c", "b"][..], &["b", "e"], &["e"]] {
        let result = state.apply(&reconfigure(vm, 2, "a", chain, false));
        assert!(matches!(result, Err(Rejection::Chain(_))), "{chain:?}");
    }
    let record = state.apply(&reconfigure(vm, 2, "a", &["b", "d"], false));
    assert_eq!(hosts(&record.unwrap()), ["b", "d"]);
    let record = state.apply(&reconfigure(vm, 3, "a", &[], false)).unwrap();
    assert!(!record.view.history.contains(mark(2, 1)), "output flows");
    let result = state.apply(&reconfigure(vm, 4, "a", &["b"], false));
    assert!(matches!(result, Err(Rejection::Chain(_))));
}

#[test]
fn a_joining_replica_becomes_the_tail_and_is_a_member_from_then_on_only() {
    let (mut state, vm) = protected();
    let join = |expect, chain: &[&str], joining: Option<&str>| Command::Reconfigure {
        vm,
        expect: Generation(expect),
        by: host("a"),
        chain: chain.iter().map(|name| member(name)).collect(),
        joining: joining.map(member),
        anew: false,
    };
    let member_twice = state.apply(&join(2, &["b", "c"], Some("c")));
    assert!(matches!(member_twice, Err(Rejection::Chain(_))));
    let alone = state.apply(&join(2, &[], Some("e")));
    assert!(matches!(alone, Err(Rejection::Chain(_))));
    let record = state.apply(&join(2, &["b", "c"], Some("d"))).unwrap();
    assert_eq!(hosts(&record), ["b", "c"]);
    let record = state.apply(&join(3, &["b", "c", "d"], None)).unwrap();
    let since: Vec<u64> = record.view.chain.iter().map(|m| m.since.0).collect();
    assert_eq!(since, [2, 2, 4], "d was out for a generation");
    assert!(record.view.history.contains(mark(2, 7)));
}
