use std::path::Path;
use std::sync::mpsc::channel;

use chain::master::{Begin, Command, LocalMaster};
use chain::{Life, ReplicaServer, ServerOptions, VmShape};
use checkpoint::HostId;

use super::*;
use crate::config::HostConfig;
use crate::daemon::boot_files::BootFiles;
use crate::daemon::events::EventLog;
use crate::engine::Served;
use crate::identity::Identity;

fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

/// Of host `a`, whose peer is `b`; nobody is at its address.
fn env(dir: &Path) -> Arc<Env> {
    let file = dir.join("host.toml");
    let text = format!(
        "host = \"a\"\ndata_dir = {dir:?}\nlisten = \"127.0.0.1:0\"\n[peers]\nb = \"127.0.0.1:1\"\n[master]\nconnect = \"127.0.0.1:1\"\n"
    );
    std::fs::write(&file, text).unwrap();
    let config = HostConfig::load(&file).unwrap();
    let options = ServerOptions {
        host: host("a"),
        data_dir: dir.join("replicas"),
        heartbeat: Duration::from_millis(20),
        missed: 5,
        files: None,
    };
    let (events, _) = channel();
    Arc::new(Env {
        host: host("a"),
        peers: Arc::new([(host("b"), "127.0.0.1:1".parse().unwrap())].into()),
        master: Arc::new(LocalMaster::open(&dir.join("master"), Begin::New).unwrap()),
        serving: Served::default(),
        replicas: ReplicaServer::bind(config.listen, options, events).unwrap(),
        events: EventLog::default(),
        identity: Mutex::new(Identity::open(dir, &host("a")).unwrap()),
        stranger: Mutex::default(),
        found: Mutex::default(),
        boot_files: BootFiles::new(dir.join("boot")),
        config,
    })
}

/// A VM that runs here, with a process that nobody hears.
fn runs(env: &Arc<Env>) -> (Runner, Arc<Shown>) {
    let shape = VmShape {
        ram: vec![],
        vcpus: 1,
        cpu: Default::default(),
        disks: vec![],
        config_toml: "name = \"vm\"\nmemory_mib = 32\nkernel = \"builtin:probe\"\n".into(),
    };
    let register = Command::Register {
        vm: VmId(1),
        life: Life::On,
        name: "vm".into(),
        owner: env.host.clone(),
        shape,
    };
    let record = env.master.propose(&register).unwrap();
    let (host, peers) = (env.host.clone(), env.peers.clone());
    let machine = Machine::starting(host, peers, &record, 1, &mut Vec::new());
    let shown = Shown::new(&machine);
    let (mail, _) = channel();
    let mut runner = Runner::new(env.clone(), machine, shown.clone(), mail);
    runner.step(Input::Spawned(Ok(())));
    runner.step(Input::Report(Report::Ready));
    (runner, shown)
}

/// Who is told that an order is carried out may look at once, and finds what the order has brought about.
#[test]
fn what_has_been_decided_is_shown_before_anybody_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let env = env(dir.path());
    let (mut runner, shown) = runs(&env);
    assert!(!lock(&shown.summary).pending);
    let order = Order::Protect {
        backups: vec![host("b")],
    };
    let (sender, answer) = channel();
    let early = std::thread::scope(|scope| {
        // As long as this is held, nothing can be shown.
        let unseen = lock(&shown.summary);
        scope.spawn(|| runner.take(Mail::Order(order, sender)));
        let early = answer.recv_timeout(Duration::from_millis(300));
        drop(unseen);
        early
    });
    assert_eq!(early, Err(RecvTimeoutError::Timeout), "nothing shown yet");
    assert_eq!(answer.recv().unwrap(), Ok(Answered::Done));
    let seen = lock(&shown.summary).clone();
    assert!(seen.pending, "{seen:?}");
    assert_eq!(seen.lacking, [("b".to_string(), None)]);
}
