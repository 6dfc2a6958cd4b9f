//! The machine alone, event by event. Its views come from the master's own state machine: no configuration is tested that
//! cannot come.

mod flowing;
mod joining;
mod leaving;
mod next;
mod returned;
mod unfreezing;

use super::*;
use crate::master::{Command, MasterState};
use crate::view::{Member, VmShape};
use checkpoint::VmId;

const G2: Generation = Generation(2);
const G3: Generation = Generation(3);
const G4: Generation = Generation(4);

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn members(names: &[&str]) -> Vec<Member> {
    let member = |name: &&str| Member::new(host(name), "127.0.0.1:1".parse().unwrap());
    names.iter().map(member).collect()
}

/// A VM at the master, owned by `a` at first.
struct Config {
    master: MasterState,
    view: View,
}

impl Config {
    /// Generation 2: a chain that begins.
    fn begin(chain: &[&str]) -> Self {
        let mut master = MasterState::default();
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: String::new(),
        };
        let register = Command::Register {
            vm: VmId(1),
            name: "vm".into(),
            owner: host("a"),
            shape,
            life: crate::view::Life::On,
        };
        let view = master.apply(&register).unwrap().view;
        let mut config = Self { master, view };
        config.anew(chain);
        config
    }

    fn vm(&self) -> VmId {
        self.view.vm
    }

    fn decide(&mut self, command: &Command) -> &View {
        self.view = self.master.apply(command).unwrap().view;
        &self.view
    }

    fn reconfigure(&mut self, chain: &[&str], joining: Option<&str>, anew: bool) -> &View {
        let command = Command::Reconfigure {
            vm: self.vm(),
            expect: self.view.generation,
            by: self.view.owner.clone(),
            chain: members(chain),
            joining: joining.map(|name| members(&[name]).remove(0)),
            anew,
        };
        self.decide(&command)
    }

    fn anew(&mut self, chain: &[&str]) -> &View {
        self.reconfigure(chain, None, true)
    }

    fn place(&mut self, chain: &[&str]) -> &View {
        self.reconfigure(chain, None, false)
    }

    fn join(&mut self, chain: &[&str], joining: &str) -> &View {
        self.reconfigure(chain, Some(joining), false)
    }

    fn take_over(&mut self, by: &str, at: Mark) -> &View {
        let command = Command::TakeOver {
            vm: self.vm(),
            expect: self.view.generation,
            by: host(by),
            at,
        };
        self.decide(&command)
    }
}

/// A machine, and what it answered.
struct Bench(Replica);

impl Bench {
    /// `name`'s replica in a chain that begins with generation 2.
    fn new(name: &str, chain: &[&str]) -> Self {
        Self::of(&Config::begin(chain), name)
    }

    fn of(config: &Config, name: &str) -> Self {
        Self(Replica::new(host(name), &config.view, 3))
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = VecDeque::new();
        self.0.step(event, &mut actions);
        actions.into()
    }

    fn begin(&mut self, generation: Generation, epoch: u64, base: Base) -> Vec<Action> {
        self.begin_with(generation, epoch, base, true)
    }

    fn begin_with(
        &mut self,
        generation: Generation,
        epoch: u64,
        base: Base,
        held: bool,
    ) -> Vec<Action> {
        self.step(Event::Begin {
            generation,
            epoch: Epoch(epoch),
            base,
            held,
        })
    }

    fn data(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        let epoch = Epoch(epoch);
        self.step(Event::Data { generation, epoch })
    }

    fn end(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        self.step(Event::End {
            generation,
            epoch: Epoch(epoch),
            install: None,
        })
    }

    fn prepared(&mut self, epoch: u64) -> Vec<Action> {
        let digest = epoch as u32;
        self.step(Event::Prepared { digest })
    }

    /// A whole checkpoint on top of what is held, or a full one, prepared without trouble: what followed its end.
    fn take(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        let base = match self.0.hist() {
            None => Base::Nothing,
            Some(held) => on(held, generation),
        };
        let full = base == Base::Nothing;
        let begun = self.begin(generation, epoch, base);
        let open = Action::Open {
            epoch: Epoch(epoch),
            full,
        };
        assert_eq!(begun.last(), Some(&open), "{begun:?}");
        let data = self.data(generation, epoch);
        assert_eq!(data.last(), Some(&Action::Stage), "{data:?}");
        let epoch_named = Epoch(epoch);
        let prepare = Action::Prepare { epoch: epoch_named };
        assert_eq!(self.end(generation, epoch), [prepare]);
        self.prepared(epoch)
    }

