//! `understudy bench pause`: how long the guest stands still at each epoch, and what protection costs it, beside the
//! same guest unprotected and with its dirty log harvested at the same rate but nothing copied or sent.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use guest::proto::PORT;
use serde::Serialize;

use super::{Outcome, print};
use crate::cli::PauseArgs;
use crate::control::Request;
use crate::demo::vmfile::{self, VM};
use crate::epoch::{EpochStats, Percentiles};
use crate::lab::{self, GUEST, Lab, Options};
use crate::probe::ProbeConn;

/// Measurements of each kind, in turn, so that a drifting machine does not favour one.
const ROUNDS: u32 = 2;

#[derive(Debug, Serialize)]
struct Report {
    pages: u64,
    work: u64,
    epoch_ms: u64,
    seconds: u64,
    backups: u8,
    pause_us: Percentiles,
    stop_us: Percentiles,
    state_us: Percentiles,
    harvest_us: Percentiles,
    copy_us: Percentiles,
    ship_us: Percentiles,
    commit_us: Percentiles,
    dirty_pages_per_epoch: Percentiles,
    hot_pages_per_epoch: Percentiles,
    sent_bytes_per_epoch: Percentiles,
    epochs_per_second: f64,
    back_pressure: u64,
    passes_per_second_unprotected: f64,
    passes_per_second_dirty_log_only: f64,
    passes_per_second_protected: f64,
    protected_to_dirty_log_only: f64,
    protected_to_unprotected: f64,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from measuring.
pub fn run(args: &PauseArgs) -> Outcome<()> {
    lab::check_machine()?;
    lab::enter()?;
    let lab = Lab::launch(Options::of(args.backups + 1)?)?;
    let memory = 64 + args.pages * 4096 * 2 / (1 << 20);
    let vm = vmfile::probe(memory, 1, (args.pages, args.work), args.epoch_ms);
    lab.start_vm("a", &vm)?;
    let addr = SocketAddr::from((GUEST, PORT));
    let mut probe = lab.within_client(|| ProbeConn::connect(addr, Duration::from_secs(30)))?;
    probe.set_timeout(Duration::from_secs(30));
    probe.set_load(args.pages, args.work)?;
    let mut control = lab.control("a")?;
    let vm = VM.to_string();
    let slice = Duration::from_secs_f64(args.seconds as f64 / f64::from(ROUNDS));
    let (mut plain, mut logged) = (0.0, 0.0);
    for _ in 0..ROUNDS {
        plain += passes(&mut probe, slice)?;
        control.order(&Request::HarvestOnly {
            vm: vm.clone(),
            ms: args.epoch_ms,
        })?;
        logged += passes(&mut probe, slice)?;
        control.order(&Request::HarvestOnly {
            vm: vm.clone(),
            ms: 0,
        })?;
    }
    lab.protect(VM, "a", &lab.hosts()[1..])
        .map_err(|e| lab.with_logs(e))?;
    // Epochs of exactly this length: the probe's own answers must not end them early.
    control.order(&Request::EpochMs {
        vm: vm.clone(),
        ms: args.epoch_ms,
        min_ms: args.epoch_ms,
    })?;
    std::thread::sleep(Duration::from_millis(500));
    control.stats(VM)?;
    let protected = passes(&mut probe, slice * ROUNDS)?;
    let stats: EpochStats = control.stats(VM)?;
    let rounds = f64::from(ROUNDS);
    let (plain, logged) = (plain / rounds, logged / rounds);
    let report = Report {
        pages: args.pages,
        work: args.work,
        epoch_ms: args.epoch_ms,
        seconds: args.seconds,
        backups: args.backups,
        pause_us: stats.pause_us,
        stop_us: stats.stop_us,
        state_us: stats.state_us,
        harvest_us: stats.harvest_us,
        copy_us: stats.copy_us,
        ship_us: stats.ship_us,
        commit_us: stats.commit_us,
        dirty_pages_per_epoch: stats.dirty_pages,
        hot_pages_per_epoch: stats.hot_pages,
        sent_bytes_per_epoch: stats.sent_bytes,
        epochs_per_second: stats.epochs as f64 * 1e6 / stats.elapsed_us as f64,
        back_pressure: stats.back_pressure,
        passes_per_second_unprotected: plain,
        passes_per_second_dirty_log_only: logged,
        passes_per_second_protected: protected,
        protected_to_dirty_log_only: protected / logged,
        protected_to_unprotected: protected / plain,
    };
    print(args.json, &report, || {
        let p = report.pause_us;
        println!(
            "pause            p50 {:>7}  p99 {:>7}  max {:>7} us",
            p.p50, p.p99, p.max
        );
        println!(
            "dirty pages      p50 {:>7}  per epoch, {} of them left writable, {:.1} epochs/s",
            report.dirty_pages_per_epoch.p50,
            report.hot_pages_per_epoch.p50,
            report.epochs_per_second
        );
        println!(
            "passes/s         unprotected {plain:.1}, dirty log only {logged:.1}, protected {protected:.1}"
        );
        println!(
            "protected/dirty log only {:.2}, protected/unprotected {:.2}",
            report.protected_to_dirty_log_only, report.protected_to_unprotected
        );
    })
}

fn passes(probe: &mut ProbeConn, during: Duration) -> Outcome<f64> {
    let before = probe.stats()?;
    let begun = Instant::now();
    std::thread::sleep(during);
    let after = probe.stats()?;
    Ok((after.passes - before.passes) as f64 / begun.elapsed().as_secs_f64())
}
