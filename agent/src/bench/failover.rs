//! `understudy bench failover`: the owner's death, many times over.

mod alternate;

use std::time::Duration;

use serde::Serialize;

use super::{Outcome, Phase, print};
use crate::cli::FailoverArgs;
use crate::demo::cluster::{self, Cluster};
use crate::demo::scenario::{self, Failover, Traffic};
use crate::demo::vmfile;

/// Guest memory in MiB.
const MEMORY: u64 = 128;

#[derive(Debug, Serialize)]
struct Report {
    runs: u32,
    backups: u8,
    pages: u64,
    epoch_ms: u64,
    acknowledged: u64,
    lost: u64,
    broken: u64,
    not_verified: u64,
    detect_ms: Phase,
    decide_ms: Phase,
    activate_ms: Phase,
    first_reply_ms: Phase,
    reprotected_ms: Phase,
}

/// Runs the bench.
///
/// # Errors
/// What keeps a run from completing; requests lost or connections broken are an error too, after the report.
pub fn run(args: &FailoverArgs) -> Outcome<()> {
    cluster::check_host()?;
    if args.alternate {
        return alternate::run(args);
    }
    let mut runs: Vec<Failover> = Vec::new();
    let (mut acknowledged, mut lost, mut broken, mut not_verified) = (0, 0, 0, 0);
    for number in 1..=args.runs {
        // The first makes the namespace, the others find it made.
        let cluster = if number == 1 {
            Cluster::launch(args.backups, false, 1)?
        } else {
            Cluster::start(args.backups, false, 1)?
        };
        let vm = vmfile::probe(&cluster, MEMORY, 1, (args.pages, args.work), args.epoch_ms)?;
        cluster.start_protected("demo", &vm)?;
        let traffic = Traffic::probe(Duration::from_millis(5))?;
        // Killed at another point of an epoch each time.
        let settle = 60 + u64::from(number) * 7 % 50;
        if !traffic.wait_acked(settle, Duration::from_secs(30)) {
            return Err(format!(
                "run {number}: no answers before the kill (logs: {})",
                cluster.keep_logs().display()
            )
            .into());
        }
        let failover =
            scenario::kill_owner_and_wait(&cluster, "demo", 0, &traffic).map_err(|e| {
                format!(
                    "run {number}: {e} (logs: {})",
                    cluster.keep_logs().display()
                )
            })?;
        let target = traffic.acked() + 20;
        let _ = traffic.wait_acked(target, Duration::from_secs(10));
        let end = traffic.stop();
        if !end.survived {
            eprintln!(
                "run {number}: {end:?} (logs: {})",
                cluster.keep_logs().display()
            );
        } else if !args.json {
            println!(
                "run {number:>3}: detect {:>6.1}  decide {:>5.1}  activate {:>5.1}  first reply {:>6.1} ms",
                failover.detect_ms,
                failover.decide_ms,
                failover.activate_ms,
                failover.first_reply_ms
            );
        }
        acknowledged += end.acked;
        lost += end.lost;
        broken += end.broken;
        not_verified += u64::from(!end.verified);
        runs.push(failover);
    }
    let phase = |pick: fn(&Failover) -> f64| Phase::of(runs.iter().map(pick).collect());
    let report = Report {
        runs: args.runs,
        backups: args.backups,
        pages: args.pages,
        epoch_ms: args.epoch_ms,
        acknowledged,
        lost,
        broken,
        not_verified,
        detect_ms: phase(|f| f.detect_ms),
        decide_ms: phase(|f| f.decide_ms),
        activate_ms: phase(|f| f.activate_ms),
        first_reply_ms: phase(|f| f.first_reply_ms),
        reprotected_ms: Phase::of(runs.iter().filter_map(|f| f.reprotected_ms).collect()),
    };
    print(args.json, &report, || {
        println!(
            "{} failovers, {acknowledged} requests acknowledged: {lost} lost, {broken} connections broken",
            args.runs
        );
        for (name, phase) in [
            ("detect", report.detect_ms),
            ("decide", report.decide_ms),
            ("activate", report.activate_ms),
            ("first reply", report.first_reply_ms),
            ("protected again", report.reprotected_ms),
        ] {
            println!(
                "{name:<16} p50 {:>7.1}  p99 {:>7.1}  max {:>7.1} ms",
                phase.p50, phase.p99, phase.max
            );
        }
    })?;
    if lost + broken + not_verified > 0 {
        return Err(format!("{lost} acknowledged requests lost, {broken} connections broken, {not_verified} runs unverified").into());
    }
    Ok(())
}
