//! `understudy bench failover`: what happens to an owner or its backups, many times over.

mod alternate;
mod fault;
mod many;

use serde::Serialize;

use super::{Outcome, Phase, phases, print};
use crate::cli::{FailoverArgs, FaultKind};
use crate::demo::scenario::Failover;
use crate::lab;
use fault::Run;

/// Guest memory in MiB.
const MEMORY: u64 = 128;

#[derive(Debug, Serialize)]
struct Report {
    fault: FaultKind,
    runs: u32,
    backups: u8,
    pages: u64,
    epoch_ms: u64,
    acknowledged: u64,
    lost: u64,
    broken: u64,
    not_verified: u64,
    /// Requests that the guest answered with an error.
    failed: u64,
    /// In all runs together.
    takeovers: u64,
    /// Runs in which the VM's process went on under another agent.
    adopted: u64,
    detect_ms: Phase,
    decide_ms: Phase,
    activate_ms: Phase,
    first_reply_ms: Phase,
    reprotected_ms: Phase,
    /// The longest time without an answer of each run.
    longest_gap_ms: Phase,
}

/// Runs the bench.
///
/// # Errors
/// What keeps a run from completing; requests lost or connections broken are an error too, after the report.
pub fn run(args: &FailoverArgs) -> Outcome<()> {
    lab::check_machine()?;
    lab::enter()?;
    if args.alternate {
        return alternate::run(args);
    }
    if let Some(vms) = args.vms {
        return many::run(args, vms);
    }
    let mut runs = Vec::new();
    for number in 1..=args.runs {
        let run = fault::run(args, number).map_err(|e| format!("run {number}: {e}"))?;
        if !args.json {
            println!("{}", line(number, &run));
        }
        runs.push(run);
    }
    let report = report(args, &runs);
    print(args.json, &report, || text(&report))?;
    let Report {
        lost, not_verified, ..
    } = report;
    // A guest that is reset ends its connections.
    let broken = match args.fault {
        FaultKind::Reboot => 0,
        _ => report.broken,
    };
    if lost + broken + not_verified > 0 {
        return Err(format!("{lost} acknowledged requests lost, {broken} connections broken, {not_verified} runs unverified").into());
    }
    Ok(())
}

fn line(number: u32, run: &Run) -> String {
    let gap = run.longest_gap_ms;
    match &run.failover {
        Some(f) => format!(
            "run {number:>3}: detect {:>6.1}  decide {:>5.1}  activate {:>5.1}  first reply {:>6.1}  longest gap {gap:>6.1} ms",
            f.detect_ms, f.decide_ms, f.activate_ms, f.first_reply_ms
        ),
        None => format!(
            "run {number:>3}: nobody took over{}  longest gap {gap:>6.1} ms",
            if run.adopted { ", adopted" } else { "" }
        ),
    }
}

fn report(args: &FailoverArgs, runs: &[Run]) -> Report {
    let phase = |pick: fn(&Failover) -> f64| {
        let taken = runs.iter().filter_map(|r| r.failover.as_ref());
        Phase::of(taken.map(pick).collect())
    };
    let sum = |pick: fn(&Run) -> u64| runs.iter().map(pick).sum();
    Report {
        fault: args.fault,
        runs: args.runs,
        backups: args.backups,
        pages: args.pages,
        epoch_ms: args.epoch_ms,
        acknowledged: sum(|r| r.end.acked),
        lost: sum(|r| r.end.lost),
        broken: sum(|r| r.end.broken),
        not_verified: sum(|r| u64::from(!r.end.verified)),
        failed: sum(|r| r.end.failed),
        takeovers: sum(|r| r.takeovers),
        adopted: sum(|r| u64::from(r.adopted)),
        detect_ms: phase(|f| f.detect_ms),
        decide_ms: phase(|f| f.decide_ms),
        activate_ms: phase(|f| f.activate_ms),
        first_reply_ms: phase(|f| f.first_reply_ms),
        reprotected_ms: Phase::of(runs.iter().filter_map(|r| r.reprotected_ms).collect()),
        longest_gap_ms: Phase::of(runs.iter().map(|r| r.longest_gap_ms).collect()),
    }
}

fn text(report: &Report) {
    println!(
        "{} runs, {} takeovers, {} adopted; {} requests acknowledged: {} lost, {} answered with an error, {} connections broken",
        report.runs,
        report.takeovers,
        report.adopted,
        report.acknowledged,
        report.lost,
        report.failed,
        report.broken
    );
    phases(&[
        ("detect", report.detect_ms),
        ("decide", report.decide_ms),
        ("activate", report.activate_ms),
        ("first reply", report.first_reply_ms),
        ("protected again", report.reprotected_ms),
        ("longest gap", report.longest_gap_ms),
    ]);
}
