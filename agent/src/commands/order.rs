//! Commands that change something: each is an order to an agent, under an id.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{Failure, Outcome};
use crate::cli::{Control, Given};
use crate::config::{Change, Takes, VmConfig};
use crate::control::{Applied, ControlClient, ControlError, Reply, Request, Role, VmStatus};

/// Between two lines of progress.
const PERIOD: Duration = Duration::from_secs(1);
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);

/// The agent that an order goes to, which may have been given before.
fn connect(control: &Given) -> Result<ControlClient, ControlError> {
    Ok(ControlClient::connect(&control.to.control)?.again(control.request))
}

/// An order that has no figures.
pub(super) fn give(control: &Given, request: &Request) -> Outcome {
    Ok(connect(control)?.order(request)?)
}

pub(super) fn delete(control: &Given, vm: &str, yes: bool) -> Outcome {
    if !yes {
        eprint!("forget {vm} for good? Its disks stay, but nothing knows them any more [y/N] ");
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err("nothing was done".into());
        }
    }
    give(control, &Request::Delete { vm: vm.into() })?;
    println!("{vm} is forgotten");
    Ok(())
}

/// What a file says, with paths that mean the same in any directory. Read and checked here, so that a typo is shown to
/// whoever made it.
fn read(file: &Path) -> Result<(VmConfig, String), Failure> {
    let (mut config, mut toml) = VmConfig::load(file)?;
    if config.absolute_paths(&std::env::current_dir()?) {
        toml = toml::to_string(&config)?;
    }
    Ok((config, toml))
}

pub(super) fn start(control: &Given, config: &Path) -> Result<String, Failure> {
    let name = config.to_string_lossy();
    let is_name =
        !config.exists() && checkpoint::HostId::new(&name).is_ok() && !name.ends_with(".toml");
    let (name, request) = match is_name {
        true => (
            name.to_string(),
            Request::StartAgain {
                vm: name.to_string(),
            },
        ),
        false => {
            let (parsed, toml) = read(config)?;
            let file = config.display().to_string();
            (parsed.name, Request::Start { toml, name: file })
        }
    };
    give(control, &request)?;
    println!("{name} runs");
    Ok(name)
}

/// Gives a VM the configuration of a file, or asks what that would change.
fn ask_apply(control: &Given, file: &Path, dry_run: bool) -> Result<Applied, Failure> {
    let (_, toml) = read(file)?;
    let name = file.display().to_string();
    let request = Request::Apply {
        toml,
        name,
        dry_run,
    };
    match connect(control)?.call(&request)? {
        Reply::Applied(applied) => Ok(applied),
        _ => Err(ControlError::Unexpected.into()),
    }
}

pub(super) fn apply(control: &Given, file: &Path, dry_run: bool, json: bool) -> Outcome {
    let applied = ask_apply(control, file, dry_run)?;
    match json {
        true => println!("{}", serde_json::to_string_pretty(&applied)?),
        false => print_applied(&applied, dry_run),
    }
    let left: Vec<&str> = applied.left().map(|change| change.key.as_str()).collect();
    match left.is_empty() || dry_run {
        true => Ok(()),
        false => Err(format!(
            "{vm} runs, and {left} can be changed only while it is off: `understudy stop {vm}`, apply this again, `understudy start {vm}`",
            vm = applied.vm,
            left = left.join(", ")
        )
        .into()),
    }
}

fn print_applied(applied: &Applied, dry_run: bool) {
    let vm = &applied.vm;
    if applied.defined {
        return match dry_run {
            true => println!("{vm} would be defined"),
            false => println!("{vm} is defined (`understudy start {vm}` boots it)"),
        };
    }
    for change in &applied.changes {
        println!("{vm}: {}", change_line(change, applied.runs));
    }
    if applied.changes.is_empty() {
        println!("{vm} is configured like this already");
    }
}

fn change_line(change: &Change, runs: bool) -> String {
    let or_unset = |value: &Option<String>| value.clone().unwrap_or_else(|| "unset".into());
    let when = match (change.takes, runs) {
        (Takes::Now, true) => "now",
        (Takes::NextStart, true) => "at its next start",
        (Takes::WhileOff, true) => "not while it runs",
        (Takes::Never, _) => "never",
        (_, false) => "when it is started",
    };
    let (from, to) = (or_unset(&change.from), or_unset(&change.to));
    format!("{}: {from} -> {to} ({when})", change.key)
}

