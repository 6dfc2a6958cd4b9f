//! A minimal KVM virtual machine: boot, devices, dirty tracking, pause, capture, restore. Knows nothing of replication.

pub mod backend;
pub mod devices;
