//! What the epoch loop needs of a virtual machine.

use checkpoint::MachineState;
use vmm::{DirtyTracker, GuestMemory, Vm, VmError};

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
    /// In words.
    fn capture(&self) -> Result<MachineState, String>;

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

    fn capture(&self) -> Result<MachineState, String> {
        Vm::capture(self).map_err(text)
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
