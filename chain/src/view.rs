//! What the master decides: who owns a VM and which replicas, in which order, hold its checkpoints.

use std::net::SocketAddr;

use checkpoint::{Generation, HostId, RamRange, VmId};
use serde::{Deserialize, Serialize};

/// A replica in a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its host.
    pub host: HostId,
    /// Its chain server.
    pub addr: SocketAddr,
}

/// One VM's configuration in one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The VM's number.
    pub vm: VmId,
    /// The VM's name.
    pub name: String,
    /// Raised by the master at every change of owner or chain.
    pub generation: Generation,
    /// The one host that may run the VM and release its output.
    pub owner: HostId,
    /// Head first. Empty: not protected, recorded by the master before output may flow.
    pub chain: Vec<Member>,
}

impl View {
    /// Position of `host` in the chain.
    #[must_use]
    pub fn position(&self, host: &HostId) -> Option<usize> {
        self.chain.iter().position(|m| m.host == *host)
    }
}

/// What a replica needs to hold a VM: image, mirrors, standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmShape {
    /// RAM.
    pub ram: Vec<RamRange>,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Disk sizes in bytes, in order.
    pub disks: Vec<u64>,
    /// Text of the VM's configuration.
    pub config_toml: String,
}

/// The master's record of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The configuration in force.
    pub view: View,
    /// What a replica needs.
    pub shape: VmShape,
}
