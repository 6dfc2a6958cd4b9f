//! A replica that joins at the tail: filled, made a member, complete. Both ends.

use super::*;

/// `b`, alone in its chain with checkpoints 5 and 6, and `c` that is to join it in generation 3.
fn pair() -> (Config, Bench, Bench) {
    let mut config = Config::begin(&["b"]);
    let mut tail = Bench::of(&config, "b");
    tail.take(G2, 5);
    tail.take(G2, 6);
    tail.0.adopt(config.join(&["b"], "c"));
    let joiner = Bench::of(&config, "c");
    (config, tail, joiner)
}

fn fed(bench: &mut Bench, generation: Generation) -> Vec<Action> {
    bench.step(Event::JoinerFed { generation })
}

#[test]
fn a_tail_goes_on_while_it_fills_a_joining_replica() {
    let (_, mut tail, _) = pair();
    assert_eq!(tail.up(G3, None), [Action::Feed]);
    assert!(!tail.0.is_linked());
    let committed = |epoch| {
        vec![
            Action::Commit(mark(G3, epoch)),
            Action::AckOwner(Epoch(epoch)),
            Action::AckUp(Epoch(epoch)),
        ]
    };
    assert_eq!(tail.take(G3, 7), committed(7));
    assert_eq!(
        tail.0.sent(),
        None,
        "nothing is kept for one that is filled"
    );
    // In the middle of a checkpoint is not the moment, and another generation's filling is not this one's.
    tail.begin(G3, 8, on(mark(G3, 7), G3));
    assert_eq!(fed(&mut tail, G3), []);
    tail.end(G3, 8);
    assert_eq!(tail.prepared(8), committed(8));
    assert_eq!(fed(&mut tail, G2), []);
    assert!(!tail.0.is_linked());
    assert_eq!(fed(&mut tail, G3), [Action::TrimAll]);
    assert!(tail.0.is_linked());
    // From here on it is a successor, but for the acks: nobody waits for its.
    let begun = tail.begin(G3, 9, on(mark(G3, 8), G3));
    assert_eq!(begun[..2], [Action::Forward, Action::Keep]);
    tail.end(G3, 9);
    let actions = tail.prepared(9);
    assert_eq!(actions[..2], [Action::Forward, Action::Keep]);
    assert_eq!(actions[2..], committed(9));
    assert_eq!(tail.0.sent(), Some((Epoch(9), Epoch(9))));
    // An old ack says nothing of what it was filled with.
    assert_eq!(tail.ack(G3, 7), []);
    assert_eq!(tail.ack(G3, 8), [Action::JoinerReady]);
    assert_eq!(tail.ack(G3, 8), [], "once");
    assert_eq!(tail.ack(G3, 9), [Action::Trim(Epoch(9))]);
    assert_eq!(tail.0.acked(), Some(Epoch(9)));
}

#[test]
fn a_joining_replica_that_holds_the_same_already_is_not_filled() {
    let (_, mut tail, _) = pair();
    let after = mark(G2, 6);
    assert_eq!(tail.up(G3, Some(after)), [Action::Resend { after }]);
    assert!(tail.0.is_linked());
    assert_eq!(tail.ack(G3, 6), [Action::JoinerReady]);
    // In the middle of a checkpoint its beginning is gone.
    let (_, mut tail, _) = pair();
    tail.begin(G3, 7, on(after, G3));
    assert_eq!(tail.up(G3, Some(after)), [Action::Feed]);
    for holds in [mark(G2, 5), mark(G3, 6), mark(G2, 7)] {
        let (_, mut tail, _) = pair();
        assert_eq!(tail.up(G3, Some(holds)), [Action::Feed], "{holds}");
    }
}

#[test]
fn a_link_to_a_joining_replica_that_breaks_is_begun_again() {
    let (_, mut tail, _) = pair();
    tail.up(G3, None);
    fed(&mut tail, G3);
    tail.take(G3, 7);
    tail.step(Event::NextDown);
    let actions = tail.take(G3, 8);
    let sent = [Action::Forward, Action::Keep];
    assert!(!sent.iter().any(|a| actions.contains(a)), "{actions:?}");
    assert_eq!(tail.ack(G3, 7), [], "from a connection that is no more");
    assert_eq!(tail.up(G3, Some(mark(G3, 7))), [Action::Feed]);
    assert_eq!(fed(&mut tail, G3), [Action::TrimAll]);
    assert_eq!(tail.ack(G3, 8), [Action::JoinerReady]);
}

