//! What a machine wants done.

use chain::master::Command;
use chain::{Mark, Member, View, VmRecord};
use checkpoint::Generation;

use super::Ticket;
use crate::config::Epochs;
use crate::control::{EventKind, Switched};

/// One thing to do, in the order given. Those marked *slow* are done on the side; their outcome comes as an input.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Freeze this host's replica for a takeover. Answered at once, by `Input::Frozen`.
    Freeze,
    /// The takeover came to nothing: the replica goes on.
    Unfreeze,
    /// The replica follows a newer configuration.
    Adopt(View),
    /// Take the replica apart: the VM is this host's. Answered at once, by `Input::HandedOver`.
    HandOver(View),
    /// This host holds no replica any more; whoever speaks of it in an older generation is refused.
    RemoveReplica(Generation),
    /// The same, but this host should have one: why it has not.
    Decline(Generation, String),
    /// Take over the VM's process that an agent before has left running, if there is one. Answered at once, by
    /// `Input::Adopted`.
    FindProcess,
    /// Slow: make or reopen the replica, and start its standby's process. `Input::Spawned` answers.
    StandBy(VmRecord),
    /// Slow: start a process that boots the VM. `Input::Spawned` answers, then the process reports.
    Boot(VmRecord, Disks),
    /// The standby becomes the VM, at what was handed over.
    Activate {
        /// The configuration in which this host owns it.
        view: View,
        /// The checkpoint.
        mark: Mark,
    },
    /// Tell the process.
    Tell(Tell),
    /// End the process, at once.
    Kill,
    /// Slow: wait until the process that was ended is gone, and has let go of disks and taps. `Input::Buried` answers.
    Bury,
    /// Slow: ask the master. `Input::Proposed` answers.
    Propose {
        /// Names this question.
        ask: u64,
        /// What is asked for.
        command: Command,
    },
    /// Slow: read what the master has decided. `Input::Decided` answers, if there is something new.
    Read,
    /// Slow: ask these hosts whether they are well. `Input::Probed` answers.
    Probe(Vec<Member>),
    /// Slow: ask the members of this chain what they hold. `Input::Surveyed` answers.
    Survey(View),
    /// Slow: tell the chain's head that its owner does not run the VM any more.
    Yield(View),
    /// Slow: bring the chain up to date with what this new owner had as a replica. `Input::Bridged` answers.
    Bridge {
        /// The configuration.
        view: View,
        /// What this owner resumed from.
        mark: Mark,
    },
    /// Slow: look for this host's copy of the VM's disks. `Input::DisksFound` answers.
    FindDisks(VmRecord),
    /// For the event log.
    Say(EventKind, String),
    /// An order is done, or not.
    Answer(Ticket, Result<Answered, String>),
    /// Nothing is left to decide about this VM here.
    Forget,
}

/// Where a VM boots from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// The images that its configuration names.
    Configured,
    /// What `Effect::FindDisks` has found.
    Found,
}

/// What an owner's process is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Tell {
    /// Follow this configuration.
    Protect(View),
    /// The last backup is lost: stand still.
    Freeze,
    /// Stop at the end of an epoch and ask the head to take over.
    HandOver,
    /// Nobody has: run on.
    RunOn,
    /// Epochs of these lengths from now on.
    Epochs(Epochs),
    /// Press the guest's reset button.
    Reset,
    /// Press the guest's power button; once it has switched itself off it boots again, or stays off.
    PowerButton {
        /// It boots again.
        reboot: bool,
    },
}

/// How an order ended well.
#[derive(Clone, Debug, PartialEq)]
pub enum Answered {
    /// Done.
    Done,
    /// Another host owns the VM.
    Switched(Switched),
}