    /// A connection to the next replica stands.
    fn up(&mut self, generation: Generation, holds: Option<Mark>) -> Vec<Action> {
        self.step(Event::NextUp { generation, holds })
    }

    fn ack(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        let epoch = Epoch(epoch);
        self.step(Event::NextAck { generation, epoch })
    }

    fn complete(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        let epoch = Epoch(epoch);
        self.step(Event::Complete { generation, epoch })
    }

    fn store_fails(&mut self, damaged: bool) -> Vec<Action> {
        let why = "fsync".into();
        self.step(Event::StoreFailed { why, damaged })
    }

    /// A joining replica is filled: it then holds `mark`. What followed the end.
    fn install(&mut self, generation: Generation, mark: Mark) -> Vec<Action> {
        self.begin(generation, 0, Base::Install);
        self.data(generation, 0);
        let prepare = self.step(Event::End {
            generation,
            epoch: Epoch::ZERO,
            install: Some(mark),
        });
        assert_eq!(prepare, [Action::Prepare { epoch: mark.epoch }]);
        // The digest of its frames is not that of the checkpoint.
        self.step(Event::Prepared { digest: 0xffff })
    }

    fn unfreeze(&mut self) -> Vec<Action> {
        self.step(Event::Unfreeze)
    }

    fn ticks(&mut self, count: u64) -> Vec<Action> {
        (1..=count)
            .flat_map(|n| self.step(Event::Tick { now_ms: n * 10 }))
            .collect()
    }
}

fn on(base: Mark, origin: Generation) -> Base {
    Base::On { base, origin }
}

fn mark(generation: Generation, epoch: u64) -> Mark {
    Mark {
        generation,
        epoch: Epoch(epoch),
        digest: epoch as u32,
        held: true,
    }
}

/// Whether the only answer is that the replica has failed, and says so.
fn fails(actions: &[Action], saying: &str) -> bool {
    matches!(actions, [Action::Failed(why)] if why.contains(saying))
}

#[test]
fn i1_a_tail_acknowledges_only_what_has_been_prepared_and_committed() {
    let mut tail = Bench::new("c", &["b", "c"]);
    assert_eq!(
        tail.take(G2, 5),
        [
            Action::Commit(mark(G2, 5)),
            Action::AckOwner(Epoch(5)),
            Action::AckUp(Epoch(5))
        ]
    );
    // An end without its beginning, or of another checkpoint, acknowledges nothing.
    assert_eq!(tail.end(G2, 6), []);
    tail.begin(G2, 6, on(mark(G2, 5), G2));
    assert_eq!(tail.end(G2, 7), []);
    // Nor does one that could not be prepared.
    assert_eq!(tail.end(G2, 6), [Action::Prepare { epoch: Epoch(6) }]);
    assert_eq!(tail.store_fails(false), [Action::Failed("fsync".into())]);
    assert_eq!(tail.0.acked(), Some(Epoch(5)));
    assert_eq!(tail.prepared(6), []);
}

#[test]
fn i2_the_end_is_forwarded_only_once_the_checkpoint_is_prepared_here() {
    let mut head = Bench::new("b", &["b", "c"]);
    assert_eq!(head.up(G2, None), [], "both begin with the first");
    let open = |epoch, full| Action::Open {
        epoch: Epoch(epoch),
        full,
    };
    let begun = head.begin(G2, 5, Base::Nothing);
    assert_eq!(begun, [Action::TrimAll, Action::Forward, open(5, true)]);
    assert_eq!(head.end(G2, 5), [Action::Prepare { epoch: Epoch(5) }]);
    assert_eq!(
        head.prepared(5),
        [Action::Forward, Action::Commit(mark(G2, 5))]
    );
    let begun = head.begin(G2, 6, on(mark(G2, 5), G2));
    assert_eq!(begun, [Action::Forward, Action::Keep, open(6, false)]);
    assert_eq!(
        head.data(G2, 6),
        [Action::Forward, Action::Keep, Action::Stage]
    );
    assert_eq!(head.end(G2, 6), [Action::Prepare { epoch: Epoch(6) }]);
    assert_eq!(head.store_fails(true), [Action::Failed("fsync".into())]);
}

