//! The hosts of a lab: an agent each, in a network namespace of its own, and what can happen to them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::LabError;
use super::disk::{Disk, Health};
use super::files::{HostFiles, Masters, VmFile, etcd_url};
use super::net::{Network, Wire, repl_addr};
use super::process::{self, Holding, Place};
use super::wait::{PATIENCE, wait, wait_for};
use crate::control::{ControlClient, Event, EventKind, Reply, Request, Role, VmStatus};
use crate::probe::{ProbeClient, ProbeConfig, ProbeError};

/// How long a running agent may take to say how its VMs are.
const STATUS: Duration = Duration::from_secs(2);
/// How long it may take over an order.
const ORDER: Duration = Duration::from_secs(90);
/// Lines of each log in an error.
const LOG_LINES: usize = 3;

/// What a lab is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program whose agents run.
    pub program: PathBuf,
    /// Hosts, the first owner first. Those of the master are added.
    pub hosts: Vec<String>,
    /// Who decides.
    pub masters: Masters,
    /// Milliseconds between heartbeats, and heartbeats missed before a host is suspected; none: the agent's defaults.
    pub detection: Option<(u64, u32)>,
    /// Mechanisms switched off: host and `UNDERSTUDY_BREAK`, in a program that can (`understudy-under-test`).
    pub broken: Vec<(String, String)>,
    /// Whether the hosts' disks can be made to fail.
    pub failing_disks: bool,
    /// Whether the working directory, with the logs, stays.
    pub keep: bool,
}

impl Options {
    /// `count` hosts a, b, c, ... of this very program, and one for the master.
    ///
    /// # Errors
    /// If the program cannot be found.
    pub fn of(count: u8) -> Result<Self, LabError> {
        let program = std::env::current_exe();
        Ok(Self {
            program: program.map_err(|e| LabError::io("this program's file", e))?,
            hosts: (0..count).map(|i| char::from(b'a' + i).into()).collect(),
            masters: Masters::One,
            detection: None,
            broken: Vec::new(),
            failing_disks: false,
            keep: false,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Off,
    On,
    Frozen,
}

#[derive(Debug)]
struct Host {
    control: PathBuf,
    /// Its network namespace's number.
    number: u64,
    disk: Option<Disk>,
    agent: Option<Child>,
    state: State,
}

/// A running lab. All processes of it end when it is dropped.
#[derive(Debug)]
pub struct Lab {
    options: Options,
    dir: PathBuf,
    names: Vec<String>,
    hosts: Mutex<Vec<Host>>,
    keep: AtomicBool,
    /// After the hosts, so that it goes after their processes.
    network: Network,
}

/// What a command came to.
#[derive(Clone, Debug)]
pub struct Said {
    /// Whether it ended with status 0.
    pub ok: bool,
    /// What it said, errors too.
    pub text: String,
}

/// Whether this machine can run VMs and taps at all.
///
/// # Errors
/// [`LabError::Missing`], with the remedy.
pub fn check_machine() -> Result<(), LabError> {
    for (path, remedy) in [
        (
            "/dev/kvm",
            "run on a machine with KVM, as a user who may use it (group kvm), or inside `scripts/kvm-host`, which emulates one: scripts/kvm-host target/release/understudy demo",
        ),
        (
            "/dev/net/tun",
            "load the kernel's tun module (modprobe tun), and run as a user who may open it",
        ),
    ] {
        if let Err(e) = File::options().read(true).write(true).open(path) {
            return Err(LabError::Missing(format!("{path}: {e}; {remedy}")));
        }
    }
    Ok(())
}

/// Gives this process what it takes to make namespaces, if it is not root: a user namespace of its own. To be called
/// before it has other threads.
///
/// # Errors
/// Naming what is in the way.
pub fn enter() -> Result<(), LabError> {
    Ok(netbuf::netconf::unshare_userns_netns()?)
}

impl Lab {
    /// Builds the network and starts all agents, the master's first. This thread has to outlive the lab: the agents end
    /// with it.
    ///
    /// # Errors
    /// Naming what is missing or did not work.
    pub fn launch(options: Options) -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("understudy-{}-{number}", std::process::id());
        Self::launch_in(options, std::env::temp_dir().join(name))
    }

    /// The same with this working directory, which is made if it is not there.
    ///
    /// # Errors
    /// As [`Lab::launch`].
    pub fn launch_in(options: Options, dir: PathBuf) -> Result<Self, LabError> {
        // The VM processes of a killed agent become this process's children, so that their end can be waited for.
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(|e| LabError::io("PR_SET_CHILD_SUBREAPER", e.into()))?;
        let only_masters = options.masters.hosts().iter().map(|n| (*n).to_string());
        let names: Vec<String> = options.hosts.iter().cloned().chain(only_masters).collect();
        fs::create_dir_all(&dir).map_err(|e| LabError::io(dir.display().to_string(), e))?;
        let mut lab = Self {
            keep: AtomicBool::new(options.keep),
            network: Network::build(&names)?,
            hosts: Mutex::default(),
            options,
            dir,
            names,
        };
        let hosts = (0..lab.names.len())
            .map(|i| lab.host(i))
            .collect::<Result<_, _>>()?;
        lab.hosts = Mutex::new(hosts);
        for name in lab.names.iter().rev() {
            lab.start_agent(name)?;
        }
        Ok(lab)
    }

    fn host(&self, i: usize) -> Result<Host, LabError> {
        let name = &self.names[i];
        let files = HostFiles {
            dir: &self.dir,
            names: &self.names,
            masters: self.options.masters,
            detection: self.options.detection,
        };
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, files.text(i)).map_err(|e| LabError::io(path.display().to_string(), e))?;
        let data = self.path(name);
        let disk = match self.options.failing_disks {
            true => {
                fs::create_dir_all(data.join("disks"))
                    .map_err(|e| LabError::io(data.display().to_string(), e))?;
                Some(Disk::mount(&data)?)
            }
            false => None,
        };
        Ok(Host {
            control: self.path(&format!("{name}.sock")),
            number: self.network.namespace(name)?.number()?,
            disk,
            agent: None,
            state: State::Off,
        })
    }

    fn hosts_locked(&self) -> MutexGuard<'_, Vec<Host>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, name: &str, f: impl FnOnce(&mut Host) -> T) -> Result<T, LabError> {
        let i = self.index(name)?;
        let mut hosts = self.hosts_locked();
        hosts
            .get_mut(i)
            .map(f)
            .ok_or_else(|| LabError::NoHost(name.into()))
    }

