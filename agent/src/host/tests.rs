//! The machine, fed by hand: what it asks for, and what it does not.

mod changes;
mod survivor;

use std::collections::BTreeMap;
use std::sync::Arc;

use chain::master::{Command, MasterState};
use chain::{Held, Life, Mark, Member, VmRecord, VmShape};
use checkpoint::{Epoch, Generation, HostId, VmId};

use super::{
    Answered, Disks, Effect, Health, Input, Loss, MS, Machine, Micros, Order, Refusal, Report,
    Role, SECOND, Tell,
};
use crate::child::proto::GuestEnd;
use crate::control::EventKind;

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn mark(generation: u64, epoch: u64) -> Mark {
    Mark {
        generation: Generation(generation),
        epoch: Epoch(epoch),
        digest: 7,
        held: true,
    }
}

/// One host's machine, and a master that decides when it is told to.
struct Bench {
    now: Micros,
    machine: Machine,
    master: MasterState,
    out: Vec<Effect>,
}

impl Bench {
    fn peers() -> Arc<BTreeMap<HostId, std::net::SocketAddr>> {
        let all = ["a", "b", "c", "d"];
        Arc::new(
            all.map(|n| (host(n), "127.0.0.1:1".parse().unwrap()))
                .into(),
        )
    }

    fn registered() -> (MasterState, VmRecord) {
        Self::registered_with("")
    }

    fn registered_with(protect: &str) -> (MasterState, VmRecord) {
        let mut master = MasterState::default();
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: format!(
                "name = \"vm\"\nmemory_mib = 32\nkernel = \"builtin:probe\"\n{protect}"
            ),
        };
        let register = Command::Register {
            vm: VmId(1),
            life: Life::On,
            name: "vm".into(),
            owner: host("a"),
            shape,
        };
        let record = master.apply(&register).unwrap();
        (master, record)
    }

    /// Host `a` owns the VM, which runs.
    fn owner() -> Self {
        Self::owning(Self::registered())
    }

    /// The same, of a VM that does not run without a backup.
    fn freezing() -> Self {
        Self::owning(Self::registered_with("[protect]\nalone = \"freeze\"\n"))
    }

    fn owning((master, record): (MasterState, VmRecord)) -> Self {
        let mut out = Vec::new();
        let machine = Machine::starting(host("a"), Self::peers(), &record, 1, &mut out);
        assert_eq!(out, [Effect::Boot(record, Disks::Configured)]);
        let mut bench = Self {
            now: SECOND,
            machine,
            master,
            out: Vec::new(),
        };
        bench.step(Input::Spawned(Ok(())));
        bench.step(Input::Report(Report::Ready));
        assert!(
            bench
                .take()
                .contains(&Effect::Answer(1, Ok(Answered::Done)))
        );
        bench
    }

    /// And is protected by these hosts.
    fn protected(by: &[&str]) -> Self {
        let mut bench = Self::owner();
        bench.order(Order::Protect {
            backups: by.iter().map(|name| host(name)).collect(),
        });
        bench.go_on(by);
        assert!(bench.machine.summary().protected, "{:?}", bench.machine);
        bench
    }

    /// Host `me` stands by for it.
    fn standby(me: &str) -> Self {
        let owner = Self::protected(&["b", "c"]);
        let record = owner.record();
        let mut bench = Self {
            now: owner.now,
            machine: Machine::new(host(me), Self::peers(), &record),
            master: owner.master,
            out: Vec::new(),
        };
        bench.step(Input::Decided(record.clone()));
        assert_eq!(bench.take(), [Effect::StandBy(record)]);
        bench.step(Input::Spawned(Ok(())));
        bench.take();
        bench
    }

    fn record(&self) -> VmRecord {
        self.master.snapshot().records.remove(0)
    }

    fn step(&mut self, input: Input) {
        self.machine.step(self.now, input, &mut self.out);
    }

    fn order(&mut self, order: Order) {
        self.step(Input::Ordered(9, order));
    }

    fn take(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.out)
    }

    fn pass(&mut self, time: Micros) {
        self.now += time;
        self.step(Input::Tick);
    }

    /// The master decides on what has been asked of it; true if something was.
    fn decide(&mut self) -> bool {
        let asked = self
            .out
            .iter()
            .position(|e| matches!(e, Effect::Propose { .. }));
        let Some(at) = asked else { return false };
        let Effect::Propose { ask, command } = self.out.remove(at) else {
            unreachable!()
        };
        let result = self.master.apply(&command);
        let result = result.map_err(|e| Refusal::Rejected(e.to_string()));
        self.step(Input::Proposed { ask, result });
        true
    }

    /// All goes well, with these hosts up, until nothing more is wanted.
    fn go_on(&mut self, up: &[&str]) -> Vec<Effect> {
        let mut all = Vec::new();
        for _ in 0..100 {
            if self.decide() {
                continue;
            }
            let effects = self.take();
            if effects.is_empty() {
                if self
                    .machine
                    .wake_at()
                    .is_none_or(|at| at > self.now + 10 * SECOND)
                {
                    break;
                }
                self.pass(SECOND);
                continue;
            }
            for effect in &effects {
                match effect {
                    Effect::Probe(members) => {
                        let health = |m: &Member| match up.contains(&m.host.as_str()) {
                            true => Health::Answers,
                            false => Health::Silent("no route".into()),
                        };
                        let answers = members.iter().map(|m| (m.host.clone(), health(m)));
                        self.step(Input::Probed(answers.collect()));
                    }
                    Effect::Survey(view) if self.machine.summary().role == Role::Owner => {
                        let held = Held::Checkpoint(mark(view.generation.0, 1));
                        let answers = view.chain.iter().map(|m| (m.host.clone(), held.clone()));
                        self.step(Input::Surveyed(answers.collect()));
                    }
                    Effect::Tell(Tell::Protect(view)) => {
                        let generation = view.generation;
                        let text = String::new();
                        self.step(Input::Report(Report::Protected { generation, text }));
                        if view.joining.is_some() {
                            self.step(Input::Report(Report::JoinerReady { generation }));
                        }
                    }
                    _ => {}
                }
            }
            all.extend(effects);
        }
        all
    }

    fn chain(&self) -> Vec<String> {
        let view = self.record().view;
        view.chain.iter().map(|m| m.host.to_string()).collect()
    }
}

