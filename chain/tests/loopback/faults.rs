//! Damage on the wire, in checkpoints and in stores; peers that are not what they should be.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use chain::{
    ChainClient, ClientError, ClientEvent, Handover, Mark, ReplicaServer, ReplicaStore,
    ServerEvent, ServerOptions, StoreError,
};
use checkpoint::{CheckpointEnd, EncoderOptions, Epoch, Generation, PageEncoder};

use crate::cluster::{Cluster, PATIENCE, VM, Vm, committed, connect, host, trouble};
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
        let cluster = Cluster::new(2);
        // Up before the proxy is: its first connection must be the one that counts.
        drop(cluster.connect());
        let mut view = cluster.view.clone();
        view.chain[0].addr = proxy::start(view.chain[0].addr, damage);
        let client = connect(&view);
        let mut vm = Vm::new();
        let mut sent = vec![vm.clone()];
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        sent.push(vm.clone());
        // Until the damage shows: sending fails, or the owner hears of it.
        let noticed = (2..2000).any(|seed| {
            vm.run(seed);
            let result = vm.try_checkpoint(&client, false);
            sent.push(vm.clone());
            result.is_err()
        });
        assert!(noticed, "{damage:?} was not noticed");
        let event = trouble(&client, vm.epoch);
        assert!(matches!(event, ClientEvent::Lost { .. }), "{event:?}");
        // Neither replica has failed; each is at a complete checkpoint, and the tail not beyond the head.
        // (The tail is asked first: what arrived before the damage may still be being processed.)
        let [head, tail] = &cluster.hosts[..] else {
            unreachable!()
        };
        let (tail_at, head_at) = (tail.epoch(), head.epoch());
        assert!(tail_at <= head_at, "{tail_at:?} {head_at:?}");
        assert_eq!((head.failed(), tail.failed()), (None, None), "{damage:?}");
        let mut view = cluster.view.clone();
        view.generation = view.generation.next();
        view.chain.remove(0);
        let server = head.server();
        let epoch = server.freeze(VM).unwrap();
        sent[epoch.0 as usize].check(&server.hand_over(&view).unwrap());
    }
}

#[test]
fn i7_a_checkpoint_that_does_not_fit_fails_the_replica_and_is_never_acknowledged() {
    type Spoil = fn(&ChainClient, &mut Vm);
    let spoils: [(&str, Spoil); 4] = [
        ("checksum", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false).unwrap();
            let mut pages = Vec::new();
            PageEncoder::new(EncoderOptions { lz4: false }).encode(3, &[9; 4096], None, &mut pages);
            *pages.last_mut().unwrap() ^= 1;
            client.pages(vm.epoch, &pages).unwrap();
            client.machine(vm.epoch, &vm.machine()).unwrap();
            client.end(vm.epoch).unwrap();
        }),
        ("no machine state", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false).unwrap();
            client.end(vm.epoch).unwrap();
        }),
        ("not a machine state", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false).unwrap();
            client.machine(vm.epoch, &[7; 100]).unwrap();
            client.end(vm.epoch).unwrap();
        }),
        ("outside the VM's memory", |client, vm| {
            vm.epoch = vm.epoch.next();
            client.begin(vm.epoch, false).unwrap();
            let mut pages = Vec::new();
            PageEncoder::new(EncoderOptions { lz4: false }).encode(
                1 << 19,
                &[9; 4096],
                None,
                &mut pages,
            );
            client.pages(vm.epoch, &pages).unwrap();
            client.end(vm.epoch).unwrap();
        }),
    ];
    for (reason, spoil) in spoils {
        let cluster = Cluster::new(2);
        let client = cluster.connect();
        let mut vm = Vm::new();
        vm.run(1);
        vm.checkpoint(&client, true);
        committed(&client, vm.epoch, Generation(2));
        let good = vm.clone();
        spoil(&client, &mut vm);
        let event = trouble(&client, good.epoch);
        let ClientEvent::Lost {
            host: Some(named),
            why,
        } = &event
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
        let mut view = cluster.view.clone();
        view.generation = view.generation.next();
        view.chain.remove(position);
        let server = cluster.hosts[position].server();
        server.freeze(VM).unwrap();
        good.check(&server.hand_over(&view).unwrap());
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
    fn prepare(&mut self, _: Generation, _: &CheckpointEnd) -> Result<(), StoreError> {
        if self.open == self.at {
            return Err(StoreError::Disks("fdatasync: it failed".into()));
        }
        Ok(())
    }
    fn commit(&mut self, mark: Mark) {
        self.committed.store(mark.epoch.0, Ordering::SeqCst);
    }
    fn hand_over(self: Box<Self>, _: Generation) -> Result<Handover, StoreError> {
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
    let ClientEvent::Lost {
        host: Some(named),
        why,
    } = &event
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

#[test]
fn a_stranger_is_not_taken_for_the_predecessor_or_the_owner() {
    let cluster = Cluster::new(1);
    let error = ChainClient::connect(&host("stranger"), &cluster.view).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("its predecessor is owner, not stranger"),
        "{error}"
    );
    assert!(matches!(error, ClientError::Peer { .. }));
}

#[test]
fn a_second_connection_takes_the_firsts_place() {
    let cluster = Cluster::new(1);
    let first = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&first, true);
    committed(&first, vm.epoch, Generation(2));
    let second = cluster.connect();
    committed(&second, vm.epoch, Generation(2));
    let mut other = vm.clone();
    other.run(5);
    // The first one's frames end its connection and change nothing.
    while first.heartbeat().is_ok() {
        std::thread::yield_now();
    }
    vm.run(1);
    vm.checkpoint(&second, false);
    committed(&second, vm.epoch, Generation(2));
    assert_eq!(cluster.hosts[0].failed(), None);
}