    fn index(&self, name: &str) -> Result<usize, LabError> {
        let found = self.names.iter().position(|n| n == name);
        found.ok_or_else(|| LabError::NoHost(name.into()))
    }

    /// Starts (again) the agent of `name`, with what its disk has.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&self, name: &str) -> Result<(), LabError> {
        let broken = self.options.broken.iter().find(|(host, _)| host == name);
        self.start_agent_with(name, broken.map(|(_, what)| what.as_str()))
    }

    /// The same, with the mechanism `broken` switched off.
    ///
    /// # Errors
    /// As [`Lab::start_agent`].
    pub fn start_agent_with(&self, name: &str, broken: Option<&str>) -> Result<(), LabError> {
        if self.options.masters == Masters::Etcd && Masters::Etcd.hosts().contains(&name) {
            return self.start_etcd(name);
        }
        let mut command = Command::new(&self.options.program);
        command
            .args(["agent", "--config"])
            .arg(self.path(&format!("{name}.toml")));
        if let Some(what) = broken {
            command.env("UNDERSTUDY_BREAK", what);
        }
        self.spawn(name, command)?;
        let control = self.with(name, |h| h.control.clone())?;
        wait(&format!("the agent of {name} to listen"), || {
            ControlClient::connect(&control).ok().map(drop)
        })
        .map_err(|why| LabError::Agent {
            host: name.into(),
            why,
            log: self.log_tail(name, LOG_LINES),
        })
    }

    fn spawn(&self, name: &str, command: Command) -> Result<(), LabError> {
        let path = self.path(&format!("{name}.log"));
        let log = File::options().create(true).append(true).open(&path);
        let log = log.map_err(|e| LabError::io(path.display().to_string(), e))?;
        let net = self.network.namespace(name)?.raw();
        self.with(name, |host| {
            let mounts = host.disk.as_ref().map(Disk::raw);
            host.agent = Some(process::spawn(command, Place { net, mounts }, log)?);
            host.state = State::On;
            Ok(())
        })?
        .map_err(|e| LabError::io(format!("starting a process on {name}"), e))
    }

    /// Starts (again) the etcd server, with what it has.
    fn start_etcd(&self, name: &str) -> Result<(), LabError> {
        let i = self.index(name)?;
        let url = etcd_url(i);
        let mut command = Command::new("etcd");
        command
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
        self.spawn(name, command)?;
        let addr = SocketAddr::from((repl_addr(i), 2379));
        let namespace = self.network.namespace(name)?;
        wait("etcd to listen (Debian: apt install etcd-server)", || {
            namespace.within(|| std::net::TcpStream::connect(addr).ok().map(drop))
        })?;
        Ok(())
    }

    /// The program, to be run on `host`. The host has to outlive the start.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn command_on(&self, host: &str) -> Result<Command, LabError> {
        self.within_command(host, Command::new(&self.options.program))
    }

    /// Another program, to be run on `host`, with its network and its disk.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn within_command(&self, host: &str, mut command: Command) -> Result<Command, LabError> {
        let net = self.network.namespace(host)?.raw();
        let mounts = self.with(host, |h| h.disk.as_ref().map(Disk::raw))?;
        process::put(&mut command, Place { net, mounts });
        Ok(command)
    }

    /// Runs a command to its end, which has to come within `within`.
    ///
    /// # Errors
    /// [`LabError::Io`], also if it does not end.
    pub fn output(&self, mut command: Command, within: Duration) -> Result<Said, LabError> {
        let what = format!("{command:?}");
        let file = |name: &str| {
            let path = self.path(name);
            let made = File::create(&path).and_then(|f| Ok((f.try_clone()?, f)));
            made.map(|(a, b)| (path, a, b))
        };
        let (path, out, err) = file("command.out").map_err(|e| LabError::io(&what, e))?;
        let child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn();
        let mut child = child.map_err(|e| LabError::io(&what, e))?;
        let ended = wait_for(&what, within, || child.try_wait().ok().flatten());
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let text = fs::read(path).unwrap_or_default();
        Ok(Said {
            ok: ended?.success(),
            text: String::from_utf8_lossy(&text).into_owned(),
        })
    }

    /// The hosts that may run VMs.
    #[must_use]
    pub fn hosts(&self) -> &[String] {
        &self.options.hosts
    }

    /// Those and the hosts that only have the master.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The working directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file in it.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Where `host` has the images of VMs that are new.
    #[must_use]
    pub fn disks_of(&self, host: &str) -> PathBuf {
        match self.options.failing_disks {
            true => self.path(host).join("disks"),
            false => self.dir.clone(),
        }
    }

    /// Keeps the working directory, and says where it is.
    pub fn keep_logs(&self) -> &Path {
        self.keep.store(true, Ordering::Relaxed);
        &self.dir
    }

    /// The last lines of a host's log.
    #[must_use]
    pub fn log_tail(&self, name: &str, lines: usize) -> String {
        let text = fs::read(self.path(&format!("{name}.log"))).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut lines: Vec<String> = text.lines().rev().take(lines).map(plain).collect();
        lines.reverse();
        lines.join("\n  ")
    }

    /// `why`, with the ends of all hosts' logs, which are kept.
    pub fn with_logs(&self, why: impl std::fmt::Display) -> LabError {
        let tails: Vec<String> = self
            .options
            .hosts
            .iter()
            .map(|name| format!("\n{name}:\n  {}", self.log_tail(name, LOG_LINES)))
            .collect();
        LabError::Logs {
            why: why.to_string(),
            dir: self.keep_logs().into(),
            tails: tails.concat(),
        }
    }

    /// Whether `name` is on and does not stand still.
    #[must_use]
    pub fn is_running(&self, name: &str) -> bool {
        self.with(name, |h| h.state == State::On).unwrap_or(false)
    }

    /// How an agent has ended that nobody here ended.
    #[must_use]
    pub fn ended_by_itself(&self, name: &str) -> Option<String> {
        let ended = |host: &mut Host| {
            let agent = host.agent.as_mut().filter(|_| host.state == State::On)?;
            agent.try_wait().ok().flatten().map(|s| s.to_string())
        };
        self.with(name, ended).ok().flatten()
    }

    /// A connection to the agent of `name`.
    ///
    /// # Errors
    /// When it does not answer; [`LabError::Down`] if it cannot.
    pub fn control(&self, name: &str) -> Result<ControlClient, LabError> {
        let (control, state) = self.with(name, |h| (h.control.clone(), h.state))?;
        if state != State::On {
            return Err(LabError::Down(name.into()));
        }
        ControlClient::connect(&control).map_err(|source| LabError::Control {
            host: name.into(),
            source,
        })
    }

    /// Asks the agent of `name`, which may take so long.
    ///
    /// # Errors
    /// As [`Lab::control`]; the agent's refusal; [`LabError::Silent`].
    pub fn ask(&self, name: &str, request: Request, within: Duration) -> Result<Reply, LabError> {
        let said = format!("{request:?}");
        let mut control = self.control(name)?;
        let (sender, receiver) = channel();
        // On a thread of its own: an agent that never answers keeps that one only.
        std::thread::spawn(move || {
            let _ = sender.send(control.call(&request));
        });
        match receiver.recv_timeout(within) {
            Ok(answer) => answer.map_err(|source| LabError::Control {
                host: name.into(),
                source,
            }),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(LabError::Silent {
                    host: name.into(),
                    request: said,
                    seconds: within.as_secs(),
                })
            }
        }
    }

    /// Gives an order to the agent of `name`.
    ///
    /// # Errors
    /// As [`Lab::ask`].
    pub fn order(&self, name: &str, request: Request) -> Result<(), LabError> {
        self.ask(name, request, ORDER).map(drop)
    }

    /// What `name` knows of its VMs; nothing if it does not answer.
    #[must_use]
    pub fn statuses(&self, name: &str) -> Vec<VmStatus> {
        match self.ask(name, Request::Status, STATUS) {
            Ok(Reply::Status(list)) => list,
            _ => Vec::new(),
        }
    }

    /// What `name` knows of `vm`.
    #[must_use]
    pub fn status(&self, vm: &str, name: &str) -> Option<VmStatus> {
        self.statuses(name).into_iter().find(|s| s.name == vm)
    }

    /// What has happened on `name`.
    #[must_use]
    pub fn events(&self, name: &str) -> Vec<Event> {
        match self.ask(name, Request::Events { since: 0 }, STATUS) {
            Ok(Reply::Events(list)) => list,
            _ => Vec::new(),
        }
    }

    /// The running host that says it owns `vm` in the highest generation, with what it says.
    #[must_use]
    pub fn owner(&self, vm: &str) -> Option<(String, VmStatus)> {
        let owners = self.hosts().iter().filter_map(|name| {
            let status = self.status(vm, name)?;
            (status.role == Role::Owner).then(|| (name.clone(), status))
        });
        owners.max_by_key(|(_, status)| status.generation)
    }

    /// Boots a VM on `host`; its disk is made there.
    ///
    /// # Errors
    /// The agent's refusal.
    pub fn start_vm(&self, host: &str, vm: &VmFile) -> Result<(), LabError> {
        let toml = vm.write(&self.dir, &self.disks_of(host))?;
        self.start_text(host, toml)
    }

    /// Boots the VM of that `vm.toml` on `host`.
    ///
    /// # Errors
    /// The agent's refusal.
    pub fn start_text(&self, host: &str, toml: String) -> Result<(), LabError> {
        let name = "vm.toml".into();
        self.order(host, Request::Start { toml, name })
    }

    /// Protects a VM that runs on `owner` by `backups`, in this order; waits until it is, and until each backup could
    /// take it over.
    ///
    /// # Errors
    /// The agent's refusal, or that it took too long.
    pub fn protect(&self, vm: &str, owner: &str, backups: &[String]) -> Result<(), LabError> {
        let request = Request::Protect {
            vm: vm.into(),
            backups: backups.to_vec(),
        };
        self.order(owner, request)?;
        self.wait_protected(vm, owner, backups)?;
        for backup in backups {
            wait(&format!("a standby of {vm} on {backup}"), || {
                let ready = |e: &Event| e.kind == EventKind::StandbyReady && e.vm == vm;
                self.events(backup).iter().find(|e| ready(e)).map(drop)
            })?;
        }
        Ok(())
    }

    /// Waits until `owner` says that the chain is exactly `backups` and the VM protected by it.
    ///
    /// # Errors
    /// That it took too long.
    pub fn wait_protected(
        &self,
        vm: &str,
        owner: &str,
        backups: &[String],
    ) -> Result<(), LabError> {
        let what = format!("{vm} on {owner} to be protected by {backups:?}");
        Ok(wait(&what, || {
            let status = self.status(vm, owner)?;
            let chain = status.chain.iter().map(|m| &m.host);
            (status.role == Role::Owner && status.protected && chain.eq(backups)).then_some(())
        })?)
    }

    /// The host that took `vm` over in a generation after `generation`, and what it says once it has.
    ///
    /// # Errors
    /// That it took too long.
    pub fn wait_failover(&self, vm: &str, generation: u64) -> Result<(String, VmStatus), LabError> {
        Ok(wait(&format!("a backup to take {vm} over"), || {
            self.taken_over(vm, generation)
        })?)
    }

    /// The same, if it has happened.
    #[must_use]
    pub fn taken_over(&self, vm: &str, generation: u64) -> Option<(String, VmStatus)> {
        self.hosts().iter().find_map(|name| {
            let status = self.status(vm, name)?;
            let new = |f: &crate::control::FailoverReport| f.generation > generation;
            let done = status.role == Role::Owner && status.failover.as_ref().is_some_and(new);
            done.then(|| (name.clone(), status))
        })
    }

    /// The host that has the master, or its member that leads.
    ///
    /// # Errors
    /// When there is none for a minute.
    pub fn leader(&self) -> Result<String, LabError> {
        Ok(wait("the master to have a leader", || {
            let leads = |name: &&String| {
                let answer = self.ask(name, Request::Leads, STATUS);
                matches!(answer, Ok(Reply::Leads(true)))
            };
            self.names.iter().find(leads).cloned()
        })?)
    }

    /// `name` loses power: all its processes are killed at once. Returns when they are gone, and their taps.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn kill(&self, name: &str) -> Result<(), LabError> {
        self.strike(name)?;
        let number = self.with(name, |h| h.number)?;
        process::bury(number);
        self.with(name, |h| h.agent = None)
    }

    /// As [`Lab::kill`], without waiting.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn strike(&self, name: &str) -> Result<(), LabError> {
        self.with(name, |host| {
            // A process that waits for its disk could not end.
            if let Some(disk) = &host.disk {
                disk.set(Health::Good);
            }
            process::signal(&process::in_namespace(host.number), Signal::SIGKILL);
            host.state = State::Off;
        })
    }

    /// The agent of `name` is killed, and only it.
    ///
    /// # Errors
    /// [`LabError::Down`] if it does not run.
    pub fn kill_agent(&self, name: &str) -> Result<(), LabError> {
        let agent = self.with(name, |host| {
            host.state = State::Off;
            host.agent.take()
        })?;
        let mut agent = agent.ok_or_else(|| LabError::Down(name.into()))?;
        let ended = agent.kill().and_then(|()| agent.wait());
        ended
            .map(drop)
            .map_err(|e| LabError::io("killing an agent", e))
    }

    /// Ends one process of `name`, the VM's or a standby's.
    pub fn kill_process(&self, pid: u32) {
        process::signal(&[pid], Signal::SIGKILL);
    }

    /// `name` stands still: every process of it stops.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn freeze(&self, name: &str) -> Result<(), LabError> {
        self.with(name, |host| {
            process::signal(&process::in_namespace(host.number), Signal::SIGSTOP);
            host.state = State::Frozen;
        })
    }

    /// `name` goes on.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn thaw(&self, name: &str) -> Result<(), LabError> {
        self.with(name, |host| {
            process::signal(&process::in_namespace(host.number), Signal::SIGCONT);
            host.state = State::On;
        })
    }

    /// Pulls or plugs a cable of `name`.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn plug(&self, name: &str, wire: Wire, plugged: bool) -> Result<(), LabError> {
        self.network.plug(name, wire, plugged)
    }

    /// From now on the disk of `name` is so.
    ///
    /// # Errors
    /// [`LabError::Missing`] if the lab was not asked for disks that fail.
    pub fn set_disk(&self, name: &str, health: Health) -> Result<(), LabError> {
        let set = self.with(name, |h| h.disk.as_ref().map(|disk| disk.set(health)))?;
        set.ok_or_else(|| LabError::Missing("this lab's disks cannot be made to fail".into()))
    }

    /// Requests that the disk of `name` refused or kept waiting.
    #[must_use]
    pub fn disk_felt(&self, name: &str) -> u64 {
        let felt = self.with(name, |h| h.disk.as_ref().map(Disk::felt));
        felt.ok().flatten().unwrap_or_default()
    }

    /// The processes of `name` with what they hold; the agent's first.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn processes(&self, name: &str) -> Result<Vec<(u32, Holding)>, LabError> {
        let (number, agent) = self.with(name, |h| (h.number, h.agent.as_ref().map(Child::id)))?;
        let mut pids = process::in_namespace(number);
        pids.sort_by_key(|pid| (Some(*pid) != agent, *pid));
        let held = |pid: u32| Some((pid, process::holding(pid)?));
        Ok(pids.into_iter().filter_map(held).collect())
    }

    /// The taps in the namespace of `name`.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn taps(&self, name: &str) -> Result<Vec<String>, LabError> {
        let list = self
            .network
            .namespace(name)?
            .within(|| fs::read_to_string("/proc/thread-self/net/dev"));
        let list = list.map_err(|e| LabError::io("/proc/net/dev", e))?;
        let names = list.lines().filter_map(|l| l.split_once(':'));
        Ok(names
            .map(|(name, _)| name.trim().to_string())
            .filter(|name| name.starts_with("tap"))
            .collect())
    }

    /// A client that sends numbered increments to the guest at `ip` on one TCP connection.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn client(&self, ip: Ipv4Addr, interval: Duration) -> Result<ProbeClient, ProbeError> {
        let mut config = ProbeConfig::new(SocketAddr::from((ip, guest::proto::PORT)));
        config.interval = interval;
        self.within_client(|| ProbeClient::start(config, PATIENCE))
    }

    /// Runs `f` on a thread where the client is.
    pub fn within_client<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match self.network.namespace("client") {
            Ok(client) => client.within(f),
            Err(_) => unreachable!("every network has a client"),
        }
    }
}

