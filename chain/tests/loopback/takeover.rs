//! From acks to a resumed VM, at every place of chains of one to three.

use chain::{ClientEvent, ServerEvent};
use checkpoint::{Epoch, Generation};

use crate::cluster::{Cluster, PATIENCE, VM, Vm, committed, trouble};

#[test]
fn i5_whoever_takes_over_has_everything_that_was_acknowledged() {
    for length in 1..=3 {
        for taker in 0..length {
            let cluster = Cluster::new(length);
            let client = cluster.connect();
            assert_eq!(client.held(), None, "new replicas hold nothing");
            let mut vm = Vm::new();
            vm.run(1);
            vm.checkpoint(&client, true);
            for seed in 2..8 {
                vm.run(seed);
                vm.checkpoint(&client, false);
            }
            committed(&client, vm.epoch, Generation(2));
            // What is under way when the owner dies must leave no trace.
            let resumed = vm.clone();
            vm.run(99);
            vm.send_body(&client, false).unwrap();
            let server = cluster.hosts[taker].server();
            assert_eq!(server.freeze(VM).unwrap(), resumed.epoch);
            let mut view = cluster.view.clone();
            view.generation = view.generation.next();
            view.owner = cluster.hosts[taker].member.host.clone();
            view.chain.remove(taker);
            let handover = server.hand_over(&view).unwrap();
            resumed.check(&handover);
            // The old owner is told, by heartbeat at the latest. It may have lost the connection to the tail first.
            let head = taker == 0;
            while head && client.heartbeat().is_ok() {
                match trouble(&client, resumed.epoch) {
                    ClientEvent::Refused { generation } => {
                        assert_eq!(generation, view.generation);
                        break;
                    }
                    ClientEvent::Lost { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[test]
fn i1_an_ack_comes_after_the_end_and_not_before() {
    let cluster = Cluster::new(2);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, Epoch(1), Generation(2));
    vm.run(1);
    vm.send_body(&client, false).unwrap();
    // Whatever of it has arrived by now: without its end it counts for nothing.
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(Epoch(1))));
    client.end(vm.epoch).unwrap();
    committed(&client, Epoch(2), Generation(2));
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(Epoch(2))));
}

#[test]
fn i4_a_superseded_owner_is_refused_when_it_connects_and_when_it_speaks() {
    let mut cluster = Cluster::new(2);
    let old_view = cluster.view.clone();
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
    cluster.reconfigure("other", &[0, 1]);
    // The connection to the tail for acks may end first; the head's answer is what counts.
    vm.run(1);
    vm.checkpoint(&client, false);
    let refused = trouble(&client, vm.epoch);
    assert_eq!(
        refused,
        ClientEvent::Refused {
            generation: Generation(3)
        }
    );
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(Epoch(1))));
    let error = chain::ChainClient::connect(&old_view.owner, &old_view).unwrap_err();
    assert!(
        matches!(
            error,
            chain::ClientError::Refused {
                generation: Generation(3),
                ..
            }
        ),
        "{error}"
    );
    // A replica that was taken away remembers too.
    cluster.hosts[0].server().remove(VM, Generation(9));
    let error = chain::ChainClient::connect(&old_view.owner, &old_view).unwrap_err();
    assert!(error.to_string().contains("newer generation 9"), "{error}");
}

#[test]
fn silence_makes_the_head_suspect_the_owner_and_tells_how_long_it_was() {
    let mut cluster = Cluster::bare(2, 6);
    cluster.create([0, 1]);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
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
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
    cluster.hosts[0].kill();
    drop(client);
    let event = cluster.hosts[1].events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, ServerEvent::Suspect { .. }), "{event:?}");
    assert_eq!(cluster.hosts[1].server().freeze(VM).unwrap(), vm.epoch);
}
