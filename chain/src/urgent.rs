//! Scheduling of the threads whose lateness would be taken for death.

/// Gives the calling thread the lowest real-time priority, if this process may: a heartbeat that waits behind busy vCPUs
/// for its turn looks like a dead host. Without the privilege the thread runs as any other, and suspicion may need a
/// longer silence (`detection` in host.toml).
pub fn urgent_thread() {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: changes only the calling thread's policy, with a parameter that lives across the call.
    let result =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &param) };
    if result != 0 {
        tracing::debug!(
            "no real-time priority for heartbeats: {}",
            std::io::Error::last_os_error()
        );
    }
}
