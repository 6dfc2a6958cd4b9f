//! What an agent and its VM processes say to each other (over [`crate::ipc`]).

use std::path::PathBuf;

use checkpoint::{ClusterId, CpuFeatures, Epoch, Generation, HostId, VmId};
use serde::{Deserialize, Serialize};

use crate::config::Epochs;
use crate::control::EventKind;
use crate::epoch::EpochStats;
use crate::epoch::figures::{Figures, SyncFigures};

/// First message to a new VM process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// The VM's configuration, as TOML.
    pub config_toml: String,
    /// Name of the file the text came from, for messages.
    pub config_name: String,
    /// Tap names, one per network card.
    pub taps: Vec<TapSpec>,
    /// What to be.
    pub role: Role,
    /// Milliseconds between heartbeats to the chain.
    pub heartbeat_ms: u64,
    /// Silence after which a host is suspected, in milliseconds.
    pub silence_ms: u64,
    /// The host this runs on.
    pub host: HostId,
    /// The VM.
    pub vm: VmId,
    /// The record of it that this process is started by.
    pub registered: Registered,
    /// Where an owner waits for the next agent when its own is gone; none: it ends with its agent.
    pub door: Option<PathBuf>,
    /// How long it waits, in milliseconds, before its chain's head is asked to take over.
    pub agent_return_ms: u64,
}

/// A record at the master, as of some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// Whose master.
    pub cluster: ClusterId,
    /// The master's revision in which it decided on the record.
    pub revision: u64,
}

/// One network card's tap on this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TapSpec {
    /// Interface name.
    pub name: String,
    /// Bridge to join.
    pub bridge: Option<String>,
}

/// What a VM process is started as.
#[derive(Debug, Serialize, Deserialize)]
pub enum Role {
    /// Boot the VM and run it. RAM is the process's own; nothing comes with the message.
    Boot {
        /// The disks' images, in order; none: those that the configuration names.
        disks: Option<Vec<std::path::PathBuf>>,
        /// The features that the VM had when it was booted for the first time: no more than these.
        cpu: CpuFeatures,
    },
    /// Build the VM around the RAM files that come with this message and wait for [`ToChild::Activate`].
    Standby {
        /// Sizes of the disks in bytes, in order.
        disk_sizes: Vec<u64>,
    },
}

/// Agent to VM process.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToChild {
    /// Standby only: become the VM at this checkpoint.
    Activate(Box<Activate>),
    /// Protect by this configuration (or, with an empty chain, stop holding output).
    Protect(Box<chain::View>),
    /// Planned switchover: stop the guest at the end of an epoch, and once that is committed ask the head to take over.
    HandOver,
    /// The last backup is lost: stand still, output held, until the next [`ToChild::Protect`].
    Freeze,
    /// Nobody has taken it over: run on.
    RunOn,
    /// Press the guest's reset button.
    Reset,
    /// Press the guest's power button: it is to switch itself off.
    PowerButton {
        /// It boots again then, in place. Otherwise it stays off.
        reboot: bool,
    },
    /// Bench only: harvest the dirty log every `ms` without copying or sending (0: stop).
    HarvestOnly {
        /// Period in milliseconds.
        ms: u64,
    },
    /// Answer with [`FromChild::Stats`] and begin a new measurement.
    TakeStats,
    /// Epochs of these lengths from now on.
    Epochs(Epochs),
    /// Answer with [`FromChild::Inspected`].
    Inspect,
    /// End the VM.
    Stop,
}

/// The machine a standby becomes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Activate {
    /// The configuration in which this host owns the VM.
    pub view: chain::View,
    /// The checkpoint that memory and mirrors are at.
    pub mark: chain::Mark,
    /// Encoded [`checkpoint::MachineState`].
    pub machine: Vec<u8>,
    /// The mirrors' files, in disk order.
    pub disks: Vec<std::path::PathBuf>,
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestEnd {
    /// It powered itself off.
    PoweredOff,
    /// It asked for a reset that was not carried out in place.
    Reset,
    /// A vCPU cannot go on.
    Crashed,
}

