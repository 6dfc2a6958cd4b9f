//! One run of the bench: a protected VM, a client, and what happens to them.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{MEMORY, Outcome};
use crate::cli::{FailoverArgs, FaultKind};
use crate::control::VmStatus;
use crate::demo::end::End;
use crate::demo::scenario::{self, Failover, Moment, Traffic};
use crate::demo::vmfile::{self, VM};
use crate::lab::wait::{PATIENCE, wait_for};
use crate::lab::{Health, Lab, LabError, Options, Wire, wait};

/// The host that owns the VM at first.
const OWNER: &str = "a";
/// How long a disk's fault is left alone to see whether somebody takes over. The VM may not answer meanwhile.
const DISK_FAULT: Duration = Duration::from_secs(20);
/// How long a backup stands still at least.
const FROZEN: Duration = Duration::from_secs(3);
/// Answers that the client has to get after everything.
const AFTERWARDS: u64 = 20;

/// What one run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// The takeover's phases, if there was one.
    pub failover: Option<Failover>,
    /// How many hosts took the VM over.
    pub takeovers: u64,
    /// Whether the VM's process went on under another agent.
    pub adopted: bool,
    /// The longest time without an answer, milliseconds.
    pub longest_gap_ms: f64,
    /// From the fault until the chain was whole, or the rest of it protected the VM, milliseconds.
    pub reprotected_ms: Option<f64>,
    /// The client's end.
    #[serde(skip)]
    pub end: End,
}

/// Sets a lab up, has the fault happen, and takes it back.
///
/// # Errors
/// What keeps the run from completing, with the logs.
pub fn run(args: &FailoverArgs, number: u32) -> Outcome<Run> {
    let disks = [
        FaultKind::DiskError,
        FaultKind::DiskHang,
        FaultKind::BackupDiskHang,
    ];
    let lab = Lab::launch(Options {
        failing_disks: disks.contains(&args.fault),
        ..Options::of(args.backups + 1)?
    })?;
    let vm = vmfile::probe(MEMORY, 1, (args.pages, args.work), args.epoch_ms);
    let done = lab
        .start_vm(OWNER, &vm)
        .and_then(|()| lab.protect(VM, OWNER, &lab.hosts()[1..]));
    done.map_err(|e| lab.with_logs(e))?;
    let traffic = Traffic::probe(&lab, Duration::from_millis(5))?;
    // At another point of an epoch each time.
    let settle = 60 + u64::from(number) * 7 % 50;
    if !traffic.wait_acked(settle, Duration::from_secs(30)) {
        return Err(lab.with_logs("no answers before the fault").into());
    }
    let before = lab.status(VM, OWNER).ok_or("the VM is gone")?;
    let scene = Scene {
        lab: &lab,
        traffic: &traffic,
        before,
        begun: Moment::now(),
    };
    let mut run = scene.happens(args.fault).map_err(|e| lab.with_logs(e))?;
    if !traffic.wait_acked(traffic.acked() + AFTERWARDS, PATIENCE) {
        return Err(lab.with_logs("the client gets no answers any more").into());
    }
    run.takeovers = scene.takeovers();
    let gap = traffic
        .longest_gap_after(scene.begun.at)
        .unwrap_or_default();
    run.longest_gap_ms = gap.as_secs_f64() * 1000.0;
    run.end = traffic.stop(&lab);
    if !run.end.survived && args.fault != FaultKind::Reboot {
        eprintln!("run {number}: {}", lab.with_logs(format!("{:?}", run.end)));
    }
    Ok(run)
}

struct Scene<'a> {
    lab: &'a Lab,
    traffic: &'a Traffic,
    /// What the owner said before.
    before: VmStatus,
    begun: Moment,
}

