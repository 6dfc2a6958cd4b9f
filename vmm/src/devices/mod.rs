//! The devices of a machine: virtio over MMIO (net, block, rng), the serial console, the RTC and the reset port.
//!
//! [`DeviceManager`] owns them, runs one worker thread for each that has events of its own, and stops them all for
//! a checkpoint.

pub mod manager;

pub use manager::{DeviceManager, DeviceSpec, MmioSlot, NetSpec, Wiring};

use thiserror::Error;

/// Guest memory as the devices see it: every write through it is marked in its dirty bitmap.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// One device's saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Which device, e.g. `net0`.
    pub name: String,
    /// Version of the layout of `state`.
    pub version: u16,
    /// The state, by the codec.
    pub state: Vec<u8>,
}

/// Why devices could not be made, saved or restored.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// More devices than the bus has places for.
    #[error("{wanted} virtio devices configured, the bus has {room} places")]
    TooMany {
        /// Devices configured.
        wanted: usize,
        /// Places on the bus.
        room: usize,
    },
    /// An operating-system object (eventfd, epoll, thread) could not be made.
    #[error("{what}: {source}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A saved state does not fit the machine it is restored into.
    #[error("state of device {name}: {why}")]
    State {
        /// Name of the device, e.g. `blk0`.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}
