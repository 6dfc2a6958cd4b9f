//! A takeover that was not granted: whatever was not taken meanwhile is asked for again. Whoever said it may wait for an
//! answer, and say nothing more.

use super::*;

/// The middle of three, holding 5 and 6, of which 5 is acknowledged; its takeover has been refused while it missed what
/// `meanwhile` does.
fn refused(meanwhile: impl FnOnce(&mut Bench)) -> (Bench, Vec<Action>) {
    let mut middle = Bench::new("c", &["b", "c", "d"]);
    middle.take(G2, 5);
    middle.up(G2, Some(mark(G2, 5)));
    middle.take(G2, 6);
    middle.ack(G2, 5);
    middle.0.freeze().unwrap();
    meanwhile(&mut middle);
    let actions = middle.unfreeze();
    assert_eq!(middle.0.state(), State::Serving, "nothing is lost yet");
    (middle, actions)
}

#[test]
fn the_next_replica_is_asked_for_its_acks_again() {
    let (mut middle, actions) = refused(|middle| assert_eq!(middle.ack(G2, 6), []));
    assert_eq!(actions, [Action::AskNext]);
    middle.step(Event::NextDown);
    let after = mark(G2, 6);
    assert_eq!(
        middle.up(G2, Some(after)),
        [Action::Resend { after }, Action::SayComplete(Epoch(6))]
    );
    // A new connection begins with what is acknowledged.
    assert_eq!(
        middle.ack(G2, 6),
        [Action::Trim(Epoch(6)), Action::AckUp(Epoch(6))]
    );
    assert_eq!(middle.0.acked_up(), Some(Epoch(6)));
}

#[test]
fn the_predecessor_is_asked_for_what_it_sent() {
    let next = on(mark(G2, 6), G2);
    for (what, meanwhile) in [
        (
            "a checkpoint",
            Event::Begin {
                generation: G2,
                epoch: Epoch(7),
                base: next,
                held: true,
            },
        ),
        (
            "that this was all",
            Event::Complete {
                generation: G2,
                epoch: Epoch(6),
            },
        ),
    ] {
        let (mut middle, actions) = refused(|middle| drop(middle.step(meanwhile)));
        assert_eq!(actions, [Action::AskNext, Action::AskPrevious], "{what}");
        // It comes again.
        middle.take(G2, 7);
        assert_eq!(middle.0.hist(), Some(mark(G2, 7)), "{what}");
    }
    // One that was half here when it froze, too.
    let mut tail = Bench::new("d", &["c", "d"]);
    tail.take(G2, 5);
    tail.begin(G2, 6, on(mark(G2, 5), G2));
    tail.0.freeze().unwrap();
    assert_eq!(
        tail.unfreeze(),
        [Action::AskPrevious],
        "it has nobody after it"
    );
}

#[test]
fn what_is_of_another_generation_or_says_nothing_is_not_asked_for() {
    let (_, actions) = refused(|middle| {
        middle.begin(Generation(1), 6, on(mark(G2, 5), G2));
        middle.complete(Generation(1), 6);
        middle.step(Event::Heartbeat { generation: G2 });
    });
    assert_eq!(actions, [Action::AskNext]);
}

#[test]
fn an_owner_that_has_stopped_meanwhile_is_succeeded_to() {
    let mut head = Bench::new("b", &["b", "c"]);
    head.take(G2, 5);
    for (epoch, wanted) in [
        (5, vec![Action::AskNext, Action::Suspect(0)]),
        (4, vec![Action::AskNext]),
    ] {
        head.0.freeze().unwrap();
        let (generation, epoch) = (G2, Epoch(epoch));
        assert_eq!(head.step(Event::Yield { generation, epoch }), []);
        assert_eq!(head.unfreeze(), wanted);
    }
    assert_eq!(head.unfreeze(), [], "it is not frozen");
}

#[test]
fn a_tail_asks_the_joining_replica_again() {
    let mut config = Config::begin(&["b"]);
    let mut tail = Bench::of(&config, "b");
    tail.take(G2, 5);
    tail.0.adopt(config.join(&["b"], "c"));
    tail.up(G3, Some(mark(G2, 5)));
    tail.0.freeze().unwrap();
    assert_eq!(tail.ack(G3, 5), []);
    assert_eq!(tail.unfreeze(), [Action::AskNext]);
    tail.step(Event::NextDown);
    tail.up(G3, Some(mark(G2, 5)));
    assert_eq!(tail.ack(G3, 5), [Action::JoinerReady]);
}
