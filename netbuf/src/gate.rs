//! The epoch queue in front of a port: what the devices, the epoch loop and the failover code share.
//!
//! Two locks. `queue` guards the rule and is held for moments only, so a guest's transmit thread and the pause that
//! seals an epoch never wait for the tap. `out` is held by whoever writes frames to the port and fixes their order;
//! it is always taken before `queue`.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use checkpoint::Epoch;
use serde::Serialize;
use tracing::warn;

use crate::hold::{EpochHold, HoldClock, HoldStats};
use crate::port::{MAX_FRAME, NET_HEADER, Port, SendOutcome};
use crate::queue::{EpochQueue, Pushed, QueueError};
use crate::wake::Wake;

/// Times one frame is offered to a port that has no room, after the first.
const RETRIES: u32 = 3;
/// Milliseconds waited for room before each of them.
const RETRY_WAIT_MS: libc::c_int = 1;
/// Waits spent on one batch of frames altogether: a stuck port delays a release by this many milliseconds, not by
/// three for every frame.
const BATCH_WAITS: u32 = 16;

/// Frames that a tap keeps for its reader (`txqueuelen`), and then some.
const PORT_QUEUE: u32 = 4096;

/// Counts since the gate was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GateStats {
    /// Frames taken from the guest.
    pub taken: u64,
    /// Frames written to the port.
    pub sent: u64,
    /// Frames refused with [`SendOutcome::Full`]: how often the guest was held back.
    pub full: u64,
    /// Frames the port had no room for, or refused; lost as in a full NIC queue.
    pub dropped_port: u64,
    /// Frames dropped because the gate was or became fenced.
    pub dropped_fenced: u64,
    /// Frames received from the port.
    pub received: u64,
    /// Received frames that were longer than what the guest offered for them, dropped: its interface takes smaller packets
    /// than the network sends.
    pub dropped_long: u64,
    /// Frames dropped, in either direction, because this was a standby's.
    pub dropped_standby: u64,
    /// Frames held now.
    pub held_frames: usize,
    /// Bytes held now, overhead included.
    pub held_bytes: usize,
}

#[derive(Debug, Default)]
struct Counts {
    taken: AtomicU64,
    sent: AtomicU64,
    full: AtomicU64,
    dropped_port: AtomicU64,
    dropped_fenced: AtomicU64,
    received: AtomicU64,
    dropped_long: AtomicU64,
    dropped_standby: AtomicU64,
}

struct Held {
    queue: EpochQueue,
    clock: HoldClock,
    /// A sender was told `Full` and not yet woken.
    waiting: bool,
    /// The mutant: see [`Gate::break_output_commit`].
    leaky: bool,
}

/// Holds back what a guest sends until its epoch is committed. Shared between threads as `Arc<Gate>`.
///
/// Memory is bounded by twice the limit: what is held, and one released batch on its way to the port.
pub struct Gate {
    port: Box<dyn Port>,
    held: Mutex<Held>,
    out: Mutex<()>,
    fenced: AtomicBool,
    standby: AtomicBool,
    warned: AtomicBool,
    room: Wake,
    counts: Counts,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("stats", &self.stats())
            .finish()
    }
}

impl Gate {
    /// A gate before `port` holding at most `limit` bytes (see [`EpochQueue::new`]). It does not hold until
    /// [`Gate::set_hold`] says so.
    ///
    /// # Errors
    /// No descriptor left for the eventfd.
    pub fn new(port: impl Port + 'static, limit: usize) -> io::Result<Arc<Gate>> {
        Ok(Arc::new(Gate {
            port: Box::new(port),
            held: Mutex::new(Held {
                queue: EpochQueue::new(limit),
                clock: HoldClock::new(),
                waiting: false,
                leaky: false,
            }),
            out: Mutex::new(()),
            fenced: AtomicBool::new(false),
            standby: AtomicBool::new(false),
            warned: AtomicBool::new(false),
            room: Wake::new()?,
            counts: Counts::default(),
        }))
    }

