//! A lab: several hosts on one machine, an agent each, wires that can be pulled, disks that can fail. The demo, the
//! benches, the soak and the whole-system tests all use this one.
//!
//! Needs `/dev/kvm`, `/dev/net/tun` and namespaces; for disks that fail `/dev/fuse`. No other programs.

mod cluster;
pub mod disk;
mod error;
pub mod files;
mod fuse;
pub mod net;
pub mod process;
mod random;
pub mod soak;
mod tree;
mod up;
pub mod wait;

pub use cluster::{Lab, Options, check_machine, enter};
pub use disk::Health;
pub use error::LabError;
pub use files::{Boot, GUEST, GUEST_MAC, Masters, VmFile};
pub use net::{CLIENT, Namespace, Network, Wire};
pub use random::{Random, fresh_seed};
pub use up::up;
pub use wait::wait;
