//! What a failed test prints of its hosts, while they still run.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use agent::control::ControlClient;

/// An agent that says nothing for so long (frozen, cut off) is left out.
const PATIENCE: Duration = Duration::from_secs(40);
/// Between two looks at the vCPUs: what does not change in this time stands still.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Lines of the guest's console.
const CONSOLE_LINES: usize = 40;
/// Newest events of each host.
const EVENTS: usize = 20;
/// Where KVM counts, if debugfs is mounted.
const KVM_COUNTERS: &str = "/sys/kernel/debug/kvm";

/// What each host's agent says of `vm`, the guest's console, and KVM's counters.
#[must_use]
pub fn of_hosts(hosts: &[(String, PathBuf)], vm: &str, console: &Path) -> String {
    let asked: Vec<_> = hosts
        .iter()
        .map(|(name, control)| {
            let (sender, receiver) = channel();
            let (name, control, vm) = (name.clone(), control.clone(), vm.to_owned());
            // A thread each: one agent that does not answer keeps nobody from the others.
            std::thread::spawn(move || {
                ask(&name, &control, &vm, &mut |text| {
                    let _ = sender.send(text);
                })
            });
            receiver
        })
        .collect();
    let deadline = Instant::now() + PATIENCE;
    let mut out = String::new();
    for ((name, _), answers) in hosts.iter().zip(asked) {
        let _ = writeln!(out, "--- host {name}");
        while let Ok(text) =
            answers.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            let _ = writeln!(out, "{text}");
        }
    }
    let _ = writeln!(
        out,
        "--- the guest's console\n{}",
        tail(console, CONSOLE_LINES)
    );
    let _ = writeln!(out, "--- KVM's counters\n{}", kvm_counters());
    out
}

/// Asks one agent; says each answer as it comes.
fn ask(name: &str, control: &Path, vm: &str, say: &mut dyn FnMut(String)) {
    let mut agent = match ControlClient::connect(control) {
        Ok(agent) => agent,
        Err(e) => return say(format!("{name} does not answer: {e}")),
    };
    match agent.status() {
        Ok(list) => say(format!("status: {list:#?}")),
        Err(e) => return say(format!("status: {e}")),
    }
    let events = agent.events(0).unwrap_or_default();
    for event in &events[events.len().saturating_sub(EVENTS)..] {
        say(format!(
            "event at {} us: {:?} {} {}",
            event.at_us, event.kind, event.vm, event.text
        ));
    }
    for look in ["first look", "second look"] {
        match agent.inspect(vm) {
            Ok(vcpus) => {
                let vcpus: Vec<String> = vcpus.iter().map(ToString::to_string).collect();
                say(format!("vCPUs, {look}:\n{}", vcpus.join("\n")));
            }
            Err(e) => return say(format!("vCPUs: {e}")),
        }
        // For the owner only; the second figures are those of the time between.
        match agent.stats(vm) {
            Ok(stats) => say(format!("epochs until the {look}: {stats:?}")),
            Err(e) => return say(format!("epochs: {e}")),
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The last lines of a file.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_else(|e| format!("{}: {e}", path.display()));
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// All counters of all VMs that are not zero: exits, injections, halts, page faults.
fn kvm_counters() -> String {
    let mut out = String::new();
    let mut dirs = vec![PathBuf::from(KVM_COUNTERS)];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            let _ = writeln!(out, "{} cannot be read (debugfs)", dir.display());
            continue;
        };
        let mut line = String::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if let Ok(value) = std::fs::read_to_string(&path)
                && value.trim() != "0"
                && value.lines().count() == 1
            {
                let _ = write!(line, " {}={}", entry.file_name().display(), value.trim());
            }
        }
        let _ = writeln!(out, "{}:{line}", dir.display());
    }
    out
}
