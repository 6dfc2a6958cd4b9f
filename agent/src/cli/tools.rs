//! The demo, the lab, the soak and the benches.

use std::path::PathBuf;

use clap::{Args, Subcommand};

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
    /// So many VMs of 64 MiB on one host, whose agent and VMs die at once.
    #[arg(long, conflicts_with_all = ["fault", "alternate"], value_parser = clap::value_parser!(u8).range(1..=100))]
    pub vms: Option<u8>,
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
