//! The thread of one virtio device: sleeps on its descriptors, works under the gate, runs jobs outside it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::fd;
use crate::devices::gate::{Access, Gated};
use crate::devices::mmio::MmioDevice;
use crate::devices::virtio::{Interrupt, Turn, WAKE_ALL, WAKE_QUEUE, WAKE_SOURCE0};

/// Epoll tokens: the guest's notification, the manager's word, then the device's own sources.
const KICK: u64 = 0;
const CONTROL: u64 = 1;
const SOURCES: u64 = 2;
/// Sources a device may have.
const MAX_SOURCES: usize = 2;

/// One virtio device as its thread, the vCPUs and the manager share it.
pub struct Slot {
    /// The device, behind the gate.
    pub device: Gated<MmioDevice>,
    /// Its interrupt, readable without the lock.
    pub interrupt: Arc<Interrupt>,
    /// The guest's notifications of all its queues.
    pub kick: EventFd,
    /// The manager's word: look at everything, or stop.
    pub control: EventFd,
    /// The thread is inside a backend without the lock, perhaps for long.
    pub busy: AtomicBool,
}

/// Waits for events on a slot's descriptors.
struct Waiter {
    epoll: Epoll,
    sources: Vec<RawFd>,
    listening: [bool; MAX_SOURCES],
}

impl Waiter {
    fn new(slot: &Slot) -> io::Result<Waiter> {
        let epoll = Epoll::new()?;
        for (fd, token) in [(&slot.kick, KICK), (&slot.control, CONTROL)] {
            epoll.ctl(
                ControlOperation::Add,
                fd.as_raw_fd(),
                EpollEvent::new(EventSet::IN, token),
            )?;
        }
        let mut sources = slot.device.access().sources();
        sources.truncate(MAX_SOURCES);
        Ok(Waiter {
            epoll,
            sources,
            listening: [false; MAX_SOURCES],
        })
    }

    /// Listens to exactly the sources the device wants. A source not wanted is removed, not masked: an error
    /// condition is reported whatever the mask and would spin.
    fn update(&mut self, device: &MmioDevice) {
        for (i, &source) in self.sources.iter().enumerate() {
            let wanted = device.wants(i);
            if wanted == self.listening[i] {
                continue;
            }
            let operation = if wanted {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            let event = EpollEvent::new(EventSet::IN, SOURCES + i as u64);
            match self.epoll.ctl(operation, source, event) {
                Ok(()) => self.listening[i] = wanted,
                Err(error) => {
                    tracing::warn!(device = device.name(), %error, "cannot listen to a device's descriptor");
                }
            }
        }
    }

    /// The next events, as a mask of `WAKE_*`.
    fn wait(&self, slot: &Slot) -> u32 {
        let mut events = [EpollEvent::default(); 2 + MAX_SOURCES];
        // Interrupted by a signal: nothing happened.
        let n = self.epoll.wait(-1, &mut events).unwrap_or(0);
        events[..n].iter().fold(0, |wake, event| {
            wake | match event.data() {
                KICK => {
                    fd::clear(slot.kick.as_raw_fd());
                    WAKE_QUEUE
                }
                CONTROL => {
                    fd::clear(slot.control.as_raw_fd());
                    WAKE_ALL
                }
                source => WAKE_SOURCE0 << (source - SOURCES),
            }
        })
    }
}

/// Starts the thread of `slot`; it ends after [`Gated::stop`] and a write to `control`.
///
/// # Errors
/// No epoll descriptor, or no thread.
pub fn spawn(slot: Arc<Slot>) -> io::Result<JoinHandle<()>> {
    let mut waiter = Waiter::new(&slot)?;
    let name = slot.device.access().name().to_owned();
    std::thread::Builder::new().name(name).spawn(move || {
        loop {
            let wake = waiter.wait(&slot);
            let Some(device) = turn(&slot, wake) else {
                return;
            };
            waiter.update(&device);
        }
    })
}

/// Works until the device has nothing more to do; `None` when it is to stop.
fn turn(slot: &Slot, wake: u32) -> Option<Access<'_, MmioDevice>> {
    let mut device = slot.device.enter()?;
    loop {
        let turn = device.service(wake);
        if let Some(mut job) = device.take_job() {
            slot.busy.store(true, Ordering::SeqCst);
            drop(device);
            job.run();
            slot.busy.store(false, Ordering::SeqCst);
            // Waits here while paused: the guest sees the request pending until it runs again.
            device = slot.device.enter()?;
            device.finish_job(job);
        } else if turn == Turn::More {
            drop(device);
            device = slot.device.enter()?;
        } else {
            return Some(device);
        }
    }
}
