//! Scheduling of what must not wait for its turn: heartbeats, and the pause of a guest.

/// Of real-time priorities the lowest two. What says that a host lives goes first: behind the pauses of many guests it would
/// wait for longer than silence is borne.
const SIGN_OF_LIFE: libc::c_int = 2;
const PAUSE: libc::c_int = 1;

fn set_policy(policy: libc::c_int, priority: libc::c_int) -> bool {
    let param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: changes only the calling thread's policy, with a parameter that lives across the call.
    unsafe { libc::sched_setscheduler(0, policy, &param) == 0 }
}

/// Gives the calling thread real-time priority, if this process may: a heartbeat that waits behind busy vCPUs
/// for its turn looks like a dead host. Without the privilege the thread runs as any other, and suspicion may need a
/// longer silence (`detection` in host.toml).
pub fn urgent_thread() {
    if !set_policy(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, SIGN_OF_LIFE) {
        tracing::debug!(
            "no real-time priority for heartbeats: {}",
            std::io::Error::last_os_error()
        );
    }
}

/// Ends for the calling thread what it was started with: see [`urgent_section_with_threads`].
pub(crate) fn ordinary_thread() {
    set_policy(libc::SCHED_OTHER, 0);
}

/// While this exists the calling thread has real-time priority, if this process may give it.
#[derive(Debug)]
pub struct UrgentSection {
    raised: bool,
    // A policy belongs to a thread: the guard must be dropped where it was made.
    _not_send: std::marker::PhantomData<*const ()>,
}

/// Begins an urgent section, of milliseconds at most: a guest stands still as long as the thread that paused it waits.
#[must_use]
pub fn urgent_section() -> UrgentSection {
    section(libc::SCHED_RESET_ON_FORK, PAUSE)
}

/// As [`urgent_section`], for signs of life, and as long as it takes; the threads that are started in it are urgent, too, until
/// they call [`ordinary_thread`].
#[must_use]
pub(crate) fn urgent_section_with_threads() -> UrgentSection {
    section(0, SIGN_OF_LIFE)
}

fn section(flags: libc::c_int, priority: libc::c_int) -> UrgentSection {
    UrgentSection {
        raised: set_policy(libc::SCHED_RR | flags, priority),
        _not_send: std::marker::PhantomData,
    }
}

impl Drop for UrgentSection {
    fn drop(&mut self) {
        if self.raised {
            set_policy(libc::SCHED_OTHER, 0);
        }
    }
}