fn proposals(effects: &[Effect]) -> usize {
    let asked = |e: &&Effect| matches!(e, Effect::Propose { .. });
    effects.iter().filter(asked).count()
}

#[test]
fn a_suspicion_freezes_before_it_asks_and_the_grant_activates() {
    let mut b = Bench::standby("b");
    b.step(Input::Suspected { silence_ms: 85 });
    let effects = b.take();
    assert!(effects.contains(&Effect::Freeze) && proposals(&effects) == 0);
    b.step(Input::Frozen(Ok(mark(2, 10))));
    assert!(b.decide());
    let view = b.record().view;
    assert!(b.take().contains(&Effect::HandOver(view.clone())));
    b.step(Input::HandedOver(Ok(mark(2, 10))));
    let effects = b.take();
    let at = |wanted: &Effect| effects.iter().position(|e| e == wanted);
    let mark = mark(2, 10);
    let activate = Effect::Activate {
        view: view.clone(),
        mark,
    };
    let bridge = Effect::Bridge { view, mark };
    assert!(at(&activate).unwrap() < at(&bridge).unwrap(), "{effects:?}");
    assert_eq!(b.machine.summary().role, Role::Owner);
}

#[test]
fn i4_a_refused_takeover_leaves_the_replica_as_it_was() {
    let mut b = Bench::standby("b");
    b.step(Input::Suspected { silence_ms: 85 });
    b.step(Input::Frozen(Ok(mark(2, 10))));
    // Somebody else was faster.
    let view = b.record().view;
    b.master
        .apply(&Command::TakeOver {
            vm: view.vm,
            expect: view.generation,
            by: host("c"),
            at: mark(2, 10),
        })
        .unwrap();
    assert!(b.decide());
    let effects = b.take();
    assert!(effects.contains(&Effect::Unfreeze) && effects.contains(&Effect::Read));
    assert_eq!(b.machine.summary().role, Role::Standby);
    let record = b.record();
    b.step(Input::Decided(record));
    assert!(b.take().contains(&Effect::RemoveReplica(Generation(3))));
}

#[test]
fn a_grant_whose_answer_is_lost_is_followed_when_the_record_comes() {
    let mut b = Bench::standby("b");
    b.step(Input::Suspected { silence_ms: 85 });
    b.step(Input::Frozen(Ok(mark(2, 10))));
    let Some(Effect::Propose { command, .. }) = b
        .take()
        .into_iter()
        .find(|e| matches!(e, Effect::Propose { .. }))
    else {
        panic!("nothing is asked");
    };
    let record = b.master.apply(&command).unwrap();
    b.step(Input::Decided(record.clone()));
    assert!(b.take().contains(&Effect::HandOver(record.view)));
}

