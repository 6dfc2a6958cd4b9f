//! The devices of a machine: virtio over MMIO (net, block, rng), the serial console, the RTC and the reset port.
//!
//! [`DeviceManager`] owns them, runs one worker thread for each that has events of its own, and stops them all for
//! a checkpoint.

pub mod block;
mod console;
mod fd;
pub mod gate;
pub mod manager;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod rng;
pub mod rtc;
pub mod serial;
mod state;
pub mod virtio;
mod worker;

pub use manager::{DeviceManager, DeviceSpec, MmioSlot, NetSpec, Wiring};

use thiserror::Error;

/// Guest memory as the devices see it: every write through it is marked in its dirty bitmap.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

pub use checkpoint::machine::DeviceState;

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
    /// The devices must be paused first.
    #[error("the devices are running; pause them first")]
    Running,
    /// The saved set of devices is not this machine's.
    #[error("the checkpoint has the devices {}, this machine has {have} devices", saved.join(", "))]
    Set {
        /// Names of the saved devices.
        saved: Vec<String>,
        /// How many this machine has, serial port and clock included.
        have: usize,
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
