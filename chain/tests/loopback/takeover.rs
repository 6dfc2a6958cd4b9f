//! From acks to a resumed VM, at every place of chains of one to three.

use chain::{ChainClient, ClientError, ClientEvent, ServerEvent};
use checkpoint::{Epoch, Generation};

use crate::cluster::{Cluster, PATIENCE, VM, Vm, committed, trouble};

#[test]
fn i5_whoever_takes_over_has_everything_that_was_acknowledged() {
    for length in 1..=3 {
        for taker in 0..length {
            let mut cluster = Cluster::new(length);
            let owner = cluster.connect();
            let mut vm = Vm::new();
            vm.run(1);
            vm.checkpoint(&owner, true);
            for seed in 2..8 {
                vm.run(seed);
                vm.checkpoint(&owner, false);
            }
            committed(&owner, vm.epoch, Generation(2));
            // What is under way when the owner dies must leave no trace.
            let resumed = vm.clone();
            vm.run(99);
            vm.send_body(&owner, false).unwrap();
            let handover = cluster.take_over(taker);
            resumed.check(&handover);
            assert_eq!(cluster.view.chain.len(), length - 1 - taker);
            // The old owner is told, by heartbeat at the latest. It may have lost the connection to the tail first.
            while owner.connection.heartbeat().is_ok() {
                match trouble(&owner, resumed.epoch) {
                    ClientEvent::Refused { generation } => {
                        assert_eq!(generation, cluster.view.generation);
                        break;
                    }
                    ClientEvent::Lost(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[test]
fn i1_an_ack_comes_after_the_end_and_not_before() {
    let cluster = Cluster::new(2);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, Epoch(1), Generation(2));
    vm.run(1);
    vm.send_body(&owner, false).unwrap();
    // Whatever of it has arrived by now: without its end it counts for nothing.
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(Epoch(1))));
    owner.end().unwrap();
    committed(&owner, Epoch(2), Generation(2));
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(Epoch(2))));
}

#[test]
fn i4_a_superseded_owner_is_refused_when_it_connects_and_when_it_speaks() {
    let mut cluster = Cluster::new(3);
    let old_view = cluster.view.clone();
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    cluster.take_over(0);
    // The connection to the tail for acks may end first; the head's answer is what counts.
    vm.run(1);
    vm.checkpoint(&owner, false);
    let refused = ClientEvent::Refused {
        generation: Generation(3),
    };
    assert_eq!(trouble(&owner, Epoch(1)), refused);
    assert!(
        cluster.hosts[1..]
            .iter()
            .all(|h| h.epoch() == Some(Epoch(1)))
    );
    let stale = || {
        let client = ChainClient::new(
            VM,
            old_view.owner.clone(),
            Generation(2),
            None,
            chain::KEPT_MAX,
        );
        client.connect(&old_view).unwrap_err()
    };
    let error = stale();
    let ClientError::Refused { generation, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(generation, Generation(3));
    // A replica that was taken away remembers too.
    cluster.hosts[0].server().remove(VM, Generation(9));
    let error = stale().to_string();
    assert!(error.contains("newer generation 9"), "{error}");
}

#[test]
fn silence_makes_the_head_suspect_the_owner_and_tells_how_long_it_was() {
    let mut cluster = Cluster::bare(2, 6);
    cluster.create([0, 1]);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    // Not another word, and no end of the connection either: a host that lost power.
    let event = cluster.hosts[0].events.recv_timeout(PATIENCE).unwrap();
    let ServerEvent::Suspect { vm: id, silence_ms } = event else {
        panic!("{event:?}")
    };
    assert_eq!(id, VM);
    assert!(
        silence_ms >= 60,
        "{silence_ms} ms are not seven ticks of 10"
    );
    // Not granted: it goes on watching.
    cluster.hosts[0].server().freeze(VM).unwrap();
    cluster.hosts[0].server().unfreeze(VM).unwrap();
    let again = cluster.hosts[0].events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(again, ServerEvent::Suspect { .. }), "{again:?}");
}

#[test]
fn when_the_head_dies_with_the_owner_the_next_one_notices() {
    let mut cluster = Cluster::bare(2, 6);
    cluster.create([0, 1]);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    cluster.hosts[0].kill();
    drop(owner);
    let event = cluster.hosts[1].events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, ServerEvent::Suspect { .. }), "{event:?}");
    vm.check(&cluster.take_over(1));
}

#[test]
fn a_takeover_that_was_not_granted_leaves_a_chain_that_goes_on() {
    // A link that breaks while the replica is frozen comes back to one that must still be heard afterwards.
    for frozen in 0..2 {
        let cluster = Cluster::new(3);
        let mut owner = cluster.connect();
        let mut vm = Vm::new();
        vm.checkpoint(&owner, true);
        committed(&owner, vm.epoch, Generation(2));
        let server = cluster.hosts[frozen].server();
        server.freeze(VM).unwrap();
        let next = &cluster.hosts[frozen + 1].wire;
        let greetings = next.greetings();
        next.cut();
        crate::cluster::until("it connects again", || next.greetings() > greetings);
        server.unfreeze(VM).unwrap();
        owner.reconnect(&cluster.view);
        vm.run(1);
        vm.checkpoint(&owner, false);
        committed(&owner, Epoch(2), Generation(2));
    }
}
