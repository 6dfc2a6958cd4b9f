//! A durable replica whose host was down.

use super::*;

fn returned(config: &Config, name: &str, holds: Mark) -> Bench {
    Bench(Replica::returned(host(name), &config.view, 3, holds))
}

/// Ticks until it suspects its predecessor, at most so many.
fn patience(bench: &mut Bench, most: u32) -> Option<u32> {
    (1..=most).find(|now| {
        let tick = Event::Tick {
            now_ms: u64::from(*now),
        };
        bench
            .step(tick)
            .iter()
            .any(|action| matches!(action, Action::Suspect(_)))
    })
}

#[test]
fn it_is_where_it_was_and_takes_over_if_nobody_comes() {
    let mut config = Config::begin(&["b", "c"]);
    let mut b = returned(&config, "b", mark(G2, 7));
    assert_eq!(
        (b.0.state(), b.0.hist()),
        (State::Serving, Some(mark(G2, 7)))
    );
    assert_eq!(b.0.resumable(), Some(mark(G2, 7)));
    // Not at once: the owner may be there, and only not have noticed yet that the replica is.
    let patient = patience(&mut b, 1000).unwrap();
    assert!(patient > 3 * 10, "{patient}");
    assert_eq!(b.0.freeze(), Ok(mark(G2, 7)));
    let view = config.take_over("b", mark(G2, 7)).clone();
    let mut c = returned(&config, "c", mark(G2, 6));
    assert!(
        c.0.state().could_resume() && c.0.acked() == Some(Epoch(6)),
        "it is the tail"
    );
    // From then on it hears its new owner as anybody does.
    c.step(Event::Heard { now_ms: 1 });
    assert!(patience(&mut c, 10).is_some());
    assert_eq!(view.chain.len(), 1);
}

#[test]
fn it_goes_on_from_what_it_holds() {
    let config = Config::begin(&["b"]);
    let mut b = returned(&config, "b", mark(G2, 7));
    let on = Base::On {
        base: mark(G2, 7),
        origin: G2,
    };
    b.begin(G2, 8, on);
    b.end(G2, 8);
    b.prepared(8);
    assert_eq!(b.0.hist(), Some(mark(G2, 8)));
}

#[test]
fn i5_what_is_no_part_of_the_history_any_more_is_forgotten() {
    let mut config = Config::begin(&["b", "c"]);
    config.take_over("b", mark(G2, 5));
    let c = returned(&config, "c", mark(G2, 6));
    assert_eq!((c.0.state(), c.0.hist()), (State::Syncing, None));
    // Nor what is from before output was let out unprotected.
    let mut config = Config::begin(&["b", "c"]);
    config.anew(&["b", "c"]);
    let b = returned(&config, "b", mark(G2, 9));
    assert_eq!((b.0.state(), b.0.resumable()), (State::Syncing, None));
}

#[test]
fn i5_a_member_that_was_none_in_between_is_not_resumed_from() {
    let mut config = Config::begin(&["b", "c"]);
    config.place(&["b"]);
    config.join(&["b"], "c");
    config.place(&["b", "c"]);
    // What it holds is from its first time as a member: more may have been acknowledged without it.
    let c = returned(&config, "c", mark(G2, 9));
    assert_eq!((c.0.state(), c.0.resumable()), (State::Joining, None));
    assert_eq!(
        c.0.acked(),
        None,
        "it does not acknowledge what it may lack"
    );
    // What was sent first while it was a member lies on top of all that.
    let since = config.view.generation;
    let c = returned(&config, "c", mark(since, 12));
    assert_eq!(c.0.resumable(), Some(mark(since, 12)));
}

#[test]
fn the_owner_may_hand_over_what_it_cannot_run() {
    let config = Config::begin(&["b", "c"]);
    let mut b = returned(&config, "b", mark(G2, 7));
    let yields = |epoch| Event::Yield {
        generation: G2,
        epoch: Epoch(epoch),
    };
    assert_eq!(b.step(yields(6)), [], "not what it was asked about");
    assert_eq!(b.step(yields(7)), [Action::Suspect(0)]);
}

#[test]
fn an_owner_that_dies_before_it_has_used_a_new_configuration_is_missed() {
    let mut config = Config::begin(&["b", "c"]);
    let mut c = returned(&config, "c", mark(G2, 7));
    c.step(Event::Heard { now_ms: 1 });
    // The head is lost, the owner asks for a chain without it, and dies as well.
    c.0.adopt(config.place(&["c"]));
    assert_eq!(c.0.state(), State::LastSurvivor);
    let patient = patience(&mut c, 1000).unwrap();
    assert!(
        patient > 3 * 10,
        "the owner is given time to come: {patient}"
    );
    assert_eq!(c.0.freeze(), Ok(mark(G2, 7)));
}