/// A line without the colours of a terminal.
fn plain(line: &str) -> String {
    let mut parts = line.split("\x1b[");
    let first = parts.next().unwrap_or_default();
    let rest = parts.map(|part| part.split_once('m').map_or(part, |(_, text)| text));
    std::iter::once(first).chain(rest).collect()
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = self.strike(name);
        }
        for host in self.hosts_locked().iter() {
            process::bury(host.number);
        }
        let unnoticed = self.names.iter().find_map(|name| {
            let log = fs::read_to_string(self.dir.join(format!("{name}.log"))).ok()?;
            let line = log
                .lines()
                .find(|line| line.contains("changed unnoticed"))?;
            Some(format!("{name}: {line}"))
        });
        if unnoticed.is_none() && !self.keep.load(Ordering::Relaxed) {
            let _ = fs::remove_dir_all(&self.dir);
        }
        if let Some(line) = unnoticed
            && !std::thread::panicking()
        {
            panic!("{line}; logs in {}", self.dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn colours_are_taken_out_of_a_log() {
        assert_eq!(
            super::plain("\x1b[2m12:00\x1b[0m \x1b[32mINFO\x1b[0m up"),
            "12:00 INFO up"
        );
        assert_eq!(super::plain("no colours"), "no colours");
    }
}
