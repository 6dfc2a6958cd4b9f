use super::*;
use crate::view::Member;
use checkpoint::VmId;

const G2: Generation = Generation(2);
const G3: Generation = Generation(3);

fn view(generation: Generation, owner: &str, chain: &[&str]) -> View {
    let host = |name: &str| HostId::new(name).unwrap();
    View {
        vm: VmId(1),
        name: "vm".into(),
        generation,
        owner: host(owner),
        chain: chain
            .iter()
            .map(|name| Member {
                host: host(name),
                addr: "127.0.0.1:1".parse().unwrap(),
            })
            .collect(),
    }
}

/// A machine, and what it answered.
struct Bench(Replica);

impl Bench {
    fn new(name: &str, chain: &[&str]) -> Self {
        let host = HostId::new(name).unwrap();
        Self(Replica::new(host, &view(G2, "a", chain), 3))
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = VecDeque::new();
        self.0.step(event, &mut actions);
        actions.into()
    }

    fn begin(&mut self, generation: Generation, epoch: u64, base: Option<Mark>) -> Vec<Action> {
        self.step(Event::Begin {
            generation,
            epoch: Epoch(epoch),
            base,
        })
    }

    fn end(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        self.step(Event::End {
            generation,
            epoch: Epoch(epoch),
        })
    }

    /// A whole checkpoint, prepared without trouble; what followed its end.
    fn take(&mut self, generation: Generation, epoch: u64, base: Option<Mark>) -> Vec<Action> {
        let begun = self.begin(generation, epoch, base);
        assert!(
            matches!(begun[..], [Action::Forward, Action::Open { .. }]),
            "{begun:?}"
        );
        assert_eq!(
            self.step(Event::Data {
                generation,
                epoch: Epoch(epoch)
            }),
            [Action::Forward, Action::Stage]
        );
        assert_eq!(self.end(generation, epoch), [Action::Prepare]);
        self.step(Event::Prepared {
            digest: epoch as u32,
        })
    }

    fn ack(&mut self, generation: Generation, epoch: u64) -> Vec<Action> {
        self.step(Event::SuccessorAck {
            generation,
            epoch: Epoch(epoch),
        })
    }

    fn ticks(&mut self, count: u64) -> Vec<Action> {
        (1..=count)
            .flat_map(|n| self.step(Event::Tick { now_ms: n * 10 }))
            .collect()
    }
}

fn mark(generation: Generation, epoch: u64) -> Mark {
    Mark {
        generation,
        epoch: Epoch(epoch),
        digest: epoch as u32,
    }
}

#[test]
fn i1_a_tail_acknowledges_only_what_has_been_prepared_and_committed() {
    let mut tail = Bench::new("c", &["b", "c"]);
    assert_eq!(
        tail.take(G2, 5, None),
        [
            Action::Commit(mark(G2, 5)),
            Action::AckOwner(Epoch(5)),
            Action::AckUp(Epoch(5))
        ]
    );
    // An end without its beginning, or of another checkpoint, acknowledges nothing.
    assert_eq!(tail.end(G2, 6), []);
    tail.begin(G2, 6, Some(mark(G2, 5)));
    assert_eq!(tail.end(G2, 7), []);
    // Nor does one that could not be prepared.
    assert_eq!(tail.end(G2, 6), [Action::Prepare]);
    let failed = tail.step(Event::StoreFailed {
        why: "no".into(),
        damaged: false,
    });
    assert_eq!(failed, [Action::Failed("no".into())]);
    assert_eq!(tail.0.acked(), Some(Epoch(5)));
    assert_eq!(tail.step(Event::Prepared { digest: 6 }), []);
}

#[test]
fn i2_the_end_is_forwarded_only_once_the_checkpoint_is_prepared_here() {
    let mut head = Bench::new("b", &["b", "c"]);
    head.begin(G2, 5, None);
    assert_eq!(head.end(G2, 5), [Action::Prepare]);
    assert_eq!(
        head.step(Event::Prepared { digest: 5 }),
        [Action::Forward, Action::Commit(mark(G2, 5))]
    );
    head.begin(G2, 6, Some(mark(G2, 5)));
    head.end(G2, 6);
    let failed = head.step(Event::StoreFailed {
        why: "disk".into(),
        damaged: true,
    });
    assert!(!failed.contains(&Action::Forward), "{failed:?}");
}

