//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Keeps a running, unmodified VM alive through the death of its host.
#[derive(Debug, Parser)]
#[command(name = "understudy", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this host's agent.
    Agent {
        /// The host's configuration.
        #[arg(long, value_name = "HOST.TOML")]
        config: PathBuf,
        /// This host's name, whatever the file says; so one file can be given to all hosts.
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
        /// Begin a new cluster: where this host is to serve the master and there is no record of one, begin one.
        #[arg(long)]
        init: bool,
    },
    /// Run a VM without protection, as a plain VMM; its console is this terminal.
    Vmm {
        /// The VM's configuration.
        #[arg(long, value_name = "VM.TOML", required_unless_present = "child_fd")]
        config: Option<PathBuf>,
        /// Used by the agent.
        #[arg(long, hide = true, conflicts_with = "config")]
        child_fd: Option<i32>,
    },
    /// Boot a VM on this host without protecting it yet: a configuration file defines a new one; a name means one that is off,
    /// which boots from its newest disks.
    Start {
        /// The VM's configuration, or its name.
        #[arg(value_name = "VM.TOML|NAME")]
        config: PathBuf,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Protect a VM: a configuration file boots it first, a name means one that runs already.
    Protect {
        /// `vm.toml`, or the name of a VM that runs on this host.
        vm: String,
        /// Backup hosts, head of the chain first (default: the configuration's `protect.backups`).
        #[arg(long, value_delimiter = ',')]
        backups: Vec<String>,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Forget a VM that is off. Its disks stay where they are.
    Delete {
        /// The VM's name.
        vm: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Shut down a VM that runs on this host: its power button is pressed, and it is off once its guest has switched itself off.
    /// Its disks stay its newest: `start NAME` boots it again.
    Stop {
        /// The VM's name.
        vm: String,
        /// Seconds that the guest may take.
        #[arg(long, default_value_t = 90, value_name = "SECONDS")]
        timeout: u64,
        /// At once, as a power cut would.
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Reboot a VM that runs on this host: its guest is asked to switch itself off, and boots again then, in place and as
    /// protected as it was.
    Reboot {
        /// The VM's name.
        vm: String,
        /// Seconds that the guest may take to switch itself off.
        #[arg(long, default_value_t = 90, value_name = "SECONDS")]
        timeout: u64,
        /// At once, as its reset button would: what its guest has not written to its disks is lost.
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// What this host knows of its VMs.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Again every second, until interrupted.
        #[arg(long)]
        watch: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// What a VM's vCPUs are at: registers, timers, pending interrupts. Stops them for as long as reading takes.
    Inspect {
        /// The VM's name.
        vm: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Take a VM over on this host, which holds a replica of it; or, with --planned, hand one over that runs here.
    Failover {
        /// The VM's name.
        vm: String,
        /// On its owner: stop it at the end of an epoch, and let the first backup take it over. Nothing is lost.
        #[arg(long)]
        planned: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Hand over every VM that runs on this host to its first backup, before the host is stopped or its agent exchanged.
    /// Fails if one stays: it says which and why.
    Evacuate {
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// After the loss of all its hosts: boot a VM from this host's copy of its disks, without waiting for other hosts. What
    /// was only in its memory is lost; so may be the last moment before, if another copy is newer.
    Recover {
        /// The VM's name.
        vm: String,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Kill the process of a VM that runs here, to see a backup take it over.
    Drill {
        /// The VM's name.
        vm: String,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// On a backup: start a clone of a VM from a checkpoint of the past, memory and disks, while the VM goes on.
    Rewind {
        /// The VM's name.
        vm: String,
        /// The checkpoint (`understudy points` lists them).
        #[arg(long)]
        epoch: u64,
        /// The clone's name.
        #[arg(long = "as", value_name = "CLONE")]
        clone: String,
        /// Connect its network cards to this network of the host's configuration; otherwise they are connected to nothing.
        /// The clone has the VM's addresses.
        #[arg(long)]
        network: Option<String>,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Which checkpoints of a VM its chain's tail has.
    Points {
        /// The VM's name.
        vm: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// What has happened on this host.
    Events {
        /// Go on with what happens, until interrupted.
        #[arg(long, short)]
        follow: bool,
        /// As JSON, one event a line.
        #[arg(long)]
        json: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Control,
    },
    /// Protect a VM, kill its host, and watch a client's TCP connection go on.
    Demo(DemoArgs),
    /// Measure.
    Bench {
        /// What.
        #[command(subcommand)]
        bench: BenchCommand,
    },
    /// Several hosts on this machine, to try things on.
    Lab {
        /// What.
        #[command(subcommand)]
        lab: LabCommand,
    },
    /// Hosts, VMs, clients; random faults and commands; everything that may not happen is looked for (scripts/soak).
    #[command(hide = true)]
    Soak(SoakArgs),
}

/// What a lab can do.
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Start one, and keep it until interrupted.
    Up(LabArgs),
}

/// Options of `understudy lab up`.
#[derive(Clone, Debug, Args)]
pub struct LabArgs {
    /// Hosts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub hosts: u8,
    /// VMs (probe guests), which the hosts run in turn and back up for each other.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=64))]
    pub vms: u8,
    /// Keep the working directory with the agents' logs.
    #[arg(long)]
    pub keep: bool,
}

/// Options of `understudy soak`.
#[derive(Clone, Debug, Args)]
pub struct SoakArgs {
    /// How long faults are made, in minutes.
    #[arg(long, default_value_t = 10.0)]
    pub minutes: f64,
    /// What chance begins with; another one each time by default.
    #[arg(long)]
    pub seed: Option<u64>,
    /// VMs.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub vms: u8,
    /// Faults and commands to choose from, by name (default: all).
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Switch this mechanism off on all hosts, to see that it is noticed. Takes the tests' program.
    #[arg(long = "break", value_name = "MECHANISM")]
    pub broken: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// How the agent is reached.
#[derive(Clone, Debug, Args)]
pub struct Control {
    /// The agent's control socket.
    #[arg(long, default_value = "/run/understudy/control.sock")]
    pub control: PathBuf,
}

/// Who is killed in the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Victim {
    /// The host that runs the VM.
    Owner,
    /// The first backup.
    Head,
    /// The second of three or more.
    Middle,
    /// The last backup.
    Tail,
    /// The leader of a master of three members; and then the owner, to see the others decide.
    Master,
}

/// Options of `understudy demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// A stock guest's kernel (bzImage or ELF) instead of the probe guest.
    #[arg(long)]
    pub kernel: Option<PathBuf>,
    /// Its initial ram disk.
    #[arg(long, requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line; it has to bring the network up at 10.77.0.2/24.
    #[arg(long, requires = "kernel")]
    pub cmdline: Option<String>,
    /// A raw disk image (a copy of it is used).
    #[arg(long)]
    pub disk: Option<PathBuf>,
    /// TCP port of an echoing or redis-like service in the stock guest.
    #[arg(long, default_value_t = 6379, requires = "kernel")]
    pub port: u16,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 128)]
    pub memory_mib: u64,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u8,
    /// Backups [default: 2; with --kill middle 3].
    #[arg(
        long,
        default_value = "2",
        default_value_if("kill", "middle", "3"),
        hide_default_value = true
    )]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=4))]
    pub backups: u8,
    /// Pages the probe guest dirties per pass.
    #[arg(long, default_value_t = 256)]
    pub pages: u64,
    /// Iterations of work after each page.
    #[arg(long, default_value_t = 20_000)]
    pub work: u64,
    /// Longest epoch in milliseconds.
    #[arg(long, default_value_t = 25)]
    pub epoch_ms: u64,
    /// Seconds of traffic before the owner is killed.
    #[arg(long, default_value_t = 2)]
    pub seconds: u64,
    /// What dies: the owner, or the chain's head or tail.
    #[arg(long, value_enum, default_value_t = Victim::Owner)]
    pub kill: Victim,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
    /// Keep the working directory with the agents' logs.
    #[arg(long)]
    pub keep: bool,
}

/// The benches.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// How long the guest stands still, and what protection costs it.
    Pause(PauseArgs),
    /// Request/response latency, unprotected and protected.
    Latency(LatencyArgs),
    /// Failovers: time per phase, requests lost, connections broken.
    Failover(FailoverArgs),
    /// Chains of 1 to 3 replicas: throughput, ack latency, and outages when a replica is lost.
    Chain(ChainArgs),
}

/// Options of `understudy bench pause`.
#[derive(Clone, Debug, Args)]
pub struct PauseArgs {
    /// Pages dirtied per pass.
    #[arg(long, default_value_t = 4096)]
    pub pages: u64,
    /// Iterations of work after each page.
    #[arg(long, default_value_t = 2000)]
    pub work: u64,
    /// Epoch length in milliseconds.
    #[arg(long, default_value_t = 25)]
    pub epoch_ms: u64,
    /// Seconds per measurement; each of the three runs twice.
    #[arg(long, default_value_t = 10)]
    pub seconds: u64,
    /// Backups.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub backups: u8,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `understudy bench latency`.
#[derive(Clone, Debug, Args)]
pub struct LatencyArgs {
    /// Seconds per measurement.
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Longest epoch in milliseconds.
    #[arg(long, default_value_t = 25)]
    pub epoch_ms: u64,
    /// Pages dirtied per pass meanwhile.
    #[arg(long, default_value_t = 0)]
    pub pages: u64,
    /// Iterations of work after each page.
    #[arg(long, default_value_t = 20_000)]
    pub work: u64,
    /// Backups.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub backups: u8,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What happens in `understudy bench failover`, always to the VM's owner unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// All processes of the host are killed; its kernel closes their connections.
    #[default]
    Kill,
    /// The VM's process is killed; its host lives.
    Crash,
    /// All frames of the host are dropped, so that nobody hears a FIN; then everything on it is killed.
    Host,
    /// The first backup stands still (SIGSTOP), and later goes on.
    FreezeHead,
    /// The last backup stands still, and later goes on.
    FreezeTail,
    /// Cut off from the backups and the master, but not from its clients; later not any more.
    Partition,
    /// The disk under the owner's image refuses writes.
    DiskError,
    /// The disk under the owner's image does not answer.
    DiskHang,
    /// The disk of the last backup does not answer.
    BackupDiskHang,
    /// The guest is reset.
    Reboot,
    /// Only the agent is killed, and started again.
    Agent,
}

/// Options of `understudy bench failover`.
#[derive(Clone, Debug, Args)]
pub struct FailoverArgs {
    /// Failovers.
    #[arg(long, default_value_t = 10)]
    pub runs: u32,
    /// What happens.
    #[arg(long, value_enum, default_value_t)]
    pub fault: FaultKind,
    /// One VM and one connection through all of them: each dead host comes back and joins again before the next dies.
    #[arg(long, conflicts_with = "fault")]
    pub alternate: bool,
    /// Backups.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub backups: u8,
    /// Pages dirtied per pass.
    #[arg(long, default_value_t = 256)]
    pub pages: u64,
    /// Iterations of work after each page.
    #[arg(long, default_value_t = 20_000)]
    pub work: u64,
    /// Longest epoch in milliseconds.
    #[arg(long, default_value_t = 25)]
    pub epoch_ms: u64,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `understudy bench chain`.
#[derive(Clone, Debug, Args)]
pub struct ChainArgs {
    /// Sizes of a checkpoint in MiB.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16], value_parser = clap::value_parser!(u64).range(1..=64))]
    pub epoch_mib: Vec<u64>,
    /// Seconds per measurement.
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Leave out the measurements with checkpoints made durable on disk.
    #[arg(long)]
    pub no_disk: bool,
    /// Losses of a replica per place in the chain.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}