/// Who a VM's process is, for an agent that finds it running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owns {
    /// The VM.
    pub vm: VmId,
    /// The host it was started on.
    pub host: HostId,
    /// The record that it was started by.
    pub registered: Registered,
    /// The newest configuration that it was told.
    pub generation: Generation,
    /// The newest one whose first checkpoint is committed.
    pub protected: Option<Generation>,
    /// How the guest ended, if it has.
    pub ended: Option<String>,
    /// It stands still: the last backup of this generation is lost, and no other chain has it.
    pub frozen: Option<Generation>,
}

/// VM process to agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromChild {
    /// First, to an agent that has found this process running: an owner.
    Owns(Box<Owns>),
    /// Boot: the guest runs. Standby: instantiated and waiting.
    Ready,
    /// An activated standby's guest runs. Times are CLOCK_MONOTONIC microseconds.
    Activated {
        /// When the message to activate had arrived.
        begun_us: u64,
        /// When vCPU and device state were restored.
        restored_us: u64,
        /// When the guest ran again.
        running_us: u64,
    },
    /// The first checkpoint of this configuration is committed.
    Protected {
        /// The configuration.
        generation: Generation,
        /// The checkpoint.
        epoch: Epoch,
        /// Milliseconds since protection began.
        sync_ms: u64,
        /// What that took, if the chain began anew.
        sync: Option<SyncFigures>,
    },
    /// A replica follows a newer generation: this owner's next, or another owner's. Nothing is let out in this one any more.
    Refused {
        /// That generation.
        generation: Generation,
    },
    /// The chain does not answer any more; output stays held until the master has decided.
    ChainLost {
        /// Generation in which it was lost.
        generation: Generation,
        /// The replica that was lost, if known.
        host: Option<HostId>,
        /// Why.
        why: String,
        /// It cannot go on from what it holds; without a host named, the whole chain has to begin anew.
        unfit: bool,
    },
    /// A chain that begins anew in this configuration cannot be completed, for a cause of this host's (an unreadable disk, say)
    /// and not of the replicas'. Output flows as before, and nothing is sent to the chain: to be tried again later, in another
    /// configuration.
    AttemptFailed {
        /// The configuration.
        generation: Generation,
        /// Why, in words; names the disk and the place if it was one.
        why: String,
    },
    /// The guest was reset and boots again, in place.
    Rebooted {
        /// Why, in words.
        how: String,
    },
    /// The replica that is joining has everything.
    JoinerReady {
        /// Generation in which it has.
        generation: Generation,
    },
    /// The guest stands still at this checkpoint, which is committed; the head has been asked to take over.
    HandedOver {
        /// The checkpoint.
        epoch: Epoch,
    },
    /// How the owner is doing; from time to time, unasked.
    Figures {
        /// Of its epochs.
        figures: Figures,
        /// What is wrong with its disks, in words.
        disks: Vec<String>,
    },
    /// Answer to [`ToChild::TakeStats`].
    Stats(Box<EpochStats>),
    /// Answer to [`ToChild::Inspect`]: what each vCPU is at, or why that cannot be told.
    Inspected(Result<Vec<vmm::VcpuReport>, String>),
    /// The guest has ended.
    GuestEnded {
        /// Of its own accord, or not.
        end: GuestEnd,
        /// In words.
        how: String,
    },
    /// Something an administrator should know of, for the host's event log.
    Said {
        /// What kind of event.
        kind: EventKind,
        /// In words.
        text: String,
    },
    /// This owner cannot keep the VM running as it should (its disk refuses writes, say), but a backup could: whoever is the
    /// chain's head is to take the VM over. The guest stands still and its output stays held until this process is ended or
    /// told otherwise.
    GiveUp {
        /// Why, in words.
        why: String,
    },
    /// The process cannot go on.
    Fatal(String),
}
