//! From the command line to the parts.

mod order;
mod show;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{BenchCommand, Cli, Command, LabCommand, VmCommand};
use crate::config::HostConfig;
use crate::control::{ControlError, Request};
use crate::{bench, child, daemon, demo, lab};

/// The exit code of a command of which nobody knows whether it was, or will be, carried out. (2 is a command line that makes
/// no sense, 1 everything else that fails.)
const UNKNOWN: u8 = 3;

type Failure = Box<dyn std::error::Error>;
type Outcome = Result<(), Failure>;

/// The program. Errors go to standard error as one line; docs/admin.md lists the exit codes.
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
            match e.downcast_ref() {
                Some(ControlError::Unknown { .. }) => ExitCode::from(UNKNOWN),
                _ => ExitCode::FAILURE,
            }
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
        Command::Demo(args) => demo::run(&args),
        Command::Lab {
            lab: LabCommand::Up(args),
        } => lab::up(&args),
        Command::Soak(args) => lab::soak::run(&args),
        Command::Bench { bench } => measure(&bench),
        Command::Status {
            json,
            watch,
            control,
        } => show::status(&control.control, json, watch),
        Command::Inspect { vm, json, control } => show::inspect(&control.control, &vm, json),
        Command::Points { vm, json, control } => show::points(&control.control, vm, json),
        Command::Events {
            follow,
            json,
            control,
        } => show::events(&control.control, json, follow),
        Command::OfVm(command) => of_vm(command),
    }
}

fn measure(bench: &BenchCommand) -> Outcome {
    match bench {
        BenchCommand::Pause(args) => bench::pause::run(args),
        BenchCommand::Latency(args) => bench::latency::run(args),
        BenchCommand::Failover(args) => bench::failover::run(args),
        BenchCommand::Chain(args) => bench::chain::run(args),
    }
}

/// The life of a VM, and where it is.
fn of_vm(command: VmCommand) -> Outcome {
    match command {
        VmCommand::Start { config, control } => order::start(&control, &config).map(drop),
        VmCommand::Apply {
            config,
            dry_run,
            json,
            control,
        } => order::apply(&control, &config, dry_run, json),
        VmCommand::Protect {
            vm,
            backups,
            control,
        } => order::protect(&control, &vm, backups),
        VmCommand::Unprotect { vm, control } => order::unprotect(&control, &vm),
        VmCommand::Delete { vm, yes, control } => order::delete(&control, &vm, yes),
        VmCommand::Stop {
            vm,
            timeout: timeout_s,
            now,
            control,
        } => {
            let request = match now {
                true => Request::Stop { vm },
                false => Request::ShutDown { vm, timeout_s },
            };
            order::give(&control, &request)
        }
        VmCommand::Reboot {
            vm,
            timeout,
            now,
            control,
        } => {
            let timeout_s = (!now).then_some(timeout);
            order::give(&control, &Request::Reboot { vm, timeout_s })
        }
        VmCommand::Failover {
            vm,
            planned: true,
            control,
        } => order::switch(&control, &vm, &Request::HandOver { vm: vm.clone() }),
        VmCommand::Failover { vm, control, .. } => order::give(&control, &Request::Failover { vm }),
        VmCommand::Evacuate { control } => order::evacuate(&control),
        VmCommand::Recover { vm, control } => order::give(&control, &Request::Recover { vm }),
        VmCommand::Drill { vm, control } => {
            order::switch(&control, &vm, &Request::Drill { vm: vm.clone() })
        }
        VmCommand::Rewind {
            vm,
            epoch,
            clone,
            network,
            control,
        } => order::rewind(&control, vm, epoch, clone, network),
        VmCommand::Outcome { id, control } => order::outcome(&control, id),
    }
}
