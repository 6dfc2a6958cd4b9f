//! `understudy soak`: three hosts, several VMs, clients; random faults and commands, one at a time or one during another;
//! and after each of them a look at everything that may not have happened.
//!
//! One host at most is at fault at any time, and the next fault waits until every VM is protected by all others again: so
//! nothing may ever be lost, no connection break (but of a guest that was stopped or reset), and no VM stay silent.

pub mod acts;
pub mod client;
pub mod history;
pub mod leaks;
pub mod plan;

use std::time::{Duration, Instant};

use serde::Serialize;

use super::wait::wait_for;
use super::{
    Boot, Lab, LabError, Masters, Options, Random, VmFile, check_machine, enter, fresh_seed,
};
use crate::cli::SoakArgs;
use client::Clients;
use leaks::Fullest;
use plan::{Act, Kind};

/// Hosts.
const HOSTS: u8 = 3;
/// Within this every VM is protected by all other hosts again, after a fault.
const PROTECTED: Duration = Duration::from_secs(180);
/// Within this a VM answers again, and nothing is where it does not belong.
const SETTLED: Duration = Duration::from_secs(60);
/// Answers that every VM has to give between two faults.
const ANSWERS: u64 = 20;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum SoakError {
    /// The lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A command line that cannot be right.
    #[error("{0}")]
    Usage(String),
    /// Something that may not happen has happened.
    #[error("{0}")]
    Found(String),
}

/// What a soak came to, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    seconds: u64,
    acts: usize,
    answers: u64,
    longest_call_ms: f64,
    left_out: Vec<&'static str>,
    found: Option<String>,
    /// What was done, in order: milliseconds since the beginning, and what.
    events: Vec<(u64, String)>,
}

/// Runs it; the error says what was found, with the seed and the order of events.
///
/// # Errors
/// As said.
pub fn run(args: &SoakArgs) -> Result<(), Box<dyn std::error::Error>> {
    check_machine()?;
    enter()?;
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let mut soak = Soak::start(args, seed)?;
    let found = soak.all(args).err();
    let report = soak.report(found.as_ref());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "seed {seed}: {} acts in {} s, {} answers, longest call {:.0} ms",
            report.acts, report.seconds, report.answers, report.longest_call_ms
        );
    }
    let Some(found) = found else { return Ok(()) };
    let mut text = format!("seed {seed}: {found}\nthe order of events:\n");
    for (ms, what) in &report.events {
        text += &format!("{ms:>9} ms  {what}\n");
    }
    Err(soak.lab.with_logs(text).into())
}

struct Soak {
    /// Before the lab: they end first.
    clients: Vec<Clients>,
    vms: Vec<String>,
    kinds: Vec<Kind>,
    left_out: Vec<&'static str>,
    random: Random,
    seed: u64,
    begun: Instant,
    events: Vec<(u64, String)>,
    acts: usize,
    first: Fullest,
    quiet: bool,
    lab: Lab,
}

impl Soak {
    fn start(args: &SoakArgs, seed: u64) -> Result<Self, Box<dyn std::error::Error>> {
        let mut options = Options::of(HOSTS)?;
        if let Some(mechanism) = &args.broken {
            let hosts = options.hosts.iter();
            options.broken = hosts.map(|h| (h.clone(), mechanism.clone())).collect();
        }
        let lab = Lab::launch(Options {
            masters: Masters::Hosts,
            failing_disks: true,
            ..options
        })?;
        if args.broken.is_some() {
            can_break(&lab)?;
        }
        let (kinds, left_out) = kinds(&lab, &args.only)?;
        let mut soak = Self {
            clients: Vec::new(),
            vms: (1..=args.vms).map(|n| format!("vm{n}")).collect(),
            kinds,
            left_out,
            random: Random(seed),
            seed,
            begun: Instant::now(),
            events: Vec::new(),
            acts: 0,
            first: Fullest::default(),
            quiet: args.json,
            lab,
        };
        for number in 1..=args.vms {
            soak.start_vm(number)?;
        }
        soak.first = Fullest::now(&soak.lab)?;
        Ok(soak)
    }

