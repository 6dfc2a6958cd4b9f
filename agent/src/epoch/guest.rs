//! What the epoch loop needs of a virtual machine.

use std::time::Duration;

use checkpoint::MachineState;
use vmm::{DirtyTracker, GuestMemory, Vm, VmError};

/// Why a guest has no state to be captured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// It has switched itself off, or crashed: there is nothing to be resumed.
    #[error("the guest has ended")]
    Ended,
    /// It could not be read.
    #[error("{0}")]
    Failed(String),
}

/// A virtual machine, as the epoch loop sees it. [`Vm`] is the one; tests have others.
pub trait Guest: Send + Sync {
    /// Stops it: on return nothing changes memory or sends frames.
    ///
    /// # Errors
    /// In words; it may run on then.
    fn pause(&self) -> Result<(), String>;

    /// Lets it run. No effect if it does.
    fn resume(&self);

    /// Its state without memory; only while paused.
    ///
    /// # Errors
    /// [`CaptureError`].
    fn capture(&self) -> Result<MachineState, CaptureError>;

    /// Whether it waited for something when it was captured last: it lost nothing by standing still.
    fn was_idle(&self) -> bool {
        false
    }

    /// What a write fault under the dirty log costs it, if that is known.
    fn write_fault(&self) -> Option<Duration> {
        None
    }

    /// Which pages change.
    fn dirty(&self) -> &dyn DirtyTracker;

    /// Its memory.
    fn memory(&self) -> &GuestMemory;
}

impl Guest for Vm {
    fn pause(&self) -> Result<(), String> {
        Vm::pause(self).map_err(text)
    }

    fn resume(&self) {
        Vm::resume(self);
    }

    fn capture(&self) -> Result<MachineState, CaptureError> {
        Vm::capture(self).map_err(|e| match e {
            VmError::Ended => CaptureError::Ended,
            other => CaptureError::Failed(other.to_string()),
        })
    }

    fn was_idle(&self) -> bool {
        self.was_halted()
    }

    fn write_fault(&self) -> Option<Duration> {
        vmm::write_fault()
    }

    fn dirty(&self) -> &dyn DirtyTracker {
        Vm::dirty(self)
    }

    fn memory(&self) -> &GuestMemory {
        Vm::memory(self)
    }
}

fn text(error: VmError) -> String {
    error.to_string()
}