/// Found by the simulation (seed 10102364): a host asks, and dies; it is back with what it knew long before, and hears that the
/// VM is its own. It ran nowhere, since the question was put again as of that older generation, and refused for ever.
#[test]
fn a_grant_to_a_host_that_knows_only_an_older_configuration_is_followed() {
    let mut b = Bench::standby("b");
    let view = b.record().view;
    let reconfigure = Command::Reconfigure {
        vm: view.vm,
        expect: view.generation,
        by: host("a"),
        chain: view.chain[..1].to_vec(),
        joining: None,
        anew: false,
    };
    let between = b.master.apply(&reconfigure).unwrap();
    let take_over = Command::TakeOver {
        vm: view.vm,
        expect: between.view.generation,
        by: host("b"),
        at: mark(view.generation.0, 10),
    };
    let granted = b.master.apply(&take_over).unwrap();
    b.step(Input::Decided(granted.clone()));
    assert!(b.take().contains(&Effect::Freeze));
    b.step(Input::Frozen(Ok(mark(view.generation.0, 10))));
    assert!(b.decide(), "the master is asked");
    assert!(b.take().contains(&Effect::HandOver(granted.view)));
}

#[test]
fn a_grant_that_has_been_overtaken_is_over() {
    let mut b = Bench::standby("b");
    b.step(Input::Suspected { silence_ms: 85 });
    b.step(Input::Frozen(Ok(mark(2, 10))));
    let asked = b.take().into_iter().find_map(|effect| match effect {
        Effect::Propose { ask, command } => Some((ask, command)),
        _ => None,
    });
    let (ask, command) = asked.expect("the master is asked");
    let granted = b.master.apply(&command).unwrap();
    // Its answer comes after what has been decided since.
    let mut since = granted.clone();
    since.view.generation = Generation(granted.view.generation.0 + 3);
    since.view.owner = host("c");
    since.view.chain = b.machine.member(&host("b")).into_iter().collect();
    b.step(Input::Decided(since));
    b.take();
    let result = Ok(granted);
    b.step(Input::Proposed { ask, result });
    assert!(b.take().contains(&Effect::Unfreeze));
    b.step(Input::Suspected { silence_ms: 85 });
    assert!(b.take().contains(&Effect::Freeze), "it can take over again");
}

#[test]
fn a_master_that_is_away_is_asked_again_a_bounded_number_of_times_and_never_twice_at_once() {
    let mut b = Bench::standby("b");
    b.step(Input::Suspected { silence_ms: 85 });
    b.step(Input::Frozen(Ok(mark(2, 10))));
    let (mut asked, mut open) = (0, 0);
    for _ in 0..10_000 {
        for effect in b.take() {
            if let Effect::Propose { ask, .. } = effect {
                (asked, open) = (asked + 1, open + 1);
                assert_eq!(open, 1, "one question at a time");
                let result = Err(Refusal::Unknown("no route".into()));
                b.step(Input::Proposed { ask, result });
                open -= 1;
            }
        }
        b.pass(10 * MS);
    }
    assert!((2..=21).contains(&asked), "{asked}");
    assert_eq!(b.machine.summary().role, Role::Standby);
}

/// FIELD C3.
#[test]
fn what_an_older_configuration_lost_changes_nothing() {
    let mut a = Bench::protected(&["b", "c"]);
    let loss = |generation| Loss {
        generation: Generation(generation),
        host: Some(host("b")),
        unfit: false,
        why: "it closed the connection".into(),
    };
    let now = a.machine.generation().0;
    for old in 0..now {
        a.step(Input::Report(Report::Lost(loss(old))));
    }
    a.pass(SECOND);
    assert_eq!(a.take(), []);
    assert!(a.machine.summary().protected && a.machine.summary().trouble.is_none());
    a.step(Input::Report(Report::Lost(loss(now))));
    a.go_on(&["c"]);
    assert_eq!(a.chain(), ["c"]);
    let summary = a.machine.summary();
    let why = Some("no route".to_string());
    assert_eq!(summary.lacking, [("b".to_string(), why)], "it is named");
}

#[test]
fn a_chain_that_is_only_slow_is_left_as_it_is() {
    let mut a = Bench::protected(&["b", "c"]);
    let generation = a.machine.generation();
    let loss = Loss {
        generation,
        host: None,
        unfit: false,
        why: "no commit for 300 ms".into(),
    };
    a.step(Input::Report(Report::Lost(loss)));
    a.go_on(&["b", "c"]);
    assert_eq!(a.machine.generation(), generation);
    assert!(a.machine.summary().protected);
}

/// FIELD H15, and its opposite.
#[test]
fn a_replica_that_is_busy_for_long_is_lost_only_if_output_waits_for_it() {
    let lost = |mut a: Bench, ms| {
        let loss = Loss {
            generation: a.machine.generation(),
            host: None,
            unfit: false,
            why: "nothing is taken".into(),
        };
        a.step(Input::Report(Report::Lost(loss)));
        let health = vec![(host("b"), Health::Busy { ms, hangs_ms: 1000 })];
        a.step(Input::Probed(health));
        proposals(&a.take()) > 0
    };
    assert!(!lost(Bench::protected(&["b"]), 900));
    assert!(lost(Bench::protected(&["b"]), 1100));
    let filling = || {
        let mut a = Bench::owner();
        a.order(Order::Protect {
            backups: vec![host("b")],
        });
        while a.record().view.chain.is_empty() {
            while a.decide() {}
            a.take();
            a.pass(SECOND);
            a.step(Input::Probed(vec![(host("b"), Health::Answers)]));
        }
        a.take();
        assert!(!a.machine.summary().protected);
        a
    };
    assert!(!lost(filling(), 15_000));
    assert!(lost(filling(), 60_000));
}