#[test]
fn what_is_kept_for_a_joining_replica_has_no_holes() {
    let (_, mut tail, _) = pair();
    tail.up(G3, None);
    fed(&mut tail, G3);
    tail.take(G3, 7);
    tail.step(Event::NextDown);
    // 8 is not kept, so 7 is of no use any more: an owner would send it to a head and go on with 9.
    tail.begin(G3, 8, on(mark(G3, 7), G3));
    tail.end(G3, 8);
    let actions = tail.prepared(8);
    assert!(actions.contains(&Action::TrimAll), "{actions:?}");
    assert_eq!(tail.0.sent(), None);
}

#[test]
fn a_joining_replica_is_at_exactly_the_checkpoint_it_was_filled_with() {
    let (_, _, mut joiner) = pair();
    assert_eq!(joiner.0.state(), State::Joining);
    let begun = joiner.begin(G3, 0, Base::Install);
    let open = Action::Open {
        epoch: Epoch::ZERO,
        full: true,
    };
    assert_eq!(begun, [Action::TrimAll, open]);
    assert_eq!(joiner.data(G3, 0), [Action::Stage]);
    let installed = mark(G2, 6);
    assert_eq!(
        joiner.install(G3, installed),
        [Action::Commit(installed), Action::AckUp(Epoch(6))],
        "the owner waits for the tail only"
    );
    assert_eq!(joiner.0.hist(), Some(installed));
    assert_eq!(joiner.0.acked_up(), Some(Epoch(6)));
    assert_eq!(
        joiner.take(G3, 7),
        [Action::Commit(mark(G3, 7)), Action::AckUp(Epoch(7))]
    );
    // Filled again, it is empty until it is full.
    joiner.begin(G3, 0, Base::Install);
    assert_eq!(joiner.0.hist(), None);
    joiner.install(G3, mark(G3, 9));
    assert_eq!(joiner.0.hist(), Some(mark(G3, 9)));
}

#[test]
fn i5_a_joining_replica_cannot_be_resumed_from() {
    let (mut config, _, mut joiner) = pair();
    assert_eq!(joiner.0.freeze(), Err(FreezeError::Empty));
    joiner.install(G3, mark(G2, 6));
    let held = mark(G2, 6);
    assert_eq!(joiner.0.freeze(), Err(FreezeError::Joining(held)));
    joiner.step(Event::Heard { now_ms: 0 });
    assert_eq!(joiner.ticks(100), [], "nor does it ask to be");
    // As a member neither, before it is sure to have everything that was acknowledged before it was one.
    joiner.0.adopt(config.place(&["b", "c"]));
    assert_eq!(joiner.0.state(), State::Joining);
    assert_eq!(joiner.0.freeze(), Err(FreezeError::Joining(held)));
    assert_eq!(joiner.0.acked(), None);
    assert_eq!(joiner.ticks(100), []);
    joiner.begin(G4, 7, on(held, G3));
    joiner.end(G4, 7);
    joiner.prepared(7);
    let held = mark(G3, 7);
    assert_eq!(joiner.0.freeze(), Err(FreezeError::Joining(held)));
    assert_eq!(
        joiner.complete(G4, 7),
        [Action::AckOwner(Epoch(7)), Action::AckUp(Epoch(7))]
    );
    assert_eq!(joiner.0.state(), State::Serving);
    assert_eq!(joiner.0.freeze(), Ok(held));
}

#[test]
fn i5_complete_means_to_have_everything() {
    let (mut config, _, mut joiner) = pair();
    joiner.install(G3, mark(G2, 6));
    assert_eq!(joiner.complete(G3, 6), [], "no member yet");
    joiner.0.adopt(config.place(&["b", "c"]));
    assert!(joiner.0.freeze().is_err());
    let lacks = joiner.complete(G4, 8);
    assert!(fails(&lacks, "8, which never came"), "{lacks:?}");
    assert!(joiner.0.freeze().is_err());
}

