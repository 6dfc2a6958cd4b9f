//! What a machine is told.

use chain::{Held, Mark, VmRecord, VmShape};
use checkpoint::{Epoch, Generation, HostId};

use super::Micros;
use crate::child::proto::{GuestEnd, Owns};

/// Names an order whose outcome somebody waits for; the driver's to choose.
pub type Ticket = u64;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The master has decided, whoever asked. Records of older generations change nothing.
    Decided(VmRecord),
    /// The master's record has lost the VM, after this host had seen it there: it was deleted.
    Removed,
    /// Outcome of [`Effect::Propose`](super::Effect::Propose).
    Proposed {
        /// Which one.
        ask: u64,
        /// The VM's record after the decision.
        result: Result<VmRecord, Refusal>,
    },
    /// This host's replica suspects its predecessor.
    Suspected {
        /// Milliseconds of silence; 0: the owner has stopped the VM and yields it.
        silence_ms: u64,
    },
    /// This host's replica has declared itself failed.
    ReplicaFailed {
        /// Why, in words.
        why: String,
    },
    /// Outcome of [`Effect::Freeze`](super::Effect::Freeze): what the replica holds.
    Frozen(Result<Mark, String>),
    /// Outcome of [`Effect::HandOver`](super::Effect::HandOver): the checkpoint to resume from.
    HandedOver(Result<Mark, String>),
    /// Outcome of [`Effect::FindProcess`](super::Effect::FindProcess): who the process is, if there is one.
    Adopted(Option<Owns>),
    /// Outcome of [`Effect::StandBy`](super::Effect::StandBy) or [`Effect::Boot`](super::Effect::Boot): the process exists.
    Spawned(Result<(), String>),
    /// Outcome of [`Effect::Bury`](super::Effect::Bury).
    Buried,
    /// The VM's process says something.
    Report(Report),
    /// Outcome of [`Effect::Bridge`](super::Effect::Bridge).
    Bridged {
        /// The generation that was bridged to.
        generation: Generation,
        /// Whether the chain holds what this owner resumed from.
        result: Result<(), Loss>,
    },
    /// Outcome of [`Effect::Probe`](super::Effect::Probe).
    Probed(Vec<(HostId, Health)>),
    /// Outcome of [`Effect::Survey`](super::Effect::Survey): what each member of the chain holds.
    Surveyed(Vec<(HostId, Held)>),
    /// Outcome of [`Effect::FindDisks`](super::Effect::FindDisks).
    DisksFound(Result<(), String>),
    /// An administrator's order.
    Ordered(Ticket, Order),
    /// Time has passed.
    Tick,
}

/// What a VM's process says that matters to what is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A booted guest runs; a standby is instantiated.
    Ready,
    /// An activated guest runs.
    Activated {
        /// When vCPU and device state were restored.
        restored_us: u64,
        /// When the guest ran.
        running_us: u64,
    },
    /// The first checkpoint of a configuration is committed.
    Protected {
        /// The configuration.
        generation: Generation,
        /// In words.
        text: String,
    },
    /// A replica follows a newer generation.
    Refused {
        /// That generation.
        generation: Generation,
    },
    /// A replica, or the whole chain, is of no use any more.
    Lost(Loss),
    /// The chain that begins cannot be completed, for a cause of this host's: an unreadable disk, say. Output flows.
    AttemptFailed {
        /// The configuration.
        generation: Generation,
        /// The cause, in words.
        why: String,
    },
    /// The joining replica has everything.
    JoinerReady {
        /// The configuration in which it joins.
        generation: Generation,
    },
    /// The guest stands still at this checkpoint, which is committed, and the head has been asked to take over.
    HandedOver {
        /// The checkpoint.
        epoch: Epoch,
    },
    /// The guest was reset, and boots again in place.
    Rebooted {
        /// Why, in words.
        how: String,
    },
    /// The guest has ended.
    Ended {
        /// How.
        end: GuestEnd,
        /// In words.
        how: String,
    },
    /// The process cannot go on as an owner, or at all.
    GiveUp {
        /// Why, in words.
        why: String,
    },
    /// The process is gone.
    Gone,
}

