//! Starting and stopping all vCPU threads together.
//!
//! A vCPU is stopped by setting `immediate_exit` in its `kvm_run` page and sending its thread a signal. The flag stays
//! set until the next resume, so it does not matter where the thread is: in the guest (the signal gets it out), in
//! this program handling an exit (the next `KVM_RUN` completes that access and returns at once) or on its way there.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// After this long without an answer a stop is signalled again; nothing is known to need it.
const KICK_AGAIN: Duration = Duration::from_millis(100);
/// Signals before a vCPU is declared stuck: 10 s.
const KICKS: u32 = 100;

/// What all vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Pause,
    Run,
    Exit,
}

#[derive(Debug)]
struct State {
    want: Want,
    /// The guest ended its run: it is not run again.
    ended: bool,
    /// The guest's reset line was pulsed: it is not run before it has been reset.
    reset: bool,
    /// vCPUs that are not running and will not before `want` changes.
    parked: usize,
    kicks: Vec<Kick>,
}

/// Shared by all vCPU threads of a machine and whoever starts and stops them.
#[derive(Debug)]
pub(crate) struct Control {
    state: Mutex<State>,
    wanted: Condvar,
    parked: Condvar,
    vcpus: usize,
}

/// How one vCPU is got out of the guest.
#[derive(Debug)]
struct Kick {
    run: RunPage,
    thread: libc::pthread_t,
}

/// The `immediate_exit` flag in a vCPU's `kvm_run` page. Keeps the vCPU, and so the page, alive.
#[derive(Clone, Debug)]
pub(crate) struct RunPage {
    flag: *const AtomicU8,
    _vcpu: Arc<Mutex<VcpuFd>>,
}

// SAFETY: the pointer is only used for atomic accesses to a shared mapping, which `_vcpu` keeps in place.
unsafe impl Send for RunPage {}
// SAFETY: as above; `AtomicU8` is `Sync`.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(crate) fn new(vcpu: &Arc<Mutex<VcpuFd>>) -> RunPage {
        let mut fd = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let run: *mut kvm_run = fd.get_kvm_run();
        // SAFETY: `run` points to a live `kvm_run`; only the address of a field is taken.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        RunPage {
            flag: flag.cast::<AtomicU8>().cast_const(),
            _vcpu: Arc::clone(vcpu),
        }
    }

    fn set(&self, leave: bool) {
        // SAFETY: one byte inside the mapped page, aligned as any byte, and kept mapped by `_vcpu`. The kernel reads
        // it concurrently, which is its purpose (Documentation/virt/kvm/api.rst, 5: immediate_exit).
        unsafe { &*self.flag }.store(u8::from(leave), Ordering::SeqCst);
    }
}

/// The signal that interrupts `KVM_RUN`. Its handler does nothing: the interruption is the point.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

/// Installs the handler, once in a process.
pub(crate) fn install_handler() -> Result<(), std::io::Error> {
    extern "C" fn nothing(_: libc::c_int) {}
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid (empty mask, no flags: system calls are interrupted, not restarted),
        // and the handler is trivially async-signal-safe.
        let refused = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal(), &action, std::ptr::null_mut())
        };
        if refused != 0 {
            result = Err(std::io::Error::last_os_error());
        }
    });
    result
}

/// Lets the calling vCPU thread be interrupted, whatever mask it inherited.
pub(crate) fn unblock_signal() {
    // SAFETY: a local signal set, initialised before its use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

impl Control {
    pub(crate) fn new(vcpus: usize) -> Control {
        Control {
            state: Mutex::new(State {
                want: Want::Pause,
                ended: false,
                reset: false,
                parked: 0,
                kicks: Vec::new(),
            }),
            wanted: Condvar::new(),
            parked: Condvar::new(),
            vcpus,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a vCPU's thread to those stopped by [`Control::pause`]. The thread must not be joined before
    /// [`Control::exit`].
    pub(crate) fn add(&self, run: RunPage, thread: &JoinHandle<()>) {
        self.state().kicks.push(Kick {
            run,
            thread: thread.as_pthread_t(),
        });
    }

    /// What the vCPUs are to do now.
    pub(crate) fn want(&self) -> Want {
        self.state().want
    }

    /// Called by a vCPU thread out of the guest: waits until it is to run (true) or to end (false).
    pub(crate) fn park(&self) -> bool {
        let mut state = self.state();
        state.parked += 1;
        if state.parked == self.vcpus {
            self.parked.notify_all();
        }
        while state.want == Want::Pause {
            state = self
                .wanted
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.want == Want::Run
    }

    /// Lets the vCPUs run, unless the guest has ended or is to be reset first.
    pub(crate) fn resume(&self) {
        let mut state = self.state();
        if state.want != Want::Pause || state.ended || state.reset {
            return;
        }
        state.want = Want::Run;
        for kick in &state.kicks {
            kick.run.set(false);
        }
        drop(state);
        self.wanted.notify_all();
    }

    /// Stops all vCPUs and waits until the last one has.
    ///
    /// # Errors
    /// The number of vCPUs that did not stop within 10 s.
    pub(crate) fn pause(&self) -> Result<(), usize> {
        let mut state = self.state();
        if state.want == Want::Run {
            state.want = Want::Pause;
        }
        // A vCPU that found itself parked is told by `want` alone.
        let mut kicks = 0;
        while state.parked < self.vcpus {
            if kicks == KICKS {
                return Err(self.vcpus - state.parked);
            }
            kicks += 1;
            state.kick();
            let waited = self
                .parked
                .wait_timeout_while(state, KICK_AGAIN, |s| s.parked < self.vcpus);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Stops all vCPUs for good, without waiting: the guest has ended. False if it already had.
    pub(crate) fn end(&self) -> bool {
        let mut state = self.state();
        let first = !state.ended;
        state.ended = true;
        state.stop();
        first
    }

    /// Stops all vCPUs, without waiting, until [`Control::reset_done`]. False if the guest has ended, or if that is so
    /// already.
    pub(crate) fn ask_reset(&self) -> bool {
        let mut state = self.state();
        if state.ended || state.reset {
            return false;
        }
        state.reset = true;
        state.stop();
        true
    }

    /// Whether the machine is to be reset.
    pub(crate) fn wants_reset(&self) -> bool {
        let state = self.state();
        state.reset && !state.ended
    }

    /// The machine has been reset.
    pub(crate) fn reset_done(&self) {
        self.state().reset = false;
    }

    /// Whether the guest has ended.
    pub(crate) fn ended(&self) -> bool {
        self.state().ended
    }

    /// Whether all vCPUs stand still.
    pub(crate) fn is_paused(&self) -> bool {
        let state = self.state();
        state.want != Want::Run && state.parked == self.vcpus
    }

    /// Makes the vCPU threads return.
    pub(crate) fn exit(&self) {
        let mut state = self.state();
        state.want = Want::Exit;
        state.kick();
        // The threads may be joined from here on: their ids must not be used again.
        state.kicks.clear();
        drop(state);
        self.wanted.notify_all();
    }
}

impl State {
    fn stop(&mut self) {
        if self.want == Want::Run {
            self.want = Want::Pause;
            self.kick();
        }
    }

    fn kick(&self) {
        // All flags before the first signal: they are what stops a vCPU; signals only hurry it.
        for kick in &self.kicks {
            kick.run.set(true);
        }
        for kick in &self.kicks {
            // SAFETY: the thread has not been joined: `kicks` is emptied before that, under the same lock.
            unsafe { libc::pthread_kill(kick.thread, signal()) };
        }
    }
}
