//! The process of one VM: `understudy vmm`.
//!
//! Plain (`--config vm.toml`) it runs a VM unprotected. Started by an agent (`--child-fd N`) it is an owner (VM and
//! epoch loop) or a standby that becomes one.

mod build;
mod disk;
mod network;
mod orphaned;
mod plain;
mod protected;
mod protector;
pub mod proto;
mod reporter;

pub use build::{BuildError, open_disks, ram_of, shape_of};
pub use plain::run_plain;
pub use protected::run_child;

/// CLOCK_MONOTONIC in microseconds: comparable between the processes of one host.
#[must_use]
pub fn monotonic_us() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("CLOCK_MONOTONIC always exists");
    now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000
}
