//! The master over TCP: decisions are compare-and-set whoever asks, and its clients are told clearly what is wrong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use chain::master::{
    Command, LocalMaster, Master, MasterError, MasterServer, Rejection, RemoteMaster,
};
use chain::{Mark, Member, VmShape};
use checkpoint::{Epoch, Generation, HostId, VmId};
use proptest::prelude::*;

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn register(name: &str) -> Command {
    Command::Register {
        name: name.into(),
        owner: host("a"),
        shape: VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: "x".into(),
        },
    }
}

fn reconfigure(vm: VmId, expect: Generation, chain: &[&str]) -> Command {
    let member = |name: &&str| Member::new(host(name), "127.0.0.1:1".parse().unwrap());
    Command::Reconfigure {
        vm,
        expect,
        by: host("a"),
        chain: chain.iter().map(member).collect(),
        joining: None,
        anew: true,
    }
}

fn checkpoint_of(generation: Generation) -> Mark {
    Mark {
        generation,
        epoch: Epoch(7),
        digest: 0,
        held: true,
    }
}

fn served() -> (tempfile::TempDir, SocketAddr) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(LocalMaster::open(dir.path()).unwrap());
    let server = MasterServer::bind(any_port(), engine).unwrap();
    (dir, server.addr())
}

#[test]
fn i4_of_many_hosts_asking_at_once_one_is_given_the_vm() {
    let (_dir, addr) = served();
    let master = RemoteMaster::new(addr);
    let vm = master.propose(&register("vm")).unwrap().view.vm;
    let names: Vec<String> = (0..8).map(|n| format!("r{n}")).collect();
    let chain: Vec<&str> = names.iter().map(String::as_str).collect();
    master
        .propose(&reconfigure(vm, Generation(1), &chain))
        .unwrap();
    let start = Arc::new(Barrier::new(names.len()));
    let asking: Vec<_> = names
        .into_iter()
        .map(|name| {
            let start = start.clone();
            std::thread::spawn(move || {
                let master = RemoteMaster::new(addr);
                start.wait();
                master.propose(&Command::TakeOver {
                    vm,
                    expect: Generation(2),
                    by: host(&name),
                    at: checkpoint_of(Generation(2)),
                })
            })
        })
        .collect();
    let mut granted = Vec::new();
    for answer in asking {
        match answer.join().unwrap() {
            Ok(record) => granted.push(record),
            Err(MasterError::Rejected(Rejection::Generation { actual, .. })) => {
                assert_eq!(actual, Generation(3));
            }
            Err(e) => panic!("{e}"),
        }
    }
    let [record] = &granted[..] else {
        panic!("granted to {}", granted.len())
    };
    assert_eq!(&master.read().unwrap().records[0], record);
    // Those after it stay, in their order; those before it may hold what is no part of the history any more.
    let taker = record.view.owner.as_str()[1..].parse::<usize>().unwrap();
    let left: Vec<&str> = record.view.chain.iter().map(|m| m.host.as_str()).collect();
    let after: Vec<String> = (taker + 1..8).map(|n| format!("r{n}")).collect();
    assert_eq!(left, after);
    assert_eq!(record.view.in_place(), taker < 7);
}

#[test]
fn an_empty_chain_is_recorded_and_nobody_takes_over_then() {
    let (_dir, addr) = served();
    let master = RemoteMaster::new(addr);
    let vm = master.propose(&register("vm")).unwrap().view.vm;
    master
        .propose(&reconfigure(vm, Generation(1), &["b"]))
        .unwrap();
    let record = master
        .propose(&reconfigure(vm, Generation(2), &[]))
        .unwrap();
    assert!(record.view.chain.is_empty());
    let take = Command::TakeOver {
        vm,
        expect: Generation(3),
        by: host("b"),
        at: checkpoint_of(Generation(2)),
    };
    let error = master.propose(&take).unwrap_err();
    assert!(error.to_string().contains("no member"), "{error}");
}