impl Scene<'_> {
    fn happens(&self, fault: FaultKind) -> Outcome<Run> {
        let lab = self.lab;
        let last = lab.hosts().last().ok_or("a lab without hosts")?.as_str();
        let head = lab.hosts().get(1).ok_or("a lab without backups")?.as_str();
        match fault {
            FaultKind::Kill => {
                lab.strike(OWNER)?;
                self.taken_over()
            }
            FaultKind::Crash => {
                lab.kill_process(self.before.pid);
                self.taken_over()
            }
            FaultKind::Host => {
                lab.plug(OWNER, Wire::Repl, false)?;
                lab.plug(OWNER, Wire::Lan, false)?;
                lab.strike(OWNER)?;
                self.taken_over()
            }
            FaultKind::Partition => {
                lab.plug(OWNER, Wire::Repl, false)?;
                let run = self.taken_over();
                lab.plug(OWNER, Wire::Repl, true)?;
                run
            }
            FaultKind::FreezeHead => self.backup_stands_still(head, Lab::freeze, Lab::thaw),
            FaultKind::FreezeTail => self.backup_stands_still(last, Lab::freeze, Lab::thaw),
            FaultKind::BackupDiskHang => self.backup_stands_still(
                last,
                |lab, host| lab.set_disk(host, Health::Hung),
                |lab, host| lab.set_disk(host, Health::Good),
            ),
            FaultKind::DiskError => self.owners_disk(Health::Failing),
            FaultKind::DiskHang => self.owners_disk(Health::Hung),
            FaultKind::Reboot => self.reboot(),
            FaultKind::Agent => self.agent_restarts(),
        }
    }

    /// Somebody takes over; its figures.
    fn taken_over(&self) -> Outcome<Run> {
        let (owner, status) = self.lab.wait_failover(VM, self.before.generation)?;
        self.figures(&owner, status)
    }

    fn figures(&self, owner: &str, status: VmStatus) -> Outcome<Run> {
        let failover = scenario::taken_over(self.lab, VM, owner, status, self.begun, self.traffic)?;
        Ok(Run {
            reprotected_ms: failover.reprotected_ms,
            failover: Some(failover),
            ..Run::new()
        })
    }

    /// A backup is of no use for a while. Nobody has to take over; the VM's chain goes on without it, and it comes back.
    fn backup_stands_still(
        &self,
        backup: &str,
        stop: fn(&Lab, &str) -> Result<(), LabError>,
        go_on: fn(&Lab, &str) -> Result<(), LabError>,
    ) -> Outcome<Run> {
        stop(self.lab, backup)?;
        let stopped = Instant::now();
        let without = |s: &VmStatus| !s.chain.iter().any(|m| m.host == backup);
        let settled = wait_for("the VM to go on without the backup", PATIENCE, || {
            let (_, status) = self.lab.owner(VM)?;
            let settled = without(&status) && (status.protected || status.chain.is_empty());
            settled.then(|| self.begun.at.elapsed())
        });
        std::thread::sleep(FROZEN.saturating_sub(stopped.elapsed()));
        go_on(self.lab, backup)?;
        if let Err(e) = &settled {
            eprintln!("{e}");
        }
        self.whole()?;
        Ok(Run {
            reprotected_ms: settled.ok().map(|d| d.as_secs_f64() * 1000.0),
            ..Run::new()
        })
    }

    /// The owner's disk is of no use for a while; whether anybody takes over is the owner's policy.
    fn owners_disk(&self, health: Health) -> Outcome<Run> {
        self.lab.set_disk(OWNER, health)?;
        let taken = wait_for("a backup to take over", DISK_FAULT, || {
            self.lab.taken_over(VM, self.before.generation)
        });
        let run = match taken {
            Ok((owner, status)) => self.figures(&owner, status),
            Err(_) => Ok(Run::new()),
        };
        if self.lab.disk_felt(OWNER) == 0 {
            return Err("the fault was not felt: nothing was written".into());
        }
        self.lab.set_disk(OWNER, Health::Good)?;
        run
    }

    fn reboot(&self) -> Outcome<Run> {
        let control = self.lab.path(&format!("{OWNER}.sock"));
        let mut command = self.lab.command_on(OWNER)?;
        command
            .args(["reboot", VM, "--now", "--control"])
            .arg(control);
        let said = command.output()?;
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        if text.contains("unrecognized subcommand") {
            return Err("this program has no command `reboot`".into());
        }
        if !said.status.success() {
            return Err(format!("reboot: {text}").into());
        }
        self.whole()?;
        Ok(Run::new())
    }

    /// The agent ends and comes back; its VM is adopted, or taken over.
    fn agent_restarts(&self) -> Outcome<Run> {
        self.lab.kill_agent(OWNER)?;
        self.lab.start_agent(OWNER)?;
        let (owner, now) = wait("somebody to run the VM, with a whole chain", || {
            let (owner, now) = self.lab.owner(VM)?;
            let whole = now.protected && now.chain.len() == self.before.chain.len();
            (now.pid != 0 && whole).then_some((owner, now))
        })?;
        if now.pid != self.before.pid {
            return match self.lab.taken_over(VM, self.before.generation) {
                Some((owner, status)) => self.figures(&owner, status),
                None => Ok(Run::new()),
            };
        }
        Ok(Run {
            adopted: owner == OWNER,
            reprotected_ms: Some(self.begun.at.elapsed().as_secs_f64() * 1000.0),
            ..Run::new()
        })
    }

    /// Waits until as many hosts back the VM up as before.
    fn whole(&self) -> Result<(), LabError> {
        wait("the chain to be whole again", || {
            let (_, status) = self.lab.owner(VM)?;
            let whole = status.protected && status.chain.len() == self.before.chain.len();
            whole.then_some(())
        })?;
        Ok(())
    }

    /// Hosts that have taken the VM over since.
    fn takeovers(&self) -> u64 {
        let taken = |name: &&String| {
            let status = self.lab.status(VM, name);
            let report = status.and_then(|s| s.failover);
            report.is_some_and(|f| f.generation > self.before.generation)
        };
        self.lab.hosts().iter().filter(taken).count() as u64
    }
}

impl Run {
    fn new() -> Self {
        Self {
            failover: None,
            takeovers: 0,
            adopted: false,
            longest_gap_ms: 0.0,
            reprotected_ms: None,
            end: End::default(),
        }
    }
}
