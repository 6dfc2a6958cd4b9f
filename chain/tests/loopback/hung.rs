//! A replica whose disk hangs harms its own VM only, and says so (FIELD H15).

use std::sync::{Arc, Condvar, Mutex};

use chain::{ChainClient, Mark, Member, ReplicaStore, ServerError, StoreError, Taken, View, probe};
use checkpoint::{CheckpointEnd, Epoch, Generation, VmId};
use diskbuf::Durability;

use crate::cluster::{Cluster, Host, PATIENCE, VM, Vm, connect, host, shape, until};

/// A disk that may hang.
#[derive(Default)]
pub struct Disk {
    hangs: Mutex<bool>,
    changed: Condvar,
}

impl Disk {
    pub fn set(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.changed.notify_all();
    }

    fn sync(&self) {
        let hangs = self.hangs.lock().unwrap();
        drop(self.changed.wait_while(hangs, |hangs| *hangs).unwrap());
    }
}

/// A store that keeps nothing, on such a disk.
pub struct Hanging(pub Arc<Disk>);

impl ReplicaStore for Hanging {
    fn begin(&mut self, _: Generation, _: Epoch, _: bool) -> Result<(), StoreError> {
        Ok(())
    }
    fn pages(&mut self, _: &[u8]) -> Result<(), StoreError> {
        self.0.sync();
        Ok(())
    }
    fn disk(&mut self, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }
    fn machine(&mut self, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }
    fn prepare(&mut self, _: Generation, _: Mark, _: &CheckpointEnd) -> Result<(), StoreError> {
        self.0.sync();
        Ok(())
    }
    fn commit(&mut self, _: Mark) {}
    fn holds(&self) -> Option<Mark> {
        None
    }
    fn machine_state(&self) -> Option<&[u8]> {
        None
    }
    fn hand_over(self: Box<Self>, _: Generation) -> Result<Taken, StoreError> {
        Err(StoreError::Empty)
    }
}

/// What another VM of the same host is in.
fn other(host: &Host, generation: Generation, owner: &str) -> View {
    View {
        vm: VmId(2),
        name: "other".into(),
        generation,
        owner: crate::cluster::host(owner),
        chain: vec![Member {
            since: generation,
            ..host.member.clone()
        }],
        joining: None,
        history: chain::History::new(generation),
    }
}

#[test]
fn h15_a_replica_whose_disk_hangs_says_so_and_delays_no_other() {
    let cluster = Cluster::bare(2, 1_000_000);
    let disk = Arc::<Disk>::default();
    let server = cluster.hosts[0].server();
    server.create_with(cluster.view.clone(), Box::new(Hanging(disk.clone())));
    cluster.hosts[1]
        .server()
        .create_with(cluster.view.clone(), Box::new(Hanging(Arc::default())));
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    crate::cluster::committed(&owner, vm.epoch, Generation(2));
    disk.set(true);
    vm.checkpoint(&owner, false);
    // Whoever asks hears at once that it is busy, and for how long: longer and longer.
    let asked = || {
        let member = &cluster.hosts[0].member;
        let alive = probe(member, VM, Generation(2), &host("owner"), PATIENCE).unwrap();
        alive.replica.unwrap()
    };
    until("it has been busy for a while", || asked().busy_ms > 20);
    assert_eq!(asked().hist, Some(Epoch(1)));
    let status = server.status(VM).unwrap();
    assert_eq!(status.epoch, Some(Epoch(1)));
    assert!(status.busy_ms > 20, "{status:?}");
    // It cannot be taken over from, and says why instead of waiting.
    let busy = server.freeze(VM).unwrap_err();
    assert!(matches!(busy, ServerError::Busy(_)), "{busy}");

    // Another VM comes, runs, and goes; so does the one whose disk hangs.
    for (generation, who) in [(2, "a"), (3, "b")] {
        let view = other(&cluster.hosts[0], Generation(generation), who);
        server
            .create(
                view.clone(),
                shape(crate::cluster::DISK),
                Durability::Memory,
            )
            .unwrap();
        let client = ChainClient::new(
            view.vm,
            view.owner.clone(),
            view.generation,
            None,
            chain::KEPT_MAX,
        );
        let connection = connect(&client, &view);
        let mut vm = Vm::new();
        vm.checkpoint(&client, true);
        until("it commits", || {
            server.status(view.vm).unwrap().epoch == Some(vm.epoch)
        });
        assert_eq!(server.freeze(view.vm).unwrap().epoch, vm.epoch);
        connection.close();
        server.remove(view.vm, Generation(generation));
        if who == "a" {
            server.decline(VM, Generation(3), "its disk hangs".into());
            assert!(server.status(VM).is_none());
            assert_eq!(asked().declined.as_deref(), Some("its disk hangs"));
        }
    }
    disk.set(false);
}

#[test]
fn h15_a_replica_whose_disk_hangs_still_beats() {
    // Its successor must not take the owner for dead: the chain can go on without the one that hangs.
    let cluster = Cluster::bare(2, 6);
    let disk = Arc::<Disk>::default();
    for (host, disk) in cluster.hosts.iter().zip([disk.clone(), Arc::default()]) {
        host.server()
            .create_with(cluster.view.clone(), Box::new(Hanging(disk)));
    }
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    crate::cluster::committed(&owner, vm.epoch, Generation(2));
    until("the last one could take over", || {
        cluster.hosts[1].could_resume()
    });
    disk.set(true);
    vm.checkpoint(&owner, false);
    let server = cluster.hosts[0].server();
    // Ten times what the last one would wait for: it waits for 30 heartbeats of 10 ms, as it is the second.
    until("a long time has passed", || {
        let _ = owner.connection.heartbeat();
        server.status(VM).unwrap().busy_ms > 3000
    });
    assert!(
        cluster.hosts[1].events.try_recv().is_err(),
        "nobody is suspected"
    );
    disk.set(false);
    crate::cluster::committed(&owner, vm.epoch, Generation(2));
}
