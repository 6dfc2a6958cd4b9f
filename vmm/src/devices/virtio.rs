//! What a virtio device is to its transport and its thread.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::block::BlockJob;
use crate::devices::ring::{Ring, RingError};
use crate::devices::{DeviceError, GuestMemory};

/// Interrupt status bit: a used ring has changed (virtio 1.2, 4.2.2, `InterruptStatus`).
pub const INT_RING: u32 = 1;
/// Interrupt status bit: the configuration, or the device's status, has changed.
pub const INT_CONFIG: u32 = 2;

/// Woken because a queue may hold something new.
pub const WAKE_QUEUE: u32 = 1;
/// Woken because the first of the device's own sources is readable.
pub const WAKE_SOURCE0: u32 = 2;
/// Woken because the second of the device's own sources is readable.
pub const WAKE_SOURCE1: u32 = 4;
/// Woken after a restore, or for the first time: look at everything.
pub const WAKE_ALL: u32 = WAKE_QUEUE | WAKE_SOURCE0 | WAKE_SOURCE1;

/// The interrupt line of one device and its status register.
///
/// Apart from the device's lock, so that the guest's handler reads and acknowledges without waiting for a batch.
/// A bit is set before the line is raised and only the guest clears it: an edge lost on the way through a checkpoint
/// (an irqfd injects from a kernel work queue) is still told by the bit, and raised again after a restore.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// A line raised by writing to `line`.
    pub fn new(line: EventFd) -> Interrupt {
        Interrupt {
            status: AtomicU32::new(0),
            line,
        }
    }

    /// Sets `bits` and raises the line.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.pulse();
    }

    /// Raises the line again if anything is pending; a spurious interrupt is harmless, a lost one is not.
    pub fn raise_pending(&self) {
        if self.status() != 0 {
            self.pulse();
        }
    }

    fn pulse(&self) {
        // Fails only when 2^64 - 1 edges are already pending, which is as good as one more.
        let _ = self.line.write(1);
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The guest's acknowledgement of `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the register without raising the line: reset and restore.
    pub fn set_status(&self, bits: u32) {
        self.status.store(bits, Ordering::SeqCst);
    }

    /// The eventfd behind the line.
    pub fn line(&self) -> &EventFd {
        &self.line
    }
}

/// What a device works with while it holds its lock.
pub struct Io<'a> {
    /// The guest's memory; writes are marked in its bitmap.
    pub mem: &'a GuestMemory,
    /// The device's queues.
    pub queues: &'a mut [Ring],
    /// The device's interrupt.
    pub interrupt: &'a Interrupt,
    /// Set while a pause is waiting for the lock: finish the piece at hand and return.
    pub hurry: &'a AtomicBool,
}

impl Io<'_> {
    /// Whether a pause is waiting.
    pub fn must_yield(&self) -> bool {
        self.hurry.load(Ordering::SeqCst)
    }

    /// Interrupts the guest for queue `index` if it wants to be.
    ///
    /// # Errors
    /// [`RingError`] from reading the guest's wishes.
    pub fn interrupt_for(&mut self, index: usize) -> Result<(), RingError> {
        if let Some(ring) = self.queues.get_mut(index)
            && ring.wants_interrupt(self.mem)?
        {
            self.interrupt.raise(INT_RING);
        }
        Ok(())
    }
}

/// Whether a device stopped because it was done or because its turn was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing more to do until the next event.
    Done,
    /// There is more: give way to a pause, then call again.
    More,
}

/// One kind of virtio device behind the MMIO transport. All calls are made under the device's lock.
pub trait VirtioDevice: Send {
    /// Name in checkpoints and messages, e.g. `net0`.
    fn name(&self) -> &str;

    /// Virtio device id (virtio 1.2, 5).
    fn device_id(&self) -> u32;

    /// Largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device's own feature bits; the transport adds its own.
    fn features(&self) -> u64;

    /// The device's configuration space, read-only.
    fn config(&self) -> &[u8];

    /// Forgets everything the driver set up. A job taken before must have no effect on the guest afterwards.
    fn reset(&mut self);

    /// File descriptors besides the queues' that wake the device: at most two.
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Whether the device wants to hear of source `index` now.
    fn wants(&self, _index: usize) -> bool {
        true
    }

    /// Does a bounded piece of work. `wake` says which events came. Queues may not be ready.
    ///
    /// # Errors
    /// How the guest broke a queue; the transport then sets `DEVICE_NEEDS_RESET`.
    fn service(&mut self, io: &mut Io<'_>, wake: u32) -> Result<Turn, RingError>;

    /// Work to be run without the lock, if there is any.
    ///
    /// # Errors
    /// As [`VirtioDevice::service`].
    fn take_job(&mut self, _io: &mut Io<'_>) -> Result<Option<BlockJob>, RingError> {
        Ok(None)
    }

    /// Delivers a job that has run.
    ///
    /// # Errors
    /// As [`VirtioDevice::service`].
    fn finish_job(&mut self, _io: &mut Io<'_>, _job: BlockJob) -> Result<(), RingError> {
        Ok(())
    }

    /// The device's own state.
    ///
    /// # Errors
    /// [`DeviceError::State`].
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Takes over a saved state; the transport has restored `queues` already.
    ///
    /// # Errors
    /// [`DeviceError::State`] if it does not fit this device.
    fn restore(&mut self, queues: &[Ring], state: &[u8]) -> Result<(), DeviceError>;
}
