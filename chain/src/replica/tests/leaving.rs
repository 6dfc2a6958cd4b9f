//! No state is final: from each of them a newer generation leads on, to a replica that can be resumed from.

use super::*;

/// `b`'s replica in each state that there is, and the configuration that it follows.
fn every_state() -> Vec<(&'static str, State, Config, Bench)> {
    let mut all = Vec::new();
    let serving = || {
        let config = Config::begin(&["b", "c"]);
        let mut bench = Bench::of(&config, "b");
        bench.take(G2, 5);
        bench.take(G2, 6);
        (config, bench)
    };

    let (config, bench) = serving();
    all.push(("serving", State::Serving, config, bench));

    let (config, mut bench) = serving();
    bench.begin(G2, 7, on(mark(G2, 6), G2));
    all.push(("in the middle of one", State::Serving, config, bench));

    let (mut config, mut bench) = serving();
    bench.0.adopt(config.place(&["b"]));
    all.push(("alone", State::LastSurvivor, config, bench));

    let (mut config, mut bench) = serving();
    bench.0.adopt(config.place(&["c"]));
    all.push(("left out", State::Offline, config, bench));

    let config = Config::begin(&["b", "c"]);
    let bench = Bench::of(&config, "b");
    all.push(("empty", State::Syncing, config, bench));

    let config = Config::begin(&["b", "c"]);
    let mut bench = Bench::of(&config, "b");
    bench.begin(G2, 5, Base::Nothing);
    all.push(("in the first one", State::Syncing, config, bench));

    // Its host came back without a content, and the owner goes on in place: it can only be left out.
    let mut config = Config::begin(&["b", "c"]);
    config.place(&["b", "c"]);
    let bench = Bench::of(&config, "b");
    all.push(("empty in place", State::Syncing, config, bench));

    let joining = || {
        let mut config = Config::begin(&["c"]);
        config.join(&["c"], "b");
        let bench = Bench::of(&config, "b");
        (config, bench)
    };
    let (config, bench) = joining();
    all.push(("to be filled", State::Joining, config, bench));

    let (config, mut bench) = joining();
    bench.begin(G3, 0, Base::Install);
    bench.data(G3, 0);
    all.push(("half filled", State::Joining, config, bench));

    let (config, mut bench) = joining();
    bench.install(G3, mark(G2, 6));
    all.push(("filled", State::Joining, config, bench));

    let (mut config, mut bench) = joining();
    bench.install(G3, mark(G2, 6));
    bench.0.adopt(config.place(&["c", "b"]));
    all.push(("not complete", State::Joining, config, bench));

    let (config, mut bench) = serving();
    bench.0.freeze().unwrap();
    all.push(("frozen", State::Frozen, config, bench));

    for (name, damaged) in [("failed", false), ("damaged", true)] {
        let (config, mut bench) = serving();
        bench.begin(G2, 7, on(mark(G2, 6), G2));
        bench.store_fails(damaged);
        all.push((name, State::Failed, config, bench));
        let (config, mut bench) = joining();
        bench.begin(G3, 0, Base::Install);
        bench.store_fails(damaged);
        all.push((name, State::Failed, config, bench));
    }
    for (name, state, config, bench) in &all {
        assert_eq!(bench.0.state(), *state, "{name}");
        assert_eq!(bench.0.generation(), config.view.generation, "{name}");
    }
    all
}

#[test]
fn the_table_has_every_state() {
    let has = |state| every_state().iter().any(|(_, s, ..)| *s == state);
    // So that a new one is not forgotten.
    let next = |state| match state {
        State::Offline => Some(State::Joining),
        State::Joining => Some(State::Syncing),
        State::Syncing => Some(State::Serving),
        State::Serving => Some(State::LastSurvivor),
        State::LastSurvivor => Some(State::Frozen),
        State::Frozen => Some(State::Failed),
        State::Failed => None,
    };
    let mut state = Some(State::Offline);
    while let Some(now) = state {
        assert!(has(now), "{now:?}");
        state = next(now);
    }
}

#[test]
fn from_every_state_a_chain_that_begins_anew_leads_on() {
    for (name, _, mut config, mut bench) in every_state() {
        bench.0.adopt(config.anew(&["b"]));
        assert_eq!(bench.0.state(), State::Syncing, "{name}");
        let now = config.view.generation;
        assert_eq!(bench.take(now, 20).len(), 3, "{name}");
        assert_eq!(bench.0.state(), State::LastSurvivor, "{name}");
        assert_eq!(bench.0.freeze(), Ok(mark(now, 20)), "{name}");
    }
}

#[test]
fn from_every_state_being_left_out_and_joining_again_leads_on() {
    for (name, _, mut config, mut bench) in every_state() {
        let in_place = config.view.position(&host("c")).is_some();
        bench.0.adopt(config.reconfigure(&["c"], None, !in_place));
        assert_eq!(bench.0.state(), State::Offline, "{name}");
        bench.0.adopt(config.join(&["c"], "b"));
        assert_eq!(bench.0.state(), State::Joining, "{name}");
        let now = config.view.generation;
        let filled = mark(config.view.history.since, 9);
        bench.install(now, filled);
        bench.0.adopt(config.place(&["c", "b"]));
        assert_eq!(bench.0.state(), State::Joining, "{name}");
        bench.complete(config.view.generation, 9);
        assert_eq!(bench.0.state(), State::Serving, "{name}");
        assert_eq!(bench.0.freeze(), Ok(filled), "{name}");
    }
}

#[test]
fn from_every_state_another_ones_takeover_leads_on() {
    for (name, state, mut config, mut bench) in every_state() {
        if state == State::LastSurvivor {
            // Nobody else is there to take over.
            continue;
        }
        bench.0.adopt(config.take_over("c", mark(G2, 4)));
        // c was before it, or after it, or the only member: then it is a successor's, or left out.
        let member = config.view.position(&host("b")).is_some();
        assert_eq!(bench.0.state() == State::Offline, !member, "{name}");
        assert_ne!(bench.0.state(), State::Failed, "{name}");
        bench.0.adopt(config.anew(&["b"]));
        bench.take(config.view.generation, 20);
        assert_eq!(bench.0.state(), State::LastSurvivor, "{name}");
    }
}

#[test]
fn from_every_state_silence_is_counted_anew() {
    for (name, _, mut config, mut bench) in every_state() {
        bench.step(Event::Heard { now_ms: 0 });
        bench.ticks(100);
        bench.0.adopt(config.anew(&["b"]));
        bench.take(config.view.generation, 20);
        assert_eq!(bench.ticks(100), [], "{name}: nobody has spoken yet");
        bench.step(Event::Heard { now_ms: 0 });
        assert_eq!(bench.ticks(100).len(), 1, "{name}");
    }
}
