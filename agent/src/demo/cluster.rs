//! Several hosts on one machine: an agent process each, in a network namespace of our own, with a bridge that the VM's
//! taps and the client share. Used by the demo and the benches.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netbuf::netconf;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::control::{ControlClient, EventKind, Reply, Request, VmStatus};

/// The client's address, on the bridge.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The guest's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The bridge's name, in the namespace of our own.
pub const BRIDGE: &str = "usbr0";
/// Generous bound for anything that should take milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// One host.
#[derive(Debug)]
pub struct Host {
    /// a, b, c, ...
    pub name: String,
    control: PathBuf,
    agent: Child,
}

impl Host {
    /// A connection to its agent.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn control(&self) -> Outcome<ControlClient> {
        Ok(ControlClient::connect(&self.control)?)
    }

    /// Ends its agent and its VM processes at once, as if the host lost power.
    pub fn kill(&mut self) {
        let _ = killpg(Pid::from_raw(self.agent.id() as i32), Signal::SIGKILL);
        let _ = self.agent.wait();
    }

    /// Waits until its VM processes are gone too, and their taps with them (bounded; they have been killed). This
    /// process has adopted them, so it can.
    fn wait_gone(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let group = Pid::from_raw(-(self.agent.id() as i32));
        while let Ok(status) = waitpid(group, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                if Instant::now() > deadline {
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// The hosts.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    hosts: std::cell::RefCell<Vec<Host>>,
    names: Vec<HostName>,
    keep: AtomicBool,
}

/// A host's name.
#[derive(Debug)]
pub struct HostName {
    /// a, b, c, ...
    pub name: String,
}

/// Whether this machine can run VMs and taps at all.
///
/// # Errors
/// Naming what is missing and the remedy.
pub fn check_host() -> Outcome<()> {
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
            return Err(format!("{path}: {e}; {remedy}").into());
        }
    }
    Ok(())
}

impl Cluster {
    /// Moves this process into a network namespace of its own (and a user namespace, if it is not root) and starts an
    /// owner's agent and `backups` more in it. Has to be called before the process has other threads.
    ///
    /// # Errors
    /// Naming what is missing.
    pub fn launch(backups: u8, keep: bool, masters: u8) -> Outcome<Self> {
        netconf::unshare_userns_netns()?;
        netconf::set_link("lo", true)?;
        netconf::create_bridge(BRIDGE)?;
        // Without an address of its own a bridge takes its ports' lowest and changes it when that port goes, as the
        // dead owner's tap does: the guest would go on sending to an address that nobody has any more.
        netconf::set_mac(BRIDGE, [0x52, 0x54, 0x00, 0x75, 0x73, 0xfe])?;
        netconf::set_addr_v4(BRIDGE, CLIENT, 24)?;
        netconf::set_link(BRIDGE, true)?;
        Self::start(backups, keep, masters)
    }

    /// As [`Cluster::launch`], in a namespace that has the bridge already.
    ///
    /// # Errors
    /// Naming what is missing.
    pub fn start(backups: u8, keep: bool, masters: u8) -> Outcome<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("understudy-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir)?;
        // A killed agent leaves its VM processes to us: a host is dead when the last of them is.
        nix::sys::prctl::set_child_subreaper(true)?;
        let names: Vec<String> = (b'a'..=b'a' + backups)
            .map(|c| char::from(c).to_string())
            .collect();
        // The master has hosts of its own, so that any other may be killed.
        let master = (b'm'..b'm' + masters).map(|c| char::from(c).to_string());
        let with_master: Vec<String> = names.iter().cloned().chain(master).collect();
        let cluster = Self {
            dir,
            hosts: Default::default(),
            names: names.iter().map(|n| HostName { name: n.clone() }).collect(),
            keep: AtomicBool::new(keep),
        };
        // The last hosts first: they have the master.
        for (i, name) in with_master.iter().enumerate().rev() {
            let toml = host_toml(&cluster.dir, &with_master, i, usize::from(masters));
            let path = cluster.dir.join(format!("{name}.toml"));
            fs::write(&path, toml)?;
            let agent = cluster.spawn_agent(name)?;
            let control = cluster.dir.join(format!("{name}.sock"));
            let host = Host {
                name: name.clone(),
                control: control.clone(),
                agent,
            };
            cluster.hosts.borrow_mut().insert(0, host);
            cluster.wait_for_agent(name, &control)?;
        }
        Ok(cluster)
    }

