//! Hosts: an agent each, in a network namespace of its own, and what can happen to them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent::control::{ControlClient, Event, EventKind, Request, VmStatus};
use agent::probe::{ProbeClient, ProbeConfig, ProbeConn, ProbeReport};
use guest::proto::{Op, PORT, Response};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::net::{HOST_BRIDGE, Network, repl_addr};
use crate::serial::{Turn, turn};
use crate::vmfile::{GUEST, VmFile};
use crate::{diagnosis, require_everything, wait};

/// The VM's name.
pub const VM: &str = "vm";
/// The host that only has the master, so that any other may be lost.
pub const MASTER: &str = "m";

/// What a cluster is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Hosts, the first owner first. The master's is added, unless they are its members.
    pub hosts: &'a [&'a str],
    /// Whether the hosts, three or five then, are the master's members: no host is only that.
    pub members: bool,
    /// Whether an etcd server decides instead, on the master's host; needs agents with the feature `etcd`.
    pub etcd: bool,
    /// Mechanisms switched off: host and `UNDERSTUDY_BREAK`.
    pub broken: &'a [(&'a str, &'a str)],
    /// Milliseconds between heartbeats.
    pub heartbeat_ms: u64,
    /// Heartbeats missed before a host is suspected.
    pub missed: u32,
}

impl<'a> Options<'a> {
    /// These hosts, everything switched on. More patient than the agent's defaults: the machine is small, and no test
    /// measures time.
    #[must_use]
    pub fn of(hosts: &'a [&'a str]) -> Self {
        Self {
            hosts,
            members: false,
            etcd: false,
            broken: &[],
            heartbeat_ms: 10,
            missed: 30,
        }
    }
}

#[derive(Debug)]
struct Host {
    name: String,
    control: PathBuf,
    agent: Option<Child>,
}

impl Host {
    fn group(&self) -> Option<Pid> {
        self.agent.as_ref().map(|a| Pid::from_raw(a.id() as i32))
    }

    fn strike(&self) {
        if let Some(group) = self.group() {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }

    /// Waits for its killed processes, the VM's and standbys' too, which this process has adopted (see
    /// [`Cluster::launch`]): their taps are gone then.
    fn bury(&mut self) {
        let Some(group) = self.group() else { return };
        self.agent = None;
        wait("a killed host's processes to be gone", || {
            match waitpid(Pid::from_raw(-group.as_raw()), Some(WaitPidFlag::WNOHANG)) {
                Err(Errno::ECHILD) => Some(()),
                _ => None,
            }
        });
    }
}

/// Starts a host's process, in a process group of its own.
fn spawn(mut command: Command, log: File) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log file"))
        .stderr(log)
        .process_group(0);
    // A killed test leaves no agents behind; their VM processes end with them.
    // SAFETY: only an async-signal-safe call (prctl) between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    command.spawn().expect("starting a host's process")
}

/// A running cluster; everything goes when it is dropped, but the logs are kept if the test failed.
#[derive(Debug)]
pub struct Cluster {
    program: PathBuf,
    etcd: bool,
    dir: Option<tempfile::TempDir>,
    hosts: Vec<Host>,
    /// After the hosts, so that it goes after their processes.
    network: Network,
    _turn: Turn,
}

impl Cluster {
    /// Starts `program`'s agents.
    ///
    /// # Panics
    /// Naming what is missing or did not work.
    #[must_use]
    pub fn launch(program: &str, options: Options<'_>) -> Self {
        let turn = turn();
        require_everything();
        // The VM processes of a killed agent become this process's children, so that their end can be waited for.
        nix::sys::prctl::set_child_subreaper(true).expect("PR_SET_CHILD_SUBREAPER");
        let only_master = (!options.members).then_some(MASTER);
        let names: Vec<&str> = options.hosts.iter().copied().chain(only_master).collect();
        let dir = tempfile::Builder::new()
            .prefix("systest-understudy-")
            .tempdir()
            .expect("a temporary directory");
        let mut cluster = Self {
            program: program.into(),
            etcd: options.etcd,
            hosts: names
                .iter()
                .map(|name| Host {
                    name: (*name).into(),
                    control: dir.path().join(format!("{name}.sock")),
                    agent: None,
                })
                .collect(),
            network: Network::build(&names),
            dir: Some(dir),
            _turn: turn,
        };
        for (i, name) in names.iter().enumerate() {
            fs::write(
                cluster.path(&format!("{name}.toml")),
                cluster.host_toml(i, &options),
            )
            .expect("writing a host's configuration");
        }
        // The master first: the others ask it.
        for name in names.iter().rev() {
            let broken = options.broken.iter().find(|(host, _)| host == name);
            cluster.start_agent(name, broken.map(|(_, what)| *what));
        }
        cluster
    }

