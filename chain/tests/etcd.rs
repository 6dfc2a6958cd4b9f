//! The engine that keeps its decisions in etcd, against Debian's etcd-server: members on loopback ports, killed and brought
//! back.

mod commands;

use std::net::TcpListener;
use std::process::{Child, Command as Process, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use chain::master::{Begin, Command, EtcdMaster, EtcdOptions, Master, MasterError, Rejection};
use chain::{Life, Mark, Member, VmShape};
use checkpoint::{Generation, VmId};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use commands::host;

/// A bound on what has to happen, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn register(name: &str) -> Command {
    commands::register(name, "a")
}

fn reconfigure(vm: VmId, expect: u64, chain: &[&str]) -> Command {
    commands::reconfigure(vm, Generation(expect), "a", chain)
}

fn take_over(vm: VmId, expect: u64, by: &str) -> Command {
    commands::take_over(vm, Generation(expect), by)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Members of an etcd cluster.
struct Etcd {
    dir: TempDir,
    ports: Vec<(u16, u16)>,
    members: Vec<Option<Child>>,
}

impl Etcd {
    fn start(count: usize) -> Self {
        let mut etcd = Self {
            dir: tempfile::tempdir().unwrap(),
            ports: (0..count).map(|_| (free_port(), free_port())).collect(),
            members: (0..count).map(|_| None).collect(),
        };
        (0..count).for_each(|i| etcd.run(i));
        until("etcd to answer", || etcd.master().read().is_ok());
        etcd
    }

    fn client_url(&self, i: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[i].0)
    }

    fn peer_url(&self, i: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[i].1)
    }

    /// Member `i`, for the first time or again with what it has.
    fn run(&mut self, i: usize) {
        let all = (0..self.ports.len()).map(|j| format!("m{j}={}", self.peer_url(j)));
        let all = all.collect::<Vec<_>>().join(",");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("m{i}.log")))
            .unwrap();
        let mut command = Process::new("etcd");
        command
            .args(["--name", &format!("m{i}"), "--initial-cluster", &all])
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("m{i}")))
            .args(["--listen-client-urls", &self.client_url(i)])
            .args(["--advertise-client-urls", &self.client_url(i)])
            .args(["--listen-peer-urls", &self.peer_url(i)])
            .args(["--initial-advertise-peer-urls", &self.peer_url(i)])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = command.spawn().unwrap_or_else(|e| {
            panic!("etcd: {e}; this test needs it: install the Debian package etcd-server")
        });
        self.members[i] = Some(child);
    }

    fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.members[i].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn signal(&self, signal: Signal) {
        for child in self.members.iter().flatten() {
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        }
    }

    fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: (0..self.ports.len()).map(|i| self.client_url(i)).collect(),
            prefix: "/understudy".into(),
            user: None,
            begin: Begin::New,
        }
    }

    /// One host's engine.
    fn master(&self) -> EtcdMaster {
        EtcdMaster::new(self.options()).unwrap()
    }

    /// With etcd's own client.
    fn with_client<T>(&self, what: impl AsyncFnOnce(&mut etcd_client::Client) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let url = self.client_url(0);
            let mut client = etcd_client::Client::connect([url], None).await.unwrap();
            what(&mut client).await
        })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|i| self.kill(i));
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// All at once, each with an engine of its own.
fn at_once(etcd: &Etcd, commands: Vec<Command>) -> Vec<Result<chain::VmRecord, MasterError>> {
    let start = Arc::new(Barrier::new(commands.len()));
    let asking: Vec<_> = commands
        .into_iter()
        .map(|command| {
            let (master, start) = (etcd.master(), start.clone());
            std::thread::spawn(move || {
                start.wait();
                master.propose(&command)
            })
        })
        .collect();
    asking.into_iter().map(|a| a.join().unwrap()).collect()
}

