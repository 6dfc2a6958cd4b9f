//! A minimal KVM virtual machine: boot, devices, dirty tracking, pause, capture, restore. Knows nothing of replication.
//!
//! [`Vm`] is the whole of it: made from a [`VmSpec`] and [`RamFiles`], started by [`Vm::boot`] or [`Vm::restore`],
//! then [`Vm::resume`]d, [`Vm::pause`]d and [`Vm::capture`]d at will, with [`DirtyTracker`] telling what changed.

mod acpi;
pub mod backend;
pub mod boot;
mod bus;
pub mod console_out;
mod control;
mod cpuid;
pub mod devices;
pub mod dirty;
mod dirty_log;
pub mod events;
mod inspect;
mod kernel;
pub mod kvm_caps;
pub mod layout;
pub mod memory;
mod msrs;
mod paging;
mod platform;
mod pm;
mod reset;
mod vcpu;
mod vcpu_state;
pub mod vm;
mod vm_error;
mod vm_state;
mod write_fault;

pub use boot::{BootError, BootFile, BootSpec, KernelSource};
pub use console_out::ConsoleOut;
pub use cpuid::host_cpu;
pub use dirty::{DirtyError, DirtyTracker};
pub use events::{Events, VmEvent};
pub use inspect::VcpuReport;
pub use memory::{GuestMemory, MemoryError, RamFiles, RamLayout};
pub use reset::Restart;
pub use vm::{Vm, VmError, VmSpec};
pub use write_fault::{measure_write_fault, write_fault};