    fn start_vm(&mut self, number: u8) -> Result<(), Box<dyn std::error::Error>> {
        let vm = VmFile {
            boot: Boot::Probe {
                pages: 64,
                work: 50_000,
            },
            memory_mib: 32,
            // No write may go unnoticed, whatever else happens.
            protect: "epoch_ms = 25\nverify_epochs = 40\n".into(),
            ..VmFile::probe(format!("vm{number}"), number)
        };
        let mut order = self.lab.hosts().to_vec();
        let turn = usize::from(number - 1) % order.len();
        order.rotate_left(turn);
        let owner = order.remove(0);
        self.lab.start_vm(&owner, &vm)?;
        let protected = self.lab.protect(&vm.name, &owner, &order);
        protected.map_err(|e| self.lab.with_logs(e))?;
        self.clients.push(Clients::start(&self.lab, vm.ip())?);
        Ok(())
    }

    fn say(&mut self, what: String) {
        let ms = self.begun.elapsed().as_millis() as u64;
        if !self.quiet {
            println!("{ms:>9} ms  {what}");
        }
        self.events.push((ms, what));
    }

    fn all(&mut self, args: &SoakArgs) -> Result<(), SoakError> {
        let end = self.begun + Duration::from_secs_f64(args.minutes.max(0.0) * 60.0);
        while Instant::now() < end {
            let hosts = self.lab.hosts().len();
            let act = plan::next(&mut self.random, &self.kinds, hosts, self.vms.len());
            let Some(act) = act else {
                return Err(SoakError::Usage("nothing to choose from".into()));
            };
            self.acts += 1;
            self.round(&act)?;
        }
        for clients in &mut self.clients {
            let _ = clients.stop();
        }
        self.check_histories()
    }

    /// One act, and everything that follows from it.
    fn round(&mut self, act: &Act) -> Result<(), SoakError> {
        let what = acts::begin(&self.lab, act, &self.vms)?;
        self.say(format!("{}: {what}", act.kind.name()));
        let until = Instant::now() + act.stays;
        if let Some(command) = act.meanwhile {
            let (host, vm) = self.elsewhere(act);
            let what = acts::command_to(&self.lab, command, &host, &vm)?;
            self.say(format!("meanwhile {}: {what}", command.name()));
        }
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        acts::end(&self.lab, act)?;
        self.say(format!("{} is over", act.kind.name()));
        self.settle()?;
        self.say("all are protected".into());
        if [Kind::StopStart, Kind::Reboot].contains(&act.kind) {
            self.clients[act.vm].forgive();
        }
        self.check_connections()?;
        self.check_histories()?;
        self.check_leaks()
    }

    /// Another host than the one at fault, and a VM.
    fn elsewhere(&mut self, act: &Act) -> (String, String) {
        let hosts = self.lab.hosts();
        let host =
            (act.host + 1 + self.random.below(hosts.len() as u64 - 1) as usize) % hosts.len();
        let vm = self.random.below(self.vms.len() as u64) as usize;
        (hosts[host].clone(), self.vms[vm].clone())
    }

    /// Waits until every VM is protected by all other hosts, and answers.
    fn settle(&self) -> Result<(), SoakError> {
        for (vm, clients) in self.vms.iter().zip(&self.clients) {
            let mut last = None;
            let mut dead = None;
            let whole = wait_for(&format!("{vm} to be protected again"), PROTECTED, || {
                dead = self.dead_agent();
                if dead.is_some() {
                    return Some(());
                }
                let (_, status) = self.lab.owner(vm)?;
                let whole = status.protected
                    && status.pid != 0
                    && status.chain.len() + 1 == self.lab.hosts().len();
                last = Some(status);
                whole.then_some(())
            });
            whole.map_err(|e| SoakError::Found(format!("{e}; its owner says {last:?}")))?;
            if let Some(dead) = dead {
                return Err(SoakError::Found(dead));
            }
            let target = clients.answers() + ANSWERS;
            let answers = wait_for(&format!("answers of {vm}"), SETTLED, || {
                // A machine that has forgotten its connections answers nothing any more: why is in the history.
                let done = clients.answers() >= target || clients.check().is_err();
                done.then_some(())
            });
            answers.map_err(|e| SoakError::Found(e.to_string()))?;
        }
        Ok(())
    }

