//! Damage on the wire, in checkpoints and in stores; peers that are not what they should be.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chain::{ChainClient, ClientEvent, Loss, Mark, ReplicaStore, ServerEvent, StoreError, Taken};
use checkpoint::{CheckpointEnd, EncoderOptions, Epoch, Generation, PageEncoder};

use crate::cluster::{Cluster, Owner, PATIENCE, VM, Vm, committed, host, trouble};
use crate::proxy::{self, Damage};

/// Bytes of a chain's greeting and first checkpoint, counted by sending them.
fn first_checkpoint_bytes() -> u64 {
    // Greeting, 16 disk blocks of 64 KiB with headers, pages, machine state, end: a little over 1 MiB.
    (1 << 20) + 2048
}

#[test]
fn i7_damage_on_the_wire_is_found_and_costs_only_what_was_under_way() {
    let base = first_checkpoint_bytes();
    for damage in (0..12).flat_map(|n| {
        let at = base + n * 401;
        [Damage::Flip(at), Damage::Cut(at)]
    }) {
        let mut cluster = Cluster::new(2);
        // Up before the proxy is: its first connection must be the one that counts.
        drop(cluster.connect());
        let mut view = cluster.view.clone();
        view.chain[0].addr = proxy::start(cluster.hosts[0].server().addr(), damage);
        let client = Owner::new(&view, None);
        let mut vm = Vm::new();
        let mut sent = vec![vm.clone()];
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        sent.push(vm.clone());
        // Until the damage shows: the connection ends.
        let noticed = (2..2000).any(|seed| {
            vm.run(seed);
            vm.checkpoint(&client, false);
            sent.push(vm.clone());
            client.connection.heartbeat().is_err()
        });
        assert!(noticed, "{damage:?} was not noticed");
        let event = trouble(&client, vm.epoch);
        assert!(matches!(event, ClientEvent::Lost(_)), "{event:?}");
        // Neither replica has failed; each is at a complete checkpoint, and the tail not beyond the head.
        // (The tail is asked first: what arrived before the damage may still be being processed.)
        let [head, tail] = &cluster.hosts[..] else {
            unreachable!()
        };
        let (tail_at, head_at) = (tail.epoch(), head.epoch());
        assert!(tail_at <= head_at, "{tail_at:?} {head_at:?}");
        assert_eq!((head.failed(), tail.failed()), (None, None), "{damage:?}");
        let handover = cluster.take_over(0);
        sent[handover.epoch.0 as usize].check(&handover);
    }
}

#[test]
fn i7_a_checkpoint_that_does_not_fit_fails_the_replica_and_is_never_acknowledged() {
    type Spoil = fn(&ChainClient, &mut Vm);
    let spoils: [(&str, Spoil); 4] = [
        ("checksum", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false, true).unwrap();
            let mut pages = Vec::new();
            PageEncoder::new(EncoderOptions { lz4: false }).encode(3, &[9; 4096], None, &mut pages);
            *pages.last_mut().unwrap() ^= 1;
            client.pages(&pages).unwrap();
            client.machine(&vm.machine()).unwrap();
            client.end().unwrap();
        }),
        ("no machine state", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false, true).unwrap();
            client.end().unwrap();
        }),
        ("not a machine state", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false, true).unwrap();
            client.machine(&[7; 100]).unwrap();
            client.end().unwrap();
        }),
        ("outside the VM's memory", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false, true).unwrap();
            let mut pages = Vec::new();
            PageEncoder::new(EncoderOptions { lz4: false }).encode(
                1 << 19,
                &[9; 4096],
                None,
                &mut pages,
            );
            client.pages(&pages).unwrap();
            client.end().unwrap();
        }),
    ];
    for (reason, spoil) in spoils {
        let mut cluster = Cluster::new(2);
        let client = cluster.connect();
        let mut vm = Vm::new();
        vm.run(1);
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        let good = vm.clone();
        spoil(&client, &mut vm);
        let event = trouble(&client, good.epoch);
        let ClientEvent::Lost(Loss {
            host: Some(named),
            why,
            ..
        }) = &event
        else {
            panic!("{event:?}")
        };
        assert!(why.contains(reason), "{why:?} does not say {reason:?}");
        let position = cluster.view.position(named).unwrap();
        let ServerEvent::Failed { why, .. } = cluster.hosts[position]
            .events
            .recv_timeout(PATIENCE)
            .unwrap()
        else {
            panic!("not a failure")
        };
        assert!(why.contains(reason), "{why}");
        assert!(cluster.hosts.iter().all(|h| h.epoch() == Some(good.epoch)));
        // What it had it still has.
        good.check(&cluster.take_over(position));
    }
}

/// A store that keeps nothing and fails at one checkpoint, as a disk does.
struct Failing {
    at: Epoch,
    open: Epoch,
    committed: Arc<AtomicU64>,
}

impl ReplicaStore for Failing {
    fn begin(&mut self, _: Generation, epoch: Epoch, _: bool) -> Result<(), StoreError> {
        self.open = epoch;
        Ok(())
    }
    fn pages(&mut self, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }
    fn disk(&mut self, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }
    fn machine(&mut self, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }
    fn prepare(&mut self, _: Generation, _: Mark, _: &CheckpointEnd) -> Result<(), StoreError> {
        if self.open == self.at {
            return Err(StoreError::Disks("fdatasync: it failed".into()));
        }
        Ok(())
    }
    fn commit(&mut self, mark: Mark) {
        self.committed.store(mark.epoch.0, Ordering::SeqCst);
    }
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

#[test]
fn i2_a_checkpoint_that_one_replica_cannot_store_reaches_none_after_it() {
    let cluster = Cluster::bare(2, 1_000_000);
    let committed_at: Vec<Arc<AtomicU64>> = [Epoch(3), Epoch(1000)]
        .into_iter()
        .zip(&cluster.hosts)
        .map(|(at, host)| {
            let committed = Arc::new(AtomicU64::new(0));
            let store = Failing {
                at,
                open: Epoch::ZERO,
                committed: committed.clone(),
            };
            host.server()
                .create_with(cluster.view.clone(), Box::new(store));
            committed
        })
        .collect();
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    vm.checkpoint(&client, false);
    vm.checkpoint(&client, false);
    let event = trouble(&client, Epoch(2));
    let ClientEvent::Lost(Loss {
        host: Some(named),
        why,
        ..
    }) = &event
    else {
        panic!("{event:?}")
    };
    assert_eq!(*named, host("r0"));
    assert!(why.contains("fdatasync"), "{why}");
    // The damage took what it had: it can neither be resumed from nor handed over.
    let error = cluster.hosts[0].server().freeze(VM).unwrap_err();
    assert!(error.to_string().contains("fdatasync"), "{error}");
    assert!(committed_at.iter().all(|c| c.load(Ordering::SeqCst) <= 2));
    assert!(cluster.hosts[1].epoch() <= Some(Epoch(2)));
}
