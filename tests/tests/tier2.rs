//! Tier 2: a stock Debian guest with redis, protected by agents on three hosts (network namespaces), on an emulated KVM
//! host. `tests/stock/README.md` says how this program is run and what it is given; a plain `cargo test` leaves it out.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::control::{ControlClient, EventKind, Request, VmStatus};
use agent::demo::redis::RedisClient;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const MASTER: &str = "10.78.0.4:7690";
/// Liveness bound for what takes seconds under two layers of emulation.
const PATIENCE: Duration = Duration::from_secs(240);
/// The hosts' namespaces have fixed names: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn given(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| {
        panic!("{name} is not set: run `scripts/test --tier2`, which builds what it names (tests/stock/README.md)")
    })
}

fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {} s in vain for {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The hosts' namespaces, made by `tests/stock/hosts`.
struct Hosts(PathBuf);

impl Hosts {
    fn up() -> Self {
        let script = given("UNDERSTUDY_STOCK_HOSTS");
        let status = Command::new(&script)
            .arg("up")
            .status()
            .expect("running tests/stock/hosts");
        assert!(status.success(), "tests/stock/hosts up: {status}");
        Self(script)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let _ = Command::new(&self.0).arg("down").status();
    }
}

/// An agent in its host's namespace; its process group dies as the host would.
struct Agent {
    name: &'static str,
    process: Child,
    dir: PathBuf,
}

impl Agent {
    fn start(name: &'static str, namespace: &str, dir: &Path, toml: &str) -> Self {
        let config = dir.join(format!("{name}.toml"));
        fs::write(&config, toml).unwrap();
        let log = File::create(dir.join(format!("{name}.log"))).unwrap();
        let process = Command::new("ip")
            .args(["netns", "exec", namespace])
            .arg(given("UNDERSTUDY_BIN"))
            .args(["agent", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("starting an agent (is iproute2 there?)");
        let agent = Self {
            name,
            process,
            dir: dir.into(),
        };
        wait("an agent's control socket", || agent.try_control());
        agent
    }

    fn try_control(&self) -> Option<ControlClient> {
        ControlClient::connect(&self.dir.join(format!("{}.sock", self.name))).ok()
    }

    fn status(&self, vm: &str) -> Option<VmStatus> {
        self.try_control()?
            .status()
            .ok()?
            .into_iter()
            .find(|s| s.name == vm)
    }

    fn kill(&mut self) {
        let _ = killpg(Pid::from_raw(self.process.id() as i32), Signal::SIGKILL);
        let _ = self.process.wait();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join(format!("{}.log", self.name))).unwrap_or_default()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- log of host {}:\n{}", self.name, self.log());
        }
    }
}

fn host_toml(name: &str, ip: &str, dir: &Path, serve: bool) -> String {
    let peers: String = [("a", 1), ("b", 2), ("c", 3)]
        .iter()
        .filter(|(peer, _)| *peer != name)
        .map(|(peer, n)| format!("{peer} = \"10.78.0.{n}:7700\"\n"))
        .collect();
    let dir = dir.display();
    let serve = if serve {
        format!("serve = \"{MASTER}\"\n")
    } else {
        String::new()
    };
    // Emulated twice, everything is slow: suspicion after a second of silence.
    format!(
        "host = \"{name}\"\ndata_dir = \"{dir}/{name}\"\ncontrol = \"{dir}/{name}.sock\"\nlisten = \"{ip}:7700\"\n\
         [master]\nconnect = \"{MASTER}\"\n{serve}[peers]\n{peers}\
         [networks.lan]\nbridge = \"usbr0\"\n[detection]\nheartbeat_ms = 50\nmissed = 20\n"
    )
}

fn vm_toml(vcpus: u8, dir: &Path) -> String {
    let disk = dir.join("redis.img");
    fs::copy(given("UNDERSTUDY_STOCK_DISK"), &disk).expect("copying the guest's disk");
    format!(
        "name = \"redis\"\nvcpus = {vcpus}\nmemory_mib = 256\nkernel = \"{}\"\ninitrd = \"{}\"\n\
         cmdline = \"console=ttyS0 quiet us.ip={GUEST}/24 us.aof=1\"\nconsole = \"{}\"\n\
         [[net]]\nmac = \"52:54:00:75:73:02\"\nnetwork = \"lan\"\nip = \"{GUEST}\"\n[[disk]]\npath = \"{}\"\n\
         [protect]\nbackups = [\"b\", \"c\"]\nepoch_ms = 200\nmin_epoch_ms = 20\n",
        given("UNDERSTUDY_STOCK_VMLINUZ").display(),
        given("UNDERSTUDY_STOCK_INITRD").display(),
        dir.join("console.log").display(),
        disk.display(),
    )
}

/// Runs `work` in the client's namespace; threads it starts stay there.
fn as_client<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let namespace = File::open("/var/run/netns/us-client").expect("the client's namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .expect("entering the client's namespace needs root");
            work()
        });
        thread.join().expect("the client's thread")
    })
}

