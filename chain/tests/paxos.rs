//! The master of three members over real sockets: whoever dies, a majority decides and nothing is forgotten.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use chain::master::{
    Begin, Command, LocalMaster, Master, MasterError, MasterServer, PaxosMaster, Rejection,
    RemoteMaster,
};
use chain::{Life, Mark, Member, VmShape};
use checkpoint::{Generation, HostId};
use proptest::prelude::*;

mod commands;
use commands::{host, reconfigure, register, take_over};

/// A bound for what should take well under a second, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(60);

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Ports that were free a moment ago.
fn ports(n: usize) -> Vec<SocketAddr> {
    let held: Vec<_> = (0..n)
        .map(|_| TcpListener::bind(any_port()).unwrap())
        .collect();
    held.iter().map(|l| l.local_addr().unwrap()).collect()
}

struct Cluster {
    dir: tempfile::TempDir,
    members: BTreeMap<HostId, SocketAddr>,
    running: BTreeMap<HostId, Arc<PaxosMaster>>,
}

impl Cluster {
    fn new(n: usize) -> Self {
        let names = ["a", "b", "c", "d", "e"];
        let members = names[..n].iter().map(|name| host(name)).zip(ports(n));
        let mut cluster = Self {
            dir: tempfile::tempdir().unwrap(),
            members: members.collect(),
            running: BTreeMap::new(),
        };
        for name in &names[..n] {
            cluster.start(name);
        }
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn try_start(&self, name: &str) -> Result<PaxosMaster, MasterError> {
        PaxosMaster::open(&self.path(name), &host(name), &self.members, Begin::New)
    }

    fn start(&mut self, name: &str) {
        let member = self.try_start(name).unwrap_or_else(|e| panic!("{e}"));
        self.running.insert(host(name), Arc::new(member));
    }

    fn stop(&mut self, name: &str) {
        self.running.remove(&host(name)).expect("it runs").stop();
    }

    fn leader(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut leaders = self.running.iter().filter(|(_, m)| m.leads());
            if let (Some((name, _)), None) = (leaders.next(), leaders.next()) {
                return name.to_string();
            }
            assert!(Instant::now() < deadline, "there is no leader");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn follower(&self) -> String {
        let leader = self.leader();
        let other = self.running.keys().find(|name| name.to_string() != leader);
        other.expect("more than one runs").to_string()
    }

    fn at(&self, name: &str) -> &Arc<PaxosMaster> {
        &self.running[&host(name)]
    }
}

/// Asks until a leader has been found: commands are answered the same when repeated.
fn patiently<T>(mut ask: impl FnMut() -> Result<T, MasterError>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(e @ MasterError::NoDecision { .. }) if Instant::now() < deadline => drop(e),
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn the_leaders_death_is_survived_a_majoritys_is_refused_and_nothing_is_forgotten() {
    let mut cluster = Cluster::new(3);
    let master = cluster.at("b").clone();
    let vm = patiently(|| master.propose(&register("vm", "h0"))).view.vm;
    patiently(|| master.propose(&reconfigure(vm, Generation(1), "h0", &["h1", "h2"])));
    let before = patiently(|| master.read());
    assert_eq!(before.records[0].view.generation, Generation(2));
    drop(master);

    let leader = cluster.leader();
    cluster.stop(&leader);
    let other = cluster.running.keys().next().unwrap().to_string();
    assert_eq!(patiently(|| cluster.at(&other).read()), before);
    let granted = patiently(|| {
        cluster
            .at(&other)
            .propose(&take_over(vm, Generation(2), "h1"))
    });
    assert_eq!(granted.view.owner, host("h1"));

    let second = cluster.leader();
    cluster.stop(&second);
    let last = cluster.running.keys().next().unwrap().to_string();
    let begun = Instant::now();
    let mut said = String::new();
    // Until it has noticed that nobody answers any more.
    while !said.contains("1 of 3 members") {
        assert!(begun.elapsed() < PATIENCE, "{said}");
        for error in [
            cluster
                .at(&last)
                .propose(&register("other", "h0"))
                .unwrap_err(),
            cluster.at(&last).read().unwrap_err(),
        ] {
            assert!(matches!(error, MasterError::NoDecision { .. }), "{error}");
            said = error.to_string();
        }
    }
    assert!(said.contains("2 are needed"), "{said}");

    cluster.stop(&last);
    for name in ["a", "b", "c"] {
        cluster.start(name);
    }
    for name in ["a", "b", "c"] {
        let now = patiently(|| cluster.at(name).read());
        let record = now.records.iter().find(|r| r.view.vm == vm).unwrap();
        assert_eq!(record, &granted, "{name}");
    }
    patiently(|| cluster.at("c").propose(&register("third", "h0")));
    assert!(matches!(
        cluster.at("a").propose(&take_over(vm, Generation(2), "h2")),
        Err(MasterError::Rejected(Rejection::Generation { .. }))
    ));
}

#[test]
fn i4_of_many_that_ask_all_members_at_once_one_is_given_the_vm() {
    let cluster = Cluster::new(5);
    let vm = patiently(|| cluster.at("a").propose(&register("vm", "h")))
        .view
        .vm;
    let names: Vec<String> = (0..10).map(|n| format!("r{n}")).collect();
    let chain: Vec<&str> = names.iter().map(String::as_str).collect();
    patiently(|| {
        cluster
            .at("b")
            .propose(&reconfigure(vm, Generation(1), "h", &chain))
    });
    let start = Arc::new(Barrier::new(names.len()));
    let asking: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let master = cluster.at(["a", "b", "c", "d", "e"][i % 5]).clone();
            let (start, take) = (start.clone(), take_over(vm, Generation(2), name));
            std::thread::spawn(move || {
                start.wait();
                loop {
                    match master.propose(&take) {
                        Err(MasterError::NoDecision { .. }) => {}
                        answer => return answer,
                    }
                }
            })
        })
        .collect();
    let mut granted = Vec::new();
    for answer in asking {
        match answer.join().unwrap() {
            Ok(record) => granted.push(record),
            Err(MasterError::Rejected(Rejection::Generation { .. })) => {}
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(granted.len(), 1, "{granted:?}");
    for name in ["a", "b", "c", "d", "e"] {
        let now = patiently(|| cluster.at(name).read());
        assert_eq!(now.records, granted, "{name}");
    }
}

#[test]
fn a_watch_at_one_member_ends_with_a_decision_at_another() {
    let cluster = Cluster::new(3);
    patiently(|| cluster.at("a").propose(&register("one", "h")));
    let watching = cluster.at("c").clone();
    let waiting = std::thread::spawn(move || patiently(|| watching.watch(1, PATIENCE)));
    patiently(|| cluster.at("b").propose(&register("two", "h")));
    let seen = waiting.join().unwrap();
    assert_eq!((seen.revision, seen.records.len()), (2, 2));
    let same = patiently(|| cluster.at("c").watch(2, Duration::from_millis(1)));
    assert_eq!(same, seen);
}

#[test]
fn a_long_log_is_folded_and_a_member_that_missed_it_catches_up() {
    let mut cluster = Cluster::new(3);
    let missing = cluster.follower();
    cluster.stop(&missing);
    let other = cluster.follower();
    let master = cluster.at(&other).clone();
    let vm = patiently(|| master.propose(&register("vm", "h"))).view.vm;
    for generation in 1..300 {
        let chain: &[&str] = if generation % 2 == 0 { &[] } else { &["x"] };
        patiently(|| master.propose(&reconfigure(vm, Generation(generation), "h", chain)));
    }
    let record = cluster.path(&other).join("paxos.record");
    let length = std::fs::metadata(record).unwrap().len();
    // 300 entries of well over 100 bytes each went through it.
    assert!(length < 20_000, "the record has {length} bytes");
    drop(master);
    cluster.start(&missing);
    let now = patiently(|| cluster.at(&missing).read());
    assert_eq!(now.records[0].view.generation, Generation(300));
    // It counts: the third may go.
    cluster.stop(&other);
    patiently(|| cluster.at(&missing).propose(&register("two", "h")));
}

#[test]
fn clients_try_the_members_in_turn() {
    let mut cluster = Cluster::new(3);
    let mut addresses = vec![ports(1)[0]]; // nobody listens there
    for name in ["a", "b", "c"] {
        let server = MasterServer::bind(any_port(), cluster.at(name).clone()).unwrap();
        addresses.push(server.addr());
    }
    let master = RemoteMaster::of(&addresses);
    let retried = |ask: &dyn Fn() -> Result<(), MasterError>| {
        let deadline = Instant::now() + PATIENCE;
        while let Err(e) = ask() {
            assert!(Instant::now() < deadline, "{e}");
        }
    };
    retried(&|| master.propose(&register("one", "h")).map(drop));
    // Its server still answers, but the member does not take part any more.
    cluster.running[&host("a")].stop();
    cluster.running.remove(&host("a"));
    retried(&|| master.propose(&register("two", "h")).map(drop));
    retried(&|| {
        let seen = master.read()?;
        assert_eq!(seen.records.len(), 2);
        Ok(())
    });
    cluster.running[&host("b")].stop();
    let error = master
        .propose(&register("three", "h"))
        .unwrap_err()
        .to_string();
    for addr in &addresses {
        assert!(error.contains(&addr.to_string()), "{error}");
    }
    assert!(error.contains("of 3 members"), "{error}");
}

#[test]
fn memberships_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let members = |names: &[&str]| -> BTreeMap<HostId, SocketAddr> {
        let list = names.iter().map(|name| host(name)).zip(ports(names.len()));
        list.collect()
    };
    let error = |me: &str, members: &BTreeMap<HostId, SocketAddr>| {
        let e = PaxosMaster::open(dir.path(), &host(me), members, Begin::New).unwrap_err();
        assert!(matches!(e, MasterError::Membership(_)), "{e}");
        e.to_string()
    };
    for names in [
        &["a"][..],
        &["a", "b"],
        &["a", "b", "c", "d"],
        &["a", "b", "c", "d", "e", "f", "g"],
    ] {
        let said = error("a", &members(names));
        assert!(said.contains("3 or 5"), "{said}");
    }
    let said = error("x", &members(&["a", "b", "c"]));
    assert!(said.contains('x') && said.contains("a, b, c"), "{said}");
    let mut same = members(&["a", "b", "c"]);
    let addr = same[&host("a")];
    same.insert(host("c"), addr);
    assert!(error("a", &same).contains("the same address"));
}

#[test]
fn a_record_is_used_only_where_it_belongs_and_never_when_damaged() {
    let mut cluster = Cluster::new(3);
    patiently(|| cluster.at("a").propose(&register("vm", "h")));
    let error = cluster.try_start("a").unwrap_err();
    assert!(matches!(error, MasterError::InUse { .. }), "{error}");
    cluster.stop("a");

    let path = cluster.path("a").join("paxos.record");
    let good = std::fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, &bad).unwrap();
        let error = cluster.try_start("a").expect_err("damage is found");
        assert!(matches!(error, MasterError::Storage { .. }), "{error}");
        assert!(error.to_string().contains("paxos.record"), "{error}");
        std::fs::write(&path, &good[..at]).unwrap();
        assert!(cluster.try_start("a").is_err(), "cut at {at}");
    }
    std::fs::write(&path, &good).unwrap();

