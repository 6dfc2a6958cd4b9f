//! FIELD H16: a chain that begins. Until its first checkpoint is acknowledged the owner lets its output out, so what was
//! sent by then is not resumed from.

use super::*;

fn flowing(epoch: u64) -> Mark {
    Mark {
        held: false,
        ..mark(G2, epoch)
    }
}

/// Takes a whole checkpoint, first sent while output flowed.
fn take_flowing(bench: &mut Bench, epoch: u64) -> Vec<Action> {
    let base = match bench.0.hist() {
        None => Base::Nothing,
        Some(hist) => on(hist, G2),
    };
    bench.begin_with(G2, epoch, base, false);
    bench.end(G2, epoch);
    bench.prepared(epoch)
}

#[test]
fn what_is_from_before_output_was_held_is_acknowledged_and_not_resumed_from() {
    let mut tail = Bench::new("b", &["b"]);
    let says = |epoch| {
        [
            Action::Commit(flowing(epoch)),
            Action::AckOwner(Epoch(epoch)),
            Action::AckUp(Epoch(epoch)),
        ]
    };
    for epoch in [5, 6] {
        assert_eq!(take_flowing(&mut tail, epoch), says(epoch));
        assert_eq!(tail.0.state(), State::Syncing);
        let held = flowing(epoch);
        assert_eq!(tail.0.freeze(), Err(FreezeError::Flowing(held)));
        assert_eq!(tail.0.resumable(), None);
    }
    tail.step(Event::Heard { now_ms: 0 });
    assert_eq!(tail.ticks(1000), [], "nor does it suspect anybody");
    assert_eq!(tail.take(G2, 7).len(), 3);
    assert_eq!(tail.0.state(), State::LastSurvivor);
    assert_eq!(tail.0.freeze(), Ok(mark(G2, 7)));
}

#[test]
fn output_that_is_held_does_not_flow_again_in_the_same_history() {
    let mut tail = Bench::new("b", &["b"]);
    tail.take(G2, 5);
    let answer = tail.begin_with(G2, 6, on(mark(G2, 5), G2), false);
    assert!(fails(&answer, "not held"), "{answer:?}");
}

#[test]
fn in_place_a_chain_that_has_begun_goes_on_and_is_complete_with_the_first_that_is_held() {
    let mut config = Config::begin(&["b", "c"]);
    let mut head = Bench::of(&config, "b");
    take_flowing(&mut head, 5);
    take_flowing(&mut head, 6);
    head.0.adopt(config.place(&["b"]));
    assert_eq!(head.0.state(), State::Syncing, "the owner still speaks");
    // That it has everything does not make it one to resume from.
    head.complete(G3, 6);
    assert_eq!(head.0.freeze(), Err(FreezeError::Flowing(flowing(6))));
    // One that was begun before, and is sent again, keeps its name.
    head.begin(G3, 7, on(flowing(6), G2));
    head.end(G3, 7);
    head.prepared(7);
    assert_eq!(head.0.freeze(), Ok(mark(G2, 7)));
}

#[test]
fn a_joining_replica_is_told_with_what_it_is_filled_with() {
    let mut config = Config::begin(&["b"]);
    config.join(&["b"], "c");
    let mut joining = Bench::of(&config, "c");
    joining.install(G3, flowing(6));
    joining.0.adopt(config.place(&["b", "c"]));
    joining.complete(G4, 6);
    assert_eq!(joining.0.state(), State::Syncing);
    joining.take(G4, 7);
    assert_eq!(joining.0.state(), State::Serving);
}

#[test]
fn one_that_comes_back_with_what_its_store_has_knows_it_from_there() {
    let config = Config::begin(&["b"]);
    for (held, can) in [(flowing(6), false), (mark(G2, 6), true)] {
        let mut back = Replica::returned(host("b"), &config.view, 3, held);
        assert_eq!(back.freeze().is_ok(), can, "{held:?}");
    }
}
