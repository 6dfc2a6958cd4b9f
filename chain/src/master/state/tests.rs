//! What the master grants, and what it refuses.

use checkpoint::{ClusterId, Epoch, Generation, HostId, HostUuid, RequestId, VmId};

use super::*;
use crate::mark::Mark;
use crate::master::DisksFrom;
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
        epoch: Epoch(epoch),
        digest: 0,
        held: true,
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

fn shape(config_toml: &str) -> VmShape {
    VmShape {
        ram: vec![],
        vcpus: 1,
        cpu: Default::default(),
        disks: vec![],
        config_toml: config_toml.into(),
    }
}

fn register(vm: VmId, name: &str, owner: &str, life: Life) -> Command {
    Command::Register {
        vm,
        name: name.into(),
        owner: host(owner),
        shape: shape(""),
        life,
    }
}

fn off(vm: VmId, expect: u64, by: &str, at: Option<u64>) -> Command {
    Command::PowerOff {
        vm,
        expect: Generation(expect),
        by: host(by),
        at: at.map(Epoch),
    }
}

fn start(vm: VmId, expect: u64, by: &str, from: DisksFrom) -> Command {
    Command::Start {
        vm,
        expect: Generation(expect),
        by: host(by),
        from,
    }
}

fn protected() -> (MasterState, VmId) {
    let mut state = MasterState::default();
    let register = register(VmId(7), "web", "a", Life::On);
    let vm = state.apply(&register).unwrap().view.vm;
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

#[test]
fn i1_an_id_is_never_given_twice_and_says_which_of_two_lives_a_vm_is_of() {
    let (mut state, vm) = protected();
    for (id, name) in [
        (vm, "other"),
        (VmId(7 << 64), "other"),
        (VmId::NIL, "other"),
    ] {
        let again = state.apply(&register(id, name, "a", Life::On));
        assert_eq!(again, Err(Rejection::IdTaken(id)));
    }
    let taken = state.apply(&register(VmId(8), "web", "a", Life::On));
    assert!(matches!(taken, Err(Rejection::NameTaken(..))));
    let remove = Command::Remove {
        vm,
        expect: Generation(2),
        by: host("a"),
    };
    state.apply(&remove).unwrap();
    // The name's next life: what names the earlier one does not touch it.
    let next = state
        .apply(&register(VmId(8), "web", "a", Life::On))
        .unwrap();
    let late = state.apply(&reconfigure(vm, 1, "a", &["b"], true));
    assert_eq!(late, Err(Rejection::Unknown(vm)));
    assert_eq!(state.snapshot().records, [next]);
}

#[test]
fn every_change_raises_the_records_revision_and_only_its_own() {
    let (mut state, vm) = protected();
    let other = register(VmId(8), "db", "a", Life::On);
    let db = state.apply(&other).unwrap();
    assert_eq!(db.revision, state.revision());
    let record = state.apply(&take(vm, 2, "b", mark(2, 7))).unwrap();
    assert_eq!(record.revision, state.revision());
    let snapshot = state.snapshot();
    assert_eq!(snapshot.records, [record, db.clone()]);
    assert_eq!(state.apply(&other), Ok(db), "nothing changed");
}

#[test]
fn l1_l4_a_vm_that_is_off_has_its_newest_disks_where_it_ran_last() {
    let (mut state, vm) = protected();
    let record = state.apply(&take(vm, 2, "b", mark(2, 7))).unwrap();
    assert_eq!((record.life, record.disks.host), (Life::On, host("b")));
    // Only who runs it can say that it is off.
    let stranger = state.apply(&off(vm, 3, "a", None));
    assert!(matches!(stranger, Err(Rejection::NotOwner { .. })));
    let record = state.apply(&off(vm, 3, "b", Some(9))).unwrap();
    assert_eq!((record.life, &record.view.owner), (Life::Off, &host("b")));
    assert_eq!(record.disks.epoch, Some(Epoch(9)));
    assert!(record.view.chain.is_empty());
    // Nothing that a replica holds may be resumed: not even with the newest generation in hand.
    assert!(!record.view.history.contains(mark(2, 7)));
    let restart = Command::Restart {
        vm,
        expect: Generation(4),
        by: host("b"),
    };
    for command in [
        take(vm, 4, "c", mark(2, 7)),
        reconfigure(vm, 4, "b", &["c"], true),
        restart,
    ] {
        let refused = state.apply(&command);
        assert!(matches!(refused, Err(Rejection::Off { .. })), "{refused:?}");
    }
    // The first owner has an older image: never by accident.
    let older = state
        .apply(&start(vm, 4, "a", DisksFrom::Newest))
        .unwrap_err();
    assert!(
        older.to_string().contains("newest disks are on b"),
        "{older}"
    );
    let record = state.apply(&start(vm, 4, "b", DisksFrom::Newest)).unwrap();
    assert_eq!(
        (record.life, record.view.generation),
        (Life::On, Generation(5))
    );
    let twice = state.apply(&start(vm, 5, "b", DisksFrom::Newest));
    assert!(matches!(twice, Err(Rejection::On { .. })), "{twice:?}");
}

#[test]
fn l1_copied_or_older_disks_are_a_choice_and_move_the_vm() {
    for from in [DisksFrom::Copied, DisksFrom::Older] {
        let (mut state, vm) = protected();
        state.apply(&off(vm, 2, "a", Some(3))).unwrap();
        let record = state.apply(&start(vm, 3, "c", from)).unwrap();
        assert_eq!(record.view.owner, host("c"));
        assert_eq!(record.disks.host, host("c"));
        // Whoever else wanted to start it is too late.
        let late = state.apply(&start(vm, 3, "a", DisksFrom::Newest));
        assert!(
            matches!(late, Err(Rejection::Generation { .. })),
            "{late:?}"
        );
    }
}

#[test]
fn l2_a_vm_is_defined_started_stopped_and_started_again() {
    let mut state = MasterState::new(ClusterId(1));
    let vm = VmId(7);
    let record = state.apply(&register(vm, "web", "a", Life::Off)).unwrap();
    assert_eq!((record.life, record.disks.host), (Life::Off, host("a")));
    for life in 0..3 {
        let g = 1 + 3 * life;
        state.apply(&start(vm, g, "a", DisksFrom::Newest)).unwrap();
        state
            .apply(&reconfigure(vm, g + 1, "a", &["b"], true))
            .unwrap();
        let record = state.apply(&off(vm, g + 2, "a", Some(life))).unwrap();
        assert_eq!(record.view.generation, Generation(g + 3));
        assert_eq!(record.hosts, [host("a"), host("b")]);
    }
}

#[test]
fn l10_a_configuration_changes_while_a_vm_runs_but_not_what_replicas_lay_out() {
    let (mut state, vm) = protected();
    let update = |expect, shape| Command::Update {
        vm,
        expect: Generation(expect),
        by: host("a"),
        shape,
    };
    let before = state
        .apply(&reconfigure(vm, 2, "a", &["b", "c"], false))
        .unwrap();
    let record = state.apply(&update(3, shape("new"))).unwrap();
    assert_eq!(record.shape.config_toml, "new");
    assert_eq!(record.view.generation, Generation(4));
    assert_eq!(record.view.chain, before.view.chain);
    assert_eq!(record.view.history, before.view.history);
    let mut larger = shape("new");
    larger.disks = vec![4096];
    let refused = state.apply(&update(4, larger.clone()));
    assert_eq!(refused, Err(Rejection::InUse(vm)));
    state.apply(&off(vm, 4, "a", None)).unwrap();
    let record = state.apply(&update(5, larger.clone())).unwrap();
    assert_eq!((record.life, record.shape), (Life::Off, larger));
}

#[test]
fn commands_of_a_life_are_answered_again_as_the_first_time() {
    let (mut state, vm) = protected();
    let update = Command::Update {
        vm,
        expect: Generation(2),
        by: host("a"),
        shape: shape("new"),
    };
    for command in [
        update,
        off(vm, 3, "a", Some(7)),
        start(vm, 4, "b", DisksFrom::Older),
        off(vm, 5, "b", None),
        start(vm, 6, "b", DisksFrom::Newest),
    ] {
        let first = state.apply(&command).unwrap();
        let revision = state.revision();
        assert_eq!(state.apply(&command).unwrap(), first);
        assert_eq!(state.revision(), revision);
    }
}

#[test]
fn i2_a_second_host_of_a_name_is_refused_and_both_addresses_are_named() {
    let mut state = MasterState::new(ClusterId(1));
    let at = |port: u16| std::net::SocketAddr::from(([10, 0, 0, 1], port));
    let enroll = |id: u128, port| Order::Enroll {
        host: host("a"),
        id: HostUuid(id),
        addr: at(port),
    };
    let first = state.order(&enroll(1, 1)).unwrap();
    assert_eq!(state.order(&enroll(1, 1)), Ok(first));
    let revision = state.revision();
    let said = state.order(&enroll(2, 2)).unwrap_err().to_string();
    assert!(
        said.contains("10.0.0.1:1") && said.contains("10.0.0.1:2"),
        "{said}"
    );
    assert_eq!(state.revision(), revision);
    // It moves.
    state.order(&enroll(1, 3)).unwrap();
    let [known] = &state.snapshot().hosts[..] else {
        panic!("one host")
    };
    assert_eq!((known.addr, known.since), (at(3), 1));
    let forget = Order::Forget { host: host("a") };
    state.order(&forget).unwrap();
    assert_eq!(state.order(&forget), Err(Rejection::UnknownHost(host("a"))));
    state.order(&enroll(2, 2)).unwrap();
}

fn request(id: u128, command: Command) -> Request {
    Request {
        id: RequestId(id),
        order: Order::Vm(command),
    }
}

#[test]
fn l8_a_request_is_carried_out_once_and_answered_the_same() {
    let mut state = MasterState::new(ClusterId(1));
    let vm = VmId(7);
    let first = request(1, register(vm, "web", "a", Life::On));
    let record = state.answer(&first).unwrap();
    assert_eq!(state.answer(&first), Ok(record));
    let refused = request(2, take(vm, 1, "b", mark(1, 1)));
    let said = state.answer(&refused).unwrap_err();
    // It would be granted now; but it was refused.
    state.apply(&reconfigure(vm, 1, "a", &["b"], true)).unwrap();
    assert_eq!(state.answer(&refused), Err(said.clone()));
    // What has changed since hides the first one's answer, and it is not carried out again.
    let before = state.snapshot();
    assert_eq!(state.answer(&first), Ok(Reply::Done { revision: 1 }));
    let remove = Command::Remove {
        vm,
        expect: Generation(2),
        by: host("a"),
    };
    state.apply(&remove).unwrap();
    assert_eq!(state.answer(&first), Ok(Reply::Done { revision: 1 }));
    assert!(state.snapshot().records.is_empty(), "not registered again");
    assert_eq!(before.records.len(), 1);
    // Whoever does not know asks.
    let settle = |about| Request {
        id: RequestId(100 + about),
        order: Order::Settle {
            request: RequestId(about),
        },
    };
    let outcome = |state: &mut MasterState, about| match state.answer(&settle(about)) {
        Ok(Reply::Outcome(outcome)) => outcome,
        other => panic!("{other:?}"),
    };
    assert_eq!(outcome(&mut state, 1), Outcome::Done { revision: 1 });
    assert_eq!(outcome(&mut state, 2), Outcome::Refused(said));
    assert_eq!(outcome(&mut state, 3), Outcome::Never);
    let late = request(3, register(VmId(8), "db", "a", Life::On));
    assert_eq!(state.answer(&late), Err(Rejection::Expired));
    assert_eq!(outcome(&mut state, 3), Outcome::Never);
}

#[test]
fn only_so_many_requests_are_remembered() {
    let mut state = MasterState::new(ClusterId(1));
    for id in 0..2000 {
        let _ = state.answer(&request(id, take(VmId(7), 1, "b", mark(1, 1))));
    }
    let bytes = checkpoint::codec::to_bytes(&state, 1 << 20).unwrap();
    assert!(bytes.len() < 64 << 10, "{} bytes", bytes.len());
    assert!(state.recent.get(RequestId(1999)).is_some());
    assert!(state.recent.get(RequestId(0)).is_none());
}
