//! Whole-system tests: hosts as network namespaces, real guests, failures.
//!
//! The hosts are those of a lab, `agent::lab`.
//!
//! Needs root; what else is missing is named by [`require_everything`].

pub mod capture;
pub mod cluster;
pub mod diagnosis;
pub mod serial;
pub mod stock;
pub mod vmfile;

pub use agent::lab::CLIENT;
pub use capture::{Capture, Injector};
pub use cluster::{Cluster, MASTER, Network, Options, VM};
pub use vmfile::{GUEST, GUEST_MAC, VmFile};

pub use agent::lab::wait::{PATIENCE, patience};

/// Polls until `ready` answers.
///
/// # Panics
/// After [`patience`], naming `what`.
#[track_caller]
pub fn wait<T>(what: &str, ready: impl FnMut() -> Option<T>) -> T {
    match agent::lab::wait(what, ready) {
        Ok(value) => value,
        Err(e) => panic!("{e}"),
    }
}

/// Checks that this machine has what the tests need.
///
/// # Panics
/// Naming everything that is missing, and the remedy.
pub fn require_everything() {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root: the tests make network namespaces (run them with sudo)".to_string());
    }
    if let Err(e) = std::process::Command::new("ip").arg("-V").output() {
        missing.push(format!(
            "the program ip: {e} (Debian: apt install iproute2)"
        ));
    }
    for (path, remedy) in [
        (
            "/dev/kvm",
            "run on a machine with KVM, or inside scripts/kvm-host",
        ),
        ("/dev/net/tun", "modprobe tun"),
    ] {
        if let Err(e) = std::fs::File::options().read(true).write(true).open(path) {
            missing.push(format!("{path}: {e} ({remedy})"));
        }
    }
    assert!(
        missing.is_empty(),
        "this machine lacks what the whole-system tests need:\n  {}",
        missing.join("\n  ")
    );
}
