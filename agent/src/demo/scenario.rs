//! The death of an owner, measured from outside: kill, wait, and take the phases apart.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::end::End;
use super::redis::RedisClient;
use crate::child::monotonic_us;
use crate::cli::DemoArgs;
use crate::control::{EventKind, VmStatus};
use crate::lab::{GUEST, Lab, wait};
use crate::probe::ProbeClient;

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
    pub fn start(lab: &Lab, args: &DemoArgs) -> Outcome<Self> {
        if args.kernel.is_some() {
            let addr = SocketAddr::from((GUEST, args.port));
            let within = Duration::from_secs(120);
            let client = lab.within_client(|| RedisClient::start(addr, within))?;
            return Ok(Self::Redis(client));
        }
        Self::probe(lab, Duration::from_millis(5))
    }

    /// Connects to the probe guest, one request every `interval`.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn probe(lab: &Lab, interval: Duration) -> Outcome<Self> {
        Ok(Self::Probe(lab.client(GUEST, interval)?))
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

    /// The longest time without an answer that ended after `t`, if the client notes such times.
    #[must_use]
    pub fn longest_gap_after(&self, t: Instant) -> Option<Duration> {
        match self {
            Self::Probe(client) => Some(client.longest_gap_after(t)?.len()),
            Self::Redis(_) => None,
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
    pub fn stop(self, lab: &Lab) -> End {
        match self {
            Self::Probe(client) => {
                let report = lab.within_client(|| client.stop(Duration::from_secs(10)));
                End {
                    acked: report.acked,
                    lost: report.lost,
                    failed: report.failed,
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

/// A moment, by both clocks: this process's, and the one that agents' reports are in.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// This process's.
    pub at: Instant,
    /// CLOCK_MONOTONIC, microseconds.
    pub us: u64,
}

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            us: monotonic_us(),
        }
    }

    /// When that was, for this process.
    #[must_use]
    pub fn instant(self, us: u64) -> Instant {
        self.at + Duration::from_micros(us.saturating_sub(self.us))
    }
}

/// Kills `owner`, which owns the VM, and waits for the client's first reply from whoever takes over.
///
/// # Errors
/// When nobody takes over, or no reply comes.
pub fn kill_owner_and_wait(
    lab: &Lab,
    vm: &str,
    owner: &str,
    traffic: &Traffic,
) -> Outcome<Failover> {
    let before = lab.status(vm, owner).map_or(0, |s| s.generation);
    let killed = Moment::now();
    lab.strike(owner)?;
    let (owner, status) = lab
        .wait_failover(vm, before)
        .map_err(|e| lab.with_logs(e))?;
    taken_over(lab, vm, &owner, status, killed, traffic)
}

/// The figures of the takeover that made `owner` what it says it is, after what happened at `begun`.
///
/// # Errors
/// When the client gets no reply from it.
pub fn taken_over(
    lab: &Lab,
    vm: &str,
    owner: &str,
    status: VmStatus,
    begun: Moment,
    traffic: &Traffic,
) -> Outcome<Failover> {
    let report = status
        .failover
        .ok_or("the new owner has no report of its failover")?;
    // Answers that were on their way when the owner died are not the new owner's: those come after the decision.
    let decided = begun.instant(report.decided_us);
    let reply = wait("the client's first reply", || {
        traffic.first_reply_after(decided)
    })?;
    let reprotected_us = if status.chain.is_empty() {
        None
    } else {
        wait("the VM to be protected again", || {
            lab.events(owner)
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
        detect_ms: ms(begun.us, report.suspected_us),
        decide_ms: ms(report.suspected_us, report.decided_us),
        activate_ms: ms(report.decided_us, report.running_us),
        hand_over_ms: ms(report.decided_us, report.handed_us),
        restore_ms: ms(report.handed_us, report.restored_us),
        first_reply_ms: reply.duration_since(begun.at).as_secs_f64() * 1000.0,
        reprotected_ms: reprotected_us.map(|at| ms(begun.us, at)),
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

/// Kills `backup` of the VM, which runs on `owner`, and waits until the VM has settled without it.
///
/// # Errors
/// When it does not, or the client gets no reply.
pub fn kill_backup_and_wait(
    lab: &Lab,
    vm: &str,
    owner: &str,
    backup: &str,
    traffic: &Traffic,
) -> Outcome<BackupLoss> {
    let before = lab.status(vm, owner).ok_or("the VM is gone")?.generation;
    let killed = Instant::now();
    lab.strike(backup)?;
    let status = wait("the VM to settle without the backup", || {
        lab.status(vm, owner)
            .filter(|s| s.generation > before && (s.protected || s.chain.is_empty()))
    })?;
    let settled = Instant::now();
    let reply = wait("the client's next reply", || {
        traffic.first_reply_after(settled)
    })?;
    let ms = |at: Instant| at.duration_since(killed).as_secs_f64() * 1000.0;
    Ok(BackupLoss {
        killed: backup.into(),
        settled_ms: ms(settled),
        first_reply_ms: ms(reply),
        state: status.state(),
        generation: status.generation,
    })
}
