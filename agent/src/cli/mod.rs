//! The command line.

mod tools;
mod vm;

use std::path::PathBuf;

use checkpoint::RequestId;
use clap::{Args, Parser, Subcommand};

pub use tools::{
    BenchCommand, ChainArgs, DemoArgs, FailoverArgs, FaultKind, LabArgs, LabCommand, LatencyArgs,
    PauseArgs, SoakArgs, Victim,
};
pub use vm::VmCommand;

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
    /// What is done to VMs.
    #[command(flatten)]
    OfVm(VmCommand),
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

/// How the agent is reached.
#[derive(Clone, Debug, Args)]
pub struct Control {
    /// The agent's control socket.
    #[arg(long, default_value = "/run/understudy/control.sock")]
    pub control: PathBuf,
}

/// How an order is given.
#[derive(Clone, Debug, Args)]
pub struct Given {
    /// How the agent is reached.
    #[command(flatten)]
    pub to: Control,
    /// The id under which the order was given before, if its outcome is not known: it is not carried out twice.
    #[arg(long, value_name = "ID")]
    pub request: Option<RequestId>,
}

impl Given {
    /// An order that was not given before.
    #[must_use]
    pub fn anew(to: &Control) -> Self {
        Self {
            to: to.clone(),
            request: None,
        }
    }
}
