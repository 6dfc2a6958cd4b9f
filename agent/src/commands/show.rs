//! Commands that look.

use std::path::Path;
use std::time::Duration;

use super::Outcome;
use crate::control::{ControlClient, ControlError, FailoverReport, Reply, Request, Role, VmStatus};

/// Between two looks of `status --watch` and `events --follow`.
const PERIOD: Duration = Duration::from_secs(1);

pub(super) fn points(control: &Path, vm: String, json: bool) -> Outcome {
    let reply = ControlClient::connect(control)?.call(&Request::Points { vm })?;
    let Reply::Points(points) = reply else {
        return Err(ControlError::Unexpected.into());
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&points)?);
        return Ok(());
    }
    println!("{:>12} {:>10}  DIGEST", "EPOCH", "GENERATION");
    for point in points {
        println!(
            "{:>12} {:>10}  {:08x}",
            point.epoch, point.generation, point.digest
        );
    }
    Ok(())
}

pub(super) fn status(control: &Path, json: bool, watch: bool) -> Outcome {
    let mut client = ControlClient::connect(control)?;
    loop {
        print_status(client.status()?, json)?;
        if !watch {
            return Ok(());
        }
        std::thread::sleep(PERIOD);
        println!();
    }
}

fn print_status(list: Vec<VmStatus>, json: bool) -> Outcome {
    if json {
        let list: Result<Vec<_>, _> = list.iter().map(with_words).collect();
        println!("{}", serde_json::to_string_pretty(&list?)?);
        return Ok(());
    }
    println!(
        "{:<14} {:<8} {:<8} {:<20} {:>4} {:>9} {:>7} {:>8}  STATE",
        "VM", "HERE", "OWNER", "CHAIN", "GEN", "EPOCH", "LAG ms", "HELD ms"
    );
    for vm in list {
        let chain: Vec<&str> = vm.chain.iter().map(|m| m.host.as_str()).collect();
        let owner = vm.role == Role::Owner && vm.pid != 0;
        println!(
            "{:<14} {:<8} {:<8} {:<20} {:>4} {:>9} {:>7} {:>8}  {}",
            vm.name,
            vm.role,
            vm.owner,
            match (chain.is_empty(), &vm.joining) {
                (true, _) => "-".into(),
                (false, None) => chain.join(" -> "),
                (false, Some(joining)) => format!("{} (+ {joining})", chain.join(" -> ")),
            },
            vm.generation,
            vm.epoch,
            if owner {
                vm.lag_ms.to_string()
            } else {
                "-".into()
            },
            if owner {
                format!("{:.1}", vm.held_p99_us as f64 / 1000.0)
            } else {
                "-".into()
            },
            vm.state()
        );
        for warning in &vm.warnings {
            println!("{:<14} note: {}", "", warning.text());
        }
        if let Some(f) = &vm.failover {
            println!("{:<14} {}", "", failover_line(f));
        }
    }
    Ok(())
}

/// As data, and `state`, what it is called.
fn with_words(status: &VmStatus) -> serde_json::Result<serde_json::Value> {
    let mut value = serde_json::to_value(status)?;
    value["state"] = status.state().into();
    Ok(value)
}

fn failover_line(f: &FailoverReport) -> String {
    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
    format!(
        "last failover: {}; generation {}, from checkpoint {}; ms: decide {:.1}, hand over {:.1}, restore {:.1}, run {:.1}",
        f.cause,
        f.generation,
        f.epoch,
        ms(f.suspected_us, f.decided_us),
        ms(f.decided_us, f.handed_us),
        ms(f.handed_us, f.restored_us),
        ms(f.restored_us, f.running_us)
    )
}

pub(super) fn inspect(control: &Path, vm: &str, json: bool) -> Outcome {
    let reports = ControlClient::connect(control)?.inspect(vm)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        for report in reports {
            println!("{report}");
        }
    }
    Ok(())
}

pub(super) fn events(control: &Path, json: bool, follow: bool) -> Outcome {
    let mut client = ControlClient::connect(control)?;
    let mut seen = 0;
    loop {
        for event in client.events(seen)? {
            seen = event.number;
            if json {
                println!("{}", serde_json::to_string(&event)?);
            } else {
                println!(
                    "{:>14.6}  {:<12} {:<16} {}",
                    event.at_us as f64 / 1e6,
                    format!("{:?}", event.kind),
                    event.vm,
                    event.text
                );
            }
        }
        if !follow {
            return Ok(());
        }
        std::thread::sleep(PERIOD);
    }
}