    fn spawn_agent(&self, name: &str) -> Outcome<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{name}.log")))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["agent", "--config"])
            .arg(self.dir.join(format!("{name}.toml")))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        // An interrupted demo leaves no agents behind; their VM processes end with them.
        // SAFETY: only an async-signal-safe call (prctl) between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        Ok(command.spawn()?)
    }

    fn wait_for_agent(&self, name: &str, control: &Path) -> Outcome<()> {
        wait("its agent to listen", || {
            ControlClient::connect(control).ok().map(drop)
        })
        .map_err(|e| format!("host {name}: {e}; its log says: {}", self.log_tail(name)).into())
    }

    /// Host number `i`, which was killed, comes back: its agent starts again, with what its disk still has.
    ///
    /// # Errors
    /// When the agent does not start.
    pub fn restart(&self, i: usize) -> Outcome<()> {
        let (name, control) = {
            let mut hosts = self.hosts.borrow_mut();
            let host = hosts.get_mut(i).ok_or("no such host")?;
            host.wait_gone();
            host.agent = self.spawn_agent(&host.name)?;
            (host.name.clone(), host.control.clone())
        };
        self.wait_for_agent(&name, &control)
    }

    /// The hosts' names, owner first.
    #[must_use]
    pub fn hosts(&self) -> &[HostName] {
        &self.names
    }

    /// The working directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps the working directory, and says where it is.
    pub fn keep_logs(&self) -> &Path {
        self.keep.store(true, Ordering::Relaxed);
        &self.dir
    }

    fn log_tail(&self, name: &str) -> String {
        let text = fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// A connection to the agent of host number `i`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn control(&self, i: usize) -> Outcome<ControlClient> {
        let hosts = self.hosts.borrow();
        hosts.get(i).ok_or("no such host")?.control()
    }

    /// Process group of host number `i`: killing it is the host's death.
    #[must_use]
    pub fn pid(&self, i: usize) -> u32 {
        self.hosts.borrow().get(i).map_or(0, |h| h.agent.id())
    }

    /// The number of the host that has the master, or its member that leads.
    ///
    /// # Errors
    /// When there is none for a minute.
    pub fn leader(&self) -> Outcome<usize> {
        wait("the master to have a leader", || {
            let count = self.hosts.borrow().len();
            (self.names.len()..count).find(|i| {
                let answer = self.control(*i).map(|mut c| c.call(&Request::Leads));
                matches!(answer, Ok(Ok(Reply::Leads(true))))
            })
        })
    }

    /// The name of host number `i`, of those with the master too.
    #[must_use]
    pub fn name(&self, i: usize) -> String {
        self.hosts
            .borrow()
            .get(i)
            .map_or_else(String::new, |h| h.name.clone())
    }

    /// Host number `i` loses power.
    pub fn kill(&self, i: usize) {
        if let Some(host) = self.hosts.borrow_mut().get_mut(i) {
            host.kill();
        }
    }

    /// Boots the VM of `toml` on host 0.
    ///
    /// # Errors
    /// The agent's.
    pub fn start_vm(&self, toml: &str) -> Outcome<()> {
        Ok(self.control(0)?.order(&Request::Start {
            toml: toml.into(),
            name: "demo.toml".into(),
        })?)
    }

    /// Protects a running VM by all other hosts and waits until it is.
    ///
    /// # Errors
    /// The agent's, or that it took too long; then with the ends of all hosts' logs, which are kept.
    pub fn protect(&self, vm: &str) -> Outcome<()> {
        self.try_protect(vm)
            .map_err(|e| self.with_logs(&e.to_string()))
    }

    fn try_protect(&self, vm: &str) -> Outcome<()> {
        let backups = self.names[1..].iter().map(|n| n.name.clone()).collect();
        let mut control = self.control(0)?;
        control.order(&Request::Protect {
            vm: vm.into(),
            backups,
        })?;
        wait("the VM to be protected", || {
            let status = control.status().ok()?;
            status
                .into_iter()
                .find(|s| s.name == vm && s.protected)
                .map(drop)
        })?;
        for i in 1..self.names.len() {
            wait("a standby", || {
                let events = self.control(i).ok()?.events(0).ok()?;
                events
                    .iter()
                    .find(|e| e.kind == EventKind::StandbyReady && e.vm == vm)
                    .map(drop)
            })?;
        }
        Ok(())
    }

    fn with_logs(&self, error: &str) -> Box<dyn std::error::Error> {
        let logs: Vec<String> = self
            .names
            .iter()
            .map(|n| format!("{}: {}", n.name, self.log_tail(&n.name)))
            .collect();
        format!(
            "{error}; logs in {}: {}",
            self.keep_logs().display(),
            logs.join("; ")
        )
        .into()
    }

    /// Boots and protects.
    ///
    /// # Errors
    /// As the two.
    pub fn start_protected(&self, vm: &str, toml: &str) -> Outcome<()> {
        self.start_vm(toml)?;
        self.protect(vm)
    }

    /// The status of `vm` on the host that owns it in a generation after `generation`, once its failover is complete.
    ///
    /// # Errors
    /// That it took too long.
    pub fn wait_failover(&self, vm: &str, generation: u64) -> Outcome<(usize, VmStatus)> {
        wait("a backup to take the VM over", || {
            (0..self.names.len()).find_map(|i| {
                let status = self.status(i, vm)?;
                let new = status
                    .failover
                    .as_ref()
                    .is_some_and(|f| f.generation > generation);
                (status.role == "owner" && new).then_some((i, status))
            })
        })
        .map_err(|e| self.with_logs(&e.to_string()))
    }

    /// What host number `i` knows of `vm`.
    #[must_use]
    pub fn status(&self, i: usize, vm: &str) -> Option<VmStatus> {
        let list = self.control(i).ok()?.status().ok()?;
        list.into_iter().find(|s| s.name == vm)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for host in self.hosts.borrow_mut().iter_mut() {
            host.kill();
            host.wait_gone();
        }
        if !self.keep.load(Ordering::Relaxed) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Polls until `ready` answers.
///
/// # Errors
/// After a minute.
pub fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> Outcome<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(format!("waited {} s in vain for {what}", PATIENCE.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn host_toml(dir: &Path, names: &[String], i: usize, masters: usize) -> String {
    // A namespace of our own: every port is free.
    let addr = |i: usize| format!("127.0.0.1:{}", 7700 + i);
    let first = names.len() - masters;
    let serves = |i: usize| format!("\"127.0.0.1:{}\"", 7690 + i - first);
    let all: Vec<String> = (first..names.len()).map(serves).collect();
    let mut toml = format!(
        "host = \"{name}\"\ndata_dir = \"{dir}/{name}\"\ncontrol = \"{dir}/{name}.sock\"\nlisten = \"{listen}\"\n\n[master]\nbegin = true\nconnect = [{all}]\n",
        name = names[i],
        dir = dir.display(),
        listen = addr(i),
        all = all.join(", "),
    );
    if i >= first {
        toml += &format!("serve = {}\n", serves(i));
        if masters > 1 {
            let members: Vec<String> = (first..names.len())
                .map(|i| format!("{} = \"127.0.0.1:{}\"", names[i], 7680 + i - first))
                .collect();
            toml += &format!("members = {{ {} }}\n", members.join(", "));
        }
    }
    toml += "\n[peers]\n";
    for (j, peer) in names.iter().enumerate().filter(|(j, _)| *j != i) {
        toml += &format!("{peer} = \"{}\"\n", addr(j));
    }
    toml += &format!(
        "\n[networks.lan]\nbridge = \"{BRIDGE}\"\ntap_prefix = \"us{}\"\n",
        names[i]
    );
    toml
}
