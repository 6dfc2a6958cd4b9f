//! The control socket's serving side.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use chain::{Life, Member, Query, VmRecord};
use checkpoint::{Epoch, HostId};

use super::calls::Calls;
use super::clones::Clones;
use super::env::{Env, lock};
use super::process::config_of;
use super::run::Shown;
use super::table::Table;
use super::{AgentError, slow, status};
use crate::child::proto::ToChild;
use crate::config::{Epochs, ProtectConfig, VmConfig, changes};
use crate::control::{Asked, Point, Reply, Request, Switched};
use crate::epoch::EpochStats;
use crate::host::{Answered, Health, Order, Role};
use crate::ipc;

/// How long a VM process may take to answer a question.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between looks whether the master knows this host.
const POLL: Duration = Duration::from_millis(10);
/// How long its vCPUs may take to stop for an inspection: they are given 10 s before they are called stuck.
const INSPECT_PATIENCE: Duration = Duration::from_secs(30);
/// How long whoever gives an order waits for its outcome. Each part of it has a shorter bound of its own.
const ORDER_PATIENCE: Duration = Duration::from_secs(60);
/// The same, of an order that boots a VM.
const START_PATIENCE: Duration = Duration::from_secs(90);
/// The same, of one that copies disks.
const COPY_PATIENCE: Duration = Duration::from_secs(3600);
/// How long the outcome of an order is waited for by its own thread, whoever waits for that.
const LATE: Duration = Duration::from_secs(2 * 3600);

