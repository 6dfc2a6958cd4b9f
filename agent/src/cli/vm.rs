//! What is done to VMs.

use std::path::PathBuf;

use checkpoint::RequestId;
use clap::Subcommand;

use super::{Control, Given};

/// Commands that change a VM, or where it is.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Boot a VM on this host without protecting it yet: a configuration file defines a new one; a name means one that is off,
    /// which boots from its newest disks.
    Start {
        /// The VM's configuration, or its name.
        #[arg(value_name = "VM.TOML|NAME")]
        config: PathBuf,
        /// How the agent is reached.
        #[command(flatten)]
        control: Given,
    },
    /// Give a VM the configuration of a file: shows what differs, and changes what can be changed now. A VM that does not exist
    /// is defined, and off. The same file again changes nothing.
    #[command(visible_alias = "define")]
    Apply {
        /// The VM's configuration.
        #[arg(value_name = "VM.TOML")]
        config: PathBuf,
        /// Only show what differs.
        #[arg(long)]
        dry_run: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// How the agent is reached.
        #[command(flatten)]
        control: Given,
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
        control: Given,
    },
    /// Take a VM's backups away: it runs on, and the loss of its host ends it. Until the next `protect`.
    Unprotect {
        /// The VM's name.
        vm: String,
        /// How the agent is reached.
        #[command(flatten)]
        control: Given,
    },
    /// What became of an order whose outcome was not known in time.
    Outcome {
        /// The id that the order was given under.
        id: RequestId,
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
        control: Given,
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
        control: Given,
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
        control: Given,
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
        control: Given,
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
        control: Given,
    },
    /// Kill the process of a VM that runs here, to see a backup take it over.
    Drill {
        /// The VM's name.
        vm: String,
        /// How the agent is reached.
        #[command(flatten)]
        control: Given,
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
        control: Given,
    },
}