/// FIELD H18: whatever the chain does while the master is away, one question is under way.
#[test]
fn losses_while_the_master_is_away_ask_for_nothing_more() {
    let mut a = Bench::protected(&["b", "c"]);
    let generation = a.machine.generation();
    let (mut probes, mut open) = (0, 0);
    for _ in 0..1000 {
        let loss = Loss {
            generation,
            host: Some(host("b")),
            unfit: false,
            why: "gone".into(),
        };
        a.step(Input::Report(Report::Lost(loss)));
        for effect in a.take() {
            match effect {
                Effect::Probe(members) => {
                    probes += 1;
                    let answers = members.iter().map(|m| (m.host.clone(), Health::Answers));
                    a.step(Input::Probed(answers.collect()));
                }
                Effect::Propose { .. } => open += 1,
                _ => {}
            }
        }
        a.pass(250 * MS);
    }
    assert_eq!((probes, open), (1, 1));
}

/// FIELD L9.
#[test]
fn the_same_protection_again_changes_nothing() {
    let mut a = Bench::protected(&["b", "c"]);
    let generation = a.machine.generation();
    a.order(Order::Protect {
        backups: vec![host("b"), host("c")],
    });
    let effects = a.go_on(&["b", "c"]);
    assert!(effects.contains(&Effect::Answer(9, Ok(Answered::Done))));
    assert_eq!(a.machine.generation(), generation);
}

/// FIELD L9: no step of the way begins the chain anew, or leaves it without a replica that has everything.
#[test]
fn other_backups_are_come_to_without_an_unprotected_moment() {
    let orders: [&[&str]; 5] = [
        &["b", "c", "d"],
        &["c", "b"],
        &["d"],
        &["b", "d", "c"],
        &["c", "d"],
    ];
    let mut a = Bench::protected(&["b", "c"]);
    let since = a.record().view.history.since;
    for order in orders {
        a.order(Order::Protect {
            backups: order.iter().map(|name| host(name)).collect(),
        });
        let effects = a.go_on(&["b", "c", "d"]);
        assert_eq!(a.chain(), order);
        assert_eq!(a.record().view.history.since, since, "never anew");
        for effect in effects {
            if let Effect::Tell(Tell::Protect(view)) = effect {
                assert!(!view.chain.is_empty(), "never alone");
            }
        }
    }
}

#[test]
fn backups_that_cannot_be_are_named_before_anything_is_done() {
    for (backups, named) in [
        (vec!["b", "b"], "twice"),
        (vec!["a"], "another host"),
        (vec!["nobody"], "nobody"),
        (vec![], "no backups"),
    ] {
        let mut a = Bench::owner();
        a.order(Order::Protect {
            backups: backups.iter().map(|name| host(name)).collect(),
        });
        let effects = a.take();
        let [Effect::Answer(9, Err(why))] = &effects[..] else {
            panic!("{effects:?}");
        };
        assert!(why.contains(named), "{why}");
    }
}

/// FIELD H1: an owner that cannot go on says so to its head, and does not wait to be suspected.
#[test]
fn an_owner_that_cannot_go_on_asks_its_head_to_take_over() {
    let gone = [
        Report::Gone,
        Report::GiveUp {
            why: "its disk".into(),
        },
    ];
    for report in gone {
        let mut a = Bench::protected(&["b", "c"]);
        let view = a.record().view;
        a.step(Input::Report(report));
        let effects = a.take();
        let at = |wanted: &Effect| effects.iter().position(|e| e == wanted);
        let (kill, yields) = (at(&Effect::Kill), at(&Effect::Yield(view)));
        assert!(kill.unwrap() < yields.unwrap(), "{effects:?}");
        assert_eq!(a.machine.summary().role, Role::Orphan);
    }
}

