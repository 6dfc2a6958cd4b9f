//! `understudy demo`: a protected VM, a client that talks to it all the time, and the death of its host.

pub mod end;
pub mod redis;
pub mod scenario;
pub mod vmfile;

use std::time::Duration;

use serde::Serialize;

use crate::cli::{DemoArgs, Victim};
use crate::lab::{self, Lab, Masters, Options};
use scenario::{BackupLoss, Failover, Traffic};
use vmfile::VM;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// The demo's result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report<'a> {
    connection_survived: bool,
    acknowledged: u64,
    lost: u64,
    broken: u64,
    guest: &'a str,
    backups: u8,
    failover: Option<&'a Failover>,
    backup_loss: Option<&'a BackupLoss>,
}

/// Runs the demo. The error says what is missing or what went wrong; success means that the connection survived and no
/// acknowledged request was lost.
///
/// # Errors
/// As said.
pub fn run(args: &DemoArgs) -> Outcome<()> {
    let say = |text: String| {
        if !args.json {
            println!("{text}");
        }
    };
    lab::check_machine()?;
    lab::enter()?;
    let lab = Lab::launch(Options {
        masters: match args.kill {
            Victim::Master => Masters::Three,
            _ => Masters::One,
        },
        keep: args.keep,
        ..Options::of(args.backups + 1)?
    })?;
    let names = lab.hosts();
    say(format!(
        "Hosts {}: an agent each, on one machine, each in a network namespace of its own.",
        names.join(", ")
    ));
    let vm = vmfile::of(args, &lab)?;
    let guest = if args.kernel.is_some() {
        "stock"
    } else {
        "probe"
    };
    lab.start_vm("a", &vm)?;
    lab.protect(VM, "a", &names[1..])
        .map_err(|e| lab.with_logs(e))?;
    let chain = names[1..].join(" -> ");
    say(format!(
        "VM demo ({guest} guest, {} MiB, {} vCPU) runs on a and is protected by the chain {chain}.",
        args.memory_mib, args.vcpus
    ));
    let traffic = Traffic::start(&lab, args)?;
    if !traffic.wait_acked(20, Duration::from_secs(20)) {
        return Err(format!("the client got no answers: {:?}", traffic.errors()).into());
    }
    std::thread::sleep(Duration::from_secs(args.seconds));
    let before = traffic.acked();
    say(format!(
        "A client at 10.77.0.1 talks TCP to the VM at 10.77.0.2: {before} numbered requests acknowledged so far."
    ));
    let (mut failover, mut loss) = (None, None);
    if args.kill == Victim::Master {
        let leader = lab.leader()?;
        say(format!(
            "Now host {} dies, which leads the three members of the master.",
            leader
        ));
        lab.strike(&leader)?;
    }
    if matches!(args.kill, Victim::Owner | Victim::Master) {
        say("Now host a dies: SIGKILL to its agent and its VM process at once.".into());
        failover = Some(scenario::kill_owner_and_wait(&lab, VM, "a", &traffic)?);
    } else {
        let i = match args.kill {
            Victim::Head => 1,
            Victim::Middle => {
                if names.len() < 4 {
                    return Err(
                        "a chain with a middle has three backups at least: --backups 3".into(),
                    );
                }
                2
            }
            _ => names.len() - 1,
        };
        say(format!(
            "Now backup {} dies: SIGKILL to its agent and its standby at once.",
            names[i]
        ));
        let backup = &names[i];
        loss = Some(scenario::kill_backup_and_wait(
            &lab, VM, "a", backup, &traffic,
        )?);
    }
    std::thread::sleep(Duration::from_secs(1));
    let end = traffic.stop(&lab);
    if let Some(failover) = &failover {
        tell(&say, failover);
    }
    if let Some(l) = &loss {
        say(format!(
            "\n  {:>9.1} ms  after the kill: {} (generation {})",
            l.settled_ms, l.state, l.generation
        ));
        say(format!(
            "  {:>9.1} ms  after the kill: the client's next reply\n",
            l.first_reply_ms
        ));
    }
    let report = Report {
        connection_survived: end.survived,
        acknowledged: end.acked,
        lost: end.lost,
        broken: end.broken,
        guest,
        backups: args.backups,
        failover: failover.as_ref(),
        backup_loss: loss.as_ref(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    say(format!(
        "The same TCP connection: {} requests acknowledged in all, {} of them since the kill; lost: {}, connections broken: {}.",
        end.acked,
        end.acked - before,
        end.lost,
        end.broken
    ));
    if !end.survived {
        return Err(format!(
            "the connection did not survive unharmed: lost {}, broken {}, verified {}; {:?} (logs: {})",
            end.lost,
            end.broken,
            end.verified,
            end.errors,
            lab.keep_logs().display()
        )
        .into());
    }
    Ok(())
}

fn tell(say: &impl Fn(String), f: &Failover) {
    say(String::new());
    say(format!(
        "  {:>9.1} ms  host {} suspects: {}",
        f.detect_ms, f.new_owner, f.cause
    ));
    say(format!(
        "  {:>+9.1} ms  the master decides: {} owns the VM in generation {}",
        f.decide_ms, f.new_owner, f.generation
    ));
    say(format!(
        "  {:>+9.1} ms  the standby is activated and runs from checkpoint {}",
        f.activate_ms, f.epoch
    ));
    say(format!(
        "  {:>9.1} ms  after the kill: the client's first reply",
        f.first_reply_ms
    ));
    if let Some(ms) = f.reprotected_ms {
        say(format!(
            "  {ms:>9.1} ms  after the kill: protected again by the remaining backup"
        ));
    }
    say(String::new());
}