fn a_moment() -> Duration {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.subsec_nanos());
    Duration::from_millis(1000 + u64::from(nanos) % 2000)
}

/// I5 and I1 for a stock guest: every write that the client was told of is there afterwards, on the same connection.
fn redis_survives_its_host(vcpus: u8) {
    let _turn = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let _hosts = Hosts::up();
    let dir = std::env::temp_dir().join(format!("us-tier2-{}-{vcpus}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let _master = Agent::start(
        "m",
        "us-client",
        &dir,
        &host_toml("m", "10.78.0.4", &dir, true),
    );
    let mut a = Agent::start("a", "us-a", &dir, &host_toml("a", "10.78.0.1", &dir, false));
    let b = Agent::start("b", "us-b", &dir, &host_toml("b", "10.78.0.2", &dir, false));
    let c = Agent::start("c", "us-c", &dir, &host_toml("c", "10.78.0.3", &dir, false));

    let mut control = a.try_control().unwrap();
    let toml = vm_toml(vcpus, &dir);
    control
        .order(&Request::Start {
            toml,
            name: "redis.toml".into(),
        })
        .expect("starting the guest");
    let client = as_client(|| RedisClient::start(SocketAddr::from((GUEST, 6379)), PATIENCE))
        .unwrap_or_else(|e: io::Error| {
            let console = fs::read_to_string(dir.join("console.log")).unwrap_or_default();
            panic!("redis in the guest does not answer: {e}; the guest's console: {console}")
        });
    control
        .order(&Request::Protect {
            vm: "redis".into(),
            backups: vec![],
        })
        .expect("protecting the guest");
    wait("the guest to be protected", || {
        a.status("redis").filter(|s| s.protected)
    });
    let before = client.acked();
    wait("acknowledged writes under protection", || {
        (client.acked() >= before + 20).then_some(())
    });
    let moment = a_moment();
    println!(
        "killing the owner {} ms later, {} writes acknowledged",
        moment.as_millis(),
        client.acked()
    );
    std::thread::sleep(moment);
    a.kill();

    let killed_at = client.acked();
    let owner = wait("a backup to take over", || {
        [&b, &c].into_iter().find(|h| {
            h.status("redis")
                .is_some_and(|s| s.role == "owner" && s.failover.is_some())
        })
    });
    wait("acknowledged writes after the failover", || {
        (client.acked() >= killed_at + 20).then_some(())
    });
    let end = client.stop();
    println!(
        "{} took over; {} writes acknowledged, {} after the kill",
        owner.name,
        end.acked,
        end.acked - killed_at
    );
    assert!(
        end.verified,
        "the guest could not be asked at the end: {:?}",
        end.errors
    );
    assert_eq!(end.broken, 0, "the TCP connection broke: {:?}", end.errors);
    assert_eq!(
        end.lost, 0,
        "acknowledged writes are missing: {:?}",
        end.errors
    );
    let events = owner.try_control().unwrap().events(0).unwrap();
    assert!(
        events.iter().any(|e| e.kind == EventKind::Activated),
        "the failover is in the new owner's events"
    );
    let _ = fs::remove_dir_all(&dir);
}

#[test]
#[ignore = "needs a stock guest and an emulated KVM host: scripts/test --tier2"]
fn a_stock_guest_with_one_vcpu_survives_its_host() {
    redis_survives_its_host(1);
}

#[test]
#[ignore = "needs a stock guest and an emulated KVM host: scripts/test --tier2"]
fn a_stock_guest_with_two_vcpus_survives_its_host() {
    redis_survives_its_host(2);
}
