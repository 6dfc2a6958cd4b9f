//! `understudy bench latency`: request/response over TCP and UDP, unprotected and protected.

use std::net::SocketAddr;
use std::time::Duration;

use guest::proto::{ECHO_PORT, PORT};
use serde::Serialize;

use super::{Outcome, print};
use crate::cli::LatencyArgs;
use crate::demo::vmfile::{self, VM};
use crate::epoch::Percentiles;
use crate::lab::{self, GUEST, Lab, Options};
use crate::probe::{Latency, Pinger, ProbeClient, ProbeConfig};

/// Guest memory in MiB.
const MEMORY: u64 = 128;

#[derive(Debug, Serialize)]
struct Report {
    epoch_ms: u64,
    pages: u64,
    backups: u8,
    seconds: u64,
    tcp_unprotected: Latency,
    tcp_protected: Latency,
    udp_unprotected: Latency,
    udp_protected: Latency,
    output_held_us: Percentiles,
    tcp_p50_added_us: i64,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from measuring.
pub fn run(args: &LatencyArgs) -> Outcome<()> {
    lab::check_machine()?;
    lab::enter()?;
    let lab = Lab::launch(Options::of(args.backups + 1)?)?;
    let vm = vmfile::probe(MEMORY, 1, (args.pages, args.work), args.epoch_ms);
    lab.start_vm("a", &vm)?;
    let (tcp_unprotected, udp_unprotected) = measure(&lab, args.seconds)?;
    lab.protect(VM, "a", &lab.hosts()[1..])
        .map_err(|e| lab.with_logs(e))?;
    let mut control = lab.control("a")?;
    control.stats(VM)?;
    let (tcp_protected, udp_protected) = measure(&lab, args.seconds)?;
    let stats = control.stats(VM)?;
    let report = Report {
        epoch_ms: args.epoch_ms,
        pages: args.pages,
        backups: args.backups,
        seconds: args.seconds,
        tcp_unprotected,
        tcp_protected,
        udp_unprotected,
        udp_protected,
        output_held_us: stats.held_us,
        tcp_p50_added_us: tcp_protected.p50_us as i64 - tcp_unprotected.p50_us as i64,
    };
    print(args.json, &report, || {
        for (name, l) in [
            ("TCP unprotected", tcp_unprotected),
            ("TCP protected", tcp_protected),
            ("UDP unprotected", udp_unprotected),
            ("UDP protected", udp_protected),
        ] {
            println!(
                "{name:<16} p50 {:>7}  p99 {:>7}  max {:>7} us  ({} answers)",
                l.p50_us, l.p99_us, l.max_us, l.count
            );
        }
    })
}

/// One request at a time, so that each latency is one request's own.
fn measure(lab: &Lab, seconds: u64) -> Outcome<(Latency, Latency)> {
    let mut config = ProbeConfig::new(SocketAddr::from((GUEST, PORT)));
    config.window = 1;
    config.interval = Duration::from_millis(1);
    let client = lab.within_client(|| ProbeClient::start(config, Duration::from_secs(30)))?;
    std::thread::sleep(Duration::from_secs(seconds));
    let report = lab.within_client(|| client.stop(Duration::from_secs(10)));
    if !report.survived() {
        return Err(format!("the client's connection failed: {:?}", report.errors).into());
    }
    let echo = SocketAddr::from((GUEST, ECHO_PORT));
    let pinger = lab.within_client(|| Pinger::start(echo, Duration::from_millis(5)))?;
    std::thread::sleep(Duration::from_secs(seconds));
    Ok((report.latency, pinger.stop().latency))
}