    let error = PaxosMaster::open(&cluster.path("a"), &host("b"), &cluster.members, Begin::New)
        .unwrap_err();
    assert!(error.to_string().contains("member a of a, b, c"), "{error}");
    let error = LocalMaster::open(&cluster.path("a"), Begin::New).unwrap_err();
    assert!(error.to_string().contains("paxos.record"), "{error}");

    let single = cluster.path("single");
    let local = LocalMaster::open(&single, Begin::New).unwrap();
    local.propose(&register("vm", "h")).unwrap();
    drop(local);
    let error = PaxosMaster::open(&single, &host("a"), &cluster.members, Begin::New).unwrap_err();
    assert!(error.to_string().contains("master.record"), "{error}");

    cluster.start("a");
    assert_eq!(patiently(|| cluster.at("a").read()).records.len(), 1);
}

#[test]
fn a_member_that_cannot_write_stands_still_until_it_can_and_the_others_go_on() {
    let cluster = Cluster::new(3);
    patiently(|| cluster.at("a").propose(&register("one", "h")));
    let broken = cluster.leader();
    // A directory in the temporary file's place makes the write fail, also for root.
    let obstacle = cluster.path(&broken).join("paxos.new");
    let deadline = Instant::now() + PATIENCE;
    while std::fs::create_dir(&obstacle).is_err() {
        // It was just being written.
        assert!(
            Instant::now() < deadline,
            "{} is always there",
            obstacle.display()
        );
    }
    loop {
        match cluster.at(&broken).propose(&register("two", "h")) {
            Err(MasterError::Storage { .. }) => break,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
    }
    let why = cluster.at(&broken).trouble().expect("it says so");
    assert!(why.contains("paxos.record"), "{why}");
    let other = ["a", "b", "c"].into_iter().find(|name| **name != broken);
    let other = cluster.at(other.unwrap());
    patiently(|| other.propose(&register("three", "h")));
    let known = patiently(|| other.read()).records;
    assert!(known.iter().any(|r| r.view.name == "one"), "{known:?}");
    std::fs::remove_dir(&obstacle).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while let Some(why) = cluster.at(&broken).trouble() {
        assert!(Instant::now() < deadline, "{why}");
        std::thread::sleep(Duration::from_millis(10));
    }
    patiently(|| cluster.at(&broken).propose(&register("four", "h")));
    let known = patiently(|| cluster.at(&broken).read()).records;
    for name in ["one", "three", "four"] {
        assert!(known.iter().any(|r| r.view.name == name), "{known:?}");
    }
    assert_eq!(cluster.at(&broken).trouble(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nonsense_ends_its_own_connection_only(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        honest_header in any::<bool>(),
    ) {
        static CLUSTER: std::sync::OnceLock<Cluster> = std::sync::OnceLock::new();
        let cluster = CLUSTER.get_or_init(|| Cluster::new(3));
        let mut message = Vec::new();
        if honest_header {
            message.extend_from_slice(b"UPAX\x01\0\x01\0");
            message.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            message.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
            let crc = crc32c::crc32c(&message);
            message.extend_from_slice(&crc.to_le_bytes());
        }
        message.extend_from_slice(&bytes);
        let mut peer = TcpStream::connect(cluster.members[&host("a")]).unwrap();
        let _ = peer.write_all(&message);
        let _ = peer.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = peer.read_to_end(&mut rest);
        patiently(|| cluster.at("a").read());
    }
}
