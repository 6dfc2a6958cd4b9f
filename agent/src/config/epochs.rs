//! How long epochs are, as configured.

use serde::{Deserialize, Serialize};

use super::ProtectConfig;

/// How long a protected VM's epochs are, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epochs {
    /// At most, unless the guest is idle.
    pub longest_ms: u64,
    /// At least, with output waiting and nothing in flight.
    pub shortest_ms: u64,
    /// At most, if the guest is idle.
    pub idle_ms: u64,
    /// The share of the time for which the guest may stand still because of output that waits, in percent.
    pub pause_percent: u32,
    /// What a pause may cost because of pages that are left writable, in microseconds.
    pub pause_budget_us: u64,
    /// Memory is compared with what the backups have after so many epochs; 0: never.
    pub verify_epochs: u64,
}

impl Epochs {
    /// Those of a configuration.
    #[must_use]
    pub fn of(protect: &ProtectConfig) -> Self {
        Self {
            longest_ms: protect.epoch_ms,
            shortest_ms: protect.min_epoch_ms,
            idle_ms: protect.idle_epoch_ms,
            pause_percent: protect.pause_percent,
            pause_budget_us: protect.pause_budget_us,
            verify_epochs: protect.verify_epochs,
        }
    }
}
