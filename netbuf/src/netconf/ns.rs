//! Network namespaces of one's own: real taps and bridges without being root.

use std::fs;
use std::io;

use thiserror::Error;

use super::{NetconfError, set_link};

/// Why there is no namespace.
#[derive(Debug, Error)]
pub enum NsError {
    /// A user namespace can only be entered by a process with one thread.
    #[error("this process has {0} threads; namespaces must be made before any thread is started")]
    Threads(usize),
    /// The kernel or its administrator does not allow user namespaces.
    #[error("this user may not make a user namespace ({source}). {hint}")]
    NoUserNs {
        /// The kernel's answer.
        source: io::Error,
        /// What is in the way and how to change it.
        hint: String,
    },
    /// The user namespace came, the network namespace in it did not.
    #[error("no network namespace: {source}. {hint}")]
    NoNetNs {
        /// The kernel's answer.
        source: io::Error,
        /// What is in the way and how to change it.
        hint: String,
    },
    /// A file of /proc could not be read or written.
    #[error("{path}: {source}. {hint}")]
    Proc {
        /// The file.
        path: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// What is in the way and how to change it, or empty.
        hint: String,
    },
    /// The namespace's loopback could not be set up.
    #[error("in the new network namespace: {0}")]
    Loopback(#[from] NetconfError),
}

/// Moves this process into a network namespace of its own with loopback up, and, unless it may do so as it is (root),
/// into a user namespace first, where it is root. Children inherit both.
///
/// To be called before any thread is started.
///
/// # Errors
/// [`NsError`], naming the setting in the way. The process may then be in the user namespace already.
pub fn unshare_userns_netns() -> Result<(), NsError> {
    let threads = threads()?;
    if threads != 1 {
        return Err(NsError::Threads(threads));
    }
    // SAFETY: geteuid and getegid cannot fail and take no arguments.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    if uid == 0 {
        match unshare(libc::CLONE_NEWNET) {
            Ok(()) => return Ok(set_link("lo", true)?),
            // Root without CAP_SYS_ADMIN, as in a container: like any other user.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
            Err(source) => return Err(no_netns(source)),
        }
    }
    unshare(libc::CLONE_NEWUSER).map_err(|source| {
        let hint = userns_hint(&source);
        NsError::NoUserNs { source, hint }
    })?;
    // Without this an unprivileged process may not write gid_map (user_namespaces(7)).
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {uid} 1\n"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1\n"))?;
    unshare(libc::CLONE_NEWNET).map_err(no_netns)?;
    Ok(set_link("lo", true)?)
}

/// Moves the calling thread, and those it starts, into a network namespace of its own with loopback up. Takes
/// `CAP_SYS_ADMIN`.
///
/// # Errors
/// [`NsError`].
pub fn unshare_netns() -> Result<(), NsError> {
    unshare(libc::CLONE_NEWNET).map_err(no_netns)?;
    Ok(set_link("lo", true)?)
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: unshare takes no pointers; it changes only which namespaces this thread is in.
    if unsafe { libc::unshare(flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn threads() -> Result<usize, NsError> {
    const PATH: &str = "/proc/self/status";
    let status = fs::read_to_string(PATH).map_err(|source| NsError::Proc {
        path: PATH,
        source,
        hint: "Is /proc mounted?".to_owned(),
    })?;
    Ok(threads_in(&status).unwrap_or(1))
}

fn threads_in(status: &str) -> Option<usize> {
    let line = status.lines().find_map(|l| l.strip_prefix("Threads:"))?;
    line.trim().parse().ok()
}

fn write(path: &'static str, content: &str) -> Result<(), NsError> {
    fs::write(path, content).map_err(|source| NsError::Proc {
        path,
        hint: apparmor_hint().unwrap_or_default(),
        source,
    })
}

fn no_netns(source: io::Error) -> NsError {
    let hint = match source.raw_os_error() {
        Some(libc::EPERM) => apparmor_hint().unwrap_or_else(|| {
            "It takes CAP_SYS_ADMIN: run as root, or where user namespaces are allowed".to_owned()
        }),
        Some(libc::EINVAL) => "The kernel was built without CONFIG_NET_NS".to_owned(),
        Some(libc::ENOSPC | libc::EUSERS) => limit_hint("/proc/sys/user/max_net_namespaces"),
        _ => String::new(),
    };
    NsError::NoNetNs { source, hint }
}

/// What keeps this user from making a user namespace, as far as the system tells.
fn userns_hint(e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EUSERS) => limit_hint("/proc/sys/user/max_user_namespaces"),
        Some(libc::EINVAL) => {
            "The kernel was built without CONFIG_USER_NS, or this process is not single-threaded"
                .to_owned()
        }
        _ => {
            const CLONE: &str = "/proc/sys/kernel/unprivileged_userns_clone";
            if read_number(CLONE) == Some(0) {
                return format!(
                    "{CLONE} is 0: as root, `sysctl kernel.unprivileged_userns_clone=1`"
                );
            }
            apparmor_hint().unwrap_or_else(|| {
                "A seccomp filter, a chroot or a container's policy may forbid it: run as root, or outside of it"
                    .to_owned()
            })
        }
    }
}

fn limit_hint(path: &str) -> String {
    let now = read_number(path).map_or_else(|| "unknown".to_owned(), |n| n.to_string());
    let key = path.trim_start_matches("/proc/sys/").replace('/', ".");
    format!("{path} is {now} and used up: as root, `sysctl {key}=10000`")
}

/// Ubuntu 23.10 and later: a user namespace is made, but gives no capabilities.
fn apparmor_hint() -> Option<String> {
    const PATH: &str = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";
    (read_number(PATH)? != 0).then(|| {
        format!("{PATH} is not 0: as root, `sysctl kernel.apparmor_restrict_unprivileged_userns=0`")
    })
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_count_is_found_in_status() {
        assert_eq!(threads_in("Name:\tx\nThreads:\t12\nSigQ:\t0/1\n"), Some(12));
        assert_eq!(threads_in("Name:\tx\n"), None);
    }

    #[test]
    fn the_setting_in_the_way_is_named() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert!(userns_hint(&full).contains("/proc/sys/user/max_user_namespaces"));
        let NsError::NoNetNs { hint, .. } = no_netns(io::Error::from_raw_os_error(libc::ENOSPC))
        else {
            panic!("another error")
        };
        assert!(hint.contains("sysctl user.max_net_namespaces"), "{hint}");
    }

    #[test]
    fn a_process_with_threads_is_refused_before_anything_changes() {
        // The test harness runs this on a thread beside its main one.
        let other = std::thread::spawn(std::thread::park);
        let got = unshare_userns_netns();
        other.thread().unpark();
        assert!(matches!(got, Err(NsError::Threads(n)) if n > 1), "{got:?}");
    }
}
