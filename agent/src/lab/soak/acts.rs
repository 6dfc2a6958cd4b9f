//! Doing what the plan says to a lab, and taking it back.

use super::plan::{Act, Kind};
use crate::control::{Reply, Request};
use crate::lab::{Health, Lab, LabError, Wire};
use std::time::Duration;

/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(90);

/// Does it. What comes back says in words to what it was done; a command that was refused is no error here.
///
/// # Errors
/// What keeps a fault from being made.
pub fn begin(lab: &Lab, act: &Act, vms: &[String]) -> Result<String, LabError> {
    let host = lab.hosts()[act.host].as_str();
    let vm = vms[act.vm].as_str();
    match act.kind {
        Kind::Kill => lab.strike(host)?,
        Kind::Host => {
            lab.plug(host, Wire::Repl, false)?;
            lab.plug(host, Wire::Lan, false)?;
            lab.strike(host)?;
        }
        Kind::Crash => {
            let Some((owner, status)) = lab.owner(vm).filter(|(_, s)| s.pid != 0) else {
                return Ok(format!("nobody runs {vm}"));
            };
            lab.kill_process(status.pid);
            return Ok(format!("the process of {vm} on {owner}"));
        }
        Kind::Freeze => lab.freeze(host)?,
        Kind::Partition => lab.plug(host, Wire::Repl, false)?,
        Kind::Agent => lab.kill_agent(host)?,
        Kind::DiskError => lab.set_disk(host, Health::Failing)?,
        Kind::DiskFull => lab.set_disk(host, Health::Full)?,
        Kind::DiskHang => lab.set_disk(host, Health::Hung)?,
        command => return command_to(lab, command, host, vm),
    }
    Ok(host.into())
}

/// Takes it back.
///
/// # Errors
/// When the host does not come back.
pub fn end(lab: &Lab, act: &Act) -> Result<(), LabError> {
    let host = lab.hosts()[act.host].as_str();
    match act.kind {
        Kind::Kill => {
            lab.kill(host)?;
            lab.start_agent(host)
        }
        Kind::Host => {
            lab.kill(host)?;
            lab.plug(host, Wire::Repl, true)?;
            lab.plug(host, Wire::Lan, true)?;
            lab.start_agent(host)
        }
        Kind::Freeze => lab.thaw(host),
        Kind::Partition => lab.plug(host, Wire::Repl, true),
        Kind::Agent => lab.start_agent(host),
        Kind::DiskError | Kind::DiskFull | Kind::DiskHang => lab.set_disk(host, Health::Good),
        _ => Ok(()),
    }
}

/// Gives a command; what it came to, in words.
///
/// # Errors
/// What keeps it from being given.
pub fn command_to(lab: &Lab, kind: Kind, host: &str, vm: &str) -> Result<String, LabError> {
    let owner = || lab.owner(vm).map(|(owner, _)| owner);
    let asked = |on: Option<String>, request: Request| {
        let Some(on) = on else {
            return format!("nobody runs {vm}");
        };
        match lab.ask(&on, request, COMMAND) {
            Ok(Reply::Switched(s)) => format!("{vm}: from {on} to {}", s.owner),
            Ok(_) => format!("{vm} on {on}: done"),
            Err(e) => format!("{vm} on {on}: {e}"),
        }
    };
    let name = vm.to_string();
    Ok(match kind {
        Kind::Planned => asked(owner(), Request::HandOver { vm: name }),
        Kind::Drill => asked(owner(), Request::Drill { vm: name }),
        Kind::Protect => {
            let Some((owner, status)) = lab.owner(vm) else {
                return Ok(format!("nobody runs {vm}"));
            };
            // All of them: one that has just been left out is wanted all the same.
            let mut backups = lab.hosts().to_vec();
            backups.retain(|host| *host != owner);
            backups.sort_by_key(|host| {
                let place = status.chain.iter().position(|m| m.host == *host);
                std::cmp::Reverse(place)
            });
            asked(Some(owner), Request::Protect { vm: name, backups })
        }
        Kind::Evacuate => run(lab, host, &["evacuate"])?,
        Kind::Status => {
            run(lab, host, &["events", "--json"])?;
            run(lab, host, &["status", "--json"])?
        }
        Kind::StopStart => {
            let Some(on) = owner() else {
                return Ok(format!("nobody runs {vm}"));
            };
            let stopped = run(lab, &on, &["stop", vm, "--now"])?;
            format!("{stopped}; {}", run(lab, &on, &["start", vm])?)
        }
        Kind::Reboot => match owner() {
            Some(on) => run(lab, &on, &["reboot", vm, "--now"])?,
            None => format!("nobody runs {vm}"),
        },
        fault => format!("{} is no command", fault.name()),
    })
}

/// Runs the program on `host` for its agent, bounded; its last words.
fn run(lab: &Lab, host: &str, args: &[&str]) -> Result<String, LabError> {
    if !lab.is_running(host) {
        return Ok(format!("{host} is not running"));
    }
    let mut command = lab.command_on(host)?;
    command
        .args(args)
        .arg("--control")
        .arg(lab.path(&format!("{host}.sock")));
    let said = lab.output(command, COMMAND)?;
    let line = said.text.lines().last().unwrap_or_default();
    let short: String = line.chars().take(160).collect();
    Ok(match said.ok {
        true => format!("{} on {host}: done", args.join(" ")),
        false => format!("{} on {host}: {short}", args.join(" ")),
    })
}

/// Whether the program has that command.
///
/// # Errors
/// If it cannot be run.
pub fn has_command(lab: &Lab, command: &[&str]) -> Result<bool, LabError> {
    let mut program = lab.command_on(&lab.hosts()[0])?;
    program.args(command);
    Ok(lab.output(program, COMMAND)?.ok)
}
