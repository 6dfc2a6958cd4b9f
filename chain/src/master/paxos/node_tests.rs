//! What the library is not trusted with, message by message.

use checkpoint::ClusterId;
use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::messages::Message;
use omnipaxos::messages::ballot_leader_election::{BLEMessage, HeartbeatMsg, HeartbeatReply};
use omnipaxos::messages::sequence_paxos::{PaxosMessage, PaxosMsg, PrepareReq, Promise};
use omnipaxos::storage::SnapshotType;
use omnipaxos::util::LogSync;

use super::entry::{Applied, Entry, LogSnapshot, Pid, Turn, What};
use super::node::{Event, Node, PeerMessage};
use super::storage::{Identity, Record};

fn member(me: Pid) -> Node {
    let members = ["a", "b", "c", "d", "e"].map(String::from).to_vec();
    Node::new(Record::new(Identity { members, me }, ClusterId(me.into()))).unwrap()
}

fn say(node: &mut Node, from: Pid, msg: PaxosMsg<Entry>) {
    let to = node.me();
    let message = Message::SequencePaxos(PaxosMessage { from, to, msg });
    node.handle(Event::Message(from, Box::new(message)));
}

/// Ticks until it asks for promises; answers its heartbeats as members without a leader do.
fn preparing(node: &mut Node) -> Ballot {
    let me = node.me();
    for _ in 0..200 {
        node.handle(Event::Tick);
        for message in node.take().messages {
            match message {
                Message::SequencePaxos(PaxosMessage {
                    msg: PaxosMsg::Prepare(prepare),
                    ..
                }) => return prepare.n,
                Message::BLE(BLEMessage {
                    to: from,
                    msg: HeartbeatMsg::Request(request),
                    ..
                }) => {
                    let reply = HeartbeatReply {
                        round: request.round,
                        ballot: Ballot::with(1, 0, 0, from),
                        leader: Ballot::with(1, 0, 0, from),
                        happy: false,
                    };
                    let msg = HeartbeatMsg::Reply(reply);
                    let message = Message::BLE(BLEMessage { from, to: me, msg });
                    node.handle(Event::Message(from, Box::new(message)));
                }
                _ => {}
            }
        }
    }
    panic!("{node:?} does not want to lead");
}

fn entries(n: u64) -> Vec<Entry> {
    let entry = |number| Entry {
        id: Turn {
            member: 2,
            incarnation: 1,
            number,
        },
        floor: 0,
        begin: Some(ClusterId(2)),
        what: What::Read,
    };
    (0..n).map(entry).collect()
}

fn promise(n: Ballot, decided: usize) -> PaxosMsg<Entry> {
    let mut applied = Applied::default();
    for entry in entries(decided as u64) {
        applied.apply(&entry);
    }
    let sync = LogSync {
        decided_snapshot: Some(SnapshotType::Complete(LogSnapshot::of(applied))),
        suffix: Vec::new(),
        sync_idx: decided,
        stopsign: None,
    };
    PaxosMsg::Promise(Promise {
        n,
        n_accepted: if decided > 0 {
            Ballot::with(1, 1, 0, 2)
        } else {
            Ballot::default()
        },
        decided_idx: decided,
        accepted_idx: decided,
        log_sync: (decided > 0).then_some(sync),
    })
}

/// Three of five promises; the one that brings a snapshot is followed by a new connection of its member.
#[test]
fn a_snapshot_that_came_with_a_promise_is_not_taken_over_without_what_is_decided() {
    let mut node = member(1);
    let round = preparing(&mut node);
    say(&mut node, 2, promise(round, 10));
    say(&mut node, 2, PaxosMsg::PrepareReq(PrepareReq { n: round }));
    say(&mut node, 3, promise(round, 0));
    // Enough promises, should the second's be forgotten.
    say(&mut node, 4, promise(round, 0));
    assert_eq!(node.stopped(), None);
    let record = node.record_for_test();
    assert_eq!((record.decided, record.compacted), (10, 10), "{record:?}");
    assert_eq!(node.leader(), Some(1));
    // And what it tells the third begins where its own log does.
    let syncs: Vec<PeerMessage> = node.take().messages;
    let sync = syncs.iter().find_map(|m| match m {
        Message::SequencePaxos(PaxosMessage {
            to: 3,
            msg: PaxosMsg::AcceptSync(sync),
            ..
        }) => Some(sync),
        _ => None,
    });
    let sync = sync.expect("the third is told");
    assert_eq!((sync.decided_idx, sync.log_sync.sync_idx), (10, 10));
    assert!(sync.log_sync.decided_snapshot.is_some());
}
