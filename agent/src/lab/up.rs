//! `understudy lab up`: a lab for people.

use std::path::Path;

use nix::sys::signal::{SigSet, Signal};

use super::{CLIENT, Lab, LabError, Options, VmFile, check_machine, enter};
use crate::cli::LabArgs;

/// Starts it, says how to use it, and keeps it until it is interrupted.
///
/// # Errors
/// What keeps it from starting.
pub fn up(args: &LabArgs) -> Result<(), Box<dyn std::error::Error>> {
    check_machine()?;
    enter()?;
    // Before any thread is started: all of them inherit it, and the signal waits for the end of this function.
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGINT);
    ends.add(Signal::SIGTERM);
    ends.thread_block()?;
    let lab = Lab::launch(Options {
        failing_disks: Path::new("/dev/fuse").exists(),
        keep: args.keep,
        ..Options::of(args.hosts)?
    })?;
    for number in 1..=args.vms {
        start(&lab, number)?;
    }
    println!("{}", usage(&lab, args.vms));
    ends.wait()?;
    Ok(())
}

/// Each host has its turn as owner; the two after it are the backups.
fn start(lab: &Lab, number: u8) -> Result<(), LabError> {
    let hosts = lab.hosts();
    let vm = VmFile::probe(format!("vm{number}"), number);
    let mut order = hosts.to_vec();
    order.rotate_left(usize::from(number - 1) % hosts.len());
    order.truncate(3);
    let owner = order.remove(0);
    lab.start_vm(&owner, &vm)?;
    println!("{} runs on {owner} at {}", vm.name, vm.ip());
    if !order.is_empty() {
        lab.protect(&vm.name, &owner, &order)
            .map_err(|e| lab.with_logs(e))?;
        println!("{} is protected by {}", vm.name, order.join(" -> "));
    }
    Ok(())
}

fn usage(lab: &Lab, vms: u8) -> String {
    let dir = lab.dir().display();
    let own = std::process::id();
    let hosts = lab.hosts().join(", ");
    let program = std::env::current_exe().unwrap_or_default();
    let program = program.display();
    let pids: Vec<String> = lab
        .hosts()
        .iter()
        .map(|name| {
            let agent = lab
                .processes(name)
                .ok()
                .and_then(|all| all.first().map(|(pid, _)| *pid));
            format!("{name} {}", agent.unwrap_or_default())
        })
        .collect();
    format!(
        "\nHosts {hosts} are up, with {vms} VMs; everything of them is in {dir}. The client is {CLIENT}.\n\
         Agents' processes: {pids}. Each host is a network namespace; interrupt this ({own}) to end all of it.\n\n  \
         {program} status --control {dir}/a.sock\n  \
         {program} failover --planned vm1 --control {dir}/a.sock\n  \
         kill -STOP PID; kill -CONT PID        # an agent's, or a VM's: `pid` in status --json\n  \
         nsenter -t PID -n ip link             # as a host sees it\n  \
         tail -f {dir}/a.log\n",
        pids = pids.join(", "),
    )
}
