//! The processes of a host: all that are in its network namespace, whoever started them. A VM's process that has outlived
//! its agent is one of them.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// The processes in the network namespace of that number. One that ends meanwhile is left out.
#[must_use]
pub fn in_namespace(number: u64) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pid = |name: &OsStr| name.to_str()?.parse::<u32>().ok();
    let inside = |pid: &u32| fs::metadata(format!("/proc/{pid}/ns/net")).map(|m| m.ino());
    // This process's own threads go in and out; the process as such is never a host's.
    let own = std::process::id();
    let all = entries.flatten().filter_map(|e| pid(&e.file_name()));
    all.filter(|pid| *pid != own && inside(pid).is_ok_and(|n| n == number))
        .collect()
}

/// Sends `signal` to all of them, as soon after each other as can be.
pub fn signal(pids: &[u32], signal: Signal) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid as i32), signal);
    }
}

/// Kills everything in the namespace, and waits until it is gone and its taps with it. This process has to be their
/// subreaper.
pub fn bury(number: u64) {
    let deadline = Instant::now() + PATIENCE;
    let mut killed: Vec<u32> = Vec::new();
    loop {
        let alive = in_namespace(number);
        signal(&alive, Signal::SIGKILL);
        killed.extend(&alive);
        killed.retain(|pid| !is_gone(*pid));
        if (alive.is_empty() && killed.is_empty()) || Instant::now() > deadline {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a killed process is gone; one that this process has adopted, or started, is waited for.
#[must_use]
pub fn is_gone(pid: u32) -> bool {
    match waitpid(Pid::from_raw(pid as i32), Some(WaitPidFlag::WNOHANG)) {
        Err(Errno::ECHILD) => !PathBuf::from(format!("/proc/{pid}")).exists(),
        Ok(status) => status.pid().is_some(),
        Err(_) => false,
    }
}

/// What a host's process is started in.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its network namespace.
    pub net: RawFd,
    /// Its mount namespace, if it has one.
    pub mounts: Option<RawFd>,
}

/// Has `command` run in `place`, and end when this thread does.
///
/// The descriptors have to stay open until it is started.
pub fn put(command: &mut Command, place: Place) {
    let enter = move |fd: RawFd, kind: libc::c_int| {
        // SAFETY: setns takes no pointers.
        match unsafe { libc::setns(fd, kind) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: only async-signal-safe calls (setns, prctl) between fork and exec.
    unsafe {
        command.pre_exec(move || {
            enter(place.net, libc::CLONE_NEWNET)?;
            if let Some(mounts) = place.mounts {
                enter(mounts, libc::CLONE_NEWNS)?;
            }
            Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
        });
    }
}

/// Starts a host's process, which says everything into `log`, in a process group of its own.
///
/// # Errors
/// What keeps it from starting.
pub fn spawn(mut command: Command, place: Place, log: fs::File) -> io::Result<Child> {
    put(&mut command, place);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
}

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// Open descriptors.
    pub descriptors: usize,
    /// Memory of its own (RssAnon), KiB: not the guest's, which is a file.
    pub memory_kib: u64,
    /// Threads.
    pub threads: u64,
}

/// What process `pid` holds; none if it is gone.
#[must_use]
pub fn holding(pid: u32) -> Option<Holding> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    Some(Holding {
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(),
        memory_kib: field("RssAnon:")?,
        threads: field("Threads:")?,
    })
}