#[test]
fn i4_another_generation_is_refused_or_ignored() {
    let mut config = Config::begin(&["b", "c"]);
    let mut tail = Bench::of(&config, "c");
    tail.take(G2, 5);
    tail.0.adopt(config.take_over("b", mark(G2, 5)));
    let next = on(mark(G2, 5), G2);
    assert_eq!(
        tail.begin(G2, 6, next),
        [Action::Refuse(G3)],
        "the old owner hears of it"
    );
    assert_eq!(
        tail.step(Event::Heartbeat { generation: G2 }),
        [Action::Refuse(G3)]
    );
    assert_eq!(tail.complete(G2, 5), [Action::Refuse(G3)]);
    assert_eq!(tail.end(G4, 6), [], "not told of it yet");
    assert_eq!(tail.begin(G4, 6, next), []);
    assert_eq!(tail.0.hist(), Some(mark(G2, 5)));
}

#[test]
fn i5_nothing_moves_in_a_frozen_replica() {
    let mut middle = Bench::new("c", &["b", "c", "d"]);
    middle.take(G2, 5);
    middle.begin(G2, 6, on(mark(G2, 5), G2));
    assert_eq!(middle.0.freeze(), Ok(mark(G2, 5)));
    assert_eq!(middle.0.state(), State::Frozen);
    assert_eq!(middle.end(G2, 6), []);
    assert_eq!(middle.begin(G2, 6, on(mark(G2, 5), G2)), []);
    assert_eq!(middle.ack(G2, 5), []);
    assert_eq!(middle.up(G2, Some(mark(G2, 5))), []);
    assert_eq!(middle.complete(G2, 5), []);
    assert_eq!(middle.ticks(100), []);
    // Not granted: should something that was missed not come again, it shows as a hole.
    middle.unfreeze();
    assert_eq!(middle.end(G2, 6), []);
    let hole = middle.begin(G2, 7, on(mark(G2, 6), G2));
    assert!(fails(&hole, "missing"), "{hole:?}");
    // Failed, but what it had is as good as before: if it is the owner after all, it can resume.
    assert_eq!(middle.0.freeze(), Ok(mark(G2, 5)));
}

#[test]
fn a_repeated_checkpoint_is_acknowledged_again_and_not_applied_again() {
    let mut tail = Bench::new("c", &["b", "c"]);
    tail.take(G2, 5);
    tail.take(G2, 6);
    for (epoch, base) in [(5, Base::Nothing), (6, on(mark(G2, 5), G2))] {
        assert_eq!(tail.begin(G2, epoch, base), []);
        assert_eq!(tail.data(G2, epoch), []);
        assert_eq!(
            tail.end(G2, epoch),
            [Action::AckOwner(Epoch(6)), Action::AckUp(Epoch(6))]
        );
    }
    assert_eq!(tail.0.hist(), Some(mark(G2, 6)));
    // A replica further up repeats only what it knows the tail to have.
    let mut head = Bench::new("b", &["b", "c"]);
    head.take(G2, 5);
    head.begin(G2, 5, Base::Nothing);
    assert_eq!(head.end(G2, 5), []);
    head.ack(G2, 5);
    head.begin(G2, 5, Base::Nothing);
    assert_eq!(head.end(G2, 5), [Action::AckUp(Epoch(5))]);
}

#[test]
fn i7_a_hole_fails_the_replica_and_costs_only_what_came() {
    let mut config = Config::begin(&["b"]);
    let mut tail = Bench::of(&config, "b");
    tail.take(G2, 5);
    let hole = tail.begin(G2, 7, on(mark(G2, 6), G2));
    assert!(fails(&hole, "7 came after 5"), "{hole:?}");
    assert_eq!(tail.0.state(), State::Failed);
    assert_eq!(tail.begin(G2, 6, on(mark(G2, 5), G2)), []);
    // In place it goes on from what it had, and can be resumed from at once.
    tail.0.adopt(config.place(&["b"]));
    assert_eq!(tail.0.state(), State::LastSurvivor);
    assert_eq!(tail.take(G3, 6).len(), 3);
    assert_eq!(tail.0.freeze(), Ok(mark(G3, 6)));
}

#[test]
fn i7_damage_to_the_store_takes_what_it_held_with_it() {
    let mut config = Config::begin(&["b"]);
    let mut tail = Bench::of(&config, "b");
    tail.take(G2, 5);
    tail.begin(G2, 6, on(mark(G2, 5), G2));
    tail.store_fails(true);
    let failed = Err(FreezeError::Failed("fsync".into()));
    assert_eq!(tail.0.freeze(), failed);
    tail.0.adopt(config.place(&["b"]));
    assert_eq!((tail.0.hist(), tail.0.acked()), (None, None));
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
    // It cannot go on in place, and says so.
    let missing = tail.begin(G3, 6, on(mark(G2, 5), G2));
    assert!(fails(&missing, "no full checkpoint"), "{missing:?}");
    tail.0.adopt(config.anew(&["b"]));
    assert_eq!(tail.0.state(), State::Syncing);
    tail.take(G4, 9);
    assert_eq!(tail.0.freeze(), Ok(mark(G4, 9)));
}

