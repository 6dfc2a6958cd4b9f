//! Resetting a machine: who asks for it, and what it boots then.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::boot::BootSpec;
use crate::control::Control;
use crate::events::VmEvent;

/// What a machine does instead of ending.
#[derive(Clone, Debug)]
pub struct Restart {
    /// What it boots.
    pub spec: BootSpec,
    /// When the guest asks for a reset.
    pub on_reset: bool,
    /// When the guest crashes.
    pub on_crash: bool,
    /// When the guest switches itself off.
    pub on_power_off: bool,
}

impl Restart {
    fn follows(&self, event: &VmEvent) -> bool {
        match event {
            VmEvent::Reset => self.on_reset,
            VmEvent::Crashed { .. } => self.on_crash,
            VmEvent::Shutdown => self.on_power_off,
        }
    }
}

/// The guest's ways to end its run. Shared by vCPUs, devices and the machine.
pub(crate) struct ResetLine {
    control: Arc<Control>,
    events: Sender<VmEvent>,
    /// None: whatever the guest does to itself ends its run.
    restart: Mutex<Option<Restart>>,
}

impl ResetLine {
    pub(crate) fn new(control: Arc<Control>, events: Sender<VmEvent>) -> Self {
        Self {
            control,
            events,
            restart: Mutex::default(),
        }
    }

    fn restart(&self) -> MutexGuard<'_, Option<Restart>> {
        self.restart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, restart: Option<Restart>) {
        *self.restart() = restart;
    }

    /// What a reset boots.
    pub(crate) fn boots(&self) -> Option<BootSpec> {
        self.restart().as_ref().map(|restart| restart.spec.clone())
    }

    /// The guest has done something to itself: it is to be reset, or its run ends. Does not wait for it.
    pub(crate) fn happened(&self, event: VmEvent) {
        let follows = self.restart().as_ref().is_some_and(|r| r.follows(&event));
        let first = match follows {
            true => self.control.ask_reset(),
            false => self.control.end(),
        };
        if first {
            self.say(event);
        }
    }

    /// Whoever may press the machine's button wants a reset. False: nothing is known to boot, or the guest has ended.
    pub(crate) fn press(&self) -> bool {
        let asked = self.restart().is_some() && self.control.ask_reset();
        if asked {
            self.say(VmEvent::Reset);
        }
        asked
    }

    /// The guest's run ends, whatever was to be done then.
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
