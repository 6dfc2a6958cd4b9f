//! One whole-system test at a time, whether tests are threads of one process (cargo test) or processes (nextest): they
//! start several VMs each, and a machine with two cores has room for one cluster.

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};

/// Held while a test runs. The lock goes with the process, however that ends.
#[derive(Debug)]
pub struct Turn(#[allow(dead_code)] Flock<File>);

/// Waits for this test's turn.
///
/// # Panics
/// If the lock file cannot be made.
#[must_use]
pub fn turn() -> Turn {
    let path = std::env::temp_dir().join("systest-understudy.lock");
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    loop {
        // Each call has an open file of its own, so this excludes other threads as well as other processes.
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => return Turn(lock),
            Err((back, nix::errno::Errno::EINTR)) => file = back,
            Err((_, e)) => panic!("{}: {e}", path.display()),
        }
    }
}