#[test]
fn only_the_tail_tells_the_owner_and_acks_trim_sent() {
    let mut head = Bench::new("b", &["b", "c"]);
    head.take(G2, 5, None);
    head.take(G2, 6, Some(mark(G2, 5)));
    assert_eq!(head.0.sent(), Some((Epoch(5), Epoch(6))));
    assert_eq!(head.ack(G2, 5), [Action::AckUp(Epoch(5))]);
    assert_eq!(head.0.sent(), Some((Epoch(6), Epoch(6))));
    assert_eq!(head.ack(G2, 5), [], "a repeated ack says nothing new");
    assert_eq!(head.ack(G2, 7), [], "nobody can have what is not even here");
    assert_eq!(head.ack(Generation(1), 6), [], "another generation's");
    assert_eq!(head.ack(G2, 6), [Action::AckUp(Epoch(6))]);
    assert_eq!(head.0.sent(), None);
}

#[test]
fn i4_another_generation_is_refused_or_ignored() {
    let mut tail = Bench::new("c", &["b", "c"]);
    tail.take(G2, 5, None);
    tail.0.adopt(&view(G3, "b", &["c"]));
    assert_eq!(
        tail.begin(G2, 6, Some(mark(G2, 5))),
        [Action::Refuse(G3)],
        "the old owner hears of it"
    );
    assert_eq!(
        tail.step(Event::Heartbeat { generation: G2 }),
        [Action::Refuse(G3)]
    );
    assert_eq!(tail.end(Generation(4), 6), [], "not told of it yet");
    assert_eq!(tail.0.hist(), Some(mark(G2, 5)));
}

#[test]
fn i5_nothing_moves_in_a_frozen_replica() {
    let mut middle = Bench::new("c", &["b", "c", "d"]);
    middle.take(G2, 5, None);
    middle.begin(G2, 6, Some(mark(G2, 5)));
    assert_eq!(middle.0.freeze(), Ok(mark(G2, 5)));
    assert_eq!(middle.0.state(), State::Frozen);
    assert_eq!(middle.end(G2, 6), []);
    assert_eq!(middle.begin(G2, 6, Some(mark(G2, 5))), []);
    assert_eq!(middle.ack(G2, 5), []);
    assert_eq!(middle.ticks(100), []);
    // Not granted: what was missed meanwhile shows as a hole.
    middle.0.unfreeze();
    assert_eq!(middle.end(G2, 6), []);
    let hole = middle.begin(G2, 7, Some(mark(G2, 6)));
    assert!(
        matches!(&hole[..], [Action::Failed(why)] if why.contains("missing")),
        "{hole:?}"
    );
    // Failed, but what it had is as good as before: if it is the owner after all, it can resume.
    assert_eq!(middle.0.freeze(), Ok(mark(G2, 5)));
}

#[test]
fn a_repeated_checkpoint_is_acknowledged_again_and_not_applied_again() {
    let mut tail = Bench::new("c", &["b", "c"]);
    tail.take(G2, 5, None);
    tail.take(G2, 6, Some(mark(G2, 5)));
    for (epoch, base) in [(5, None), (6, Some(mark(G2, 5)))] {
        assert_eq!(tail.begin(G2, epoch, base), []);
        let epoch = Epoch(epoch);
        assert_eq!(
            tail.step(Event::Data {
                generation: G2,
                epoch
            }),
            []
        );
        assert_eq!(
            tail.end(G2, epoch.0),
            [Action::AckOwner(Epoch(6)), Action::AckUp(Epoch(6))]
        );
    }
    assert_eq!(tail.0.hist(), Some(mark(G2, 6)));
    // A replica further up repeats only what it knows the tail to have.
    let mut head = Bench::new("b", &["b", "c"]);
    head.take(G2, 5, None);
    head.begin(G2, 5, None);
    assert_eq!(head.end(G2, 5), []);
    head.ack(G2, 5);
    head.begin(G2, 5, None);
    assert_eq!(head.end(G2, 5), [Action::AckUp(Epoch(5))]);
}

#[test]
fn i7_a_hole_fails_the_replica_and_a_newer_generation_may_fill_it_again() {
    let mut tail = Bench::new("b", &["b"]);
    tail.take(G2, 5, None);
    let hole = tail.begin(G2, 7, Some(mark(G2, 6)));
    assert!(
        matches!(&hole[..], [Action::Failed(why)] if why.contains("7 came after 5")),
        "{hole:?}"
    );
    assert_eq!(tail.0.state(), State::Failed);
    assert_eq!(tail.begin(G2, 6, Some(mark(G2, 5))), []);
    tail.0.adopt(&view(G3, "a", &["b"]));
    assert_eq!(tail.0.state(), State::Syncing);
    assert_eq!(tail.take(G3, 9, None).len(), 3);
    assert_eq!(tail.0.state(), State::Serving);
}

