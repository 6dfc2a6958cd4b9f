//! virtio-mmio transport, version 2 (Virtual I/O Device specification 1.2, clause 4.2), driver side.

pub mod blk;
pub mod net;
pub mod queue;

use core::sync::atomic::{Ordering, fence};

use crate::boot::IRQ_PENDING;
use crate::irq::{read32, write32};
use queue::Rings;

const FIRST_SLOT: usize = 0xd000_0000;
const SLOT_SIZE: usize = 0x1000;
const SLOTS: usize = 8;

const MAGIC: usize = 0x000;
const VERSION: usize = 0x004;
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SEL: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SEL: usize = 0x024;
const QUEUE_SEL: usize = 0x030;
const QUEUE_NUM_MAX: usize = 0x034;
const QUEUE_NUM: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const INTERRUPT_ACK: usize = 0x064;
const STATUS: usize = 0x070;
const QUEUE_DESC: usize = 0x080;
const QUEUE_DRIVER: usize = 0x090;
const QUEUE_DEVICE: usize = 0x0a0;
const CONFIG: usize = 0x100;

const S_ACKNOWLEDGE: u32 = 1;
const S_DRIVER: u32 = 2;
const S_DRIVER_OK: u32 = 4;
const S_FEATURES_OK: u32 = 8;
const S_FAILED: u32 = 128;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;

/// Why a device cannot be used.
pub enum Unusable {
    /// It does not offer VIRTIO_F_VERSION_1.
    Legacy,
    /// It did not accept the features chosen.
    Features,
    /// The queue of this number is missing or too small.
    Queue(u32),
}

impl core::fmt::Display for Unusable {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Unusable::Legacy => f.write_str("it does not offer VIRTIO_F_VERSION_1"),
            Unusable::Features => f.write_str("it refuses its own features"),
            Unusable::Queue(i) => write!(f, "queue {i} is missing or too small"),
        }
    }
}

/// One virtio-mmio slot with a device in it.
#[derive(Clone, Copy)]
pub struct Transport {
    base: usize,
    slot: usize,
}

impl Transport {
    /// The first slot that holds a device of this type (1 network, 2 block).
    pub fn find(device_id: u32) -> Option<Transport> {
        (0..SLOTS)
            .map(|slot| Transport {
                base: FIRST_SLOT + slot * SLOT_SIZE,
                slot,
            })
            .find(|t| {
                t.read(MAGIC) == u32::from_le_bytes(*b"virt")
                    && t.read(VERSION) == 2
                    && t.read(DEVICE_ID) == device_id
            })
    }

    /// The slot's number.
    pub fn slot(&self) -> usize {
        self.slot
    }

    fn read(&self, register: usize) -> u32 {
        read32(self.base + register)
    }

    fn write(&self, register: usize, v: u32) {
        write32(self.base + register, v);
    }

    /// Reads 32 bits of the device's configuration space.
    pub fn config(&self, offset: usize) -> u32 {
        self.read(CONFIG + offset)
    }

    /// Resets the device and agrees on VERSION_1 and those of `wanted` it offers; returns what was agreed on.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, Unusable> {
        self.write(STATUS, 0);
        self.write(STATUS, S_ACKNOWLEDGE);
        self.write(STATUS, S_ACKNOWLEDGE | S_DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(DEVICE_FEATURES_SEL, half);
            offered |= u64::from(self.read(DEVICE_FEATURES)) << (32 * half);
        }
        if offered & VERSION_1 == 0 {
            self.write(STATUS, S_FAILED);
            return Err(Unusable::Legacy);
        }
        let agreed = offered & (wanted | VERSION_1);
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (agreed >> (32 * half)) as u32);
        }
        self.write(STATUS, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK);
        if self.read(STATUS) & S_FEATURES_OK == 0 {
            self.write(STATUS, S_FAILED);
            return Err(Unusable::Features);
        }
        Ok(agreed)
    }

    /// Gives the device queue `index` of `size` entries in `rings`.
    pub fn set_queue<const N: usize>(&self, index: u32, rings: &Rings<N>) -> Result<(), Unusable> {
        self.write(QUEUE_SEL, index);
        if (self.read(QUEUE_NUM_MAX) as usize) < N {
            self.write(STATUS, S_FAILED);
            return Err(Unusable::Queue(index));
        }
        self.write(QUEUE_NUM, N as u32);
        for (register, at) in [
            (QUEUE_DESC, (&raw const rings.desc) as u64),
            (QUEUE_DRIVER, (&raw const rings.avail) as u64),
            (QUEUE_DEVICE, (&raw const rings.used) as u64),
        ] {
            self.write(register, at as u32);
            self.write(register + 4, (at >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        Ok(())
    }

    /// The driver is ready.
    pub fn go(&self) {
        fence(Ordering::SeqCst);
        self.write(
            STATUS,
            S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK,
        );
    }

    /// Tells the device about new descriptors in queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(QUEUE_NOTIFY, index);
    }

    /// Acknowledges the device's interrupt if one came (clause 4.2.2: the status register stays set otherwise).
    pub fn acknowledge(&self) {
        if IRQ_PENDING[self.slot].swap(0, Ordering::Relaxed) != 0 {
            self.write(INTERRUPT_ACK, 3);
        }
    }
}
