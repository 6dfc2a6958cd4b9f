//! A replica that is slow is not lost: only who does not answer is. And whoever sends to one that takes nothing is let go as
//! soon as the master has decided to do without it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use chain::blocks::{Answer, Digest};
use chain::{ChainClient, ClientEvent, Connection};
use checkpoint::{Epoch, Generation};

use crate::cluster::{Cluster, PATIENCE, VM, committed, connect, until};
use crate::hung::{Disk, Hanging};
use crate::vm::Vm;

/// More than the sockets between two hosts hold.
const MUCH: usize = 24 << 20;
const PIECE: usize = 256 << 10;

/// Sends that many bytes of nothing in particular, for stores that do not look.
fn send(client: &ChainClient, bytes: usize) {
    for _ in 0..bytes / PIECE {
        client.pages(&[0; PIECE]).unwrap();
    }
}

#[test]
fn a_replica_that_takes_its_time_over_the_first_checkpoint_is_waited_for() {
    let cluster = Cluster::bare(1, 1_000_000);
    let disk = Arc::<Disk>::default();
    let server = cluster.hosts[0].server();
    server.create_with(cluster.view.clone(), Box::new(Hanging(disk.clone())));
    let owner = cluster.connect();
    disk.set(true);
    std::thread::scope(|scope| {
        let client = &owner.client;
        scope.spawn(move || {
            client.begin(Epoch(1), true, false).unwrap();
            send(client, MUCH);
            client.machine(&Vm::new().machine()).unwrap();
            client.end().unwrap();
        });
        // Longer than any peer may take nothing that is only told something.
        until("it has taken nothing for long", || {
            server.status(VM).unwrap().busy_ms > 4000
        });
        disk.set(false);
    });
    committed(&owner, Epoch(1), Generation(2));
}

#[test]
fn a_question_about_disks_waits_its_turn_behind_much_that_a_slow_replica_has_still_to_take() {
    let cluster = Cluster::bare(2, 1_000_000);
    let disk = Arc::<Disk>::default();
    for (host, disk) in cluster.hosts.iter().zip([Arc::default(), disk.clone()]) {
        let store = Hanging(disk);
        host.server()
            .create_with(cluster.view.clone(), Box::new(store));
    }
    let owner = cluster.connect();
    disk.set(true);
    owner.begin_over(Epoch(1)).unwrap();
    send(&owner, MUCH);
    owner.compare(0, 0, &[Digest::default(); 3]).unwrap();
    // The first replica has read the question once it has taken as much again.
    send(&owner, MUCH);
    disk.set(false);
    match owner.next_event() {
        Some(ClientEvent::Compared { answer, .. }) => {
            let Answer { disk, first, .. } = answer;
            assert_eq!((disk, first), (0, 0));
        }
        other => panic!("instead of an answer: {other:?}"),
    }
}

/// Counts what is acknowledged, to the end of the connection.
fn hear(connection: Arc<Connection>, acked: &Arc<AtomicU64>) {
    let acked = acked.clone();
    std::thread::spawn(move || {
        while let Some(event) = connection.next_event() {
            if let ClientEvent::Ack { epoch, .. } = event {
                acked.fetch_max(epoch.0, Ordering::SeqCst);
            }
        }
    });
}

#[test]
fn an_owner_that_waits_for_a_head_is_let_go_by_the_chain_without_it() {
    let mut cluster = Cluster::bare(2, 1_000_000);
    let disk = Arc::<Disk>::default();
    let head = cluster.hosts[0].server();
    head.create_with(cluster.view.clone(), Box::new(Hanging(disk.clone())));
    cluster.create(1..2);
    let owner = cluster.connect();
    let client = &owner.client;
    let acked = Arc::<AtomicU64>::default();
    let mut vm = Vm::new();
    vm.checkpoint(client, true);
    vm.live();
    vm.checkpoint(client, false);
    committed(&owner, vm.epoch, Generation(2));
    disk.set(true);
    let sent = AtomicU64::new(0);
    let vm = std::thread::scope(|scope| {
        let sent = &sent;
        let sending = scope.spawn(move || {
            vm.busy = true;
            for _ in 0..MUCH / PIECE {
                vm.live();
                vm.checkpoint(client, false);
                sent.fetch_add(1, Ordering::SeqCst);
            }
            vm
        });
        let mut before = u64::MAX;
        until("the owner waits for the head", || {
            std::thread::sleep(Duration::from_millis(300));
            let now = sent.load(Ordering::SeqCst);
            std::mem::replace(&mut before, now) == now
        });
        assert!(!sending.is_finished());
        cluster.reconfigure(&[1], None);
        let (done, connected) = mpsc::channel();
        let view = cluster.view.clone();
        scope.spawn(move || done.send(connect(client, &view)));
        let connection = connected.recv_timeout(PATIENCE / 3);
        disk.set(false);
        hear(connection.expect("nobody waits for the old head"), &acked);
        let vm = sending.join().unwrap();
        until("all of it is acknowledged", || {
            acked.load(Ordering::SeqCst) == vm.epoch.0
        });
        vm
    });
    vm.check(&cluster.take_over(1));
}
