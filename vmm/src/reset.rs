//! Resetting a machine: who asks for it, and what it was at power-on.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::machine::MachineState;

use crate::boot::BootSpec;
use crate::control::Control;
use crate::events::VmEvent;

/// The guest's ways to end its run. Shared by vCPUs, devices and the machine.
pub(crate) struct ResetLine {
    control: Arc<Control>,
    events: Sender<VmEvent>,
    /// What a reset boots; none: a reset ends the guest's run.
    boots: Mutex<Option<BootSpec>>,
}

impl ResetLine {
    pub(crate) fn new(control: Arc<Control>, events: Sender<VmEvent>) -> Self {
        Self {
            control,
            events,
            boots: Mutex::default(),
        }
    }

    /// From now on a reset boots this.
    pub(crate) fn set_boots(&self, spec: Option<BootSpec>) {
        *self.boots.lock().unwrap_or_else(PoisonError::into_inner) = spec;
    }

    /// What a reset boots.
    pub(crate) fn boots(&self) -> Option<BootSpec> {
        let boots = self.boots.lock().unwrap_or_else(PoisonError::into_inner);
        boots.clone()
    }

    /// The guest, or whoever may press its button, wants a reset. Does not wait for it.
    pub(crate) fn pulse(&self) {
        let asked = match self.boots().is_some() {
            true => self.control.ask_reset(),
            false => self.control.end(),
        };
        if asked {
            self.say(VmEvent::Reset);
        }
    }

    /// The guest's run ends.
    pub(crate) fn ends(&self, event: VmEvent) {
        if self.control.end() {
            self.say(event);
        }
    }

    fn say(&self, event: VmEvent) {
        // Nobody listening means the machine is being taken down.
        let _ = self.events.send(event);
    }
}

/// The state of the machine before anything ran. Processor features are not a part of it: those of a machine that was
/// restored are another's.
pub(crate) struct PowerOn(pub(crate) MachineState);
