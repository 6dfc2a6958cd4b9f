//! A host's disk that can fail: refuse every write, be full, or stand still, whenever a fault asks for it.
//!
//! The host's data directory is a FUSE file system in a mount namespace of the host's own; this process serves it from
//! the directory below, which it sees itself. Needs /dev/fuse, and neither root nor a block device.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::LabError;
use super::fuse::{self, Request, op};
use super::tree::Tree;

/// How a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// It does what it is asked.
    #[default]
    Good,
    /// Writes and syncs fail: EIO.
    Failing,
    /// Writes fail: ENOSPC.
    Full,
    /// Nothing that it is asked comes back.
    Hung,
}

#[derive(Debug, Default)]
struct Shared {
    /// How it is, and requests that have felt it not being good.
    state: Mutex<(Health, u64)>,
    changed: Condvar,
}

/// The disk of one host. It is gone when this is dropped and the host's last process has ended.
#[derive(Debug)]
pub struct Disk {
    mounts: File,
    shared: Arc<Shared>,
}

impl Disk {
    /// Serves `dir` at the same place in a new mount namespace.
    ///
    /// # Errors
    /// [`LabError::Missing`] if there is no FUSE.
    pub fn mount(dir: &Path) -> Result<Self, LabError> {
        let (device, mounts) = std::thread::scope(|scope| {
            let made = scope.spawn(|| mount_in_new_namespace(dir));
            made.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        })?;
        let shared = Arc::new(Shared::default());
        let (served, tree) = (shared.clone(), Tree::new(dir));
        std::thread::Builder::new()
            .name("lab-disk".into())
            .spawn(move || serve(&device, &served, tree))
            .map_err(|e| LabError::io("a thread", e))?;
        Ok(Self { mounts, shared })
    }

    /// The mount namespace, for setns(2).
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.mounts.as_raw_fd()
    }

    /// From now on it is so.
    pub fn set(&self, health: Health) {
        let mut state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.0 = health;
        self.shared.changed.notify_all();
    }

    /// Requests that were refused, or had to wait.
    #[must_use]
    pub fn felt(&self) -> u64 {
        let state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.1
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A request that waits would keep its process from ending.
        self.set(Health::Good);
    }
}

fn mount_in_new_namespace(dir: &Path) -> Result<(File, File), LabError> {
    let missing = |what: &str, e: io::Error| {
        LabError::Missing(format!(
            "{what}: {e}; faults of disks need FUSE (modprobe fuse) and namespaces (root, or user namespaces allowed)"
        ))
    };
    // The thread's view of the file system is its own from here on, and nobody else's.
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
        .map_err(|e| missing("a mount namespace", e.into()))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .map_err(|e| missing("a mount namespace", e.into()))?;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|e| missing("/dev/fuse", e))?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("understudy-lab"),
        dir,
        Some("fuse"),
        flags,
        Some(options.as_str()),
    )
    .map_err(|e| missing("mounting a FUSE file system", e.into()))?;
    let namespace = File::open("/proc/thread-self/ns/mnt");
    Ok((
        device,
        namespace.map_err(|e| missing("a mount namespace", e))?,
    ))
}

/// Until nothing has it mounted any more.
fn serve(mut device: &File, shared: &Shared, mut tree: Tree) {
    let mut buffer = vec![0; fuse::MAX_WRITE as usize + 4096];
    loop {
        let len = match device.read(&mut buffer) {
            Ok(len) => len,
            // A request that was taken back before it could be read.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN)
                ) =>
            {
                continue;
            }
            Err(_) => return,
        };
        let Some(request) = Request::parse(&buffer[..len]) else {
            return;
        };
        if matches!(
            request.opcode,
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT
        ) {
            continue;
        }
        let outcome = match health(shared, request.opcode) {
            None => tree.serve(&request),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        };
        // One that was interrupted meanwhile cannot be answered: nobody waits for it.
        let _ = device.write(&fuse::answer(request.unique, &outcome));
    }
}

/// What the disk's health makes of a request: an error, or a wait until it is better.
fn health(shared: &Shared, opcode: u32) -> Option<i32> {
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    let mut waited = false;
    loop {
        let errno = match state.0 {
            Health::Good => return None,
            Health::Failing => refused(opcode, libc::EIO),
            Health::Full => refused(opcode, libc::ENOSPC).filter(|_| opcode != op::FSYNC),
            Health::Hung => {
                state.1 += u64::from(!waited);
                waited = true;
                state = shared
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
        };
        state.1 += u64::from(errno.is_some());
        return errno;
    }
}

fn refused(opcode: u32, errno: i32) -> Option<i32> {
    let writes = [
        op::WRITE,
        op::FSYNC,
        op::FALLOCATE,
        op::CREATE,
        op::MKNOD,
        op::MKDIR,
    ];
    writes.contains(&opcode).then_some(errno)
}