/// Binds the control socket, replacing one that nobody listens at any more.
pub(super) fn bind(path: &Path) -> Result<UnixListener, AgentError> {
    let fail = |source| AgentError::Control {
        path: path.into(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && UnixStream::connect(path).is_err();
    if stale {
        std::fs::remove_file(path).map_err(fail)?;
    }
    UnixListener::bind(path).map_err(fail)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How long whoever asks for this waits.
fn limit(request: &Request) -> Duration {
    let more = |s: u64| ORDER_PATIENCE.saturating_add(Duration::from_secs(s));
    match request {
        Request::Start { .. } | Request::StartAgain { .. } | Request::Recover { .. } => {
            START_PATIENCE
        }
        Request::ShutDown { timeout_s, .. } => more(*timeout_s),
        Request::Reboot { timeout_s, .. } => more(timeout_s.unwrap_or(0)),
        Request::Rewind { .. } => COPY_PATIENCE,
        _ => ORDER_PATIENCE,
    }
}

/// Answers commands.
pub(super) struct Service {
    pub(super) env: Arc<Env>,
    pub(super) table: Arc<Table>,
    clones: Arc<Clones>,
    calls: Calls,
}

impl Service {
    pub fn new(env: Arc<Env>, table: Arc<Table>) -> Self {
        Self {
            clones: Clones::new(env.clone()),
            calls: Calls::default(),
            env,
            table,
        }
    }

    /// Serves one connection.
    pub fn serve(self: &Arc<Self>, stream: &UnixStream) {
        while let Ok((Asked { id, request }, _)) = ipc::recv::<Asked>(stream) {
            let reply = match request {
                request if request.is_order() => {
                    let (limit, service) = (limit(&request), self.clone());
                    let act = move || service.answer(request).unwrap_or_else(Reply::Error);
                    self.calls.carry_out(id, limit, act)
                }
                request => self.answer(request).unwrap_or_else(Reply::Error),
            };
            if ipc::send(stream, &reply, &[]).is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: Request) -> Result<Reply, String> {
        match request {
            Request::Start { toml, name } => self.start(&toml, &name)?,
            Request::Protect { vm, backups } => self.protect(&vm, &backups)?,
            Request::Unprotect { vm } => drop(self.order(&vm, Order::Unprotect)?),
            Request::Apply {
                toml,
                name,
                dry_run,
            } => return self.apply(&toml, &name, dry_run).map(Reply::Applied),
            Request::Outcome { id } => return Ok(self.calls.outcome(id, ORDER_PATIENCE)),
            Request::Stop { vm } => {
                if !self.clones.stop(&vm) {
                    self.order(&vm, Order::Stop)?;
                }
            }
            Request::StartAgain { vm } => drop(self.order(&vm, Order::Start)?),
            Request::Delete { vm } => drop(self.order(&vm, Order::Delete)?),
            Request::ShutDown { vm, timeout_s } => {
                if !self.clones.stop(&vm) {
                    let patience = micros(Duration::from_secs(timeout_s));
                    self.order(&vm, Order::ShutDown { patience })?;
                }
            }
            Request::Reboot { vm, timeout_s } => {
                let patience = timeout_s.map(|s| micros(Duration::from_secs(s)));
                self.order(&vm, Order::Reboot { patience })?;
            }
            Request::Status => {
                let mut all = status::status(&self.env, &self.table);
                all.extend(self.clones.status());
                return Ok(Reply::Status(all));
            }
            Request::Stats { vm } => return self.stats(&vm).map(|s| Reply::Stats(Box::new(s))),
            Request::Inspect { vm } => return self.inspect(&vm).map(Reply::Vcpus),
            Request::Failover { vm } => drop(self.order(&vm, Order::Failover)?),
            Request::Recover { vm } => self.recover(&vm)?,
            Request::HandOver { vm } => return self.switch(&vm, Order::HandOver),
            Request::Drill { vm } => return self.switch(&vm, Order::Drill),
            Request::Leads => {
                let serving = self.env.serving.engine.as_ref();
                return Ok(Reply::Leads(serving.is_some_and(|master| master.leads())));
            }
            Request::Rewind {
                vm,
                epoch,
                clone,
                network,
            } => {
                let record = self.replica_of(&vm, &clone)?;
                self.clones
                    .rewind(&record, Epoch(epoch), &clone, network.as_deref())?;
            }
            Request::Points { vm } => return self.points(&vm).map(Reply::Points),
            Request::Events { since } => return Ok(Reply::Events(self.env.events.since(since))),
            Request::HarvestOnly { vm, ms } => self.tell(&vm, &ToChild::HarvestOnly { ms })?,
            Request::EpochMs { vm, ms, min_ms } => {
                // Of exactly these lengths, whatever the guest does.
                let epochs = Epochs {
                    longest_ms: ms,
                    shortest_ms: min_ms,
                    idle_ms: ms,
                    pause_percent: 100,
                    ..Epochs::of(&ProtectConfig::default())
                };
                self.tell(&vm, &ToChild::Epochs(epochs))?;
            }
        }
        Ok(Reply::Ok)
    }

    pub(super) fn order(&self, name: &str, order: Order) -> Result<Answered, String> {
        if self.table.shown(name).is_none() {
            return Err(self.elsewhere(name));
        }
        self.table.order(name, order, LATE)
    }

    /// Where a VM is that this host has no part in.
    pub(super) fn elsewhere(&self, name: &str) -> String {
        let found = match self.env.master.read() {
            Ok(snapshot) => snapshot.records.into_iter().find(|r| r.view.name == name),
            Err(e) => return format!("this host has no part in a VM named {name:?}; {e}"),
        };
        match found {
            None => {
                format!("there is no VM named {name:?} (`understudy status` lists this host's)")
            }
            Some(record) if record.life == Life::Off => format!(
                "{name} is off, and its newest disks are on {}: give the order there",
                record.disks.host
            ),
            Some(record) => format!(
                "{name} runs on {}; ask that host's agent",
                record.view.owner
            ),
        }
    }

    fn switch(&self, name: &str, order: Order) -> Result<Reply, String> {
        match self.order(name, order)? {
            Answered::Switched(switched) => Ok(Reply::Switched(switched)),
            Answered::Done => Ok(Reply::Switched(Switched::default())),
        }
    }

    /// Boots a VM on this host, registered with the master before its first instruction. What can be checked is checked
    /// before that.
    fn start(&self, toml: &str, name: &str) -> Result<(), String> {
        let config = VmConfig::from_text(Path::new(name), toml).map_err(|e| e.to_string())?;
        if let Some(known) = self.known(&config.name)? {
            return self.start_known(&known, config);
        }
        let (config, toml) = self.resolved(config, toml, None)?;
        let register = self.registration(&config, &toml, Life::On)?;
        self.known_to_master()?;
        let register = || {
            let registered = self.env.master.propose(&register);
            registered.map_err(|e| e.to_string())
        };
        self.table.start(register, LATE)
    }

    /// The record of a VM of that name, if there is one.
    pub(super) fn known(&self, name: &str) -> Result<Option<VmRecord>, String> {
        let snapshot = self.env.master.read().map_err(|e| e.to_string())?;
        let mut records = snapshot.records.into_iter();
        Ok(records.find(|record| record.view.name == name))
    }

    /// A VM that exists boots from its newest disks, whatever images its configuration names: those may be older.
    fn start_known(&self, record: &VmRecord, config: VmConfig) -> Result<(), String> {
        let (view, name) = (&record.view, &record.view.name);
        if record.life == Life::On {
            return Err(format!(
                "a VM named {name:?} runs on {} already",
                view.owner
            ));
        }
        if record.disks.host != self.env.host {
            return Err(self.elsewhere(name));
        }
        let old = config_of(record)?;
        let (config, _) = self.resolved(config, "", Some(&old))?;
        if !changes(&old, &config).is_empty() {
            return Err(format!(
                "{name} exists, is off, and is configured otherwise than in this file: `understudy apply` with this file shows how and changes it; `understudy start {name}` boots it as it is"
            ));
        }
        self.order(name, Order::Start).map(drop)
    }

    /// Waits, briefly, until the master knows this host.
    pub(super) fn known_to_master(&self) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        loop {
            let why = lock(&self.env.stranger).clone();
            match why {
                None => return Ok(()),
                Some(why) if Instant::now() >= until => return Err(why),
                Some(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// A backup that nobody can reach would only be found out while the VM waits for it.
    fn protect(&self, name: &str, backups: &[String]) -> Result<(), String> {
        let hosts = backups
            .iter()
            .map(|backup| HostId::new(backup).map_err(|e| format!("backup {backup:?}: {e}")))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(record) = self.table.summary(name).map(|summary| summary.record) {
            let known = hosts.iter().filter_map(|host| {
                let addr = self.env.peers.get(host)?;
                Some(Member::new(host.clone(), *addr))
            });
            let known: Vec<Member> = known.collect();
            for (host, health) in slow::probe(&self.env, &record.view, &known) {
                if let Health::Silent(why) = health {
                    return Err(format!(
                        "backup {host} cannot be had: {why} (is its agent running?)"
                    ));
                }
            }
        }
        self.order(name, Order::Protect { backups: hosts })
            .map(drop)
    }

    fn recover(&self, name: &str) -> Result<(), String> {
        let summary = self.table.summary(name).ok_or_else(|| {
            format!("this host has no copy of {name:?} (`understudy status` lists what it has)")
        })?;
        let replica = self.env.replicas.status(summary.record.view.vm);
        let resumable = replica.is_some_and(|replica| replica.state.could_resume());
        self.order(name, Order::Recover { resumable }).map(drop)
    }

    /// Of a VM that runs on this host.
    fn owned(&self, name: &str) -> Result<Arc<Shown>, String> {
        let shown = self.table.shown(name).ok_or_else(|| {
            format!("no VM named {name:?} runs on this host (`understudy status` lists them)")
        })?;
        let summary = lock(&shown.summary).clone();
        match summary.role {
            Role::Owner => Ok(shown),
            _ => Err(format!(
                "{name} runs on {}; ask that host's agent",
                summary.record.view.owner
            )),
        }
    }

    fn tell(&self, name: &str, message: &ToChild) -> Result<(), String> {
        send(&*self.owned(name)?, name, message)
    }

    fn stats(&self, name: &str) -> Result<EpochStats, String> {
        let shown = self.owned(name)?;
        let (sender, receiver) = channel();
        lock(&shown.waiting).stats.push(sender);
        send(&shown, name, &ToChild::TakeStats)?;
        receiver
            .recv_timeout(PATIENCE)
            .map_err(|_| "the VM's process does not answer".to_string())
    }

    /// What the vCPUs of a VM or of a standby on this host are at.
    fn inspect(&self, name: &str) -> Result<Vec<vmm::VcpuReport>, String> {
        let shown = self.table.shown(name).ok_or_else(|| {
            format!("no VM named {name:?} is on this host (`understudy status` lists them)")
        })?;
        let (sender, receiver) = channel();
        lock(&shown.waiting).inspected.push(sender);
        send(&shown, name, &ToChild::Inspect)?;
        receiver
            .recv_timeout(INSPECT_PATIENCE)
            .map_err(|_| "the VM's process does not answer".to_string())?
    }

    /// Asks the chain's tail, wherever it is; any host of the cluster may.
    fn points(&self, name: &str) -> Result<Vec<Point>, String> {
        let snapshot = self.env.master.read().map_err(|e| e.to_string())?;
        let record = snapshot
            .records
            .iter()
            .find(|r| r.view.name == name)
            .ok_or_else(|| format!("the master knows no VM named {name:?}"))?;
        let everything = Query::Range(Epoch::ZERO, Epoch(u64::MAX));
        let vm = record.view.vm;
        let master = self.env.master.as_ref();
        let marks = chain::query(master, vm, &self.env.host, everything, PATIENCE)
            .map_err(|e| e.to_string())?;
        Ok(marks
            .iter()
            .map(|mark| Point {
                epoch: mark.epoch.0,
                generation: mark.generation.0,
                digest: mark.digest,
            })
            .collect())
    }

    /// The record of a VM whose replica is here, to be cloned under a name that is free.
    fn replica_of(&self, name: &str, clone: &str) -> Result<VmRecord, String> {
        if self.table.summary(clone).is_some() {
            return Err(format!(
                "a VM named {clone:?} is on this host already; choose another name"
            ));
        }
        let summary = self
            .table
            .summary(name)
            .filter(|summary| matches!(summary.role, Role::Owner | Role::Standby))
            .ok_or_else(|| {
                format!(
                    "this host holds no replica of {name:?} (`understudy status` lists what it has)"
                )
            })?;
        if summary.role == Role::Owner {
            let chain = summary.record.view.chain.iter();
            let hosts: Vec<&str> = chain.map(|m| m.host.as_str()).collect();
            return Err(match hosts.is_empty() {
                true => format!("{name} runs here and has no backups: nobody keeps its past"),
                false => format!(
                    "{name} runs here; its past is kept by its backups: give the order on {}",
                    hosts.join(" or ")
                ),
            });
        }
        Ok(summary.record)
    }
}

fn send(shown: &Shown, name: &str, message: &ToChild) -> Result<(), String> {
    let child = lock(&shown.child).clone();
    let child = child.ok_or_else(|| format!("{name} has no process at the moment"))?;
    child.send(message).map_err(|e| e.to_string())
}
