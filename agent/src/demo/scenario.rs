//! The death of an owner, measured from outside: kill, wait, and take the phases apart.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use guest::proto::PORT;
use serde::Serialize;

use super::cluster::{Cluster, GUEST, wait};
use super::redis::RedisClient;
use crate::child::monotonic_us;
use crate::cli::DemoArgs;
use crate::control::EventKind;
use crate::probe::{ProbeClient, ProbeConfig};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// One failover. Times in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Failover {
    /// From the kill to the backup's suspicion.
    pub detect_ms: f64,
    /// From there to the master's decision.
    pub decide_ms: f64,
    /// From there to the guest running: memory and mirrors at the checkpoint, state restored, taps up.
    pub activate_ms: f64,
    /// Part of it: memory and mirrors.
    pub hand_over_ms: f64,
    /// Part of it: vCPU and device state.
    pub restore_ms: f64,
    /// From the kill to the client's first reply from the new host.
    pub first_reply_ms: f64,
    /// From the kill until protected again, where a backup is left and it did not take too long.
    pub reprotected_ms: Option<f64>,
    /// Who took over.
    pub new_owner: String,
    /// Why.
    pub cause: String,
    /// The new generation.
    pub generation: u64,
    /// The checkpoint resumed from.
    pub epoch: u64,
}

/// The client's end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct End {
    /// Acknowledged requests.
    pub acked: u64,
    /// Acknowledged requests that the guest does not know any more.
    pub lost: u64,
    /// Connections broken.
    pub broken: u64,
    /// Whether the guest could be asked at the end.
    pub verified: bool,
    /// Verified, nothing lost, nothing broken.
    pub survived: bool,
    /// What went wrong.
    pub errors: Vec<String>,
}

/// The client's traffic: the probe guest's protocol, or redis.
pub enum Traffic {
    /// Numbered increments.
    Probe(ProbeClient),
    /// Numbered keys.
    Redis(RedisClient),
}

impl Traffic {
    /// Connects as `args` ask.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start(args: &DemoArgs) -> Outcome<Self> {
        if args.kernel.is_some() {
            let addr = SocketAddr::from((GUEST, args.port));
            return Ok(Self::Redis(RedisClient::start(
                addr,
                Duration::from_secs(120),
            )?));
        }
        Self::probe(Duration::from_millis(5))
    }

    /// Connects to the probe guest, one request every `interval`.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn probe(interval: Duration) -> Outcome<Self> {
        let mut config = ProbeConfig::new(SocketAddr::from((GUEST, PORT)));
        config.interval = interval;
        Ok(Self::Probe(ProbeClient::start(
            config,
            Duration::from_secs(30),
        )?))
    }

    /// Acknowledged requests so far.
    #[must_use]
    pub fn acked(&self) -> u64 {
        match self {
            Self::Probe(client) => client.progress().acked,
            Self::Redis(client) => client.acked(),
        }
    }

    /// Waits for `n` acknowledgements.
    #[must_use]
    pub fn wait_acked(&self, n: u64, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while self.acked() < n && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.acked() >= n
    }

    /// The first acknowledgement after `t`.
    #[must_use]
    pub fn first_reply_after(&self, t: Instant) -> Option<Instant> {
        match self {
            Self::Probe(client) => client.first_reply_after(t),
            Self::Redis(client) => client.first_reply_after(t),
        }
    }

    /// What went wrong so far.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        match self {
            Self::Probe(client) => vec![format!("{:?}", client.progress())],
            Self::Redis(client) => client.errors(),
        }
    }

    /// Stops, and asks the guest for everything that it acknowledged.
    #[must_use]
    pub fn stop(self) -> End {
        match self {
            Self::Probe(client) => {
                let report = client.stop(Duration::from_secs(10));
                End {
                    acked: report.acked,
                    lost: report.lost,
                    broken: report.broken,
                    verified: report.verified,
                    survived: report.survived(),
                    errors: report.errors,
                }
            }
            Self::Redis(client) => client.stop(),
        }
    }
}

