//! FIELD C8: a chain that is slow slows its owner down, and is not left for it. FIELD H16: a chain that begins lets output
//! flow until it holds the VM.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use chain::{ChainClient, ClientError, ClientEvent, ServerError};
use checkpoint::{Epoch, Generation};

use crate::cluster::{Cluster, PATIENCE, VM, committed, connect, until};
use crate::vm::Vm;

/// Several times what an owner keeps in these tests.
const BOUND: usize = 256 << 10;

#[test]
fn c8_at_its_bound_the_owner_waits_for_acks_and_loses_nothing() {
    let mut cluster = Cluster::new(2);
    let view = cluster.view.clone();
    let client = ChainClient::new(VM, view.owner.clone(), view.generation, None, BOUND);
    let client = Arc::new(client);
    let connection = connect(&client, &view);
    // The tail processes nothing until it is let go on.
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    until("the first is there", || {
        cluster.hosts[1].epoch() == Some(vm.epoch)
    });
    cluster.hosts[1].server().freeze(VM).unwrap();
    let begun = Arc::new(AtomicU64::new(0));
    let (counted, sending) = (begun.clone(), client.clone());
    let owner = std::thread::spawn(move || {
        vm.busy = true;
        for _ in 0..12 {
            vm.live();
            vm.checkpoint(&sending, false);
            counted.fetch_add(1, Ordering::SeqCst);
        }
        vm
    });
    // An incremental checkpoint changes all of its memory, 256 KiB: the second has no room, and waits.
    until("the owner is blocked", || {
        client.unacknowledged() > 0 && begun.load(Ordering::SeqCst) > 0
    });
    let heard = Arc::new(AtomicU64::new(0));
    let (acks, hearing) = (heard.clone(), connection.clone());
    std::thread::spawn(move || {
        while let Some(event) = hearing.next_event() {
            if let ClientEvent::Ack { epoch, .. } = event {
                acks.fetch_max(epoch.0, Ordering::SeqCst);
            }
        }
    });
    let sent = begun.load(Ordering::SeqCst);
    assert!(sent < 12 && client.unacknowledged() <= 2, "{sent}");
    assert!(!owner.is_finished(), "nothing has been acknowledged");
    // Granted to nobody: it asks for what it missed, and the chain goes on.
    cluster.hosts[1].server().unfreeze(VM).unwrap();
    let vm = owner.join().unwrap();
    until("all of it is acknowledged", || {
        heard.load(Ordering::SeqCst) == vm.epoch.0
    });
    assert_eq!(vm.epoch, Epoch(13));
    assert_eq!(client.unacknowledged(), 0);
    vm.check(&cluster.take_over(1));
}

#[test]
fn c8_a_client_that_is_closed_waits_for_nothing() {
    let cluster = Cluster::new(2);
    let view = cluster.view.clone();
    let client = ChainClient::new(VM, view.owner.clone(), view.generation, None, BOUND);
    let client = Arc::new(client);
    let _connection = connect(&client, &view);
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    until("the first is there", || {
        cluster.hosts[1].epoch() == Some(vm.epoch)
    });
    cluster.hosts[1].server().freeze(VM).unwrap();
    let (done, ended) = mpsc::channel();
    let sending = client.clone();
    std::thread::spawn(move || {
        vm.busy = true;
        let refused = loop {
            vm.live();
            if let Err(e) = vm.try_checkpoint(&sending, false) {
                break e;
            }
        };
        let _ = done.send(refused);
    });
    until("something is kept", || client.unacknowledged() > 0);
    client.close();
    let refused = ended.recv_timeout(PATIENCE).expect("it waits no longer");
    assert!(matches!(refused, ClientError::Closed), "{refused}");
    assert!(matches!(
        client.begin(Epoch(99), false, true),
        Err(ClientError::Closed)
    ));
}

#[test]
fn h16_a_replica_is_resumed_from_only_once_output_is_held() {
    let mut cluster = Cluster::new(2);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.holds = false;
    for full in [true, false] {
        vm.live();
        vm.checkpoint(&owner, full);
        committed(&owner, vm.epoch, Generation(2));
        for host in &cluster.hosts {
            let refused = host.server().freeze(VM).unwrap_err();
            assert!(matches!(refused, ServerError::Joining(_)), "{refused}");
            assert!(!host.could_resume());
        }
    }
    vm.holds = true;
    vm.live();
    vm.checkpoint(&owner, false);
    committed(&owner, vm.epoch, Generation(2));
    assert!(cluster.hosts.iter().all(|host| host.could_resume()));
    vm.check(&cluster.take_over(1));
}
