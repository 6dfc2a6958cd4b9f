//! Statics that are handed out once. There is one thread and interrupts touch only the atomics of boot.rs, so a large
//! buffer may live in .bss and be owned by whoever took it.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A value in static memory that can be taken once.
pub struct Once<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `take` hands out the only reference, once.
unsafe impl<T> Sync for Once<T> {}

impl<T> Once<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Once<T> {
        Once {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// The value; a second call is a mistake in this program and panics.
    #[allow(clippy::mut_from_ref)] // the flag makes it the only one
    pub fn take(&'static self) -> &'static mut T {
        assert!(
            !self.taken.swap(true, Ordering::Relaxed),
            "static taken twice"
        );
        // SAFETY: the flag just checked makes this the only reference ever given out.
        unsafe { &mut *self.value.get() }
    }
}
