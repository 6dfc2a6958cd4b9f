//! The link to a successor: what it is sent when it connects, and what is kept for that.

use super::*;

/// The head of a chain of two that holds 5 to 7, of which 5 is acknowledged.
fn head() -> Bench {
    let mut head = Bench::new("b", &["b", "c"]);
    for epoch in 5..=7 {
        head.take(G2, epoch);
    }
    head.ack(G2, 5);
    head
}

fn unfit(actions: &[Action], saying: &str) -> bool {
    matches!(actions, [Action::Unfit(why)] if why.contains(saying))
}

#[test]
fn only_the_tail_tells_the_owner_and_acks_trim_sent() {
    let mut head = Bench::new("b", &["b", "c"]);
    head.take(G2, 5);
    assert_eq!(head.0.sent(), None, "a full one is not kept");
    head.take(G2, 6);
    head.take(G2, 7);
    assert_eq!(head.0.sent(), Some((Epoch(6), Epoch(7))));
    assert_eq!(head.ack(G2, 5), [Action::AckUp(Epoch(5))]);
    assert_eq!(
        head.ack(G2, 6),
        [Action::Trim(Epoch(6)), Action::AckUp(Epoch(6))]
    );
    assert_eq!(head.0.sent(), Some((Epoch(7), Epoch(7))));
    assert_eq!(head.ack(G2, 6), [], "a repeated ack says nothing new");
    assert_eq!(head.ack(G2, 8), [], "nobody can have what is not even here");
    assert_eq!(head.ack(Generation(1), 7), [], "another generation's");
    assert_eq!(
        head.ack(G2, 7),
        [Action::Trim(Epoch(7)), Action::AckUp(Epoch(7))]
    );
    assert_eq!(head.0.sent(), None);
}

#[test]
fn a_successor_is_sent_what_it_lacks_or_said_to_be_unfit() {
    let held = |epoch| Some(mark(G2, epoch));
    for epoch in 5..=7 {
        let mut head = head();
        let after = mark(G2, epoch);
        assert_eq!(
            head.up(G2, held(epoch)),
            [Action::Resend { after }, Action::SayComplete(Epoch(7))]
        );
        assert!(head.0.is_linked());
    }
    let other = Mark {
        digest: 99,
        ..mark(G2, 6)
    };
    let cases = [
        (held(4), "what is between"),
        (held(8), "what is between"),
        (Some(mark(Generation(1), 6)), "of generation 1"),
        (Some(other), "what is between"),
        (None, "it holds nothing"),
    ];
    for (holds, why) in cases {
        let mut head = head();
        let answer = head.up(G2, holds);
        assert!(unfit(&answer, why), "{holds:?}: {answer:?}");
        assert!(!head.0.is_linked());
        // It goes on without it, and keeps what the next one may need.
        head.take(G2, 8);
        assert_eq!(head.0.sent(), Some((Epoch(6), Epoch(8))));
    }
}

#[test]
fn in_the_middle_of_a_checkpoint_its_beginning_is_sent_too() {
    let mut head = head();
    head.begin(G2, 8, on(mark(G2, 7), G2));
    head.data(G2, 8);
    let after = mark(G2, 6);
    // The driver sends what is kept of the unfinished one as well; from here on it is forwarded.
    assert_eq!(
        head.up(G2, Some(after)),
        [Action::Resend { after }, Action::SayComplete(Epoch(7))]
    );
    assert_eq!(
        head.data(G2, 8),
        [Action::Forward, Action::Keep, Action::Stage]
    );
    head.end(G2, 8);
    assert_eq!(
        head.prepared(8),
        [Action::Forward, Action::Keep, Action::Commit(mark(G2, 8))]
    );
}

#[test]
fn a_successor_that_comes_during_the_first_checkpoint_has_missed_its_beginning() {
    let mut head = Bench::new("b", &["b", "c"]);
    head.begin(G2, 5, Base::Nothing);
    let answer = head.up(G2, None);
    assert!(unfit(&answer, "in the middle of the first"), "{answer:?}");
    head.end(G2, 5);
    assert_eq!(head.prepared(5), [Action::Commit(mark(G2, 5))]);
}

