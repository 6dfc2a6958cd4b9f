//! Unprotect and apply.

use super::*;
use crate::config::Epochs;

fn answers(effects: &[Effect]) -> Vec<&Result<Answered, String>> {
    let answers = effects.iter().filter_map(|effect| match effect {
        Effect::Answer(_, answer) => Some(answer),
        _ => None,
    });
    answers.collect()
}

fn text_of(protect: &str) -> String {
    format!("name = \"vm\"\nmemory_mib = 32\nkernel = \"builtin:probe\"\n{protect}")
}

impl Bench {
    fn apply(&mut self, protect: &str) {
        let shape = Box::new(VmShape {
            config_toml: text_of(protect),
            ..self.record().shape
        });
        self.order(Order::Apply { shape });
    }

    fn wanted(&self) -> Vec<HostId> {
        self.record().wanted_by(&host("a"))
    }
}

#[test]
fn unprotect_takes_the_backups_away_and_they_stay_away() {
    let mut b = Bench::protected(&["b", "c"]);
    b.take();
    b.order(Order::Unprotect);
    assert!(
        answers(&b.out).is_empty(),
        "not before the master has decided"
    );
    let effects = b.go_on(&["b", "c"]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    assert_eq!((b.chain(), b.wanted()), (vec![], vec![]));
    // Output flows from then on, and only from then on.
    let told = effects.iter().filter_map(|effect| match effect {
        Effect::Tell(Tell::Protect(view)) => Some(view.chain.len()),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), [0]);
    b.pass(60 * SECOND);
    assert_eq!((proposals(&b.out), b.chain()), (0, vec![]));
    // Nor does an agent that is started again bring them back, configured or not.
    let record = b.record();
    let mut again = Machine::new(host("a"), Bench::peers(), &record);
    let mut out = Vec::new();
    again.step(b.now, Input::Decided(record), &mut out);
    let owns = survivor::owns(b.record().view.generation, None);
    again.step(b.now, Input::Adopted(Some(owns)), &mut out);
    again.step(b.now + 60 * SECOND, Input::Tick, &mut out);
    assert!(again.summary().lacking.is_empty());
    assert!(
        !out.iter().any(|e| matches!(e, Effect::Probe(_))),
        "{out:?}"
    );
    // An order does.
    b.order(Order::Protect {
        backups: vec![host("c")],
    });
    b.go_on(&["c"]);
    assert_eq!(b.chain(), ["c"]);
}

#[test]
fn unprotect_of_a_vm_without_backups_is_done_at_once() {
    let mut b = Bench::owner();
    b.order(Order::Unprotect);
    let effects = b.go_on(&[]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
}

#[test]
fn unprotect_ends_a_frozen_vms_wait_for_a_backup() {
    let mut b = Bench::owning(Bench::registered_with("[protect]\nalone = \"freeze\"\n"));
    b.order(Order::Protect {
        backups: vec![host("b")],
    });
    b.go_on(&["b"]);
    let generation = b.record().view.generation;
    let why = "silent".to_string();
    b.step(Input::Report(Report::Lost(Loss {
        generation,
        host: Some(host("b")),
        unfit: false,
        why,
    })));
    let effects = b.go_on(&[]);
    assert!(effects.contains(&Effect::Tell(Tell::Freeze)), "{effects:?}");
    b.order(Order::Unprotect);
    let effects = b.go_on(&[]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    assert!(b.machine.summary().trouble.is_none());
}

#[test]
fn an_order_to_protect_takes_the_place_of_one_to_unprotect() {
    let mut b = Bench::protected(&["b"]);
    b.take();
    b.order(Order::Unprotect);
    b.order(Order::Protect {
        backups: vec![host("b")],
    });
    let effects = b.go_on(&["b"]);
    let answers = answers(&effects);
    assert!(
        matches!(answers[..], [Err(_), Ok(Answered::Done)]),
        "{answers:?}"
    );
    assert_eq!((b.chain(), b.wanted()), (vec!["b".into()], vec![host("b")]));
}

#[test]
fn l10_a_running_vm_is_configured_anew_and_its_chain_goes_on_in_place() {
    let mut b = Bench::protected(&["b", "c"]);
    let since = b.record().view.history.since;
    b.take();
    b.apply("on_crash = \"restart\"\n[protect]\nepoch_ms = 77\nmin_epoch_ms = 7\n");
    let effects = b.go_on(&["b", "c"]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    let record = b.record();
    assert!(record.shape.config_toml.contains("77"));
    assert_eq!(record.view.history.since, since, "nothing began anew");
    assert_eq!(b.chain(), ["b", "c"]);
    let epochs = Epochs {
        longest_ms: 77,
        shortest_ms: 7,
        idle_ms: 250,
        pause_percent: 10,
        pause_budget_us: 2000,
        verify_epochs: 0,
    };
    assert!(
        effects.contains(&Effect::Tell(Tell::Epochs(epochs))),
        "{effects:?}"
    );
}

#[test]
fn l10_other_backups_in_the_file_join_before_the_old_ones_leave() {
    let mut b = Bench::protected(&["b"]);
    let since = b.record().view.history.since;
    b.take();
    b.apply("[protect]\nbackups = [\"c\", \"d\"]\n");
    let effects = b.go_on(&["b", "c", "d"]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    assert_eq!(b.chain(), ["c", "d"]);
    assert_eq!(b.record().view.history.since, since, "never unprotected");
    // Whoever has no protection is not given one by a file that names backups.
    let mut b = Bench::owner();
    b.apply("[protect]\nbackups = [\"c\"]\n");
    b.go_on(&["c"]);
    assert_eq!(b.chain(), Vec::<String>::new());
    // And one whose file names none keeps those that it has.
    let mut b = Bench::protected(&["b"]);
    b.apply("[protect]\nalone = \"freeze\"\n");
    b.go_on(&["b"]);
    assert_eq!(b.chain(), ["b"]);
    assert!(b.machine.policy.freezes_alone, "counts at once");
}

#[test]
fn l10_l11_a_file_with_a_backup_that_does_not_exist_changes_nothing() {
    let mut b = Bench::protected(&["b"]);
    let before = b.record();
    b.take();
    b.apply("[protect]\nbackups = [\"nobody\"]\n");
    let effects = b.go_on(&["b"]);
    let answers = answers(&effects);
    assert!(
        matches!(answers[..], [Err(why)] if why.contains("\"nobody\"")),
        "{answers:?}"
    );
    assert_eq!(b.record(), before);
}

/// The news of the decision may be here before the answer; or that of another one, on which the question was not based.
#[test]
fn l10_whoever_applies_is_answered_whatever_comes_first() {
    let mut b = Bench::protected(&["b"]);
    b.take();
    b.apply("on_crash = \"restart\"\n");
    let effects = b.take();
    let asked = effects.iter().find_map(|effect| match effect {
        Effect::Propose { ask, command } => Some((*ask, command.clone())),
        _ => None,
    });
    let (ask, command) = asked.expect("a question");
    let record = b.master.apply(&command).unwrap();
    b.step(Input::Decided(record.clone()));
    assert_eq!(answers(&b.take()), [&Ok(Answered::Done)]);
    b.step(Input::Proposed {
        ask,
        result: Ok(record),
    });
    assert_eq!((answers(&b.out).len(), proposals(&b.out)), (0, 0));

    let mut b = Bench::protected(&["b"]);
    b.take();
    b.apply("on_crash = \"restart\"\n");
    b.take();
    let view = b.record().view;
    let other = Command::Reconfigure {
        vm: view.vm,
        expect: view.generation,
        by: host("a"),
        chain: view.chain,
        joining: None,
        anew: false,
    };
    let record = b.master.apply(&other).unwrap();
    b.step(Input::Decided(record));
    let effects = b.go_on(&["b"]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    assert!(b.record().shape.config_toml.contains("restart"));
}

/// Found by the simulation (seed 1438): the answer is lost, a backup follows what was decided, and refuses what its owner sends.
/// That is no other owner's generation.
#[test]
fn l10_an_owner_whose_question_is_not_answered_is_not_superseded_by_itself() {
    let mut b = Bench::protected(&["b"]);
    b.take();
    b.apply("on_crash = \"restart\"\n");
    let asked = b.take().into_iter().find_map(|effect| match effect {
        Effect::Propose { ask, command } => Some((ask, command)),
        _ => None,
    });
    let (ask, command) = asked.expect("a question");
    let decided = b.master.apply(&command).unwrap();
    let result = Err(Refusal::Unknown("no answer".into()));
    b.step(Input::Proposed { ask, result });
    let generation = decided.view.generation;
    b.step(Input::Report(Report::Refused { generation }));
    let effects = b.take();
    assert!(
        !effects.contains(&Effect::Kill) && effects.contains(&Effect::Read),
        "{effects:?}"
    );
    b.pass(SECOND);
    let effects = b.go_on(&["b"]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    assert_eq!(b.record(), decided);
}

#[test]
fn l10_an_owner_that_loses_the_vm_answers_whoever_applies() {
    let mut b = Bench::protected(&["b"]);
    b.take();
    b.apply("on_crash = \"restart\"\n");
    let view = b.record().view;
    let take_over = Command::TakeOver {
        vm: view.vm,
        expect: view.generation,
        by: host("b"),
        at: mark(view.generation.0, 1),
    };
    let record = b.master.apply(&take_over).unwrap();
    b.step(Input::Decided(record));
    let answers = answers(&b.out);
    assert!(matches!(answers[..], [Err(_)]), "{answers:?}");
}

#[test]
fn l10_a_vm_that_is_off_is_configured_anew_and_stays_off() {
    let mut b = Bench::owner();
    b.order(Order::Stop);
    b.decide();
    b.step(Input::Buried);
    b.take();
    let shape = Box::new(VmShape {
        vcpus: 4,
        config_toml: text_of("vcpus = 4\n"),
        ..b.record().shape
    });
    b.order(Order::Apply { shape });
    // Nothing else may be ordered meanwhile.
    b.apply("on_crash = \"restart\"\n");
    assert!(matches!(answers(&b.out)[..], [Err(_)]));
    b.out.retain(|effect| !matches!(effect, Effect::Answer(..)));
    let effects = b.go_on(&[]);
    assert_eq!(answers(&effects), [&Ok(Answered::Done)]);
    assert_eq!((b.record().shape.vcpus, b.record().life), (4, Life::Off));
    b.order(Order::Start);
    b.step(Input::DisksFound(Ok(())));
    b.decide();
    let boots = b.out.iter().find_map(|effect| match effect {
        Effect::Boot(record, _) => Some(record.shape.vcpus),
        _ => None,
    });
    assert_eq!(boots, Some(4));
}

/// The simulation's seed 46658: what was ordered while the backups went was looked at when something else happened, or never.
#[test]
fn what_is_ordered_while_a_vm_without_a_chain_is_unprotected_is_done_at_once() {
    let mut b = Bench::owner();
    b.take();
    b.order(Order::Unprotect);
    b.apply("on_crash = \"restart\"\n");
    b.decide();
    b.decide();
    let effects = b.take();
    assert_eq!(
        answers(&effects),
        [&Ok(Answered::Done), &Ok(Answered::Done)]
    );
}
