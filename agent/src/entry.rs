//! From the command line to the parts.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use crate::cli::{BenchCommand, Cli, Command, LabCommand};
use crate::config::{HostConfig, VmConfig};
use crate::control::{ControlClient, ControlError, FailoverReport, Reply, Request, VmStatus};
use crate::{bench, child, daemon, demo, lab};

/// Between two looks of `status --watch` and `events --follow`.
const PERIOD: Duration = Duration::from_secs(1);

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// The program. Errors go to standard error as one line and make the exit code 1.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("UNDERSTUDY_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .init();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("understudy: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Agent { config, host, init } => {
            let mut config = HostConfig::load_as(&config, host.as_deref())?;
            config.master.begin |= init;
            Ok(daemon::run_agent(config)?)
        }
        Command::Vmm {
            config: Some(config),
            ..
        } => Ok(child::run_plain(&config)?),
        Command::Vmm { child_fd, .. } => {
            let fd = child_fd.ok_or("--config or --child-fd is needed")?;
            std::process::exit(child::run_child(fd))
        }
        Command::Start { config, control } => start(&control.control, &config).map(drop),
        Command::Protect {
            vm,
            backups,
            control,
        } => protect(&control.control, &vm, backups),
        Command::Delete { vm, yes, control } => delete(&control.control, &vm, yes),
        Command::Stop {
            vm,
            timeout: timeout_s,
            now,
            control,
        } => {
            let request = match now {
                true => Request::Stop { vm },
                false => Request::ShutDown { vm, timeout_s },
            };
            Ok(ControlClient::connect(&control.control)?.order(&request)?)
        }
        Command::Reboot {
            vm,
            timeout,
            now,
            control,
        } => {
            let timeout_s = (!now).then_some(timeout);
            let request = Request::Reboot { vm, timeout_s };
            Ok(ControlClient::connect(&control.control)?.order(&request)?)
        }
        Command::Status {
            json,
            watch,
            control,
        } => status(&control.control, json, watch),
        Command::Inspect { vm, json, control } => inspect(&control.control, &vm, json),
        Command::Failover {
            vm,
            planned: true,
            control,
        } => switch(&control.control, &vm, Request::HandOver { vm: vm.clone() }),
        Command::Failover { vm, control, .. } => {
            Ok(ControlClient::connect(&control.control)?.order(&Request::Failover { vm })?)
        }
        Command::Evacuate { control } => evacuate(&control.control),
        Command::Recover { vm, control } => {
            Ok(ControlClient::connect(&control.control)?.order(&Request::Recover { vm })?)
        }
        Command::Drill { vm, control } => {
            switch(&control.control, &vm, Request::Drill { vm: vm.clone() })
        }
        Command::Rewind {
            vm,
            epoch,
            clone,
            network,
            control,
        } => {
            ControlClient::connect(&control.control)?.order(&Request::Rewind {
                vm: vm.clone(),
                epoch,
                clone: clone.clone(),
                network,
            })?;
            println!("{clone} runs from checkpoint {epoch} of {vm}");
            Ok(())
        }
        Command::Points { vm, json, control } => points(&control.control, vm, json),
        Command::Events {
            follow,
            json,
            control,
        } => events(&control.control, json, follow),
        Command::Demo(args) => demo::run(&args),
        Command::Lab {
            lab: LabCommand::Up(args),
        } => lab::up(&args),
        Command::Soak(args) => lab::soak::run(&args),
        Command::Bench {
            bench: BenchCommand::Pause(args),
        } => bench::pause::run(&args),
        Command::Bench {
            bench: BenchCommand::Latency(args),
        } => bench::latency::run(&args),
        Command::Bench {
            bench: BenchCommand::Failover(args),
        } => bench::failover::run(&args),
        Command::Bench {
            bench: BenchCommand::Chain(args),
        } => bench::chain::run(&args),
    }
}

fn delete(control: &Path, vm: &str, yes: bool) -> Outcome {
    if !yes {
        eprint!("forget {vm} for good? Its disks stay, but nothing knows them any more [y/N] ");
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err("nothing was done".into());
        }
    }
    let request = Request::Delete { vm: vm.into() };
    ControlClient::connect(control)?.order(&request)?;
    println!("{vm} is forgotten");
    Ok(())
}