    /// `host.toml` of host number `i`.
    #[must_use]
    pub fn host_toml(&self, i: usize, options: &Options<'_>) -> String {
        let dir = self.dir().display();
        let name = &self.hosts[i].name;
        let addr = |i: usize| format!("{}:7700", repl_addr(i));
        let master = if options.etcd {
            format!("etcd = [\"{}\"]\n", self.etcd_url())
        } else if options.members {
            let all = 0..self.hosts.len();
            let list = |port: u16, named: bool| -> String {
                let each = all.clone().map(|j| {
                    let addr = format!("\"{}:{port}\"", repl_addr(j));
                    if named {
                        format!("{} = {addr}", self.hosts[j].name)
                    } else {
                        addr
                    }
                });
                each.collect::<Vec<_>>().join(", ")
            };
            format!(
                "serve = \"{}:7690\"\nconnect = [{}]\nmembers = {{ {} }}\n",
                repl_addr(i),
                list(7690, false),
                list(7691, true)
            )
        } else {
            let master = format!("{}:7690", repl_addr(self.hosts.len() - 1));
            let serve = if name == MASTER { "serve" } else { "# serve" };
            format!("connect = \"{master}\"\n{serve} = \"{master}\"\n")
        };
        let peers: String = (0..self.hosts.len())
            .filter(|j| *j != i)
            .map(|j| format!("{} = \"{}\"\n", self.hosts[j].name, addr(j)))
            .collect();
        let Options {
            heartbeat_ms,
            missed,
            ..
        } = options;
        format!(
            "host = \"{name}\"\ndata_dir = \"{dir}/{name}\"\ncontrol = \"{dir}/{name}.sock\"\nlisten = \"{}\"\n\n\
             [master]\nbegin = true\n{master}\n[peers]\n{peers}\n\
             [networks.lan]\nbridge = \"{HOST_BRIDGE}\"\ntap_prefix = \"tap\"\n\n\
             [detection]\nheartbeat_ms = {heartbeat_ms}\nmissed = {missed}\n",
            addr(i)
        )
    }

    fn etcd_url(&self) -> String {
        format!("http://{}:2379", repl_addr(self.hosts.len() - 1))
    }

    /// Starts (again) the etcd server, with what it has.
    fn start_etcd(&mut self) {
        let log = self.log_of(MASTER);
        let mut command = Command::new("ip");
        let url = self.etcd_url();
        command
            .args(["netns", "exec", &self.network.namespace(MASTER), "etcd"])
            .arg("--data-dir")
            .arg(self.path("etcd"))
            .args([
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
            ])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
            .args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380"])
            .args(["--initial-cluster", "default=http://127.0.0.1:2380"]);
        self.host_mut(MASTER).agent = Some(spawn(command, log));
        let addr = SocketAddr::from((repl_addr(self.hosts.len() - 1), 2379));
        wait("etcd to listen (Debian: apt install etcd-server)", || {
            self.network
                .within(MASTER, || std::net::TcpStream::connect(addr).ok())
        });
    }