/// A replica that is lost to its owner, or a chain that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The configuration that this is about; of an older one it says nothing.
    pub generation: Generation,
    /// The replica concerned; none: whoever does not answer.
    pub host: Option<HostId>,
    /// What it holds cannot be gone on from. Without a host this is the whole chain's: it begins anew.
    pub unfit: bool,
    /// In words.
    pub why: String,
}

/// How another host is, as far as a question tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It answered.
    Answers,
    /// It answered; its replica has had one piece of a checkpoint in hand for so long.
    Busy {
        /// Milliseconds.
        ms: u64,
        /// After so many it hangs, if output waits for it.
        hangs_ms: u64,
    },
    /// It answered that it cannot hold a replica, or that its replica has failed; in words. Asked anew it may.
    Declines(String),
    /// It does not answer; in words.
    Silent(String),
}

/// How long a replica may have one piece in hand while nobody waits for it, at least, in milliseconds: the chain begins, and the
/// end of its first checkpoint is everything at once.
const HANGS_FILLING_MS: u64 = 30_000;

impl Health {
    /// What keeps the host from backing a VM up, if anything does; `waited_for`: the chain is filled, so that output waits
    /// for it.
    #[must_use]
    pub fn trouble(&self, waited_for: bool) -> Option<String> {
        match self {
            Self::Declines(why) | Self::Silent(why) => Some(why.clone()),
            Self::Busy { ms, hangs_ms } => {
                let limit = match waited_for {
                    true => *hangs_ms,
                    false => HANGS_FILLING_MS.max(*hangs_ms),
                };
                (*ms >= limit).then(|| format!(
                    "it has been handling one piece of a checkpoint for {ms} ms: its storage hangs, most likely"
                ))
            }
            Self::Answers => None,
        }
    }
}

/// What is known of that host, if it was asked.
pub(super) fn health_of<'a>(answers: &'a [(HostId, Health)], host: &HostId) -> Option<&'a Health> {
    let of = answers.iter().find(|(asked, _)| asked == host);
    of.map(|(_, health)| health)
}

/// Why the master did not decide as asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It refused; nothing has changed.
    Rejected(String),
    /// Nothing is known of its decision.
    Unknown(String),
}

/// What an administrator may want of a VM on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Of a standby: take the VM over.
    Failover,
    /// Of an owner: give the VM to the chain's head, nothing lost.
    HandOver,
    /// Of an owner: kill the process, to see a backup take over.
    Drill,
    /// Boot the VM from this host's disks, whatever other hosts may hold.
    Recover {
        /// This host's replica holds a complete checkpoint.
        resumable: bool,
    },
    /// Of an owner: protect the VM by these hosts, head first.
    Protect {
        /// In this order.
        backups: Vec<HostId>,
    },
    /// Of an owner: the VM is to have no backups any more.
    Unprotect,
    /// Of an owner, or of a VM that is off: this is its configuration from now on. What a replica lays out does not differ
    /// while it runs.
    Apply {
        /// With the configuration's text.
        shape: Box<VmShape>,
    },
    /// Of an owner: the VM is to run nowhere. Its newest disks stay here.
    Stop,
    /// The same, but its guest is asked to switch itself off, and has so many microseconds for that.
    ShutDown {
        /// How long.
        patience: Micros,
    },
    /// Of an owner: its guest boots again, in place. It is asked to switch itself off first, and has so many microseconds for
    /// that; or it is reset at once.
    Reboot {
        /// How long; none: at once.
        patience: Option<Micros>,
    },
    /// Of a VM that is off, whose newest disks are here: boot it.
    Start,
    /// Of a VM that is off, or runs nowhere: the cluster forgets it.
    Delete,
}