#[test]
fn i5_who_was_out_for_a_generation_is_no_complete_member_for_having_been_one() {
    for skips in [false, true] {
        let mut config = Config::begin(&["b", "c"]);
        let mut tail = Bench::of(&config, "c");
        tail.take(G2, 5);
        assert_eq!(tail.0.state(), State::Serving);
        for step in 0..3 {
            match step {
                0 => config.place(&["b"]),
                1 => config.join(&["b"], "c"),
                _ => config.place(&["b", "c"]),
            };
            if !skips {
                tail.0.adopt(&config.view);
            }
        }
        tail.0.adopt(&config.view);
        assert_eq!(tail.0.hist(), Some(mark(G2, 5)), "it is of this history");
        let joining = FreezeError::Joining(mark(G2, 5));
        assert_eq!(
            tail.0.freeze(),
            Err(joining),
            "6 may have been acknowledged"
        );
    }
}

#[test]
fn the_old_tail_brings_the_new_one_up_to_date() {
    let (mut config, mut tail, mut joiner) = pair();
    tail.up(G3, None);
    fed(&mut tail, G3);
    joiner.install(G3, mark(G2, 6));
    tail.ack(G3, 6);
    for epoch in 7..=9 {
        tail.take(G3, epoch);
    }
    joiner.take(G3, 7);
    let promoted = config.place(&["b", "c"]);
    tail.0.adopt(promoted);
    joiner.0.adopt(promoted);
    assert_eq!(tail.0.acked(), Some(Epoch(9)), "that it has said");
    assert_eq!(tail.0.sent(), Some((Epoch(7), Epoch(9))));
    let after = mark(G3, 7);
    assert_eq!(
        tail.up(G4, joiner.0.hist()),
        [Action::Resend { after }, Action::SayComplete(Epoch(9))]
    );
    for epoch in 8..=9 {
        joiner.begin(G4, epoch, on(mark(G3, epoch - 1), G3));
        joiner.end(G4, epoch);
        assert!(joiner.0.freeze().is_err());
        joiner.prepared(epoch);
    }
    joiner.complete(G4, 9);
    assert_eq!(joiner.0.freeze(), Ok(mark(G3, 9)));
    // Only the tail speaks to the owner.
    let actions = tail.take(G4, 10);
    assert!(!actions.contains(&Action::AckOwner(Epoch(10))));
}

#[test]
fn that_a_joining_replica_is_ready_is_said_again_to_who_may_have_missed_it() {
    let (_, mut tail, _) = pair();
    tail.up(G3, None);
    assert_eq!(tail.complete(G3, 6), lost_ack(6), "it is not ready yet");
    fed(&mut tail, G3);
    assert_eq!(tail.complete(G3, 6), lost_ack(6));
    assert_eq!(tail.ack(G3, 6), [Action::JoinerReady]);
    // The predecessor has connected again: what it was told before may have been lost on the way.
    let mut said = lost_ack(6);
    said.push(Action::JoinerReady);
    assert_eq!(tail.complete(G3, 6), said);
    tail.step(Event::NextDown);
    assert_eq!(tail.complete(G3, 6), lost_ack(6), "it is not any more");
}

fn lost_ack(epoch: u64) -> Vec<Action> {
    vec![Action::AckOwner(Epoch(epoch)), Action::AckUp(Epoch(epoch))]
}

#[test]
fn only_a_joining_replica_is_filled_and_only_with_what_belongs_to_the_history() {
    let mut tail = Bench::new("b", &["b"]);
    let answer = tail.begin(G2, 0, Base::Install);
    assert!(fails(&answer, "only a joining replica"), "{answer:?}");
    let end = |bench: &mut Bench, epoch, install| {
        bench.step(Event::End {
            generation: G3,
            epoch: Epoch(epoch),
            install,
        })
    };
    // Before the history began.
    let (_, _, mut joiner) = pair();
    joiner.begin(G3, 0, Base::Install);
    let answer = end(&mut joiner, 0, Some(mark(Generation(1), 6)));
    assert!(fails(&answer, "does not fit its beginning"), "{answer:?}");
    // Without saying with what.
    let (_, _, mut joiner) = pair();
    joiner.begin(G3, 0, Base::Install);
    let answer = end(&mut joiner, 0, None);
    assert!(fails(&answer, "does not fit its beginning"), "{answer:?}");
    // A checkpoint that says at its end that it was no checkpoint.
    let (_, _, mut joiner) = pair();
    joiner.install(G3, mark(G2, 6));
    joiner.begin(G3, 7, on(mark(G2, 6), G3));
    let answer = end(&mut joiner, 7, Some(mark(G3, 7)));
    assert!(fails(&answer, "does not fit its beginning"), "{answer:?}");
}
