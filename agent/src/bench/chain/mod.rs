//! `understudy bench chain`: what a chain carries, beside a plain TCP stream of the same bytes and an owner that feeds every
//! replica itself; and how long it stands still when a replica is lost.

mod hosts;
mod load;
mod outage;

use std::time::Duration;

use diskbuf::Durability;
use serde::Serialize;

use super::{Outcome, print};
use crate::cli::ChainArgs;
use load::{Content, Rate};

/// Longest chain measured.
const LONGEST: usize = 3;

#[derive(Debug, Serialize)]
struct Size {
    epoch_mib: u64,
    plain_tcp_mb_per_s: f64,
    /// For 1, 2 and 3 replicas.
    memory: Degree,
    disk: Option<Degree>,
}

#[derive(Debug, Serialize)]
struct Degree {
    chain: Vec<Rate>,
    fan_out: Vec<Rate>,
    /// Throughput of a chain of 3, as a part of a chain of 1's.
    three_to_one: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    cores: usize,
    epochs_in_flight: u64,
    sizes: Vec<Size>,
    message_delay_ms: f64,
    outages: Vec<outage::Outage>,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from measuring.
pub fn run(args: &ChainArgs) -> Outcome<()> {
    let time = Duration::from_secs_f64(args.seconds);
    let mut sizes = Vec::new();
    for epoch_mib in &args.epoch_mib {
        let content = Content::new(epoch_mib << 20)?;
        sizes.push(Size {
            epoch_mib: *epoch_mib,
            plain_tcp_mb_per_s: load::plain(&content, time)?.mb_per_s,
            memory: degree(&content, Durability::Memory, time)?,
            disk: match args.no_disk {
                true => None,
                false => Some(degree(&content, Durability::Disk, time)?),
            },
        });
    }
    let message_delay_ms = outage::message_delay()?;
    let report = Report {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        epochs_in_flight: load::IN_FLIGHT,
        sizes,
        message_delay_ms,
        outages: outage::measure(args.runs, message_delay_ms)?,
    };
    print(args.json, &report, || text(&report))
}

fn degree(content: &Content, durability: Durability, time: Duration) -> Outcome<Degree> {
    let rates = |measure: fn(&Content, usize, Durability, Duration) -> Outcome<Rate>| {
        (1..=LONGEST)
            .map(|n| measure(content, n, durability, time))
            .collect::<Outcome<Vec<Rate>>>()
    };
    let chain = rates(load::chain)?;
    let fan_out = rates(load::fan_out)?;
    let three_to_one = chain[LONGEST - 1].mb_per_s / chain[0].mb_per_s;
    Ok(Degree {
        chain,
        fan_out,
        three_to_one,
    })
}

fn text(report: &Report) {
    println!(
        "{} cores; {} checkpoints in flight; MB/s (ack p50 / p99 in ms; cores kept busy)",
        report.cores, report.epochs_in_flight
    );
    for size in &report.sizes {
        println!(
            "\n{} MiB per checkpoint; a plain TCP stream carries {:.0} MB/s",
            size.epoch_mib, size.plain_tcp_mb_per_s
        );
        let degrees = [("memory", Some(&size.memory)), ("disk", size.disk.as_ref())];
        for (name, degree) in degrees {
            let Some(degree) = degree else { continue };
            for (what, rates) in [("chain of", &degree.chain), ("fan-out to", &degree.fan_out)] {
                for (n, rate) in (1..).zip(rates) {
                    println!(
                        "  {name:<6} {what:>10} {n}: {:6.0}  ({:5.1} / {:5.1} ms; {:.1})",
                        rate.mb_per_s, rate.ack_ms.p50, rate.ack_ms.p99, rate.cores
                    );
                }
            }
            println!(
                "  {name:<6} a chain of 3 to a chain of 1: {:.2}",
                degree.three_to_one
            );
        }
    }
    println!(
        "\nLoss of a replica of three, with updates flowing; a message takes {:.3} ms",
        report.message_delay_ms
    );
    for outage in &report.outages {
        println!(
            "  {:<6} updates stand still for {:.1} ms (p99 {:.1}), {:.1} of them after the decision: {:.0} message delays; the paper: {}",
            outage.lost,
            outage.updates_ms.p50,
            outage.updates_ms.p99,
            outage.after_decision_ms.p50,
            outage.after_decision_delays,
            outage.paper_delays
        );
    }
}