#[test]
fn i5_an_orphan_boots_only_if_nobody_holds_a_checkpoint() {
    let mut a = Bench::protected(&["b", "c"]);
    a.step(Input::Report(Report::Gone));
    a.take();
    let survey = |b: Held, c: Held| Input::Surveyed(vec![(host("b"), b), (host("c"), c)]);
    for _ in 0..100 {
        a.step(survey(Held::Nothing, Held::Checkpoint(mark(2, 3))));
        a.pass(SECOND);
    }
    assert!(!a.take().iter().any(|e| matches!(e, Effect::FindDisks(_))));
    a.step(survey(Held::Nothing, Held::Nothing));
    assert!(a.take().iter().any(|e| matches!(e, Effect::FindDisks(_))));
    a.step(Input::DisksFound(Ok(())));
    assert!(a.decide());
    let record = a.record();
    assert!(
        a.take()
            .contains(&Effect::Boot(record.clone(), Disks::Found))
    );
    assert_eq!(record.view.history.since, record.view.generation);
}

#[test]
fn whoever_ordered_a_drill_that_nobody_takes_is_told_so() {
    let mut a = Bench::protected(&["b"]);
    a.order(Order::Drill);
    assert!(answer(&a.take(), 9).is_none());
    a.step(Input::Surveyed(vec![(host("b"), Held::Nothing)]));
    a.step(Input::DisksFound(Ok(())));
    assert!(a.decide());
    let effects = a.take();
    assert!(matches!(answer(&effects, 9), Some(Err(why)) if why.contains("nobody has taken")));
}

#[test]
fn a_planned_switch_that_nobody_takes_runs_on_here() {
    let mut a = Bench::protected(&["b", "c"]);
    a.order(Order::HandOver);
    assert_eq!(a.take(), [Effect::Tell(Tell::HandOver)]);
    a.step(Input::Report(Report::HandedOver { epoch: Epoch(5) }));
    a.pass(4 * SECOND);
    assert!(!a.take().contains(&Effect::Tell(Tell::RunOn)));
    a.pass(2 * SECOND);
    let effects = a.take();
    assert!(effects.contains(&Effect::Tell(Tell::RunOn)));
    assert!(
        effects
            .iter()
            .any(|e| matches!(e, Effect::Answer(9, Err(_))))
    );
    assert_eq!(a.machine.summary().role, Role::Owner);
}

fn answer(effects: &[Effect], ticket: super::Ticket) -> Option<&Result<Answered, String>> {
    effects.iter().find_map(|effect| match effect {
        Effect::Answer(of, answer) if *of == ticket => Some(answer),
        _ => None,
    })
}

/// FIELD L5.
#[test]
fn who_presses_the_power_button_is_answered_once_the_vm_is_off_or_the_guest_has_not_reacted() {
    let mut a = Bench::protected(&["b"]);
    let patience = 90 * SECOND;
    a.order(Order::ShutDown { patience });
    let pressed = Effect::Tell(Tell::PowerButton { reboot: false });
    assert_eq!(a.take(), std::slice::from_ref(&pressed));
    a.step(Input::Ordered(10, Order::ShutDown { patience }));
    let twice = a.take();
    assert!(matches!(answer(&twice, 10), Some(Err(why)) if why.contains("--now")));
    a.pass(91 * SECOND);
    let late = a.take();
    assert!(matches!(answer(&late, 9), Some(Err(why)) if why.contains("90 s")));
    assert_eq!(a.machine.summary().role, Role::Owner, "it runs on");

    a.order(Order::ShutDown { patience });
    assert!(a.take().contains(&pressed));
    let (end, how) = (GuestEnd::PoweredOff, "the guest has shut down".to_string());
    a.step(Input::Report(Report::Ended { end, how }));
    assert!(a.decide());
    let deciding = a.take();
    assert!(answer(&deciding, 9).is_none(), "its process is there still");
    a.step(Input::Buried);
    assert_eq!(answer(&a.take(), 9), Some(&Ok(Answered::Done)));
    assert_eq!(a.machine.summary().role, Role::Off);
    assert_eq!(a.record().life, chain::Life::Off);
}

#[test]
fn a_guest_that_switches_itself_off_while_its_chain_changes_is_off() {
    let mut a = Bench::protected(&["b", "c"]);
    let loss = Loss {
        generation: a.machine.generation(),
        host: Some(host("c")),
        unfit: false,
        why: "gone".into(),
    };
    a.step(Input::Report(Report::Lost(loss)));
    let health = |name| (host(name), Health::Answers);
    a.step(Input::Probed(vec![health("b"), health("c")]));
    // The master decides, and its answer is on its way.
    let command = a.take().into_iter().find_map(|effect| match effect {
        Effect::Propose { command, .. } => Some(command),
        _ => None,
    });
    a.master.apply(&command.expect("another chain")).unwrap();
    let (end, how) = (GuestEnd::PoweredOff, "the guest has shut down".to_string());
    a.step(Input::Report(Report::Ended { end, how }));
    assert!(a.decide());
    a.take();
    assert_eq!(a.record().life, chain::Life::On, "it was refused");
    a.step(Input::Decided(a.record()));
    assert!(a.decide());
    assert_eq!(a.record().life, chain::Life::Off);
}