#[test]
fn i7_damage_to_the_store_takes_what_it_held_with_it() {
    let mut tail = Bench::new("b", &["b"]);
    tail.take(G2, 5, None);
    tail.begin(G2, 6, Some(mark(G2, 5)));
    tail.step(Event::StoreFailed {
        why: "fsync".into(),
        damaged: true,
    });
    assert_eq!(tail.0.freeze(), Err(FreezeError::Failed("fsync".into())));
    tail.0.adopt(&view(G3, "a", &["b"]));
    assert_eq!(tail.0.hist(), None);
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
}

#[test]
fn i3_while_the_image_is_being_replaced_there_is_nothing_to_resume_from() {
    let mut tail = Bench::new("b", &["b"]);
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
    tail.take(G2, 5, None);
    tail.begin(G2, 9, None);
    assert_eq!(tail.0.state(), State::Syncing);
    assert_eq!(tail.0.freeze(), Err(FreezeError::Empty));
    tail.end(G2, 9);
    tail.step(Event::Prepared { digest: 9 });
    assert_eq!(tail.0.freeze(), Ok(mark(G2, 9)));
}

#[test]
fn an_incremental_checkpoint_needs_exactly_the_base_it_names() {
    let mut empty = Bench::new("b", &["b"]);
    assert!(matches!(
        empty.begin(G2, 5, Some(mark(G2, 4)))[..],
        [Action::Failed(_)]
    ));
    // The same number, but another owner's checkpoint: applied on top it would be silent nonsense.
    let mut tail = Bench::new("b", &["b"]);
    tail.take(G2, 5, None);
    tail.0.adopt(&view(G3, "c", &["b"]));
    let other = tail.begin(G3, 6, Some(mark(G3, 5)));
    assert!(
        matches!(&other[..], [Action::Failed(why)] if why.contains("on top of")),
        "{other:?}"
    );
    // A suffix that the new owner never had is no repetition of what the new owner sends.
    let mut ahead = Bench::new("b", &["b"]);
    ahead.take(G2, 5, None);
    ahead.take(G2, 6, Some(mark(G2, 5)));
    ahead.0.adopt(&view(G3, "c", &["b"]));
    assert!(matches!(
        ahead.begin(G3, 6, Some(mark(G2, 5)))[..],
        [Action::Failed(_)]
    ));
}

#[test]
fn a_new_configuration_may_go_on_in_place() {
    let mut tail = Bench::new("b", &["b", "c"]);
    tail.take(G2, 5, None);
    tail.0.adopt(&view(G3, "a", &["b"]));
    assert!(tail.0.is_tail());
    // Until its owner has added to it: perhaps it began anew and lets output out meanwhile.
    assert!(matches!(
        tail.0.freeze(),
        Err(FreezeError::Outdated { now: G3, .. })
    ));
    assert_eq!(tail.take(G3, 6, Some(mark(G2, 5))).len(), 3);
    assert_eq!(tail.0.freeze(), Ok(mark(G3, 6)));
}

#[test]
fn silence_is_counted_in_the_replicas_own_ticks() {
    let mut head = Bench::new("b", &["b", "c"]);
    assert_eq!(head.ticks(100), [], "nothing to resume from yet");
    head.take(G2, 5, None);
    assert_eq!(head.ticks(100), [], "never heard of its predecessor");
    head.step(Event::Heard { now_ms: 0 });
    assert_eq!(head.ticks(3), []);
    head.step(Event::Heard { now_ms: 0 });
    assert_eq!(head.ticks(3), []);
    assert_eq!(head.ticks(1), [Action::Suspect(10)]);
    assert_eq!(head.ticks(100), [], "once is enough");
    head.0.unfreeze();
    assert_eq!(
        head.ticks(4).len(),
        1,
        "a takeover that was not granted is tried again"
    );
}

#[test]
fn further_down_replicas_are_more_patient() {
    let mut tail = Bench::new("d", &["b", "c", "d"]);
    tail.take(G2, 5, None);
    tail.step(Event::Heard { now_ms: 0 });
    assert_eq!(tail.ticks(27), []);
    assert_eq!(tail.ticks(1).len(), 1);
}
