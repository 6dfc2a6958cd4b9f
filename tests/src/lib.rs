//! Whole-system tests: hosts as network namespaces, real guests, failures.
//!
//! ```text
//!   client -- lan0 --+-- host a: br0 -- tap of the VM        (guest LAN)
//!                    +-- host b: br0 -- tap of its standby
//!             repl0 -+-- a, b, ..., m (the master's host)    (checkpoints, control)
//! ```
//!
//! `lan0` and `repl0` are bridges in a namespace of their own, so that a host can lose one network and keep the other.
//! Needs root; what else is missing is named by [`require_everything`].

pub mod capture;
pub mod cluster;
pub mod diagnosis;
pub mod net;
pub mod serial;
pub mod stock;
pub mod vmfile;

pub use capture::{Capture, Injector};
pub use cluster::{Cluster, MASTER, Options, VM};
pub use net::{CLIENT, Network};
pub use vmfile::{GUEST, GUEST_MAC, VmFile};

use std::time::{Duration, Instant};

/// Generous bound for anything that should take milliseconds or seconds.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// [`PATIENCE`], or more on an emulated KVM host, where a guest is emulated twice.
#[must_use]
pub fn patience() -> Duration {
    match std::env::var_os("UNDERSTUDY_KVM_HOST") {
        Some(_) => 4 * PATIENCE,
        None => PATIENCE,
    }
}

/// Polls until `ready` answers.
///
/// # Panics
/// After [`patience`], naming `what`.
#[track_caller]
pub fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {} s in vain for {what}",
            patience().as_secs()
        );
        std::thread::sleep(Duration::from_millis(5));
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
