//! What a chain does about a member that is lost, and going on without it.

use chain::{ChainClient, ClientError, ClientEvent};
use checkpoint::{Epoch, Generation};

use crate::cluster::{Cluster, VM, Vm, committed, host, trouble};

#[test]
fn the_owner_is_told_which_replica_is_lost_wherever_it_was() {
    for lost in 0..3 {
        let mut cluster = Cluster::new(3);
        let client = cluster.connect();
        let mut vm = Vm::new();
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        cluster.hosts[lost].kill();
        let event = trouble(&client, vm.epoch);
        let ClientEvent::Lost {
            host: Some(named), ..
        } = &event
        else {
            panic!("{event:?}")
        };
        assert_eq!(*named, host(&format!("r{lost}")));
    }
}

#[test]
fn what_is_left_of_a_chain_goes_on_in_place() {
    for lost in 0..3 {
        let mut cluster = Cluster::new(3);
        let client = cluster.connect();
        let mut vm = Vm::new();
        vm.run(1);
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        cluster.hosts[lost].kill();
        trouble(&client, vm.epoch);
        let left: Vec<usize> = (0..3).filter(|i| *i != lost).collect();
        cluster.reconfigure("owner", &left);
        let client = cluster.connect();
        let held = client.held().expect("all that are left hold the same");
        assert_eq!((held.generation, held.epoch), (Generation(2), vm.epoch));
        for seed in 2..5 {
            vm.run(seed);
            vm.checkpoint(&client, false);
        }
        committed(&client, vm.epoch, Generation(3));
        let taker = left[left.len() - 1];
        let server = cluster.hosts[taker].server();
        assert_eq!(server.freeze(VM).unwrap(), vm.epoch);
        let mut view = cluster.view.clone();
        view.generation = view.generation.next();
        view.chain
            .retain(|m| m.host == cluster.hosts[left[0]].member.host);
        vm.check(&server.hand_over(&view).unwrap());
    }
}

#[test]
fn replicas_that_hold_different_checkpoints_are_filled_anew() {
    let mut cluster = Cluster::new(2);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
    // The tail is replaced: an empty replica has joined.
    cluster.view.generation = cluster.view.generation.next();
    cluster.hosts[1]
        .server()
        .remove(VM, cluster.view.generation);
    cluster.create([1]);
    cluster.hosts[0]
        .server()
        .adopt(cluster.view.clone())
        .unwrap();
    let client = cluster.connect();
    assert_eq!(client.held(), None);
    vm.run(1);
    let error = client.begin(vm.epoch.next(), false).unwrap_err();
    assert!(matches!(error, ClientError::Base { .. }), "{error}");
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(3));
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(vm.epoch)));
}

#[test]
fn i5_until_the_new_configuration_has_a_checkpoint_nobody_may_take_over() {
    let mut cluster = Cluster::new(2);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
    cluster.reconfigure("owner", &[1]);
    // The owner may be running unprotected by now: its old checkpoint does not know what it has said since.
    let error = cluster.hosts[1].server().freeze(VM).unwrap_err();
    assert!(
        error.to_string().contains("generation 3 has begun"),
        "{error}"
    );
    let client = cluster.connect();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(3));
    assert_eq!(cluster.hosts[1].server().freeze(VM).unwrap(), vm.epoch);
}

#[test]
fn an_ack_that_was_lost_with_its_connection_is_repeated() {
    for length in [2, 1] {
        let cluster = Cluster::new(length);
        let client = cluster.connect();
        let mut vm = Vm::new();
        vm.run(1);
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        drop(client);
        committed(&cluster.connect(), vm.epoch, Generation(2));
    }
}

#[test]
fn a_checkpoint_that_comes_again_is_acknowledged_again_and_not_applied_again() {
    let cluster = Cluster::new(1);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.run(1);
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
    // It is known by its number: this one has other content, which must go nowhere.
    let before = vm.clone();
    vm.epoch = Epoch(0);
    vm.run(2);
    vm.checkpoint(&client, true);
    committed(&client, Epoch(1), Generation(2));
    for (i, replica) in cluster.hosts.iter().enumerate() {
        replica.server().freeze(VM).unwrap();
        let mut view = cluster.view.clone();
        view.generation = view.generation.next();
        view.chain.remove(i);
        before.check(&replica.server().hand_over(&view).unwrap());
    }
}

#[test]
fn a_chain_that_does_not_come_up_names_who_is_missing() {
    let mut cluster = Cluster::bare(3, 1_000_000);
    cluster.create([0, 1]);
    let blamed = |cluster: &Cluster| match ChainClient::connect(&host("owner"), &cluster.view)
        .unwrap_err()
    {
        ClientError::Peer { host, why, .. } => (host, why),
        other => panic!("{other}"),
    };
    // At first the ones before it are still finding out; in the end the head knows who it is.
    let why = loop {
        let (who, why) = blamed(&cluster);
        if who == host("r2") {
            break why;
        }
    };
    assert!(why.contains("holds no replica of VM 7 yet"), "{why}");
    // However late it comes, it is taken.
    cluster.create([2]);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    committed(&client, vm.epoch, Generation(2));
}