fn start(control: &Path, config: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let name = config.to_string_lossy();
    if !config.exists() && checkpoint::HostId::new(&name).is_ok() && !name.ends_with(".toml") {
        let request = Request::StartAgain {
            vm: name.to_string(),
        };
        ControlClient::connect(control)?.order(&request)?;
        println!("{name} runs");
        return Ok(name.to_string());
    }
    // Read and checked here, so that a typo is shown to whoever made it and relative paths mean this directory.
    let (mut parsed, text) = VmConfig::load(config)?;
    let mut toml = text;
    if parsed.absolute_paths(&std::env::current_dir()?) {
        toml = toml::to_string(&parsed)?;
    }
    let name = parsed.name.clone();
    ControlClient::connect(control)?.order(&Request::Start {
        toml,
        name: config.display().to_string(),
    })?;
    println!("{name} runs");
    Ok(name)
}

fn protect(control: &Path, vm: &str, backups: Vec<String>) -> Outcome {
    let name = if Path::new(vm).is_file() {
        start(control, Path::new(vm))?
    } else {
        vm.to_string()
    };
    let mut client = ControlClient::connect(control)?;
    let mut said = Instant::now();
    client.order(&Request::Protect {
        vm: name.clone(),
        backups,
    })?;
    loop {
        let status = client
            .status()?
            .into_iter()
            .find(|s| s.name == name)
            .ok_or_else(|| format!("{name} has ended while it was being protected"))?;
        let by = |status: &VmStatus| {
            let chain: Vec<&str> = status.chain.iter().map(|m| m.host.as_str()).collect();
            format!(
                "{name} is protected by {} (generation {})",
                chain.join(" -> "),
                status.generation
            )
        };
        if status.protected && !status.pending {
            println!("{}", by(&status));
            return match status.lacking.is_empty() {
                true => Ok(()),
                false => Err(status.state.into()),
            };
        }
        if !status.protected && !status.pending && status.sync.is_none() {
            return Err(format!("{name} runs on, but: {}", status.state).into());
        }
        if let Some(sync) = status.sync
            && said.elapsed() >= PERIOD
        {
            said = Instant::now();
            println!("{name}: {}", sync.text());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Hands over what runs here, one after the other.
fn evacuate(control: &Path) -> Outcome {
    let mut client = ControlClient::connect(control)?;
    let mut stay = Vec::new();
    for vm in client.status()?.into_iter().filter(|s| s.role == "owner") {
        let request = Request::HandOver {
            vm: vm.name.clone(),
        };
        if let Err(e) = switch(control, &vm.name, request) {
            eprintln!("understudy: {e}");
            stay.push(vm.name);
        }
    }
    match stay.is_empty() {
        true => Ok(()),
        false => Err(format!("still here: {}", stay.join(", ")).into()),
    }
}

fn switch(control: &Path, vm: &str, request: Request) -> Outcome {
    match ControlClient::connect(control)?.call(&request)? {
        Reply::Switched(s) => {
            println!(
                "{} owns {vm} in generation {}, decided after {:.1} ms (`understudy status` there has the phases)",
                s.owner, s.generation, s.decided_ms
            );
            Ok(())
        }
        _ => Err(ControlError::Unexpected.into()),
    }
}

fn points(control: &Path, vm: String, json: bool) -> Outcome {
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

fn status(control: &Path, json: bool, watch: bool) -> Outcome {
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
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    println!(
        "{:<14} {:<8} {:<8} {:<20} {:>4} {:>9} {:>7} {:>8}  STATE",
        "VM", "HERE", "OWNER", "CHAIN", "GEN", "EPOCH", "LAG ms", "HELD ms"
    );
    for vm in list {
        let chain: Vec<&str> = vm.chain.iter().map(|m| m.host.as_str()).collect();
        let owner = vm.role == "owner" && vm.pid != 0;
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
            vm.state
        );
        if let Some(f) = &vm.failover {
            println!("{:<14} {}", "", failover_line(f));
        }
    }
    Ok(())
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

fn inspect(control: &Path, vm: &str, json: bool) -> Outcome {
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

fn events(control: &Path, json: bool, follow: bool) -> Outcome {
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
