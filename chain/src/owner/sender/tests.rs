//! The machine alone, event by event.

use super::*;
use crate::view::{History, Member};
use checkpoint::{HostId, VmId};

fn mark(generation: u64, epoch: u64) -> Mark {
    Mark {
        generation: Generation(generation),
        epoch: Epoch(epoch),
        digest: epoch as u32,
        held: true,
    }
}

/// A configuration with a chain whose history began in `since`.
fn view(generation: u64, since: u64) -> View {
    let host = |name| HostId::new(name).unwrap();
    View {
        vm: VmId(1),
        name: "vm".into(),
        generation: Generation(generation),
        owner: host("a"),
        chain: vec![Member::new(host("b"), "127.0.0.1:1".parse().unwrap())],
        joining: None,
        history: History::new(Generation(since)),
    }
}

/// Sends a whole checkpoint.
fn send(sender: &mut Sender, epoch: u64, full: bool) -> Ended {
    sender.begin(Epoch(epoch), full, true).unwrap();
    sender.end(epoch as u32).unwrap()
}

/// Connected in generation 2, in which the chain began, and sent the full checkpoint 5 and 6 to 8.
fn sending() -> Sender {
    let mut sender = Sender::new(Generation(1), None);
    assert_eq!(sender.connected(&view(2, 2), None), Joined::Anew);
    assert!(!send(&mut sender, 5, true).kept);
    for epoch in 6..=8 {
        let mark = mark(2, epoch);
        let ended = Ended { mark, kept: true };
        assert_eq!(send(&mut sender, epoch, false), ended);
    }
    sender
}

fn goes_on(after: Mark, complete: u64) -> Joined {
    let complete = Some(Epoch(complete));
    Joined::GoesOn { after, complete }
}

#[test]
fn a_new_head_is_sent_what_it_lacks_or_is_unfit() {
    let in_place = view(3, 2);
    for held in 5..=8 {
        let mut sender = sending();
        let joined = sender.connected(&in_place, Some(mark(2, held)));
        assert_eq!(joined, goes_on(mark(2, held), 8));
        assert!(sender.is_linked());
        assert_eq!(sender.generation(), Generation(3));
    }
    let unfit = Joined::Unfit {
        newest: Some(mark(2, 8)),
    };
    let other = Mark {
        digest: 99,
        ..mark(2, 7)
    };
    for holds in [None, Some(mark(2, 4)), Some(mark(2, 9)), Some(other)] {
        let mut sender = sending();
        assert_eq!(sender.connected(&in_place, holds), unfit, "{holds:?}");
        assert!(!sender.is_linked());
    }
}

#[test]
fn acks_trim_what_is_kept_and_only_those_of_this_generation() {
    let mut sender = sending();
    assert!(!sender.acked(Generation(1), Epoch(6)), "another generation");
    assert!(!sender.acked(Generation(2), Epoch(9)), "it was never sent");
    assert!(
        !sender.acked(Generation(2), Epoch(5)),
        "a full one is not kept"
    );
    assert_eq!(sender.unacknowledged(), 3);
    assert!(sender.acked(Generation(2), Epoch(7)));
    assert_eq!(sender.unacknowledged(), 1);
    // What the chain has acknowledged a new head has to hold.
    let in_place = view(3, 2);
    let joined = sender.clone().connected(&in_place, Some(mark(2, 7)));
    assert_eq!(joined, goes_on(mark(2, 7), 8));
    let joined = sender.connected(&in_place, Some(mark(2, 6)));
    assert!(matches!(joined, Joined::Unfit { .. }));
}

#[test]
fn a_checkpoint_keeps_the_generation_it_was_begun_in() {
    let mut sender = sending();
    sender.begin(Epoch(9), false, true).unwrap();
    let both = Pass {
        forward: true,
        keep: true,
    };
    assert_eq!(sender.pass(), Some(both));
    sender.lost();
    let only_kept = Pass {
        forward: false,
        ..both
    };
    assert_eq!(sender.pass(), Some(only_kept));
    let joined = sender.connected(&view(3, 2), Some(mark(2, 8)));
    assert_eq!(joined, goes_on(mark(2, 8), 8), "the open one follows");
    assert_eq!(sender.open(), Some((Epoch(9), Generation(2))));
    assert_eq!(sender.end(9).map(|e| e.mark), Some(mark(2, 9)));
    let begun = sender.begin(Epoch(10), false, true).unwrap();
    let origin = Generation(3);
    let base = mark(2, 9);
    assert_eq!(begun.base, Base::On { base, origin });
}

#[test]
fn a_chain_that_begins_anew_takes_nothing_but_a_full_checkpoint() {
    let mut sender = sending();
    sender.begin(Epoch(9), false, true).unwrap();
    assert_eq!(sender.connected(&view(3, 3), None), Joined::Anew);
    assert_eq!((sender.pass(), sender.end(9)), (None, None));
    assert_eq!(sender.unacknowledged(), 0);
    let newest = None;
    let epoch = Epoch(9);
    assert_eq!(
        sender.begin(epoch, false, true),
        Err(BeginError { epoch, newest })
    );
    sender.begin(epoch, true, false).unwrap();
    let pass = Pass {
        forward: true,
        keep: false,
    };
    assert_eq!(sender.pass(), Some(pass));
    // A head that did not get it has nothing to go on from.
    sender.end(9);
    let joined = sender.connected(&view(3, 3), None);
    assert!(matches!(joined, Joined::Unfit { .. }));
    let holds = Mark {
        held: false,
        ..mark(3, 9)
    };
    assert_eq!(
        sender.connected(&view(3, 3), Some(holds)),
        goes_on(holds, 9)
    );
}

#[test]
fn h16_output_once_held_stays_held_until_the_chain_begins_anew() {
    let mut sender = Sender::new(Generation(1), None);
    sender.connected(&view(2, 2), None);
    for (epoch, full, says, held) in [
        (5, true, false, false),
        (6, false, false, false),
        (7, false, true, true),
        (8, false, false, true),
        (9, true, false, false),
    ] {
        let begun = sender.begin(Epoch(epoch), full, says).unwrap();
        assert_eq!(begun.held, held, "{epoch}");
        assert_eq!(sender.end(0).unwrap().mark.held, held, "{epoch}");
    }
}

#[test]
fn a_new_owner_sends_what_it_had_as_a_replica() {
    let mut sent = Sent::after(mark(2, 4));
    (5..=6).for_each(|epoch| sent.push(mark(2, epoch)));
    let mut bridge = Sender::taking_over(Generation(3), mark(2, 6), sent);
    let view = view(3, 2);
    for held in 4..=6 {
        let joined = bridge.connected(&view, Some(mark(2, held)));
        assert_eq!(joined, goes_on(mark(2, held), 6));
    }
    for holds in [None, Some(mark(2, 3)), Some(mark(2, 7))] {
        let joined = bridge.connected(&view, holds);
        assert!(matches!(joined, Joined::Unfit { .. }), "{holds:?}");
    }
    // Kept nothing: only a head that holds the same can go on.
    let mut bridge = Sender::taking_over(Generation(3), mark(2, 6), Sent::default());
    assert_eq!(
        bridge.connected(&view, Some(mark(2, 6))),
        goes_on(mark(2, 6), 6)
    );
    assert!(matches!(
        bridge.connected(&view, Some(mark(2, 5))),
        Joined::Unfit { .. }
    ));
}
