//! Why the master refuses.

use std::net::SocketAddr;

use checkpoint::{Generation, HostId, VmId};
use serde::{Deserialize, Serialize};

use crate::mark::Mark;

/// Why a command changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Rejection {
    /// The name is taken.
    #[error(
        "a VM named {0:?} exists already (owner: {1}); choose another name, or stop that VM first"
    )]
    NameTaken(String, HostId),
    /// The id is another VM's, or too much like one: to be asked again with another.
    #[error("the id {0}, or its short form, is another VM's; register it with a new id")]
    IdTaken(VmId),
    /// There is no such VM.
    #[error("the master knows no VM {0}")]
    Unknown(VmId),
    /// Decided on another generation.
    #[error("VM {vm} is in generation {actual} (owner: {owner}), not {expected}")]
    Generation {
        /// The VM.
        vm: VmId,
        /// As asked.
        expected: Generation,
        /// As it is.
        actual: Generation,
        /// Its owner.
        owner: HostId,
    },
    /// Only the owner may ask for this.
    #[error("{by} does not own VM {vm}, {owner} does")]
    NotOwner {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
        /// Its owner.
        owner: HostId,
    },
    /// Only a replica of the chain may take over.
    #[error("{by} is no member of VM {vm}'s chain")]
    NotMember {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
    },
    /// What the replica holds is no part of the VM's history any more.
    #[error("{by} holds checkpoint {at} of VM {vm}, which is not part of its history any more")]
    Outdated {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
        /// What it holds.
        at: Mark,
    },
    /// A chain that cannot be.
    #[error("that chain cannot be: {0}")]
    Chain(String),
    /// Only a VM that is on can be protected, taken over or restarted.
    #[error("VM {vm} is off, its newest disks are on {disks}; start it first")]
    Off {
        /// The VM.
        vm: VmId,
        /// Where its disks are.
        disks: HostId,
    },
    /// It is on already.
    #[error("VM {vm} is on already, {owner} runs it")]
    On {
        /// The VM.
        vm: VmId,
        /// Its owner.
        owner: HostId,
    },
    /// A host without the newest disks must not boot a VM as if it had them.
    #[error(
        "VM {vm}'s newest disks are on {disks}, not on {by}: start it there, or copy them first; only if {disks} is gone for good, recover it from older ones"
    )]
    DisksElsewhere {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
        /// Where they are.
        disks: HostId,
    },
    /// Memory, processors and disks of a VM that is on are what its replicas have laid out.
    #[error(
        "memory, processors and disks of VM {0} can change only while it is off; stop it first"
    )]
    InUse(VmId),
    /// Another host has that name.
    #[error(
        "host {host} is enrolled already, at {there}; the agent at {here} has the same name but another identity: give it a name of its own (`host` in host.toml), or, if the one at {there} is gone for good, have the master forget it first"
    )]
    HostTaken {
        /// The name.
        host: HostId,
        /// Whose it is.
        there: SocketAddr,
        /// Who asked.
        here: SocketAddr,
    },
    /// There is no such host.
    #[error("the master knows no host {0}")]
    UnknownHost(HostId),
    /// It was asked what became of the request before it arrived.
    #[error("the request came too late: whoever asked has given it up")]
    Expired,
}