#[test]
fn who_connects_at_the_wrong_time_or_to_the_wrong_one_is_sent_nothing() {
    let fits = Some(mark(G2, 7));
    let mut other = head();
    assert_eq!(other.up(G3, fits), []);
    assert_eq!(other.up(Generation(1), fits), []);
    let mut failed = head();
    failed.store_fails(false);
    assert_eq!(failed.up(G2, fits), []);
    let mut frozen = head();
    frozen.0.freeze().unwrap();
    assert_eq!(frozen.up(G2, fits), []);
    let mut tail = Bench::new("c", &["b", "c"]);
    tail.take(G2, 7);
    assert_eq!(tail.up(G2, fits), [], "it has nobody after it");
    for bench in [other, failed, frozen, tail] {
        assert!(!bench.0.is_linked());
    }
}

#[test]
fn without_a_link_nothing_is_forwarded_and_everything_kept() {
    let mut head = head();
    head.up(G2, Some(mark(G2, 7)));
    head.step(Event::NextDown);
    let begun = head.begin(G2, 8, on(mark(G2, 7), G2));
    assert_eq!(begun[0], Action::Keep);
    assert_eq!(head.data(G2, 8), [Action::Keep, Action::Stage]);
    head.end(G2, 8);
    assert_eq!(
        head.prepared(8),
        [Action::Keep, Action::Commit(mark(G2, 8))]
    );
    assert_eq!(head.0.sent(), Some((Epoch(6), Epoch(8))));
}

#[test]
fn what_was_forgotten_cannot_be_sent_again_but_what_came_later_can() {
    let mut head = head();
    head.0.forget_sent();
    assert_eq!(head.0.sent(), None);
    assert!(unfit(&head.up(G2, Some(mark(G2, 6))), "what is between"));
    let after = mark(G2, 7);
    assert_eq!(
        head.up(G2, Some(after)),
        [Action::Resend { after }, Action::SayComplete(Epoch(7))],
        "it needs nothing that was forgotten"
    );
    head.step(Event::NextDown);
    head.take(G2, 8);
    head.take(G2, 9);
    assert!(unfit(&head.up(G2, Some(after)), "what is between"));
    let after = mark(G2, 8);
    assert_eq!(head.up(G2, Some(after))[0], Action::Resend { after });
}

#[test]
fn a_new_successor_is_brought_up_to_date_when_the_middle_is_lost() {
    let mut config = Config::begin(&["b", "c", "d"]);
    let mut head = Bench::of(&config, "b");
    for epoch in 5..=8 {
        head.take(G2, epoch);
    }
    head.ack(G2, 6);
    head.0.adopt(config.place(&["b", "d"]));
    assert_eq!(head.0.sent(), Some((Epoch(7), Epoch(8))), "kept");
    let after = mark(G2, 7);
    assert_eq!(
        head.up(G3, Some(after)),
        [Action::Resend { after }, Action::SayComplete(Epoch(8))]
    );
    assert_eq!(
        head.ack(G3, 8),
        [Action::Trim(Epoch(8)), Action::AckUp(Epoch(8))]
    );
}

#[test]
fn i5_one_that_is_not_complete_itself_does_not_say_so_to_another() {
    // c joined b, became a member, and got a successor before it had been sent everything.
    let mut config = Config::begin(&["b"]);
    config.join(&["b"], "c");
    let mut middle = Bench::of(&config, "c");
    middle.install(G3, mark(G2, 7));
    config.join(&["b", "c"], "d");
    middle.0.adopt(config.place(&["b", "c", "d"]));
    let now = config.view.generation;
    let after = mark(G2, 7);
    assert_eq!(middle.up(now, Some(after)), [Action::Resend { after }]);
    middle.begin(now, 8, on(after, G2));
    middle.end(now, 8);
    middle.prepared(8);
    assert_eq!(
        middle.complete(now, 8),
        [Action::SayComplete(Epoch(8))],
        "now it does"
    );
    assert_eq!(middle.0.state(), State::Serving);
}