    fn log_of(&self, name: &str) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.path(&format!("{name}.log")))
            .expect("a log file")
    }

    /// Starts (again) the agent of `name`, with the mechanism `broken` switched off.
    pub fn start_agent(&mut self, name: &str, broken: Option<&str>) {
        if self.etcd && name == MASTER {
            return self.start_etcd();
        }
        let config = self.path(&format!("{name}.toml"));
        let mut command = self.command_on(name);
        command.args(["agent", "--config"]).arg(config);
        if let Some(what) = broken {
            command.env("UNDERSTUDY_BREAK", what);
        }
        self.host_mut(name).agent = Some(spawn(command, self.log_of(name)));
        let control = self.host(name).control.clone();
        wait(&format!("the agent of {name} to listen"), || {
            ControlClient::connect(&control).ok()
        });
    }

    /// The program under test, to be run inside `host`'s namespace.
    #[must_use]
    pub fn command_on(&self, host: &str) -> Command {
        // `ip netns exec` becomes the program: same process, same process group.
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.network.namespace(host)])
            .arg(&self.program);
        command
    }

    fn host(&self, name: &str) -> &Host {
        let found = self.hosts.iter().find(|h| h.name == name);
        found.unwrap_or_else(|| panic!("there is no host {name}"))
    }

    fn host_mut(&mut self, name: &str) -> &mut Host {
        let found = self.hosts.iter_mut().find(|h| h.name == name);
        found.unwrap_or_else(|| panic!("there is no host {name}"))
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The working directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().expect("kept until the drop").path()
    }

    /// A file in it.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    /// A connection to the agent of `name`.
    #[must_use]
    pub fn control(&self, name: &str) -> ControlClient {
        ControlClient::connect(&self.host(name).control)
            .unwrap_or_else(|e| panic!("host {name}: {e}"))
    }

    /// What `name` knows of the VM.
    #[must_use]
    pub fn status(&self, name: &str) -> Option<VmStatus> {
        self.status_of(VM, name)
    }

    /// What `name` knows of that VM.
    #[must_use]
    pub fn status_of(&self, vm: &str, name: &str) -> Option<VmStatus> {
        let list = self.control(name).status().ok()?;
        list.into_iter().find(|s| s.name == vm)
    }

    /// What has happened on `name`.
    #[must_use]
    pub fn events(&self, name: &str) -> Vec<Event> {
        self.control(name).events(0).unwrap_or_default()
    }

    /// Waits for an event of the VM on `name`.
    pub fn wait_event(&self, name: &str, kind: EventKind) -> Event {
        wait(&format!("the event {kind:?} on {name}"), || {
            self.events(name)
                .into_iter()
                .find(|e| e.kind == kind && e.vm == VM)
        })
    }

    /// Boots the VM on the first host and protects it by `backups`, in this order; waits until it is.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn protect(&self, vm: &VmFile, backups: &[&str]) {
        self.start_vm(vm.write(self.dir()));
        self.protect_vm(backups);
    }

    /// Boots the VM of `toml` on the first host.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn start_vm(&self, toml: String) {
        self.start_vm_on(&self.hosts[0].name, toml);
    }

    /// Boots the VM of `toml` on `host`.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn start_vm_on(&self, host: &str, toml: String) {
        self.control(host)
            .order(&Request::Start {
                toml,
                name: "vm.toml".into(),
            })
            .unwrap_or_else(|e| panic!("starting the VM: {e}"));
    }

    /// Protects the first host's VM by `backups`, in this order; waits until it is.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn protect_vm(&self, backups: &[&str]) {
        self.protect_vm_of(VM, &self.hosts[0].name, backups);
    }

    /// Protects `owner`'s VM of that name by `backups`, in this order; waits until it is.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn protect_vm_of(&self, vm: &str, owner: &str, backups: &[&str]) {
        self.control(owner)
            .order(&Request::Protect {
                vm: vm.into(),
                backups: backups.iter().map(|b| (*b).into()).collect(),
            })
            .unwrap_or_else(|e| panic!("protecting {vm}: {e}"));
        self.wait_protected_of(vm, owner, backups);
    }

    /// Waits until `owner` says that the chain is exactly `backups` and the VM protected by it.
    pub fn wait_protected(&self, owner: &str, backups: &[&str]) {
        self.wait_protected_of(VM, owner, backups);
    }

    /// The same for that VM.
    pub fn wait_protected_of(&self, vm: &str, owner: &str, backups: &[&str]) {
        wait(
            &format!("{vm} on {owner} to be protected by {backups:?}"),
            || {
                let status = self.status_of(vm, owner)?;
                let chain: Vec<&str> = status.chain.iter().map(|m| m.host.as_str()).collect();
                (status.role == "owner" && status.protected && chain == backups).then_some(())
            },
        );
    }

    /// Waits until `name` runs the VM after a failover; returns what it says of it.
    pub fn wait_owner(&self, name: &str) -> VmStatus {
        wait(&format!("{name} to take the VM over"), || {
            self.status(name)
                .filter(|s| s.role == "owner" && s.failover.is_some())
        })
    }

    /// `name` loses power: its agent and its VM processes are killed at once.
    pub fn kill(&mut self, name: &str) {
        self.strike(name);
        self.host_mut(name).bury();
    }

    /// As [`Cluster::kill`], without waiting until everything of it is gone.
    pub fn strike(&self, name: &str) {
        self.host(name).strike();
    }

    /// `name` stands still: every process of it stops.
    pub fn freeze(&self, name: &str) {
        self.signal(name, Signal::SIGSTOP);
    }

    /// `name` goes on.
    pub fn thaw(&self, name: &str) {
        self.signal(name, Signal::SIGCONT);
    }

    fn signal(&self, name: &str, signal: Signal) {
        let group = self.host(name).group();
        killpg(group.unwrap_or_else(|| panic!("{name} runs")), signal)
            .unwrap_or_else(|e| panic!("{signal} to {name}: {e}"));
    }

    /// A client that sends numbered increments on one TCP connection, one every 5 ms; has some answers when this
    /// returns.
    ///
    /// # Panics
    /// If the guest does not answer.
    #[must_use]
    pub fn client(&self) -> ProbeClient {
        self.client_of(GUEST)
    }

    /// The same for the VM at that address.
    ///
    /// # Panics
    /// If the guest does not answer.
    #[must_use]
    pub fn client_of(&self, guest: Ipv4Addr) -> ProbeClient {
        let mut config = ProbeConfig::new(SocketAddr::from((guest, PORT)));
        config.interval = Duration::from_millis(5);
        let client = self
            .network
            .within("client", || ProbeClient::start(config, crate::PATIENCE))
            .unwrap_or_else(|e| panic!("the client: {e}"));
        assert!(
            client.wait_acked(50, crate::PATIENCE),
            "the client gets no answers: {:?}",
            client.progress()
        );
        client
    }

    /// Ends the client, which first asks the guest, on a new connection, how far its counter is.
    #[must_use]
    pub fn stop_client(&self, client: ProbeClient) -> ProbeReport {
        self.network
            .within("client", || client.stop(Duration::from_secs(20)))
    }

    /// Asks the guest on a new connection.
    ///
    /// # Panics
    /// If it does not answer.
    #[must_use]
    pub fn ask(&self, op: Op) -> Response {
        self.network.within("client", || {
            ProbeConn::connect(SocketAddr::from((GUEST, PORT)), crate::PATIENCE)
                .and_then(|mut guest| guest.call(guest::proto::Request::new(op, 0)))
                .unwrap_or_else(|e| panic!("asking the guest for {op:?}: {e}"))
        })
    }

    fn log_tails(&self) -> String {
        self.hosts
            .iter()
            .map(|h| {
                let log = self.path(&format!("{}.log", h.name));
                format!(
                    "--- log of host {}\n{}\n",
                    h.name,
                    diagnosis::tail(&log, 12)
                )
            })
            .collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            let hosts: Vec<_> = self
                .hosts
                .iter()
                .filter(|host| host.agent.is_some())
                .map(|host| (host.name.clone(), host.control.clone()))
                .collect();
            let console = self.path("console.log");
            eprintln!("{}", diagnosis::of_hosts(&hosts, VM, &console));
        }
        for host in &self.hosts {
            host.strike();
        }
        if failed {
            eprintln!("{}", self.log_tails());
        }
        for host in &mut self.hosts {
            host.bury();
        }
        if failed && let Some(dir) = self.dir.take() {
            eprintln!("the hosts' logs are kept in {}", dir.keep().display());
        }
    }
}
