//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2): registers, negotiation, status, reset.
//!
//! The guest is hostile: whatever it writes, the worst that follows is `DEVICE_NEEDS_RESET` on its own device.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::block::BlockJob;
use crate::devices::ring::{Ring, RingError, RingState};
use crate::devices::virtio::{INT_CONFIG, INT_RING, Interrupt, Io, Turn, VirtioDevice};
use crate::devices::{DeviceError, DeviceState, GuestMemory, state};

/// `MagicValue`: "virt", little endian.
pub const MAGIC: u32 = 0x7472_6976;
/// `Version`: 2, not legacy.
pub const VERSION: u32 = 2;
/// `VendorID`: "UNDR".
pub const VENDOR: u32 = 0x5244_4E55;

/// Register offsets (virtio 1.2, 4.2.2), bytes from the device's base.
#[allow(missing_docs)]
pub mod reg {
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// The status bits a driver may set; the rest are reserved.
const STATUS_BITS: u32 = 1 | 2 | DRIVER_OK | FEATURES_OK | FAILED;

/// Version of [`Transport`]'s layout.
const STATE_VERSION: u16 = 1;

/// What a checkpoint holds of a virtio device.
#[derive(Debug, Serialize, Deserialize)]
struct Transport {
    device_id: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    queues: Vec<RingState>,
    device: Vec<u8>,
}

/// A virtio device behind a virtio-mmio register window.
pub struct MmioDevice {
    device: Box<dyn VirtioDevice>,
    mem: GuestMemory,
    queues: Vec<Ring>,
    interrupt: Arc<Interrupt>,
    kick: EventFd,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    hurry: Arc<AtomicBool>,
    /// Counts resets, so that a job begun before one is not delivered after it.
    era: u64,
}

impl MmioDevice {
    /// Puts `device` behind a register window. `interrupt` is its line; `kick` is signalled when the guest notifies
    /// by a write that reaches user space (KVM's ioeventfd signals the same one); `hurry` is set while a pause waits.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        interrupt: Arc<Interrupt>,
        kick: EventFd,
        hurry: Arc<AtomicBool>,
    ) -> MmioDevice {
        let queues = device.queue_sizes().iter().map(|&n| Ring::new(n)).collect();
        MmioDevice {
            device,
            mem,
            queues,
            interrupt,
            kick,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
            hurry,
            era: 0,
        }
    }

    /// The device's name in checkpoints.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// File descriptors, besides the kick, that wake the device.
    pub fn sources(&self) -> Vec<std::os::fd::RawFd> {
        self.device.sources()
    }

    /// Whether source `index` is to be listened to now.
    pub fn wants(&self, index: usize) -> bool {
        self.live() && self.device.wants(index)
    }

    fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn event_idx(&self) -> bool {
        self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1
    }