#[test]
fn i7_damage_found_after_a_failure_counts_too() {
    let mut tail = Bench::new("b", &["b"]);
    tail.take(G2, 5);
    tail.store_fails(false);
    assert_eq!(tail.0.freeze(), Ok(mark(G2, 5)));
    assert_eq!(tail.unfreeze(), [], "it asks for nothing: it has failed");
    assert_eq!(tail.store_fails(true), [], "it is said once");
    assert!(tail.0.freeze().is_err());
}

#[test]
fn i3_while_the_image_is_being_replaced_there_is_nothing_to_resume_from() {
    let mut config = Config::begin(&["b"]);
    let mut tail = Bench::of(&config, "b");
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
    tail.take(G2, 5);
    tail.0.adopt(config.anew(&["b"]));
    // Output may have flowed since that the old checkpoint does not know of.
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
    tail.begin(G3, 9, Base::Nothing);
    assert_eq!(tail.0.state(), State::Syncing);
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
    tail.end(G3, 9);
    tail.prepared(9);
    assert_eq!(tail.0.freeze(), Ok(mark(G3, 9)));
}

#[test]
fn a_full_checkpoint_that_the_master_did_not_decide_is_refused() {
    let undecided = "has not decided";
    let mut tail = Bench::new("b", &["b"]);
    tail.take(G2, 5);
    let again = tail.begin(G2, 9, Base::Nothing);
    assert!(fails(&again, undecided), "{again:?}");
    assert_eq!(tail.0.freeze(), Ok(mark(G2, 5)), "what it had it has");
    // An empty replica in a generation that goes on in place: what it lacks may have been acknowledged.
    let mut config = Config::begin(&["b", "c"]);
    config.place(&["c"]);
    let mut empty = Bench::of(&config, "c");
    let full = empty.begin(G3, 9, Base::Nothing);
    assert!(fails(&full, undecided), "{full:?}");
}

#[test]
fn an_incremental_checkpoint_needs_exactly_the_base_it_names() {
    let base = mark(G2, 5);
    let other_digest = Mark { digest: 77, ..base };
    let wrong = [
        (6, on(other_digest, G2), "on top of"),
        (6, on(mark(Generation(1), 5), G2), "on top of"),
        (6, on(mark(G2, 4), G2), "on top of"),
        (8, on(mark(G2, 7), G2), "missing"),
        (6, on(base, G3), "cannot follow"),
        (6, on(base, Generation(1)), "cannot follow"),
    ];
    for (epoch, base, why) in wrong {
        let mut tail = Bench::new("b", &["b"]);
        tail.take(G2, 5);
        let answer = tail.begin(G2, epoch, base);
        assert!(fails(&answer, why), "{base:?}: {answer:?}");
    }
    let mut empty = Bench::new("b", &["b"]);
    let answer = empty.begin(G2, 5, on(mark(G2, 4), G2));
    assert!(fails(&answer, "no full checkpoint"), "{answer:?}");
    // What a fork has cut cannot come again under its old name.
    let mut config = Config::begin(&["b", "c"]);
    let mut tail = Bench::of(&config, "c");
    tail.take(G2, 5);
    tail.0.adopt(config.take_over("b", base));
    let answer = tail.begin(G3, 6, on(base, G2));
    assert!(fails(&answer, "cannot follow"), "{answer:?}");
}

#[test]
fn i5_a_fork_cuts_an_unacknowledged_suffix_and_nothing_else() {
    let mut config = Config::begin(&["b", "c", "d"]);
    let ahead_by: [&[u64]; 2] = [&[5], &[5, 6]];
    let mut replicas = ahead_by.map(|epochs| {
        let mut head = Bench::of(&config, "b");
        epochs.iter().for_each(|epoch| drop(head.take(G2, *epoch)));
        head
    });
    let took_over = config.take_over("c", mark(G2, 5)).clone();
    let joins = config.join(&["d"], "b").clone();
    for (replica, skips) in replicas.iter_mut().zip([true, false]) {
        // However many configurations it has slept through.
        if !skips {
            replica.0.adopt(&took_over);
            assert_eq!(replica.0.state(), State::Offline);
        }
        replica.0.adopt(&joins);
        assert_eq!(replica.0.state(), State::Joining);
    }
    let [same, ahead] = replicas;
    assert_eq!(same.0.hist(), Some(mark(G2, 5)), "that much is shared");
    assert_eq!(ahead.0.hist(), None, "6 was never acknowledged");
    assert_eq!((ahead.0.acked(), ahead.0.sent()), (None, None));
}

