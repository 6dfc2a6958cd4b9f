//! One VM, one connection, and hosts that die in turn: each comes back and joins the chain again before the next dies.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{MEMORY, Outcome, Phase, phases, print};
use crate::cli::FailoverArgs;
use crate::demo::scenario::{self, Failover, Traffic};
use crate::demo::vmfile::{self, VM};
use crate::lab::{Lab, Options, wait};

#[derive(Debug, Serialize)]
struct Run {
    killed: String,
    new_owner: String,
    detect_ms: f64,
    decide_ms: f64,
    activate_ms: f64,
    first_reply_ms: f64,
    reprotected_ms: Option<f64>,
    /// From the dead host's return until it is a member of the chain again.
    rejoined_ms: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    runs: Vec<Run>,
    backups: u8,
    pages: u64,
    epoch_ms: u64,
    acknowledged: u64,
    lost: u64,
    broken: u64,
    verified: bool,
    protected_again_after_each: bool,
    detect_ms: Phase,
    decide_ms: Phase,
    activate_ms: Phase,
    first_reply_ms: Phase,
    reprotected_ms: Phase,
    rejoined_ms: Phase,
}

/// Runs it.
///
/// # Errors
/// As the bench's.
pub(super) fn run(args: &FailoverArgs) -> Outcome<()> {
    let lab = Lab::launch(Options::of(args.backups + 1)?)?;
    let vm = vmfile::probe(MEMORY, 1, (args.pages, args.work), args.epoch_ms);
    lab.start_vm("a", &vm)?;
    lab.protect(VM, "a", &lab.hosts()[1..])
        .map_err(|e| lab.with_logs(e))?;
    let traffic = Traffic::probe(&lab, Duration::from_millis(5))?;
    let with_logs = |number: u32, e: &dyn std::fmt::Display| {
        let logs = lab.keep_logs().display();
        format!("run {number}: {e} (logs: {logs})")
    };
    let mut owner = "a".to_string();
    let mut runs = Vec::new();
    for number in 1..=args.runs {
        let target = traffic.acked() + 40 + u64::from(number) * 7 % 50;
        if !traffic.wait_acked(target, Duration::from_secs(30)) {
            return Err(with_logs(number, &"no answers before the kill").into());
        }
        let failover = scenario::kill_owner_and_wait(&lab, VM, &owner, &traffic)
            .map_err(|e| with_logs(number, &e))?;
        let rejoined_ms =
            come_back(&lab, &owner, &failover, args.backups).map_err(|e| with_logs(number, &e))?;
        let killed = std::mem::replace(&mut owner, failover.new_owner.clone());
        let run = Run {
            killed,
            new_owner: failover.new_owner,
            detect_ms: failover.detect_ms,
            decide_ms: failover.decide_ms,
            activate_ms: failover.activate_ms,
            first_reply_ms: failover.first_reply_ms,
            reprotected_ms: failover.reprotected_ms,
            rejoined_ms,
        };
        if !args.json {
            println!(
                "run {number:>3}: {} dies, {} goes on: first reply {:>6.1}, protected {:>6.1} ms; {} is back in the chain after {:>6.1} ms",
                run.killed,
                run.new_owner,
                run.first_reply_ms,
                run.reprotected_ms.unwrap_or_default(),
                run.killed,
                run.rejoined_ms
            );
        }
        runs.push(run);
    }
    let _ = traffic.wait_acked(traffic.acked() + 20, Duration::from_secs(10));
    let end = traffic.stop(&lab);
    let phase = |pick: fn(&Run) -> f64| Phase::of(runs.iter().map(pick).collect());
    let report = Report {
        backups: args.backups,
        pages: args.pages,
        epoch_ms: args.epoch_ms,
        acknowledged: end.acked,
        lost: end.lost,
        broken: end.broken,
        verified: end.verified,
        protected_again_after_each: runs.iter().all(|r| r.reprotected_ms.is_some()),
        detect_ms: phase(|r| r.detect_ms),
        decide_ms: phase(|r| r.decide_ms),
        activate_ms: phase(|r| r.activate_ms),
        first_reply_ms: phase(|r| r.first_reply_ms),
        reprotected_ms: phase(|r| r.reprotected_ms.unwrap_or_default()),
        rejoined_ms: phase(|r| r.rejoined_ms),
        runs,
    };
    print(args.json, &report, || text(&report))?;
    if !end.survived || !report.protected_again_after_each {
        let logs = lab.keep_logs().display();
        return Err(format!("it did not survive unharmed: {end:?} (logs: {logs})").into());
    }
    Ok(())
}

/// The dead host's agent starts again; milliseconds until the chain is whole.
fn come_back(lab: &Lab, dead: &str, failover: &Failover, backups: u8) -> Outcome<f64> {
    lab.kill(dead)?;
    let returned = Instant::now();
    lab.start_agent(dead)?;
    wait("the host that returned to join the chain", || {
        let status = lab.status(VM, &failover.new_owner)?;
        (status.protected && status.chain.len() == usize::from(backups)).then_some(())
    })?;
    Ok(returned.elapsed().as_secs_f64() * 1000.0)
}

fn text(report: &Report) {
    println!(
        "{} failovers in turn on one connection, {} requests acknowledged: {} lost, {} connections broken",
        report.runs.len(),
        report.acknowledged,
        report.lost,
        report.broken
    );
    phases(&[
        ("detect", report.detect_ms),
        ("decide", report.decide_ms),
        ("activate", report.activate_ms),
        ("first reply", report.first_reply_ms),
        ("protected again", report.reprotected_ms),
        ("joined again", report.rejoined_ms),
    ]);
}