    fn dead_agent(&self) -> Option<String> {
        self.lab.hosts().iter().find_map(|host| {
            let how = self.lab.ended_by_itself(host)?;
            Some(format!("the agent of {host} ended by itself: {how}"))
        })
    }

    fn check_connections(&self) -> Result<(), SoakError> {
        for (vm, clients) in self.vms.iter().zip(&self.clients) {
            if let Some(why) = clients.take_broken().first() {
                return Err(SoakError::Found(format!(
                    "a connection to {vm} ended: {why}"
                )));
            }
        }
        Ok(())
    }

    fn check_histories(&self) -> Result<(), SoakError> {
        for (vm, clients) in self.vms.iter().zip(&self.clients) {
            let checked = clients.check();
            checked.map_err(|why| SoakError::Found(format!("not linearizable, {vm}: {why}")))?;
        }
        Ok(())
    }

    /// What is left over goes away soon, or is a leak.
    fn check_leaks(&self) -> Result<(), SoakError> {
        let mut last = String::new();
        let placed = wait_for("nothing to be left over", SETTLED, || {
            let odd = leaks::out_of_place(&self.lab, self.vms.len()).ok()?;
            let grown = Fullest::now(&self.lab).ok()?.beyond(&self.first);
            match odd.or(grown) {
                Some(what) => {
                    last = what;
                    None
                }
                None => Some(()),
            }
        });
        placed.map_err(|e| SoakError::Found(format!("{e}: {last}")))
    }

    fn report(&self, found: Option<&SoakError>) -> Report {
        let longest = self.clients.iter().map(Clients::longest).max();
        Report {
            seed: self.seed,
            seconds: self.begun.elapsed().as_secs(),
            acts: self.acts,
            answers: self.clients.iter().map(Clients::answers).sum(),
            longest_call_ms: longest.unwrap_or_default().as_secs_f64() * 1000.0,
            left_out: self.left_out.clone(),
            found: found.map(ToString::to_string),
            events: self.events.clone(),
        }
    }
}

/// What may be chosen, and what this program cannot do.
fn kinds(lab: &Lab, only: &[String]) -> Result<(Vec<Kind>, Vec<&'static str>), SoakError> {
    if let Some(odd) = only
        .iter()
        .find(|n| !Kind::ALL.iter().any(|k| k.name() == *n))
    {
        let names: Vec<&str> = Kind::ALL.iter().map(|k| k.name()).collect();
        return Err(SoakError::Usage(format!(
            "{odd:?} is none of {}",
            names.join(", ")
        )));
    }
    let mut wanted: Vec<Kind> = Kind::ALL.to_vec();
    wanted.retain(|k| only.is_empty() || only.iter().any(|n| n == k.name()));
    let mut left_out = Vec::new();
    let reboots = acts::has_command(lab, &["reboot", "--help"])?;
    for kind in [Kind::Reboot, Kind::StopStart] {
        // What starts a VM by its name came with what resets one.
        if !reboots && wanted.contains(&kind) {
            wanted.retain(|k| *k != kind);
            left_out.push(kind.name());
        }
    }
    Ok((wanted, left_out))
}

/// Whether this program can have a mechanism switched off: it is the tests' then, and refuses one that there is not.
fn can_break(lab: &Lab) -> Result<(), SoakError> {
    let mut command = lab.command_on(&lab.hosts()[0])?;
    command.arg("--version").env("UNDERSTUDY_BREAK", "nothing");
    match lab.output(command, SETTLED)?.ok {
        true => Err(SoakError::Usage(
            "--break: this program cannot switch anything off; run the tests' understudy-under-test"
                .into(),
        )),
        false => Ok(()),
    }
}