#[test]
fn i5_what_replicas_hold_counts_until_the_chain_begins_anew_and_survives_the_master() {
    let dir = tempfile::tempdir().unwrap();
    let vm = {
        let master = LocalMaster::open(dir.path()).unwrap();
        let vm = master.propose(&register("vm")).unwrap().view.vm;
        master
            .propose(&reconfigure(vm, Generation(1), &["b", "c", "d"]))
            .unwrap();
        let take = Command::TakeOver {
            vm,
            expect: Generation(2),
            by: host("b"),
            at: checkpoint_of(Generation(2)),
        };
        master.propose(&take).unwrap();
        vm
    };
    // Started again, it knows what had been decided on the history, too.
    let master = LocalMaster::open(dir.path()).unwrap();
    let take = |by, epoch| Command::TakeOver {
        vm,
        expect: Generation(3),
        by: host(by),
        at: Mark {
            epoch: Epoch(epoch),
            ..checkpoint_of(Generation(2))
        },
    };
    let error = master.propose(&take("d", 8)).unwrap_err();
    assert!(
        matches!(error, MasterError::Rejected(Rejection::Outdated { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("not part of its history"));
    let record = master.propose(&take("c", 7)).unwrap();
    assert!(record.view.in_place());
    let anew = Command::Reconfigure {
        vm,
        expect: Generation(4),
        by: host("c"),
        chain: record.view.chain.clone(),
        joining: None,
        anew: true,
    };
    let record = master.propose(&anew).unwrap();
    assert!(!record.view.in_place());
    assert!(!record.view.history.contains(checkpoint_of(Generation(2))));
}

#[test]
fn a_watch_ends_with_the_decision_it_waits_for() {
    let (_dir, addr) = served();
    let waiting = std::thread::spawn(move || {
        RemoteMaster::new(addr)
            .watch(0, Duration::from_secs(60))
            .unwrap()
    });
    let master = RemoteMaster::new(addr);
    master.propose(&register("vm")).unwrap();
    let snapshot = waiting.join().unwrap();
    assert_eq!((snapshot.revision, snapshot.records.len()), (1, 1));
    // Nothing new: whatever it is, after the time given.
    let same = master.watch(1, Duration::from_millis(1)).unwrap();
    assert_eq!(same, snapshot);
}

#[test]
fn a_master_that_is_not_there_is_named_with_the_remedy() {
    // A port that was free a moment ago.
    let addr = TcpListener::bind(any_port()).unwrap().local_addr().unwrap();
    let error = RemoteMaster::new(addr)
        .propose(&register("vm"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&addr.to_string()) && error.contains("master.connect"),
        "{error}"
    );
}

#[test]
fn an_address_in_use_is_named_with_the_remedy() {
    let (_dir, addr) = served();
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(LocalMaster::open(dir.path()).unwrap());
    let error = MasterServer::bind(addr, engine).unwrap_err().to_string();
    assert!(
        error.contains(&addr.to_string()) && error.contains("master.serve"),
        "{error}"
    );
}

#[test]
fn a_master_that_cannot_store_says_so_and_decides_nothing_more() {
    let (dir, addr) = served();
    let master = RemoteMaster::new(addr);
    master.propose(&register("one")).unwrap();
    // A directory in the temporary file's place makes the write fail, also for root.
    std::fs::create_dir(dir.path().join("master.new")).unwrap();
    for _ in 0..2 {
        let error = master.propose(&register("two")).unwrap_err();
        assert!(matches!(error, MasterError::Engine { .. }), "{error}");
        assert!(error.to_string().contains("stopped deciding"), "{error}");
    }
}

#[test]
fn a_broken_connection_is_made_again() {
    let (dir, addr) = served();
    // In front of the master: ends each connection after one answer.
    let listener = TcpListener::bind(any_port()).unwrap();
    let front = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut server = TcpStream::connect(addr).unwrap();
            let mut header = [0u8; 8];
            for (from, to) in [(0, 1), (1, 0)] {
                let mut ends = [client.try_clone().unwrap(), server.try_clone().unwrap()];
                ends[from].read_exact(&mut header).unwrap();
                let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
                let mut body = vec![0; length as usize];
                ends[from].read_exact(&mut body).unwrap();
                ends[to].write_all(&header).unwrap();
                ends[to].write_all(&body).unwrap();
            }
            let _ = (client.flush(), server.flush());
        }
    });
    let master = RemoteMaster::new(front);
    for n in 0..4 {
        master.propose(&register(&format!("vm{n}"))).unwrap();
    }
    assert_eq!(master.read().unwrap().records.len(), 4);
    drop(dir);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nonsense_ends_its_own_connection_only(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        honest_header in any::<bool>(),
    ) {
        static SERVED: std::sync::OnceLock<(tempfile::TempDir, SocketAddr)> = std::sync::OnceLock::new();
        let (_, addr) = SERVED.get_or_init(served);
        let mut message = Vec::new();
        if honest_header {
            message.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            message.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        }
        message.extend_from_slice(&bytes);
        let mut peer = TcpStream::connect(addr).unwrap();
        let _ = peer.write_all(&message);
        let _ = peer.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = peer.read_to_end(&mut rest);
        prop_assert!(RemoteMaster::new(*addr).read().is_ok());
    }
}
