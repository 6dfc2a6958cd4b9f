//! Waiting for what should come soon, with a bound.

use std::time::{Duration, Instant};

/// Generous bound for anything that should take milliseconds or seconds.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// It did not come.
#[derive(Debug, thiserror::Error)]
#[error("waited {} s in vain for {what}", within.as_secs())]
pub struct InVain {
    /// For what.
    pub what: String,
    /// How long.
    pub within: Duration,
}

/// [`PATIENCE`], or more on an emulated KVM host, where a guest is emulated twice.
#[must_use]
pub fn patience() -> Duration {
    match std::env::var_os("UNDERSTUDY_KVM_HOST") {
        Some(_) => 4 * PATIENCE,
        None => PATIENCE,
    }
}

/// Polls until `ready` answers, for [`patience`] at most.
///
/// # Errors
/// [`InVain`], naming `what`.
pub fn wait<T>(what: &str, ready: impl FnMut() -> Option<T>) -> Result<T, InVain> {
    wait_for(what, patience(), ready)
}

/// Polls until `ready` answers, for `within` at most.
///
/// # Errors
/// [`InVain`], naming `what`.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<T, InVain> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(InVain {
                what: what.into(),
                within,
            });
        }
        std::thread::sleep(LOOK);
    }
}