#[test]
fn a_port_in_use_is_an_error_that_names_address_and_remedy() {
    let cluster = Cluster::bare(1, 6);
    let addr = cluster.hosts[0].member.addr;
    let options = ServerOptions {
        host: host("x"),
        data_dir: "/nonexistent".into(),
        heartbeat: std::time::Duration::from_millis(10),
        missed: 6,
    };
    let (sender, _events) = mpsc::channel();
    let Err(error) = ReplicaServer::bind(addr, options, sender) else {
        panic!("two servers on one address")
    };
    let text = error.to_string();
    assert!(text.contains(&addr.to_string()), "{text}");
    assert!(text.contains("host.toml"), "{text}");
}

#[test]
fn a_name_that_leaves_the_directory_is_refused() {
    let cluster = Cluster::bare(1, 6);
    for name in ["..", "a/b", "/etc", "", "."] {
        let mut view = cluster.view.clone();
        view.name = name.into();
        let result = cluster.hosts[0].server().create(
            view,
            crate::cluster::shape(),
            diskbuf::Durability::Memory,
        );
        let error = result.expect_err(name).to_string();
        assert!(error.contains("cannot be named"), "{error}");
    }
}

#[test]
fn peers_that_talk_nonsense_are_cut_off_and_others_served_on() {
    let cluster = Cluster::new(1);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    let mut x = 88_172_645_463_325_252u64;
    for round in 0..50 {
        let mut peer = TcpStream::connect(cluster.hosts[0].member.addr).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes: Vec<u8> = (0..64 + round * 7)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect();
        if round % 2 == 0 {
            // A good header of a kind that may not come first, or a greeting that does not decode.
            bytes[..4].copy_from_slice(b"UCHN");
            let kind = 1 + round as u16 % 12;
            bytes[4..8].copy_from_slice(&[2, 0, kind as u8, 0]);
            bytes[32..64].fill(0);
            bytes[32] = 40;
            let payload = crc32c::crc32c(&bytes[64..]);
            bytes[36..40].copy_from_slice(&payload.to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        }
        // The other side may have hung up before everything is out.
        let _ = peer.write_all(&bytes);
        let _ = peer.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = peer.read_to_end(&mut rest);
        vm.run(round);
        vm.checkpoint(&client, false);
    }
    committed(&client, vm.epoch, Generation(2));
    assert_eq!(cluster.hosts[0].failed(), None);
}
