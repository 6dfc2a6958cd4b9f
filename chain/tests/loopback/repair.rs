//! What a chain does about a member that is lost or late, and going on without it.

use chain::{ChainClient, ClientError, ClientEvent, Loss};
use checkpoint::{Epoch, Generation};

use crate::cluster::{Cluster, Owner, VM, Vm, committed, host, trouble, until};

#[test]
fn the_owner_is_told_which_replica_is_lost_wherever_it_was() {
    for lost in 0..3 {
        let mut cluster = Cluster::new(3);
        let owner = cluster.connect();
        let mut vm = Vm::new();
        vm.checkpoint(&owner, true);
        committed(&owner, vm.epoch, Generation(2));
        cluster.hosts[lost].kill();
        let event = trouble(&owner, vm.epoch);
        let ClientEvent::Lost(Loss {
            host: Some(named), ..
        }) = &event
        else {
            panic!("{event:?}")
        };
        assert_eq!(*named, host(&format!("r{lost}")));
    }
}

#[test]
fn an_empty_member_cannot_go_on_in_place_and_the_owner_is_told_so() {
    let mut cluster = Cluster::new(2);
    let mut owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    cluster.hosts[1].restart();
    cluster.create([1]);
    // At first the head may not have noticed, then it is only gone, then it is there and holds nothing.
    let mut why = String::new();
    until("the owner is told", || {
        match owner.client.connect(&cluster.view) {
            Err(ClientError::Peer {
                host: who,
                why: said,
                ..
            }) => {
                why = said;
                who == host("r1") && why.contains("it holds nothing")
            }
            Err(other) => panic!("{other}"),
            Ok(_) => false,
        }
    });
    assert!(why.contains("checkpoint 1 of generation 2"), "{why}");
    // Begun anew, it is filled with the others.
    cluster.anew(&[0, 1]);
    owner.reconnect(&cluster.view);
    vm.run(1);
    let error = owner.begin(vm.epoch.next(), false, true).unwrap_err();
    assert!(matches!(error, ClientError::Base(_)), "{error}");
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(3));
    assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(vm.epoch)));
}

#[test]
fn i5_a_chain_that_begins_anew_has_nothing_to_resume_from_until_it_is_filled() {
    let mut cluster = Cluster::new(2);
    let mut owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    // In place there is, at once.
    cluster.reconfigure(&[1], None);
    assert_eq!(
        cluster.hosts[1].server().freeze(VM).unwrap().epoch,
        vm.epoch
    );
    cluster.hosts[1].server().unfreeze(VM).unwrap();
    // The owner may be running unprotected now: the old checkpoint does not know what it has said since.
    cluster.anew(&[1]);
    let error = cluster.hosts[1].server().freeze(VM).unwrap_err();
    assert!(
        error.to_string().contains("holds no complete checkpoint"),
        "{error}"
    );
    owner.reconnect(&cluster.view);
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(4));
    vm.check(&cluster.take_over(1));
}

#[test]
fn an_ack_that_was_lost_with_its_connection_is_repeated() {
    for length in [2, 1] {
        let cluster = Cluster::new(length);
        let owner = cluster.connect();
        let mut vm = Vm::new();
        vm.run(1);
        vm.checkpoint(&owner, true);
        committed(&owner, vm.epoch, Generation(2));
        drop(owner);
        committed(&cluster.connect(), vm.epoch, Generation(2));
    }
}

#[test]
fn a_checkpoint_that_comes_again_is_acknowledged_again_and_not_applied_again() {
    let mut cluster = Cluster::new(1);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.run(1);
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    // It is known by its number: this one has other content, which must go nowhere.
    let before = vm.clone();
    vm.epoch = Epoch(0);
    vm.run(2);
    vm.checkpoint(&owner, true);
    committed(&owner, Epoch(1), Generation(2));
    before.check(&cluster.take_over(0));
}

#[test]
fn a_chain_that_does_not_come_up_names_who_is_missing() {
    let mut cluster = Cluster::bare(3, 1_000_000);
    cluster.create([0, 1]);
    let client = ChainClient::new(VM, host("owner"), Generation(2), None, chain::KEPT_MAX);
    let blamed = || match client.connect(&cluster.view).unwrap_err() {
        ClientError::Peer { host, why, .. } => (host, why),
        other => panic!("{other}"),
    };
    // At first the ones before it are still finding out; in the end the head knows who it is.
    let mut why = String::new();
    until("the head knows who is missing", || {
        let (who, said) = blamed();
        why = said;
        who == host("r2")
    });
    let wanted = format!("holds no replica of VM {VM} yet");
    assert!(why.contains(&wanted), "{why}");
    // However late it comes, it is taken.
    cluster.create([2]);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
}

#[test]
fn a_configuration_that_is_told_again_changes_nothing() {
    let cluster = Cluster::new(2);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    let made = cluster.hosts[1].wire.greetings();
    for _ in 0..5 {
        let server = cluster.hosts[0].server();
        server.adopt(cluster.view.clone()).unwrap();
        for seed in 0..5 {
            vm.run(seed);
            vm.checkpoint(&owner, false);
        }
        committed(&owner, vm.epoch, Generation(2));
    }
    let more = cluster.hosts[1].wire.greetings() - made;
    assert_eq!(more, 0, "the head has connected again, with nothing to say");
}

#[test]
fn an_owner_that_lost_its_whole_chain_begins_another() {
    let mut cluster = Cluster::with_spares(1, 1);
    let mut owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    cluster.hosts[0].kill();
    trouble(&owner, vm.epoch);
    cluster.reconfigure(&[], None);
    cluster.anew(&[1]);
    owner.reconnect(&cluster.view);
    vm.run(1);
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(4));
    vm.check(&cluster.take_over(1));
}

#[test]
fn a_new_client_of_a_chain_that_goes_on_does_not_fit_without_knowing_what_it_holds() {
    let mut cluster = Cluster::new(2);
    let owner = Owner::new(&cluster.view, None);
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    cluster.reconfigure(&[0, 1], None);
    let client = ChainClient::new(VM, host("owner"), Generation(3), None, chain::KEPT_MAX);
    let mut error = String::new();
    until("the chain is up", || {
        match client.connect(&cluster.view).unwrap_err() {
            ClientError::Peer { .. } => false,
            unfit @ ClientError::Unfit { .. } => {
                error = unfit.to_string();
                true
            }
            other => panic!("{other}"),
        }
    });
    assert!(
        error.contains("r0 holds checkpoint 1 of generation 2"),
        "{error}"
    );
    assert!(error.contains("has to be filled again"), "{error}");
}