/// Found by the simulation (seed 1165).
#[test]
fn a_guest_that_switches_itself_off_is_off_although_an_order_to_stop_it_came_to_nothing() {
    let mut a = Bench::owner();
    let (end, how) = (GuestEnd::PoweredOff, "the guest has shut down".to_string());
    a.step(Input::Report(Report::Ended { end, how }));
    a.order(Order::ShutDown { patience: SECOND });
    let asked = a.take().into_iter().filter_map(|effect| match effect {
        Effect::Propose { ask, .. } => Some(ask),
        _ => None,
    });
    for ask in asked.collect::<Vec<_>>() {
        let result = Err(Refusal::Unknown("no answer".into()));
        a.step(Input::Proposed { ask, result });
    }
    assert!(matches!(answer(&a.out, 9), Some(Err(_))), "{:?}", a.out);
    assert!(a.decide(), "it is asked again");
    assert_eq!(a.record().life, Life::Off);
}

#[test]
fn a_reboot_is_answered_once_the_guest_boots_again() {
    let mut a = Bench::protected(&["b"]);
    let generation = a.machine.generation();
    for (patience, tell) in [
        (None, Tell::Reset),
        (Some(SECOND), Tell::PowerButton { reboot: true }),
    ] {
        a.order(Order::Reboot { patience });
        let effects = a.take();
        assert_eq!(effects, [Effect::Tell(tell)]);
        let how = "the guest asked to be reset".to_string();
        a.step(Input::Report(Report::Rebooted { how }));
        assert_eq!(answer(&a.take(), 9), Some(&Ok(Answered::Done)));
    }
    // One that comes by itself answers nobody.
    a.order(Order::ShutDown { patience: SECOND });
    let how = "the guest asked to be reset".to_string();
    a.step(Input::Report(Report::Rebooted { how }));
    assert!(answer(&a.take(), 9).is_none());
    assert_eq!(a.machine.generation(), generation);
    assert!(a.machine.summary().protected);
}

#[test]
fn a_start_that_fails_leaves_nothing_behind() {
    let (master, record) = Bench::registered();
    let mut out = Vec::new();
    let machine = Machine::starting(host("a"), Bench::peers(), &record, 1, &mut out);
    let mut a = Bench {
        now: 0,
        machine,
        master,
        out: Vec::new(),
    };
    a.step(Input::Spawned(Err("no kernel".into())));
    assert!(a.out.contains(&Effect::Answer(1, Err("no kernel".into()))));
    assert!(a.decide());
    assert!(a.take().contains(&Effect::Forget));
    assert!(a.master.snapshot().records.is_empty());
}

#[test]
fn a_guest_that_has_ended_is_not_resumed_when_its_process_goes() {
    let mut a = Bench::protected(&["b", "c"]);
    let (end, how) = (GuestEnd::PoweredOff, "the guest has shut down".to_string());
    a.step(Input::Report(Report::Ended { end, how }));
    a.step(Input::Report(Report::Gone));
    let effects = a.take();
    assert!(
        !effects
            .iter()
            .any(|e| matches!(e, Effect::Yield(_) | Effect::Survey(_)))
    );
}

#[test]
fn a_host_that_cannot_stand_by_says_why_and_tries_again_when_the_configuration_changes() {
    let mut b = Bench::standby("b");
    b.step(Input::Report(Report::Gone));
    let gone = b.take();
    assert!(gone.iter().any(|e| matches!(e, Effect::Decline(..))));
    // For as long as it is a member it is tried again, at growing intervals.
    b.pass(SECOND);
    assert!(b.take().iter().any(|e| matches!(e, Effect::StandBy(_))));
    b.step(Input::Spawned(Err("no bridge br0".into())));
    b.take();
    b.pass(SECOND);
    assert_eq!(b.take(), []);
    b.pass(SECOND);
    assert!(b.take().iter().any(|e| matches!(e, Effect::StandBy(_))));
    let mut b = Bench::standby("b");
    let mut record = b.record();
    record.view.generation = record.view.generation.next();
    b.machine = Machine::new(host("b"), Bench::peers(), &record);
    b.step(Input::Decided(record.clone()));
    b.step(Input::Spawned(Err("no bridge br0".into())));
    let (generation, why) = (record.view.generation, "no bridge br0".to_string());
    assert!(b.take().contains(&Effect::Decline(generation, why)));
    assert_eq!(b.machine.summary().role, Role::Declined);
    record.view.generation = record.view.generation.next();
    b.step(Input::Decided(record.clone()));
    assert!(b.take().contains(&Effect::StandBy(record)));
}