pub(super) fn unprotect(control: &Given, vm: &str) -> Outcome {
    give(control, &Request::Unprotect { vm: vm.into() })?;
    println!("{vm} has no backups any more: the loss of its host ends it");
    Ok(())
}

pub(super) fn protect(control: &Given, vm: &str, backups: Vec<String>) -> Outcome {
    let name = match Path::new(vm).is_file() {
        true => running(&control.to, Path::new(vm))?,
        false => vm.to_string(),
    };
    let mut client = connect(control)?;
    client.order(&Request::Protect {
        vm: name.clone(),
        backups,
    })?;
    let mut said = Instant::now();
    loop {
        let status = client
            .status()?
            .into_iter()
            .find(|s| s.name == name)
            .ok_or_else(|| format!("{name} has ended while it was being protected"))?;
        if status.protected && !status.pending {
            println!("{}", protected_by(&status));
            return match status.lacking.is_empty() {
                true => Ok(()),
                false => Err(status.state().into()),
            };
        }
        if !status.protected && !status.pending && status.sync.is_none() {
            return Err(format!("{name} runs on, but: {}", status.state()).into());
        }
        if let Some(sync) = status.sync
            && said.elapsed() >= PERIOD
        {
            said = Instant::now();
            println!("{name}: {}", sync.text());
        }
        std::thread::sleep(POLL);
    }
}

/// The VM of this file, started if it does not run.
fn running(control: &Control, file: &Path) -> Result<String, Failure> {
    let given = Given::anew(control);
    let there = ask_apply(&given, file, true)?;
    let vm = there.vm;
    if !there.changes.is_empty() {
        return Err(format!(
            "{vm} exists and is configured otherwise than in this file: `understudy apply {}` shows how and changes it; `understudy protect {vm}` protects it as it is",
            file.display()
        )
        .into());
    }
    if !there.runs {
        start(&given, file)?;
    }
    Ok(vm)
}

fn protected_by(status: &VmStatus) -> String {
    let chain: Vec<&str> = status.chain.iter().map(|m| m.host.as_str()).collect();
    format!(
        "{} is protected by {} (generation {})",
        status.name,
        chain.join(" -> "),
        status.generation
    )
}

/// Hands over what runs here, one after the other.
pub(super) fn evacuate(control: &Control) -> Outcome {
    let mut client = ControlClient::connect(&control.control)?;
    let mut stay = Vec::new();
    for vm in client
        .status()?
        .into_iter()
        .filter(|s| s.role == Role::Owner)
    {
        let request = Request::HandOver {
            vm: vm.name.clone(),
        };
        if let Err(e) = switch(&Given::anew(control), &vm.name, &request) {
            eprintln!("understudy: {e}");
            stay.push(vm.name);
        }
    }
    match stay.is_empty() {
        true => Ok(()),
        false => Err(format!("still here: {}", stay.join(", ")).into()),
    }
}

pub(super) fn switch(control: &Given, vm: &str, request: &Request) -> Outcome {
    let reply = connect(control)?.call(request)?;
    said(&reply, vm)
}

/// What became of an order that was given before.
pub(super) fn outcome(control: &Control, id: checkpoint::RequestId) -> Outcome {
    let reply = ControlClient::connect(&control.control)?.call(&Request::Outcome { id })?;
    match &reply {
        Reply::Ok => println!("done"),
        Reply::Applied(applied) => print_applied(applied, false),
        other => return said(other, "the VM"),
    }
    Ok(())
}

fn said(reply: &Reply, vm: &str) -> Outcome {
    let Reply::Switched(s) = reply else {
        return Err(ControlError::Unexpected.into());
    };
    println!(
        "{} owns {vm} in generation {}, decided after {:.1} ms (`understudy status` there has the phases)",
        s.owner, s.generation, s.decided_ms
    );
    Ok(())
}

pub(super) fn rewind(
    control: &Given,
    vm: String,
    epoch: u64,
    clone: String,
    network: Option<String>,
) -> Outcome {
    let text = format!("{clone} runs from checkpoint {epoch} of {vm}");
    let request = Request::Rewind {
        vm,
        epoch,
        clone,
        network,
    };
    give(control, &request)?;
    println!("{text}");
    Ok(())
}
