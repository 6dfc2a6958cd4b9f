//! What happens to a machine from within: it switched itself off, pulsed its reset line, or crashed.

use std::fmt;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Something the guest did that ends its run. After any of these no vCPU runs again, but in a machine that is
/// restarted ([`crate::Vm::restarts`]): there it stands still until [`crate::Vm::reset`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked to be reset.
    Reset,
    /// A vCPU cannot go on.
    Crashed {
        /// Which one.
        vcpu: u8,
        /// Why, for a person.
        reason: String,
    },
}

impl fmt::Display for VmEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmEvent::Shutdown => f.write_str("the guest switched itself off"),
            VmEvent::Reset => f.write_str("the guest asked to be reset"),
            VmEvent::Crashed { vcpu, reason } => {
                write!(f, "the guest crashed on vCPU {vcpu}: {reason}")
            }
        }
    }
}

/// The receiving end of a machine's events; unlike an [`mpsc::Receiver`] it may be shared between threads.
#[derive(Debug)]
pub struct Events(Mutex<Receiver<VmEvent>>);

impl Events {
    pub(crate) fn channel() -> (Sender<VmEvent>, Events) {
        let (sender, receiver) = mpsc::channel();
        (sender, Events(Mutex::new(receiver)))
    }

    /// Waits for the next event, at most `limit`.
    ///
    /// # Errors
    /// As [`mpsc::Receiver::recv_timeout`].
    pub fn recv_timeout(&self, limit: Duration) -> Result<VmEvent, RecvTimeoutError> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv_timeout(limit)
    }

    /// The next event if there is one.
    ///
    /// # Errors
    /// As [`mpsc::Receiver::try_recv`].
    pub fn try_recv(&self) -> Result<VmEvent, TryRecvError> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_recv()
    }
}