    /// Takes a frame from the guest, its 12-byte header first: held while holding, else sent at once.
    ///
    /// After [`SendOutcome::Full`] the caller keeps the frame. [`Gate::room_fd`] becomes readable when there is room;
    /// the caller reads it and *then* tries again (in this order, or a wake-up may be lost).
    ///
    /// # Errors
    /// `InvalidInput` for a frame shorter than its headers or longer than [`MAX_FRAME`]; nothing is sent then.
    pub fn send(&self, frame: &[u8]) -> io::Result<SendOutcome> {
        if frame.len() < NET_HEADER + 14 || frame.len() > MAX_FRAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a frame of {} bytes, headers included", frame.len()),
            ));
        }
        {
            let mut held = self.held();
            if held.queue.is_holding() || held.queue.is_fenced() {
                return Ok(self.push(&mut held, frame));
            }
        }
        // Not holding. Under `out`, so that the frame goes out after those released before it; and asked again, since
        // holding may have begun meanwhile, and then set_hold's caller relies on nothing leaving any more.
        let _out = self.out();
        {
            let mut held = self.held();
            if held.queue.is_holding() || held.queue.is_fenced() {
                return Ok(self.push(&mut held, frame));
            }
        }
        self.counts.taken.fetch_add(1, Ordering::Relaxed);
        self.write(frame, &mut { BATCH_WAITS });
        Ok(SendOutcome::Sent)
    }

    fn push(&self, held: &mut Held, frame: &[u8]) -> SendOutcome {
        match held.queue.push(frame.to_vec()) {
            Pushed::Held => {
                held.clock.pushed(Instant::now());
                self.counts.taken.fetch_add(1, Ordering::Relaxed);
                SendOutcome::Sent
            }
            Pushed::Full(_) => {
                held.waiting = true;
                self.counts.full.fetch_add(1, Ordering::Relaxed);
                SendOutcome::Full
            }
            // SendNow is excluded by the callers; dropping would be the safe side of a mistake.
            Pushed::Dropped | Pushed::SendNow(_) => {
                self.counts.dropped_fenced.fetch_add(1, Ordering::Relaxed);
                SendOutcome::Sent
            }
        }
    }

    /// Takes the next inbound frame, header first, into `buf`; `None` when there is none. Inbound frames are never
    /// held.
    ///
    /// # Errors
    /// As [`Port::recv`].
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        if self.standby.load(Ordering::Acquire) {
            self.discard(buf)?;
            return Ok(None);
        }
        let got = self.port.recv(buf)?;
        if got.is_some() {
            self.counts.received.fetch_add(1, Ordering::Relaxed);
        }
        Ok(got)
    }

    /// Drops what the port has for us, as much as a tap keeps at most.
    fn discard(&self, buf: &mut [u8]) -> io::Result<()> {
        for _ in 0..PORT_QUEUE {
            if self.port.recv(buf)?.is_none() {
                break;
            }
            self.counts.dropped_standby.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The guest is not there yet: from here on nothing leaves and nothing is taken, until [`Gate::activate`]. The port may
    /// be connected meanwhile.
    pub fn stand_by(&self) {
        let _out = self.out();
        self.standby.store(true, Ordering::Release);
        if let Err(e) = self.port.set_deaf(true) {
            // What comes meanwhile is dropped at activation then.
            warn!("a standby's tap: {e}");
        }
    }

    /// The end of [`Gate::stand_by`]: the guest hears what comes from here on.
    pub fn activate(&self) {
        let _out = self.out();
        if !self.standby.load(Ordering::Acquire) {
            return;
        }
        if let Err(e) = self
            .discard(&mut vec![0; MAX_FRAME])
            .and_then(|()| self.port.set_deaf(false))
        {
            warn!("activating a standby's tap: {e}");
        }
        self.standby.store(false, Ordering::Release);
    }

    /// The guest has offered less room than a received frame takes; the frame is dropped.
    pub fn too_long(&self) {
        self.counts.dropped_long.fetch_add(1, Ordering::Relaxed);
    }

    /// Readable (level-triggered) while [`Gate::recv`] has a frame.
    pub fn rx_fd(&self) -> RawFd {
        self.port.fd()
    }

    /// An eventfd raised when there is room again after [`SendOutcome::Full`]. Read its eight bytes to lower it.
    pub fn room_fd(&self) -> RawFd {
        self.room.fd()
    }

    /// Closes the open epoch as `epoch`. To be called while the guest is paused, at the capture of checkpoint `epoch`.
    ///
    /// # Errors
    /// As [`EpochQueue::seal`].
    pub fn seal(&self, epoch: Epoch) -> Result<(), QueueError> {
        let leaky = {
            let mut held = self.held();
            held.queue.seal(epoch)?;
            held.leaky
        };
        if leaky {
            self.release(epoch)?;
        }
        Ok(())
    }

    /// Checkpoint `epoch` is committed: sends the frames of all sealed epochs up to it, in order. Returns how many
    /// frames were let out. Idempotent; after [`Gate::fence`] it lets nothing out.
    ///
    /// The caller answers for the ack being of the owner's current generation (I1, I4).
    ///
    /// # Errors
    /// [`QueueError::NotSealed`]; then nothing was let out.
    pub fn release(&self, epoch: Epoch) -> Result<usize, QueueError> {
        let _out = self.out();
        let frames = {
            let mut held = self.held();
            let frames = held.queue.release(epoch)?;
            held.clock.released(epoch, frames.len(), Instant::now());
            self.wake_sender(&mut held);
            frames
        };
        self.write_all(&frames);
        Ok(frames.len())
    }

    /// Switches holding. On: nothing pushed from the call's return on leaves before its commit. Off: everything held is
    /// sent at once, in order, for output that needs no commit any more.
    pub fn set_hold(&self, hold: bool) {
        let _out = self.out();
        let frames = {
            let mut held = self.held();
            let frames = held.queue.set_hold(hold);
            if !frames.is_empty() {
                held.clock.forget();
            }
            self.wake_sender(&mut held);
            frames
        };
        self.write_all(&frames);
    }

    /// This owner is superseded: drops what is held; when the call returns no frame leaves any more, ever. Returns the
    /// number of held frames dropped.
    pub fn fence(&self) -> usize {
        // Before the lock: a release in progress stops at its next frame.
        self.fenced.store(true, Ordering::Release);
        let _out = self.out();
        let mut held = self.held();
        let dropped = held.queue.fence();
        held.clock.forget();
        self.counts
            .dropped_fenced
            .fetch_add(dropped as u64, Ordering::Relaxed);
        self.wake_sender(&mut held);
        dropped
    }

    /// Sends a frame of the host's own on the guest's behalf, past the hold: an announcement at activation
    /// ([`crate::announce`]). `ethernet` has no virtio header. Does nothing once fenced.
    pub fn announce(&self, ethernet: &[u8]) {
        let mut frame = vec![0; NET_HEADER];
        frame.extend_from_slice(ethernet);
        let _out = self.out();
        self.write(&frame, &mut { BATCH_WAITS });
    }

    /// Whether frames are being held.
    pub fn is_holding(&self) -> bool {
        self.held().queue.is_holding()
    }

    /// Whether [`Gate::fence`] was called.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// Counts so far.
    pub fn stats(&self) -> GateStats {
        let (held_frames, held_bytes) = {
            let held = self.held();
            (held.queue.held_frames(), held.queue.held_bytes())
        };
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        GateStats {
            taken: get(&self.counts.taken),
            sent: get(&self.counts.sent),
            full: get(&self.counts.full),
            dropped_port: get(&self.counts.dropped_port),
            dropped_fenced: get(&self.counts.dropped_fenced),
            received: get(&self.counts.received),
            dropped_long: get(&self.counts.dropped_long),
            dropped_standby: get(&self.counts.dropped_standby),
            held_frames,
            held_bytes,
        }
    }

    /// Hold times of all frames released since the start or [`Gate::reset_hold_stats`].
    pub fn hold_stats(&self) -> HoldStats {
        self.held().clock.totals()
    }

    /// Hold times per release, oldest first: the last 4096 that let a frame out.
    pub fn recent_holds(&self) -> Vec<EpochHold> {
        self.held().clock.recent()
    }

    /// Forgets the hold times measured so far.
    pub fn reset_hold_stats(&self) {
        self.held().clock.reset();
    }

    /// **For tests only: breaks invariant I1.** Frames are let out when their epoch is sealed, not when it is committed.
    /// A test of I1 that passes with this switched on tests nothing.
    #[doc(hidden)]
    pub fn break_output_commit(&self, on: bool) {
        if on {
            warn!("output commit is switched off: frames leave at seal");
        }
        self.held().leaky = on;
    }

    /// In the lock that changed the queue: a sender told `Full` before is woken now, one told so later finds the room.
    fn wake_sender(&self, held: &mut Held) {
        if held.waiting && held.queue.has_room() {
            held.waiting = false;
            self.room.raise();
        }
    }

    /// Writes a batch, with `out` held.
    fn write_all(&self, frames: &[Vec<u8>]) {
        let mut waits = BATCH_WAITS;
        for frame in frames {
            self.write(frame, &mut waits);
        }
    }

    /// Writes one frame, with `out` held. `waits` is what may still be waited for the port.
    fn write(&self, frame: &[u8], waits: &mut u32) {
        if self.is_fenced() {
            self.counts.dropped_fenced.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.standby.load(Ordering::Acquire) {
            self.counts.dropped_standby.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut left = RETRIES;
        loop {
            let e = match self.port.send(frame) {
                Ok(()) => {
                    self.counts.sent.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(e) => e,
            };
            if e.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            if no_room(&e) && left > 0 && *waits > 0 {
                left -= 1;
                *waits -= 1;
                wait_writable(self.port.fd());
                continue;
            }
            self.counts.dropped_port.fetch_add(1, Ordering::Relaxed);
            // Once: a tap that went away would fill the log with the guest's every frame.
            if !no_room(&e) && !self.warned.swap(true, Ordering::Relaxed) {
                warn!(error = %e, "the tap refuses frames; they are dropped and counted");
            }
            return;
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A panic elsewhere cannot leave the queue half changed in a way that lets a frame out early.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn out(&self) -> MutexGuard<'_, ()> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_room(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::WouldBlock || e.raw_os_error() == Some(libc::ENOBUFS)
}

/// Waits for room, a short while. ENOBUFS comes from a device whose descriptor stays writable: then only the while
/// itself helps.
fn wait_writable(fd: RawFd) {
    let mut p = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: `p` is one valid pollfd; a descriptor closed meanwhile only sets POLLNVAL.
    let n = unsafe { libc::poll(&raw mut p, 1, RETRY_WAIT_MS) };
    if n > 0 {
        std::thread::yield_now();
    }
}