#[test]
fn a_standby_that_is_still_being_made_remembers_the_silence() {
    let owner = Bench::protected(&["b"]);
    let record = owner.record();
    let mut b = Bench {
        now: owner.now,
        machine: Machine::new(host("b"), Bench::peers(), &record),
        master: owner.master,
        out: Vec::new(),
    };
    b.step(Input::Decided(record));
    b.step(Input::Suspected { silence_ms: 100 });
    assert!(!b.take().contains(&Effect::Freeze));
    b.step(Input::Spawned(Ok(())));
    let effects = b.take();
    assert!(effects.contains(&Effect::Freeze));
    let said = |e: &Effect| matches!(e, Effect::Say(EventKind::Suspected, _));
    assert!(effects.iter().any(said));
}

#[test]
fn a_vm_that_was_deleted_is_gone_here_too() {
    for mut bench in [Bench::standby("b"), Bench::protected(&["b"])] {
        bench.step(Input::Removed);
        let effects = bench.take();
        assert!(effects.contains(&Effect::Kill) && effects.contains(&Effect::Forget));
    }
}

/// The simulation's seed 7: the thread of a VM whose chain comes about, and lacks a host still, did not rest for a moment.
#[test]
fn an_owner_rests_while_its_chain_comes_about_and_while_it_leaves() {
    let rests = |b: &mut Bench| {
        b.take();
        b.step(Input::Tick);
        b.machine.wake_at().is_none_or(|at| at > b.now)
    };
    let mut b = Bench::owner();
    b.order(Order::Protect {
        backups: vec![host("b"), host("c")],
    });
    b.decide();
    let up = [
        (host("b"), Health::Answers),
        (host("c"), Health::Silent("no route".into())),
    ];
    b.step(Input::Probed(up.into()));
    b.decide();
    assert_eq!(b.chain(), ["b"]);
    b.now += 10 * SECOND;
    assert!(rests(&mut b), "the first checkpoint is on its way");
    let generation = b.machine.generation();
    let text = String::new();
    b.step(Input::Report(Report::Protected { generation, text }));
    b.step(Input::Probed(vec![(
        host("c"),
        Health::Silent("no".into()),
    )]));
    b.order(Order::HandOver);
    b.now += SECOND;
    assert!(rests(&mut b), "the VM leaves");
}

/// The simulation's seed 216: a host that had just become the tail lacked what had been acknowledged before, when the one that
/// had it was made to leave: nothing could be gone on from.
#[test]
fn a_backup_leaves_once_the_others_hold_everything() {
    let mut b = Bench::protected(&["b", "c"]);
    b.order(Order::Protect {
        backups: vec![host("c")],
    });
    b.decide();
    let effects = b.take();
    let asks = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Survey(_)));
    assert!(asks(&effects) && proposals(&effects) == 0, "{effects:?}");
    let holds = Held::Checkpoint(mark(2, 7));
    let lacks = [(host("b"), holds.clone()), (host("c"), Held::Nothing)];
    b.step(Input::Surveyed(lacks.into()));
    assert_eq!(b.take(), [], "not yet");
    assert!(b.machine.wake_at().is_some_and(|at| at > b.now));
    b.pass(SECOND);
    assert!(asks(&b.take()));
    let holds = [(host("b"), holds.clone()), (host("c"), holds)];
    b.step(Input::Surveyed(holds.into()));
    b.decide();
    assert_eq!(b.chain(), ["c"]);
}

/// The simulation's seeds 439 and 470: with another backup joining, or a second report of the loss, a VM that stood still for
/// its last backup did so for ever.
#[test]
fn a_vm_that_stands_still_is_protected_again_whatever_joined_or_was_lost_meanwhile() {
    for (joins, twice) in [(false, false), (true, false), (false, true)] {
        let mut b = Bench::freezing();
        b.order(Order::Protect {
            backups: vec![host("b"), host("c")],
        });
        b.decide();
        let (up, silent) = (Health::Answers, Health::Silent("no route".into()));
        let c = if joins { up.clone() } else { silent.clone() };
        b.step(Input::Probed(vec![
            (host("b"), up.clone()),
            (host("c"), silent.clone()),
        ]));
        b.decide();
        let generation = b.machine.generation();
        let text = String::new();
        b.step(Input::Report(Report::Protected { generation, text }));
        b.pass(2 * SECOND);
        b.step(Input::Probed(vec![(host("c"), c)]));
        b.decide();
        assert_eq!(b.record().view.joining.is_some(), joins);
        let generation = b.machine.generation();
        let loss = Loss {
            generation,
            host: Some(host("b")),
            unfit: false,
            why: "its connection ended".into(),
        };
        for _ in 0..=usize::from(twice) {
            b.step(Input::Report(Report::Lost(loss.clone())));
        }
        b.take();
        b.step(Input::Probed(vec![
            (host("b"), silent.clone()),
            (host("c"), silent),
        ]));
        assert!(b.take().contains(&Effect::Tell(Tell::Freeze)));
        b.pass(100 * SECOND);
        b.go_on(&["b", "c"]);
        assert_eq!(b.chain().len(), 2, "joins {joins}, twice {twice}");
    }
}