#[test]
fn i5_in_place_what_is_held_can_be_resumed_from_at_once() {
    let mut config = Config::begin(&["b", "c"]);
    let mut tail = Bench::of(&config, "c");
    tail.take(G2, 5);
    tail.0.adopt(config.place(&["c"]));
    assert_eq!(tail.0.state(), State::LastSurvivor);
    assert_eq!(tail.0.freeze(), Ok(mark(G2, 5)));
}

#[test]
fn in_place_a_new_tail_acknowledges_what_it_holds() {
    let mut config = Config::begin(&["b", "c"]);
    let mut head = Bench::of(&config, "b");
    for epoch in 5..=7 {
        head.take(G2, epoch);
    }
    head.ack(G2, 5);
    head.begin(G2, 8, on(mark(G2, 7), G2));
    assert_eq!(head.0.acked(), Some(Epoch(5)));
    head.0.adopt(config.place(&["b"]));
    assert_eq!(head.0.acked(), Some(Epoch(7)), "nobody else has to have it");
    assert_eq!(head.0.acked_up(), Some(Epoch(7)));
    assert_eq!(head.0.sent(), None);
    assert!(head.0.is_between_checkpoints(), "8 comes again");
    // What had been sent in the old generation keeps its name.
    head.begin(G3, 8, on(mark(G2, 7), G2));
    head.end(G3, 8);
    assert_eq!(
        head.prepared(8),
        [
            Action::Commit(mark(G2, 8)),
            Action::AckOwner(Epoch(8)),
            Action::AckUp(Epoch(8))
        ]
    );
}

#[test]
fn an_older_or_the_same_configuration_changes_nothing() {
    let mut config = Config::begin(&["b", "c"]);
    let old = config.view.clone();
    let mut head = Bench::of(&config, "b");
    head.take(G2, 5);
    head.0.adopt(config.place(&["b"]));
    head.begin(G3, 6, on(mark(G2, 5), G3));
    let before = head.0.clone();
    head.0.adopt(&old);
    head.0.adopt(&config.view);
    assert_eq!(head.0, before);
}

#[test]
fn the_last_survivor_is_one_only_while_it_is_alone() {
    let mut config = Config::begin(&["b", "c"]);
    let mut head = Bench::of(&config, "b");
    assert_eq!(head.0.state(), State::Syncing);
    head.take(G2, 5);
    assert_eq!(head.0.state(), State::Serving);
    head.0.adopt(config.place(&["b"]));
    assert_eq!(head.0.state(), State::LastSurvivor);
    head.0.adopt(config.join(&["b"], "c"));
    assert_eq!(head.0.state(), State::LastSurvivor, "c counts for nothing");
    head.0.adopt(config.place(&["b", "c"]));
    assert_eq!(head.0.state(), State::Serving);
    assert!(State::Serving.could_resume() && State::LastSurvivor.could_resume());
}

#[test]
fn silence_is_counted_in_the_replicas_own_ticks() {
    let mut head = Bench::new("b", &["b", "c"]);
    assert_eq!(head.ticks(100), [], "nothing to resume from yet");
    head.take(G2, 5);
    assert_eq!(head.ticks(100), [], "never heard of its predecessor");
    head.step(Event::Heard { now_ms: 0 });
    assert_eq!(head.ticks(3), []);
    head.step(Event::Heard { now_ms: 0 });
    assert_eq!(head.ticks(3), []);
    assert_eq!(head.ticks(1), [Action::Suspect(10)]);
    assert_eq!(head.ticks(100), [], "once is enough");
    head.0.freeze().unwrap();
    head.unfreeze();
    assert_eq!(
        head.ticks(4).len(),
        1,
        "a takeover that was not granted is tried again"
    );
}

#[test]
fn further_down_replicas_are_more_patient() {
    let mut tail = Bench::new("d", &["b", "c", "d"]);
    tail.take(G2, 5);
    tail.step(Event::Heard { now_ms: 0 });
    assert_eq!(tail.ticks(39), []);
    assert_eq!(tail.ticks(1).len(), 1);
}