    /// Whether the driver is running and nothing is broken.
    pub fn live(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    /// A read of the register window; unknown registers and odd widths read as zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= reg::CONFIG {
            let config = self.device.config();
            for (i, byte) in data.iter_mut().enumerate() {
                let at = usize::try_from(offset - reg::CONFIG)
                    .ok()
                    .and_then(|o| o.checked_add(i));
                *byte = at.and_then(|at| config.get(at)).copied().unwrap_or(0);
            }
            return;
        }
        data.fill(0);
        // Control registers are 32 bits wide and aligned (4.2.2.2).
        if let (4, 0) = (data.len(), offset % 4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device.device_id(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            reg::QUEUE_NUM_MAX => queue.map_or(0, |q| u32::from(q.max())),
            reg::QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready())),
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::STATUS => self.status,
            // No shared memory regions: length and base read as all ones (4.2.2.1).
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            // The configuration never changes while the device lives.
            reg::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// A write to the register window. The configuration space is read-only; unknown registers, odd widths and writes
    /// out of turn are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if offset >= reg::CONFIG || !offset.is_multiple_of(4) {
            return;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES if self.status & (FEATURES_OK | FAILED) == 0 => {
                let shift = match self.driver_features_sel {
                    0 => 0,
                    1 => 32,
                    // Bits beyond 63 do not exist; asking for one must fail the negotiation.
                    _ if value == 0 => return,
                    _ => {
                        self.driver_features = u64::MAX;
                        return;
                    }
                };
                self.driver_features &= !(u64::from(u32::MAX) << shift);
                self.driver_features |= u64::from(value) << shift;
            }
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_READY => self.set_queue_ready(value),
            reg::QUEUE_NOTIFY if (value as usize) < self.queues.len() => {
                let _ = self.kick.write(1);
            }
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => self.set_status(value),
            reg::QUEUE_NUM | reg::QUEUE_DESC_LOW..=reg::QUEUE_DEVICE_HIGH => {
                self.set_queue_register(offset, value);
            }
            _ => {}
        }
    }

    /// Whether the driver may set queues up now: features agreed, nothing broken.
    fn configurable(&self) -> bool {
        self.status & (FEATURES_OK | FAILED | NEEDS_RESET) == FEATURES_OK
    }

    fn set_queue_register(&mut self, offset: u64, value: u32) {
        if !self.configurable() {
            return;
        }
        let Some(regs) = self
            .queues
            .get_mut(self.queue_sel as usize)
            .and_then(Ring::regs_mut)
        else {
            return;
        };
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            // Too large becomes 0, which no queue can be made ready with.
            reg::QUEUE_NUM => regs.size = u16::try_from(value).unwrap_or(0),
            reg::QUEUE_DESC_LOW => regs.desc = low(regs.desc),
            reg::QUEUE_DESC_HIGH => regs.desc = high(regs.desc),
            reg::QUEUE_DRIVER_LOW => regs.avail = low(regs.avail),
            reg::QUEUE_DRIVER_HIGH => regs.avail = high(regs.avail),
            reg::QUEUE_DEVICE_LOW => regs.used = low(regs.used),
            reg::QUEUE_DEVICE_HIGH => regs.used = high(regs.used),
            _ => {}
        }
    }

    fn set_queue_ready(&mut self, value: u32) {
        let (configurable, event_idx) = (self.configurable(), self.event_idx());
        let Some(ring) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        match value {
            0 => ring.reset(),
            1 if configurable && !ring.ready() => {
                if let Err(e) = ring.enable(&self.mem, event_idx) {
                    self.broken(&e);
                }
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let kept = self.status & NEEDS_RESET;
        let mut new = value & STATUS_BITS;
        // A driver does not take bits back except by a reset (2.1.1).
        if self.status & !NEEDS_RESET & !new != 0 {
            return;
        }
        if new & FEATURES_OK != 0 && self.status & FEATURES_OK == 0 {
            let agreed = self.driver_features & !self.offered() == 0
                && self.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1;
            if !agreed {
                new &= !FEATURES_OK;
            }
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        let starts = new & DRIVER_OK != 0 && self.status & DRIVER_OK == 0;
        self.status = new | kept;
        if starts {
            // Buffers may have been offered before DRIVER_OK; look at the queues once.
            let _ = self.kick.write(1);
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(Ring::reset);
        self.interrupt.set_status(0);
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.status = 0;
        self.era = self.era.wrapping_add(1);
    }

    /// The guest broke a queue: nothing is done for it any more until it resets the device (2.1.2).
    fn broken(&mut self, why: &RingError) {
        tracing::warn!(device = self.device.name(), %why, "the guest broke a virtqueue; the device needs a reset");
        let running = self.status & DRIVER_OK != 0;
        self.status |= NEEDS_RESET;
        if running {
            self.interrupt.raise(INT_CONFIG);
        }
    }

    /// Runs `f` with the device if it is live; a broken queue ends in `DEVICE_NEEDS_RESET` and `idle`.
    fn with_live<T>(
        &mut self,
        idle: T,
        f: impl FnOnce(&mut dyn VirtioDevice, &mut Io<'_>) -> Result<T, RingError>,
    ) -> T {
        if !self.live() {
            return idle;
        }
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            interrupt: &self.interrupt,
            hurry: &self.hurry,
        };
        match f(self.device.as_mut(), &mut io) {
            Ok(value) => value,
            Err(e) => {
                self.broken(&e);
                idle
            }
        }
    }

    /// Lets the device do a bounded piece of work for the events in `wake`.
    pub fn service(&mut self, wake: u32) -> Turn {
        self.with_live(Turn::Done, |device, io| device.service(io, wake))
    }

    /// Work to run without the lock, if any; hand it back to [`MmioDevice::finish_job`].
    pub fn take_job(&mut self) -> Option<BlockJob> {
        let era = self.era;
        self.with_live(None, |device, io| device.take_job(io))
            .map(|mut job| {
                job.era = era;
                job
            })
    }

    /// Delivers a job that has run, unless the guest reset the device meanwhile.
    pub fn finish_job(&mut self, job: BlockJob) {
        if job.era == self.era {
            self.with_live((), |device, io| device.finish_job(io, job));
        }
    }

    /// Wakes the device's thread to look at everything.
    pub fn kick(&self) {
        let _ = self.kick.write(1);
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// The state of transport and device.
    ///
    /// # Errors
    /// [`DeviceError::State`] if it cannot be encoded.
    pub fn save(&self) -> Result<DeviceState, DeviceError> {
        let transport = Transport {
            device_id: self.device.device_id(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            status: self.status,
            interrupt_status: self.interrupt.status(),
            queues: self.queues.iter().map(Ring::save).collect(),
            device: self.device.save()?,
        };
        state::encode(self.device.name(), STATE_VERSION, &transport)
    }

    /// Takes over a saved state; what the device was doing goes on at the next [`MmioDevice::service`].
    ///
    /// # Errors
    /// [`DeviceError::State`] if it is of another version or kind, or could not have been a live device in this memory.
    /// The device is then reset.
    pub fn restore(&mut self, saved: &DeviceState) -> Result<(), DeviceError> {
        let result = self.try_restore(saved);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn try_restore(&mut self, saved: &DeviceState) -> Result<(), DeviceError> {
        self.reset();
        let name = self.device.name().to_owned();
        let wrong = |why: String| DeviceError::State {
            name: name.clone(),
            why,
        };
        let t: Transport = state::decode(saved, &name, STATE_VERSION)?;
        if t.device_id != self.device.device_id() {
            return Err(wrong(format!(
                "is of a device of type {}, not {}",
                t.device_id,
                self.device.device_id()
            )));
        }
        if t.queues.len() != self.queues.len() {
            return Err(wrong(format!("has {} queues", t.queues.len())));
        }
        if t.status & !(STATUS_BITS | NEEDS_RESET) != 0
            || t.interrupt_status & !(INT_RING | INT_CONFIG) != 0
        {
            return Err(wrong("has unknown status bits".to_owned()));
        }
        if t.status & FEATURES_OK != 0 && t.driver_features & !self.offered() != 0 {
            return Err(wrong(format!(
                "negotiated features {:#x} of which this device offers only {:#x}",
                t.driver_features,
                self.offered()
            )));
        }
        self.driver_features = t.driver_features;
        let event_idx = self.event_idx();
        for (ring, from) in self.queues.iter_mut().zip(&t.queues) {
            ring.restore(&self.mem, from, event_idx)
                .map_err(|e| wrong(e.to_string()))?;
        }
        self.device_features_sel = t.device_features_sel;
        self.driver_features_sel = t.driver_features_sel;
        self.queue_sel = t.queue_sel;
        self.status = t.status;
        self.interrupt.set_status(t.interrupt_status);
        self.device.restore(&self.queues, &t.device)
    }
}
