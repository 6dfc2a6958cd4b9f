//! Hosts: a lab (`agent::lab`), in the words of a test: what does not work panics.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agent::control::{ControlClient, Event, EventKind, Request, Role, VmStatus};
use agent::lab::{Lab, LabError, Masters, Wire};
use agent::probe::{ProbeClient, ProbeConn, ProbeReport};
use guest::proto::{Op, PORT, Response};

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
    /// Whether the hosts' disks can be made to fail.
    pub failing_disks: bool,
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
            failing_disks: false,
        }
    }
}

/// A running cluster; everything goes when it is dropped, but the logs are kept if the test failed.
#[derive(Debug)]
pub struct Cluster {
    lab: Lab,
    /// After the lab, whose hosts write into it.
    dir: Option<tempfile::TempDir>,
    _turn: Turn,
}

#[track_caller]
fn must<T>(outcome: Result<T, LabError>) -> T {
    outcome.unwrap_or_else(|e| panic!("{e}"))
}

fn names(hosts: &[&str]) -> Vec<String> {
    hosts.iter().map(|h| (*h).into()).collect()
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
        let dir = tempfile::Builder::new()
            .prefix("systest-understudy-")
            .tempdir()
            .expect("a temporary directory");
        let broken = options.broken.iter();
        let lab = Lab::launch_in(
            agent::lab::Options {
                program: program.into(),
                hosts: names(options.hosts),
                masters: match (options.members, options.etcd) {
                    (true, _) => Masters::Hosts,
                    (false, true) => Masters::Etcd,
                    (false, false) => Masters::One,
                },
                detection: Some((options.heartbeat_ms, options.missed)),
                broken: broken.map(|(h, m)| ((*h).into(), (*m).into())).collect(),
                failing_disks: options.failing_disks,
                keep: false,
            },
            dir.path().into(),
        );
        Self {
            lab: must(lab),
            dir: Some(dir),
            _turn: turn,
        }
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Starts (again) the agent of `name`, with the mechanism `broken` switched off.
    pub fn start_agent(&mut self, name: &str, broken: Option<&str>) {
        must(self.lab.start_agent_with(name, broken));
    }

    /// The program under test, to be run inside `host`'s namespace.
    #[must_use]
    pub fn command_on(&self, host: &str) -> Command {
        must(self.lab.command_on(host))
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> Network<'_> {
        Network(&self.lab)
    }

    /// The working directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.lab.dir()
    }

    /// A file in it.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.lab.path(file)
    }

    /// A connection to the agent of `name`.
    #[must_use]
    pub fn control(&self, name: &str) -> ControlClient {
        must(self.lab.control(name))
    }

    /// What `name` knows of the VM.
    #[must_use]
    pub fn status(&self, name: &str) -> Option<VmStatus> {
        self.status_of(VM, name)
    }

    /// What `name` knows of that VM.
    #[must_use]
    pub fn status_of(&self, vm: &str, name: &str) -> Option<VmStatus> {
        self.lab.status(vm, name)
    }

    /// What has happened on `name`.
    #[must_use]
    pub fn events(&self, name: &str) -> Vec<Event> {
        self.lab.events(name)
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
        self.start_vm_on(&self.lab.hosts()[0], toml);
    }

    /// Boots the VM of `toml` on `host`.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn start_vm_on(&self, host: &str, toml: String) {
        must(self.lab.start_text(host, toml));
    }

    /// Protects the first host's VM by `backups`, in this order; waits until it is.
    ///
    /// # Panics
    /// With the agent's refusal.
    pub fn protect_vm(&self, backups: &[&str]) {
        self.protect_vm_of(VM, &self.lab.hosts()[0], backups);
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
        must(self.lab.wait_protected(vm, owner, &names(backups)));
    }

    /// Waits until `name` runs the VM after a failover; returns what it says of it.
    pub fn wait_owner(&self, name: &str) -> VmStatus {
        wait(&format!("{name} to take the VM over"), || {
            self.status(name)
                .filter(|s| s.role == Role::Owner && s.failover.is_some())
        })
    }

    /// `name` loses power: its agent and its VM processes are killed at once.
    pub fn kill(&mut self, name: &str) {
        must(self.lab.kill(name));
    }

    /// As [`Cluster::kill`], without waiting until everything of it is gone.
    pub fn strike(&self, name: &str) {
        must(self.lab.strike(name));
    }

    /// `name` stands still: every process of it stops.
    pub fn freeze(&self, name: &str) {
        must(self.lab.freeze(name));
    }

    /// `name` goes on.
    pub fn thaw(&self, name: &str) {
        must(self.lab.thaw(name));
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
        let client = self.lab.client(guest, Duration::from_millis(5));
        let client = client.unwrap_or_else(|e| panic!("the client: {e}"));
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
        self.lab
            .within_client(|| client.stop(Duration::from_secs(20)))
    }

    /// Asks the guest on a new connection.
    ///
    /// # Panics
    /// If it does not answer.
    #[must_use]
    pub fn ask(&self, op: Op) -> Response {
        self.lab.within_client(|| {
            ProbeConn::connect((GUEST, PORT).into(), crate::PATIENCE)
                .and_then(|mut guest| guest.call(guest::proto::Request::new(op, 0)))
                .unwrap_or_else(|e| panic!("asking the guest for {op:?}: {e}"))
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let running = self.lab.names().iter().filter(|n| self.lab.is_running(n));
        let hosts: Vec<_> = running
            .map(|name| (name.clone(), self.path(&format!("{name}.sock"))))
            .collect();
        let console = self.path("console.log");
        eprintln!("{}", diagnosis::of_hosts(&hosts, VM, &console));
        for name in self.lab.names() {
            let _ = self.lab.strike(name);
        }
        for name in self.lab.names() {
            let log = diagnosis::tail(&self.path(&format!("{name}.log")), 12);
            eprintln!("--- log of host {name}\n{log}");
        }
        self.lab.keep_logs();
        if let Some(dir) = self.dir.take() {
            eprintln!("the hosts' logs are kept in {}", dir.keep().display());
        }
    }
}

/// The network of a test.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a>(&'a Lab);

impl Network<'_> {
    /// Pulls or plugs `host`'s cable to the replication network; its link to the guest LAN stays.
    pub fn plug(&self, host: &str, plugged: bool) {
        must(self.0.plug(host, Wire::Repl, plugged));
    }

    /// Runs `f` on a thread inside `host`'s namespace, or inside `client`'s or `switch`'s. Threads and sockets it makes
    /// stay there.
    ///
    /// # Panics
    /// If there is no such host, or as `f` does.
    pub fn within<T: Send>(&self, host: &str, f: impl FnOnce() -> T + Send) -> T {
        must(self.0.network().namespace(host)).within(f)
    }
}
