//! The pause gate: a device's lock that its own thread may only take while the machine runs.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Something a device thread works on while the machine runs, and nobody but the pauser while it does not.
#[derive(Debug)]
pub struct Gated<T> {
    inner: Mutex<Inner<T>>,
    opened: Condvar,
    /// Shared by all devices of a machine: set as soon as a pause begins, so that threads let go of their locks early
    /// and do not take them again ahead of the pauser (a mutex is not fair).
    hurry: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Inner<T> {
    value: T,
    paused: bool,
    stopping: bool,
}

/// Access to the value; the lock is held.
pub struct Access<'a, T>(MutexGuard<'a, Inner<T>>);

impl<T> Deref for Access<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> DerefMut for Access<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0.value
    }
}

impl<T> Gated<T> {
    /// Wraps `value`, paused. `hurry` is shared by all gates that pause together.
    pub fn new(value: T, hurry: Arc<AtomicBool>) -> Gated<T> {
        Gated {
            inner: Mutex::new(Inner {
                value,
                paused: true,
                stopping: false,
            }),
            opened: Condvar::new(),
            hurry,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        // A device thread that panicked leaves a device that answers as best it can.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Access whether paused or not: for a vCPU's accesses, and for save and restore.
    pub fn access(&self) -> Access<'_, T> {
        Access(self.lock())
    }

    /// Access for the device's thread: waits while paused or about to be; `None` once stopping.
    pub fn enter(&self) -> Option<Access<'_, T>> {
        let mut inner = self.lock();
        while !inner.stopping && (inner.paused || self.hurry.load(Ordering::SeqCst)) {
            inner = self
                .opened
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        (!inner.stopping).then(|| Access(inner))
    }

    /// Waits for the device's thread to leave and keeps it out. The caller has set `hurry`.
    pub fn pause(&self) {
        self.lock().paused = true;
    }

    /// Lets the device's thread in again. The caller has cleared `hurry`.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.opened.notify_all();
    }

    /// Whether paused.
    pub fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// Ends the device's thread at its next, or present, [`Gated::enter`].
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.opened.notify_all();
    }
}
