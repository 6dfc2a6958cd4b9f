//! What can go wrong with a machine.

use thiserror::Error;

use crate::devices::DeviceError;
use crate::kvm_caps::KvmError;
use crate::layout::MAX_VCPUS;
use crate::memory::MemoryError;
use crate::msrs::MsrError;
use crate::vcpu_state::VcpuStateError;
use crate::vm_state::VmStateError;

/// Why something could not be done with a machine.
#[derive(Debug, Error)]
pub enum VmError {
    /// This host's KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A number of vCPUs that cannot be had.
    #[error("{0} vCPUs asked for: a machine has 1 to {MAX_VCPUS}")]
    VcpuCount(u8),
    /// KVM refused a part of the machine.
    #[error("{what}: {source}")]
    Create {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// KVM refused a memory slot.
    #[error("memory slot {slot}: {source}")]
    Slot {
        /// Number of the slot.
        slot: u32,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The MSRs this host has.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// A vCPU's state.
    #[error("vCPU {id}: {source}")]
    Vcpu {
        /// Which one.
        id: u8,
        /// What failed.
        source: VcpuStateError,
    },
    /// The state of what the vCPUs share.
    #[error(transparent)]
    State(#[from] VmStateError),
    /// Only a paused machine can do this.
    #[error("the machine is running; it must be paused first")]
    NotPaused,
    /// The guest has switched itself off or crashed.
    #[error("the guest has ended its run")]
    Ended,
    /// vCPUs that did not leave the guest.
    #[error("{0} vCPUs did not stop within 10 s")]
    Stuck(usize),
    /// The checkpoint is of a machine of another shape.
    #[error("the checkpoint does not fit this machine: {0}")]
    Shape(String),
}

/// Wraps KVM's refusal of `what`.
pub(crate) fn create(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |e| VmError::Create {
        what,
        source: e.into(),
    }
}
