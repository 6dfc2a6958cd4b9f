//! Mechanisms that the whole-system tests switch off, one at a time, to see that their checks notice.
//!
//! Process-global, and set by the tests' own binary only: the program `understudy` never calls [`set`], so no option,
//! file or variable can switch anything off in it.

use std::sync::atomic::{AtomicU8, Ordering};

/// A mechanism that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fault {
    /// I1: frames leave when their epoch is sealed, not when it is committed.
    OutputCommit = 1,
    /// I1, I4: output is never held, so that a stale owner is heard.
    Hold = 2,
    /// I6: the owner's disk writes are not streamed to the replicas.
    DiskStream = 3,
    /// The host has an older processor than the others: none of the features of CPUID leaf 7.
    Processor = 4,
}

static BROKEN: AtomicU8 = AtomicU8::new(0);

/// Switches the mechanism `name` off in this process.
///
/// # Errors
/// The name, if there is no such mechanism: a test with a typo would otherwise test nothing.
pub fn set(name: &str) -> Result<(), String> {
    let fault = match name {
        "output-commit" => Fault::OutputCommit,
        "hold" => Fault::Hold,
        "disk-stream" => Fault::DiskStream,
        "processor" => Fault::Processor,
        other => return Err(format!("there is no mechanism {other:?} to switch off")),
    };
    BROKEN.store(fault as u8, Ordering::Relaxed);
    Ok(())
}

/// Whether `fault` is switched on (its mechanism off).
#[must_use]
pub fn is(fault: Fault) -> bool {
    BROKEN.load(Ordering::Relaxed) == fault as u8
}