#[test]
fn i4_of_many_that_ask_at_once_one_is_given_the_vm() {
    let etcd = Etcd::start(1);
    let master = etcd.master();
    let vm = master.propose(&register("vm")).unwrap().view.vm;
    let names: Vec<String> = (0..8).map(|n| format!("r{n}")).collect();
    let chain: Vec<&str> = names.iter().map(String::as_str).collect();
    master.propose(&reconfigure(vm, 1, &chain)).unwrap();
    let asked = names.iter().map(|name| take_over(vm, 2, name)).collect();
    let mut granted = Vec::new();
    for answer in at_once(&etcd, asked) {
        match answer {
            Ok(record) => granted.push(record),
            Err(MasterError::Rejected(Rejection::Generation { actual, .. })) => {
                assert_eq!(actual, Generation(3));
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(granted.len(), 1, "{granted:#?}");
    assert_eq!(master.read().unwrap().records, granted);
}

#[test]
fn vms_that_are_registered_at_once_do_not_meet_and_a_name_is_given_once() {
    let etcd = Etcd::start(1);
    let names = ["a", "b", "c", "d", "e", "f"];
    let answers = at_once(&etcd, names.map(register).into());
    let mut vms: Vec<VmId> = answers.into_iter().map(|r| r.unwrap().view.vm).collect();
    vms.sort();
    vms.dedup();
    assert_eq!(vms.len(), 6);
    // A name is given once: whoever registers it again, from another host, is told.
    let again = commands::register("a", "elsewhere");
    let said = etcd.master().propose(&again).unwrap_err();
    assert!(
        matches!(said, MasterError::Rejected(Rejection::NameTaken(..))),
        "{said}"
    );
}

#[test]
fn nothing_is_forgotten_when_etcd_dies() {
    let mut etcd = Etcd::start(1);
    let master = etcd.master();
    let vm = master.propose(&register("vm")).unwrap().view.vm;
    let decided = master.propose(&reconfigure(vm, 1, &["b", "c"])).unwrap();
    let before = master.read().unwrap();
    etcd.kill(0);
    let said = master.read().unwrap_err().to_string();
    assert!(
        said.contains("etcd does not decide") && said.contains(&etcd.client_url(0)),
        "{said}"
    );
    etcd.run(0);
    until("etcd to be back", || master.read().is_ok());
    assert_eq!(master.read().unwrap(), before);
    // Asked again, as if its answer had been lost, it is the same one.
    assert_eq!(
        master.propose(&reconfigure(vm, 1, &["b", "c"])).unwrap(),
        decided
    );
    assert_eq!(
        master.read().unwrap(),
        before,
        "and nothing is written for it"
    );
}

#[test]
fn a_decision_whose_answer_is_lost_is_made_once() {
    let etcd = Etcd::start(1);
    let master = Arc::new(etcd.master());
    let vm = master.propose(&register("vm")).unwrap().view.vm;
    master.propose(&reconfigure(vm, 1, &["b", "c"])).unwrap();
    for round in 0..4 {
        // It stands still while it is asked: the answer comes too late, or never.
        etcd.signal(Signal::SIGSTOP);
        let asking = master.clone();
        let expect = 2 + round;
        let taker = if round % 2 == 0 { "b" } else { "c" };
        let command = match round {
            0 | 1 => take_over(vm, expect, taker),
            _ => Command::Restart {
                vm,
                expect: Generation(expect),
                by: host("c"),
            },
        };
        let asked = command.clone();
        let answer = std::thread::spawn(move || asking.propose(&asked));
        std::thread::sleep(Duration::from_millis(if round % 2 == 0 {
            300
        } else {
            2500
        }));
        etcd.signal(Signal::SIGCONT);
        let first = answer.join().unwrap();
        let again = master.propose(&command).unwrap();
        if let Ok(record) = first {
            assert_eq!(record, again);
        }
        assert_eq!(again.view.generation, Generation(expect + 1));
        assert_eq!(master.read().unwrap().records, [again]);
    }
}

#[test]
fn who_watches_hears_of_decisions_and_compaction_does_not_matter() {
    let etcd = Etcd::start(1);
    let master = etcd.master();
    master.propose(&register("one")).unwrap();
    for name in ["two", "three"] {
        let seen = master.read().unwrap().revision;
        let watching = etcd.master();
        let watcher = std::thread::spawn(move || watching.watch(seen, PATIENCE).unwrap());
        // Other keys are none of its business; and etcd forgets everything up to now.
        etcd.with_client(async |client| {
            let put = client.put("/elsewhere", "x", None).await.unwrap();
            let now = put.header().unwrap().revision();
            client.compact(now, None).await.unwrap();
        });
        assert!(!watcher.is_finished());
        let record = master.propose(&register(name)).unwrap();
        let snapshot = watcher.join().unwrap();
        assert!(snapshot.revision > seen && snapshot.records.contains(&record));
    }
    let now = master.read().unwrap();
    let same = master
        .watch(now.revision, Duration::from_millis(50))
        .unwrap();
    assert_eq!(same, now, "after the time-out it is whatever it is");
}

#[test]
fn a_minority_may_be_lost_and_without_a_majority_nothing_is_decided() {
    let mut etcd = Etcd::start(3);
    let master = etcd.master();
    let vm = master.propose(&register("vm")).unwrap().view.vm;
    etcd.kill(0);
    let goes_on = master.propose(&reconfigure(vm, 1, &["b", "c"])).unwrap();
    let read = etcd.master().read().unwrap();
    assert_eq!(read.records, std::slice::from_ref(&goes_on));
    etcd.kill(1);
    let said = master.propose(&take_over(vm, 2, "b")).unwrap_err();
    assert!(matches!(said, MasterError::Etcd(_)), "{said}");
    // Nor is read what a majority may have changed meanwhile.
    assert!(matches!(master.read(), Err(MasterError::Etcd(_))));
    etcd.run(0);
    until("a majority to be back", || master.read().is_ok());
    assert_eq!(master.read().unwrap().records, [goes_on]);
    let taken = master.propose(&take_over(vm, 2, "b")).unwrap();
    etcd.run(1);
    etcd.kill(2);
    until("another majority", || master.read().is_ok());
    assert_eq!(master.read().unwrap().records, [taken]);
}

#[test]
fn what_is_not_ours_is_named_and_left_alone() {
    let etcd = Etcd::start(1);
    let master = etcd.master();
    etcd.with_client(async |client| {
        let key = "/understudy/vm/0000000007";
        client.put(key, "not a record", None).await.unwrap();
    });
    let said = master.propose(&register("vm")).unwrap_err().to_string();
    assert!(said.contains("/understudy/vm/0000000007"), "{said}");
    // With a prefix of its own it does not matter.
    let other = EtcdMaster::new(EtcdOptions {
        prefix: "/other".into(),
        ..etcd.options()
    });
    other.unwrap().propose(&register("vm")).unwrap();
}