/// The simulation's seed 24170: whoever had ordered a takeover was never answered when the replica was given up meanwhile.
#[test]
fn whoever_ordered_a_takeover_is_told_when_the_replica_is_given_up() {
    let mut b = Bench::standby("b");
    b.order(Order::Failover);
    b.step(Input::Frozen(Ok(mark(2, 7))));
    let anew = Command::Reconfigure {
        vm: VmId(1),
        expect: b.machine.generation(),
        by: host("a"),
        chain: vec![Member::new(host("c"), "127.0.0.1:1".parse().unwrap())],
        joining: None,
        anew: true,
    };
    let record = b.master.apply(&anew).unwrap();
    b.take();
    b.step(Input::Decided(record));
    let told = |e: &Effect| matches!(e, Effect::Answer(9, Err(_)));
    assert!(b.take().iter().any(told));
}

/// The simulation's seed 4977: granted a takeover, a host lost the answer and then, with its power, its replica. It asked its
/// empty replica again and again, without a pause, and the VM ran nowhere for ever.
#[test]
fn a_vm_that_was_granted_to_a_host_that_lost_its_replica_is_looked_for() {
    let mut b = Bench::standby("b");
    let at = mark(2, 7);
    let take = Command::TakeOver {
        vm: VmId(1),
        expect: b.machine.generation(),
        by: host("b"),
        at,
    };
    let record = b.master.apply(&take).unwrap();
    b.step(Input::Decided(record.clone()));
    for _ in 0..10 {
        for effect in b.take() {
            match effect {
                Effect::Freeze => b.step(Input::Frozen(Err("nothing".into()))),
                Effect::Read => b.step(Input::Decided(record.clone())),
                Effect::Survey(view) => {
                    assert_eq!(view.generation, record.view.generation);
                    assert_eq!(b.machine.summary().role, Role::Orphan);
                    return;
                }
                _ => {}
            }
        }
        b.step(Input::Tick);
    }
    panic!("{:?}", b.machine);
}

/// The simulation's seed 132: whoever ordered the same stop first was never answered.
#[test]
fn of_two_orders_to_stop_both_are_answered() {
    let mut b = Bench::owner();
    b.step(Input::Ordered(7, Order::Stop));
    b.step(Input::Ordered(8, Order::Stop));
    while b.decide() {}
    b.step(Input::Buried);
    let effects = b.take();
    for ticket in [7, 8] {
        let of = |e: &Effect| matches!(e, Effect::Answer(of, _) if *of == ticket);
        assert!(effects.iter().any(of), "{ticket}: {effects:?}");
    }
}

/// An order that comes to nothing does not leave the VM with a chain that nobody repairs.
#[test]
fn a_stop_that_comes_to_nothing_forgets_no_loss() {
    let mut b = Bench::protected(&["b", "c"]);
    let loss = Loss {
        generation: b.machine.generation(),
        host: Some(host("b")),
        unfit: false,
        why: "its connection ended".into(),
    };
    b.step(Input::Report(Report::Lost(loss)));
    b.take();
    let answers = ["b", "c"].map(|n| (host(n), Health::Answers));
    b.step(Input::Probed(answers.into()));
    assert_eq!(proposals(&b.take()), 1);
    b.order(Order::Stop);
    let Some(Effect::Propose { ask, .. }) = b.take().pop() else {
        panic!("it is asked for");
    };
    let result = Err(Refusal::Unknown("no answer".into()));
    b.step(Input::Proposed { ask, result });
    b.decide();
    assert_eq!(b.chain(), ["c"]);
}

/// The simulation's seed 826: a start that a deletion came after, which came to nothing, kept the VM from being started ever.
#[test]
fn a_start_that_another_order_takes_the_place_of_can_be_ordered_again() {
    let mut b = Bench::owner();
    b.order(Order::Stop);
    while b.decide() {}
    b.step(Input::Buried);
    let start = |b: &mut Bench| {
        b.take();
        b.order(Order::Start);
        assert!(b.take().iter().any(|e| matches!(e, Effect::FindDisks(_))));
        b.step(Input::DisksFound(Ok(())));
    };
    start(&mut b);
    b.step(Input::Ordered(10, Order::Delete));
    let told = |e: &Effect| matches!(e, Effect::Answer(9, Err(_)));
    assert!(b.out.iter().any(told));
    let asked = b.take();
    let Some(Effect::Propose { ask, .. }) = asked.last() else {
        panic!("{asked:?}");
    };
    let result = Err(Refusal::Unknown("no answer".into()));
    b.step(Input::Proposed { ask: *ask, result });
    start(&mut b);
}
