//! The master over TCP: decisions are compare-and-set whoever asks, and its clients are told clearly what is wrong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use chain::master::{
    Begin, Command, LocalMaster, Master, MasterError, MasterServer, Order, Outcome, Rejection,
    RemoteMaster, Reply, Request, Snapshot, Wanted,
};
use chain::{Life, Mark, Member, VmShape};
use checkpoint::{Epoch, Generation, HostId, HostUuid, RequestId, VmId};
use proptest::prelude::*;

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn register(name: &str) -> Command {
    Command::Register {
        vm: VmId(name.bytes().fold(1, |n, b| n * 31 + u128::from(b))),
        name: name.into(),
        owner: host("a"),
        life: Life::On,
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
    let engine = Arc::new(LocalMaster::open(dir.path(), Begin::New).unwrap());
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
        let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
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
    let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
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
    let engine = Arc::new(LocalMaster::open(dir.path(), Begin::New).unwrap());
    let error = MasterServer::bind(addr, engine).unwrap_err().to_string();
    assert!(
        error.contains(&addr.to_string()) && error.contains("master.serve"),
        "{error}"
    );
}

#[test]
fn a_master_that_cannot_store_says_so_and_decides_nothing_until_it_can() {
    let (dir, addr) = served();
    let master = RemoteMaster::new(addr);
    master.propose(&register("one")).unwrap();
    // A directory in the temporary file's place makes the write fail, also for root.
    std::fs::create_dir(dir.path().join("master.new")).unwrap();
    for n in 0..2 {
        let error = master.propose(&register("two")).unwrap_err();
        match n {
            // It may be on the disk, and count when the master is started again.
            0 => assert!(matches!(error, MasterError::Unknown { .. }), "{error}"),
            _ => assert!(matches!(error, MasterError::Engine { .. }), "{error}"),
        }
        assert!(
            error.to_string().contains("until it can be written"),
            "{error}"
        );
    }
    std::fs::remove_dir(dir.path().join("master.new")).unwrap();
    master.propose(&register("two")).unwrap();
    assert_eq!(master.read().unwrap().records.len(), 2);
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

#[test]
fn h17_a_master_begins_by_order_only_and_a_cluster_keeps_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let said = LocalMaster::open(dir.path(), Begin::Existing).unwrap_err();
    assert!(matches!(said, MasterError::NotBegun { .. }), "{said}");
    assert!(said.to_string().contains("understudy init"), "{said}");
    let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
    let cluster = master.read().unwrap().cluster;
    assert_eq!(cluster, master.cluster());
    drop(master);
    for begin in [Begin::Existing, Begin::New] {
        let master = LocalMaster::open(dir.path(), begin).unwrap();
        assert_eq!(master.read().unwrap().cluster, cluster);
    }
    let other = tempfile::tempdir().unwrap();
    let other = LocalMaster::open(other.path(), Begin::New).unwrap();
    assert_ne!(other.cluster(), cluster);
}

#[test]
fn i2_over_tcp_a_second_host_of_a_name_is_refused() {
    let (_dir, addr) = served();
    let master = RemoteMaster::new(addr);
    let (one, two) = (HostUuid::random(), HostUuid::random());
    let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
    let known = master.enroll(&host("a"), one, at(1)).unwrap();
    assert_eq!(master.read().unwrap().hosts, [known]);
    let said = master
        .enroll(&host("a"), two, at(2))
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("10.0.0.1:1") && said.contains("10.0.0.1:2"),
        "{said}"
    );
    assert_eq!(master.forget(&host("a")).unwrap().id, one);
    master.enroll(&host("a"), two, at(2)).unwrap();
}

fn ask_with(id: RequestId, command: Command) -> Request {
    let order = Order::Vm(command);
    Request { id, order }
}

/// A bound for what should take no time, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(60);

/// An engine that tells what it answers.
struct Watched {
    engine: LocalMaster,
    said: Sender<Result<Reply, MasterError>>,
}

impl Master for Watched {
    fn request(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError> {
        let answer = self.engine.request(request, wanted);
        let told = match &answer {
            Ok(reply) => Ok(reply.clone()),
            Err(MasterError::GivenUp) => Err(MasterError::GivenUp),
            Err(e) => Err(MasterError::Stopped(e.to_string())),
        };
        let _ = self.said.send(told);
        answer
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        self.engine.watch(since, timeout)
    }
}

/// The master stands still: the kernel takes its connections and what is said on them. Its client gives up; then it goes
/// on, with everything that has arrived meanwhile.
#[test]
fn l8_what_was_given_up_is_not_carried_out_later() {
    let dir = tempfile::tempdir().unwrap();
    let (said, heard) = std::sync::mpsc::channel();
    let engine = Arc::new(Watched {
        engine: LocalMaster::open(dir.path(), Begin::New).unwrap(),
        said,
    });
    let frozen = TcpListener::bind(any_port()).unwrap();
    let addr = frozen.local_addr().unwrap();
    let master = RemoteMaster::new(addr).patience(Duration::from_millis(50));
    let id = RequestId::random();
    let request = ask_with(id, register("given-up"));
    let said = master.request(&request, &Wanted::always()).unwrap_err();
    assert!(
        matches!(&said, MasterError::Unknown { id: named, .. } if *named == id),
        "{said}"
    );
    assert!(said.to_string().contains(&id.to_string()), "{said}");
    // It thaws, and finds both attempts.
    MasterServer::on(frozen, engine).unwrap();
    for _ in 0..2 {
        let answer = heard.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(answer, Err(MasterError::GivenUp)), "{answer:?}");
    }
    let master = RemoteMaster::new(addr);
    let outcome = master.outcome(id).unwrap();
    assert_eq!(outcome, Outcome::Never);
    assert!(master.read().unwrap().records.is_empty());
    // And never is never: as if a copy were still under way.
    let late = master.request(&request, &Wanted::always()).unwrap_err();
    assert!(
        matches!(late, MasterError::Rejected(Rejection::Expired)),
        "{late}"
    );
    master.propose(&register("given-up")).unwrap();
}

/// The answer is lost, not the request.
#[test]
fn l8_a_request_whose_answer_is_lost_was_done_once_and_its_id_says_so() {
    let (_dir, addr) = served();
    // In front of the master: passes requests on, swallows answers.
    let listener = TcpListener::bind(any_port()).unwrap();
    let front = listener.local_addr().unwrap();
    let (done, passed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut server = TcpStream::connect(addr).unwrap();
            let mut header = [0u8; 8];
            client.read_exact(&mut header).unwrap();
            let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
            let mut body = vec![0; length as usize];
            client.read_exact(&mut body).unwrap();
            server.write_all(&header).unwrap();
            server.write_all(&body).unwrap();
            server.read_exact(&mut header).unwrap();
            let _ = done.send(());
        }
    });
    let master = RemoteMaster::new(front).patience(Duration::from_secs(30));
    let id = RequestId::random();
    let said = master.request(&ask_with(id, register("vm")), &Wanted::always());
    assert!(matches!(said, Err(MasterError::Unknown { .. })), "{said:?}");
    // Tried twice, each time answered.
    assert_eq!(passed.iter().take(2).count(), 2);
    let direct = RemoteMaster::new(addr);
    let outcome = direct.outcome(id).unwrap();
    assert_eq!(outcome, Outcome::Done { revision: 1 });
    assert_eq!(direct.read().unwrap().records.len(), 1);
    let again = direct.request(&ask_with(id, register("vm")), &Wanted::always());
    assert!(matches!(again, Ok(Reply::Vm(_))), "{again:?}");
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