/// Kills host number `owner`, which owns the VM, and waits for the client's first reply from whoever takes over.
///
/// # Errors
/// When nobody takes over, or no reply comes.
pub fn kill_owner_and_wait(
    cluster: &Cluster,
    vm: &str,
    owner: usize,
    traffic: &Traffic,
) -> Outcome<Failover> {
    let before = cluster.status(owner, vm).map_or(0, |s| s.generation);
    let origin = (Instant::now(), monotonic_us());
    let killed_us = monotonic_us();
    cluster.kill(owner);
    let (owner, status) = cluster.wait_failover(vm, before)?;
    let report = status
        .failover
        .ok_or("the new owner has no report of its failover")?;
    // Answers that were on their way when the owner died are not the new owner's: those come after the decision.
    let decided = origin.0 + Duration::from_micros(report.decided_us.saturating_sub(origin.1));
    let reply = wait("the client's first reply", || {
        traffic.first_reply_after(decided)
    })?;
    let first_reply_us = reply.duration_since(origin.0).as_micros() as u64 + origin.1 - killed_us;
    let reprotected_us = if status.chain.is_empty() {
        None
    } else {
        let mut control = cluster.control(owner)?;
        wait("the VM to be protected again", || {
            let events = control.events(0).ok()?;
            events
                .iter()
                .find(|e| {
                    e.kind == EventKind::Protected && e.vm == vm && e.at_us >= report.decided_us
                })
                .map(|e| e.at_us)
        })
        .ok()
    };
    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
    Ok(Failover {
        detect_ms: ms(killed_us, report.suspected_us),
        decide_ms: ms(report.suspected_us, report.decided_us),
        activate_ms: ms(report.decided_us, report.running_us),
        hand_over_ms: ms(report.decided_us, report.handed_us),
        restore_ms: ms(report.handed_us, report.restored_us),
        first_reply_ms: first_reply_us as f64 / 1000.0,
        reprotected_ms: reprotected_us.map(|at| ms(killed_us, at)),
        new_owner: status.host,
        cause: report.cause,
        generation: report.generation,
        epoch: report.epoch,
    })
}

/// What the loss of a backup did. Times in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BackupLoss {
    /// Which host.
    pub killed: String,
    /// From the kill until the VM's state was protected again, or, with no backup left, recorded as unprotected.
    pub settled_ms: f64,
    /// From the kill to the client's first reply after that.
    pub first_reply_ms: f64,
    /// How it is protected now.
    pub state: String,
    /// The new generation.
    pub generation: u64,
}

/// Kills backup number `i` (1 is the head) and waits until the VM has settled without it.
///
/// # Errors
/// When it does not, or the client gets no reply.
pub fn kill_backup_and_wait(
    cluster: &Cluster,
    vm: &str,
    i: usize,
    traffic: &Traffic,
) -> Outcome<BackupLoss> {
    let mut control = cluster.control(0)?;
    let find = |control: &mut crate::control::ControlClient| {
        control
            .status()
            .ok()
            .and_then(|list| list.into_iter().find(|s| s.name == vm))
    };
    let before = find(&mut control).ok_or("the VM is gone")?.generation;
    let killed = Instant::now();
    cluster.kill(i);
    let status = wait("the VM to settle without the backup", || {
        find(&mut control).filter(|s| s.generation > before && (s.protected || s.chain.is_empty()))
    })?;
    let settled = Instant::now();
    let reply = wait("the client's next reply", || {
        traffic.first_reply_after(settled)
    })?;
    let ms = |at: Instant| at.duration_since(killed).as_secs_f64() * 1000.0;
    Ok(BackupLoss {
        killed: cluster.hosts()[i].name.clone(),
        settled_ms: ms(settled),
        first_reply_ms: ms(reply),
        state: status.state,
        generation: status.generation,
    })
}
