//! The virtio devices, driven by a mock driver through registers and rings, without KVM.

mod blk;
mod checkpointing;
mod driver;
mod gated;
mod hostile;
mod legacy;
mod net;
mod stand_ins;
mod transport;
