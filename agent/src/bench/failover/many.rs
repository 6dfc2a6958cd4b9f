//! Many VMs on one host, whose agent and VMs all die at once: how long each is away, and whether any other moves at all.

use std::time::Duration;

use serde::Serialize;

use super::{Outcome, Phase, phases, print};
use crate::cli::FailoverArgs;
use crate::demo::scenario::Moment;
use crate::lab::{Boot, Lab, Options, VmFile};
use crate::probe::ProbeClient;

/// Guest memory in MiB.
const MEMORY: u64 = 64;
/// Between a client's requests: all clients share this machine with all VMs.
const INTERVAL: Duration = Duration::from_millis(50);
/// Before and after the deaths nothing is to happen for so long.
const QUIET: Duration = Duration::from_secs(5);
/// After the deaths nobody is asked for so long.
const UNASKED: Duration = Duration::from_secs(2);
/// A VM that has not answered by then is lost.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default, Serialize)]
struct Report {
    vms: u8,
    backups: u8,
    runs: u32,
    acknowledged: u64,
    lost: u64,
    broken: u64,
    not_verified: u64,
    takeovers: u64,
    /// Takeovers before or after the host's death.
    false_takeovers: u64,
    detect_ms: Phase,
    decide_ms: Phase,
    activate_ms: Phase,
    first_reply_ms: Phase,
    /// Of each run: the last VM's first reply in medians of all.
    last_to_median: Vec<f64>,
}

/// Of one VM's takeover, in milliseconds.
struct Times {
    /// From the kill to the suspicion, from there to the decision, and from there until the guest runs.
    detect: f64,
    decide: f64,
    activate: f64,
    /// From the kill to the first reply.
    reply: f64,
}

/// Runs it: a new lab for each of the runs.
///
/// # Errors
/// As the bench's.
pub(super) fn run(args: &FailoverArgs, vms: u8) -> Outcome<()> {
    let mut report = Report {
        vms,
        backups: args.backups,
        runs: args.runs,
        ..Report::default()
    };
    let mut all = Vec::new();
    for number in 1..=args.runs {
        let times = once(args, vms, &mut report).map_err(|e| format!("run {number}: {e}"))?;
        let phase = Phase::of(times.iter().map(|t| t.reply).collect());
        if !args.json {
            println!(
                "run {number:>3}: first reply p50 {:>7.1}  last {:>7.1} ms",
                phase.p50, phase.max
            );
        }
        report.last_to_median.push(phase.max / phase.p50);
        all.extend(times);
    }
    let phase = |pick: fn(&Times) -> f64| Phase::of(all.iter().map(pick).collect());
    report.detect_ms = phase(|t| t.detect);
    report.decide_ms = phase(|t| t.decide);
    report.activate_ms = phase(|t| t.activate);
    report.first_reply_ms = phase(|t| t.reply);
    print(args.json, &report, || text(&report))?;
    let Report {
        lost,
        broken,
        not_verified,
        false_takeovers,
        ..
    } = report;
    if lost + broken + not_verified + false_takeovers > 0 {
        return Err(format!("{lost} acknowledged requests lost, {broken} connections broken, {not_verified} clients unverified, {false_takeovers} takeovers for nothing").into());
    }
    Ok(())
}

fn once(args: &FailoverArgs, vms: u8, report: &mut Report) -> Outcome<Vec<Times>> {
    let lab = Lab::launch(Options::of(args.backups + 1)?)?;
    let files: Vec<VmFile> = (1..=vms).map(|number| file(args, number)).collect();
    for vm in &files {
        lab.start_vm("a", vm)?;
        lab.protect(&vm.name, "a", &lab.hosts()[1..])
            .map_err(|e| lab.with_logs(e))?;
    }
    let clients = files.iter().map(|vm| lab.client(vm.ip(), INTERVAL));
    let clients = clients.collect::<Result<Vec<ProbeClient>, _>>()?;
    std::thread::sleep(QUIET);
    report.false_takeovers += moved(&lab, &files);
    let before = files.iter().map(|vm| lab.status(&vm.name, "a"));
    let before: Vec<Option<u64>> = before.map(|s| s.map(|s| s.generation)).collect();
    let killed = Moment::now();
    lab.kill("a")?;
    // Whoever asks how it goes takes the processors from those that do it.
    std::thread::sleep(UNASKED);
    let mut runs = Vec::new();
    for ((vm, client), before) in files.iter().zip(&clients).zip(before) {
        // One that has moved for nothing is not this host's any more.
        let Some(before) = before else { continue };
        let taken = lab.wait_failover(&vm.name, before);
        let (_, status) = taken.map_err(|e| lab.with_logs(e))?;
        let times = status.failover.ok_or("a new owner without a report")?;
        let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
        // A VM that is killed last still answers after the first has been: what comes after the decision is new.
        let reply = client.wait_reply_after(killed.instant(times.decided_us), PATIENCE);
        let reply = reply.ok_or_else(|| lab.with_logs(format!("{} does not answer", vm.name)))?;
        runs.push(Times {
            detect: ms(killed.us, times.suspected_us),
            decide: ms(times.suspected_us, times.decided_us),
            activate: ms(times.decided_us, times.running_us),
            reply: reply.duration_since(killed.at).as_secs_f64() * 1000.0,
        });
    }
    std::thread::sleep(QUIET);
    let takeovers = moved(&lab, &files);
    report.takeovers += takeovers;
    report.false_takeovers += takeovers - u64::from(vms);
    for client in clients {
        let end = lab.within_client(|| client.stop(Duration::from_secs(10)));
        report.acknowledged += end.acked;
        report.lost += end.lost;
        report.broken += end.broken;
        report.not_verified += u64::from(!end.verified);
    }
    Ok(runs)
}

fn file(args: &FailoverArgs, number: u8) -> VmFile {
    VmFile {
        memory_mib: MEMORY,
        boot: Boot::Probe {
            pages: args.pages,
            work: args.work,
        },
        protect: format!("epoch_ms = {}\n", args.epoch_ms),
        ..VmFile::probe(format!("vm{number}"), number)
    }
}

/// Takeovers so far: the hosts that are up say how many there were, since each made an event of its own.
fn moved(lab: &Lab, files: &[VmFile]) -> u64 {
    let activated = |name: &String| {
        let events = lab.events(name).into_iter();
        let taken = events.filter(|e| e.kind == crate::control::EventKind::Activated);
        taken
            .filter(|e| files.iter().any(|vm| vm.name == e.vm))
            .count() as u64
    };
    let up = lab.hosts().iter().filter(|name| lab.is_running(name));
    up.map(activated).sum()
}

fn text(report: &Report) {
    println!(
        "{} VMs, {} runs, {} takeovers, {} of them for nothing; {} requests acknowledged: {} lost, {} connections broken",
        report.vms,
        report.runs,
        report.takeovers,
        report.false_takeovers,
        report.acknowledged,
        report.lost,
        report.broken
    );
    phases(&[
        ("detect", report.detect_ms),
        ("decide", report.decide_ms),
        ("activate", report.activate_ms),
        ("first reply", report.first_reply_ms),
    ]);
    let ratios = report.last_to_median.iter().map(|r| format!("{r:.2}"));
    let ratios: Vec<String> = ratios.collect();
    println!(
        "the last first reply, in medians of its run: {}",
        ratios.join(", ")
    );
}
