//! The state of what a machine's vCPUs share: clock, timer, interrupt controllers, power management.

use checkpoint::codec;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::pm::Pm;

/// Layout of [`VmState`] in a blob; a change of the struct raises it.
const VERSION: u16 = 2;
/// Most bytes of the blob.
const BLOB_LIMIT: usize = 16 << 10;
/// The controllers, in the order they are saved and restored.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// Why the shared state could not be read or restored.
#[derive(Debug, Error)]
pub enum VmStateError {
    /// KVM refused one part.
    #[error("{what}: {source}")]
    Kvm {
        /// Which ioctl.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The blob is not one of ours.
    #[error("machine state: {0}")]
    Codec(#[from] codec::CodecError),
    /// The blob's layout is of another version.
    #[error("machine state of version {0}, this program reads {VERSION}")]
    Version(u16),
    /// The interrupt controllers are not the expected ones.
    #[error("machine state: interrupt controllers {0:?}")]
    Chips(Vec<u32>),
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmStateError {
    move |e| VmStateError::Kvm {
        what,
        source: e.into(),
    }
}

/// See the module.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    version: u16,
    clock: kvm_clock_data,
    pit: kvm_pit_state2,
    chips: Vec<kvm_irqchip>,
    pub(crate) pm: Pm,
}

impl VmState {
    /// Reads the state; all vCPUs must be stopped.
    ///
    /// # Errors
    /// [`VmStateError::Kvm`] naming the part refused.
    pub(crate) fn capture(vm: &VmFd, pm: Pm) -> Result<VmState, VmStateError> {
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        Ok(VmState {
            version: VERSION,
            clock: vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?,
            pit: vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?,
            chips,
            pm,
        })
    }

    /// Restores the state; no vCPU may have run yet (their paravirtual clocks are computed from this one at entry).
    ///
    /// # Errors
    /// [`VmStateError::Kvm`] naming the part refused.
    pub(crate) fn apply(&self, vm: &VmFd) -> Result<(), VmStateError> {
        vm.set_pit2(&self.pit).map_err(kvm("KVM_SET_PIT2"))?;
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        // Without flags the clock goes on from the saved value: like the time-stamp counter, it stood still meanwhile.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))
    }

    /// The blob of this state.
    ///
    /// # Errors
    /// [`VmStateError::Codec`], never in practice: the size is fixed.
    pub(crate) fn to_blob(&self) -> Result<Vec<u8>, VmStateError> {
        Ok(codec::to_bytes(self, BLOB_LIMIT)?)
    }

    /// Reads a blob back.
    ///
    /// # Errors
    /// [`VmStateError`] if it is not one of ours.
    pub(crate) fn from_blob(blob: &[u8]) -> Result<VmState, VmStateError> {
        let state: VmState = codec::from_bytes(blob, BLOB_LIMIT)?;
        if state.version != VERSION {
            return Err(VmStateError::Version(state.version));
        }
        let chips: Vec<u32> = state.chips.iter().map(|chip| chip.chip_id).collect();
        if chips != CHIPS {
            return Err(VmStateError::Chips(chips));
        }
        Ok(state)
    }
}
