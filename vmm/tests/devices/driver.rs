//! A machine without vCPUs and a driver for one of its devices: registers, one split ring per queue, buffers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm::backend::BlockBackend;
use vmm::devices::manager::{FIRST_GSI, MMIO_BASE, MMIO_STRIDE};
use vmm::devices::mmio::reg;
use vmm::devices::{DeviceManager, DeviceSpec, GuestMemory, NetSpec};

use crate::stand_ins::{End, TestDisk, TestWire, Wires};

pub const RAM_LOW: u64 = 8 << 20;
pub const HIGH: u64 = 4 << 30;
pub const RAM_HIGH: u64 = 4 << 20;
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;

/// Two regions, as a machine with a hole below 4 GiB has.
pub fn memory() -> GuestMemory {
    vm_memory::GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[
        (GuestAddress(0), RAM_LOW as usize),
        (GuestAddress(HIGH), RAM_HIGH as usize),
    ])
    .unwrap()
}

/// Every byte of `from` into `to`.
pub fn copy_memory(from: &GuestMemory, to: &GuestMemory) {
    for (start, len) in [(0, RAM_LOW), (HIGH, RAM_HIGH)] {
        let mut bytes = vec![0; len as usize];
        from.read_slice(&mut bytes, GuestAddress(start)).unwrap();
        to.write_slice(&bytes, GuestAddress(start)).unwrap();
    }
}

pub fn is_dirty(mem: &GuestMemory, addr: u64) -> bool {
    let (region, at) = mem.to_region_addr(GuestAddress(addr)).unwrap();
    region.bitmap().dirty_at(at.0 as usize)
}

pub fn clean(mem: &GuestMemory) {
    for region in mem.iter() {
        region.get_mmap().bitmap().reset();
    }
}

/// Waits, generously, until `what` holds.
pub fn eventually(name: &str, mut what: impl FnMut() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "never came: {name}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The devices and what they stand on. On the bus: net, disk, rng.
pub struct Machine {
    pub mem: GuestMemory,
    pub devices: Arc<DeviceManager>,
    pub wires: Arc<Wires>,
    pub wire: Arc<TestWire>,
    pub disk: Arc<TestDisk>,
}

pub const NET: usize = 0;
pub const BLK: usize = 1;
pub const RNG: usize = 2;

impl Machine {
    pub fn new(disk: Arc<TestDisk>) -> Machine {
        let machine = Machine::paused(disk);
        machine.devices.resume();
        machine
    }

    pub fn paused(disk: Arc<TestDisk>) -> Machine {
        let (mem, wires, wire) = (memory(), Arc::new(Wires::default()), TestWire::new());
        let backend: Arc<dyn BlockBackend> = disk.clone();
        let devices = DeviceManager::new(
            mem.clone(),
            wires.as_ref(),
            DeviceSpec {
                net: vec![NetSpec {
                    mac: MAC,
                    backend: Box::new(End(wire.clone())),
                }],
                disks: vec![backend],
                rng: true,
                serial_out: Box::new(std::io::sink()),
                serial_in: None,
                on_reset: Box::new(|| {}),
            },
        )
        .unwrap();
        Machine {
            mem,
            devices: Arc::new(devices),
            wires,
            wire,
            disk,
        }
    }

    /// A paused copy of this, also paused, machine on another disk: what a checkpoint and a restore do.
    pub fn successor(&self, disk: Arc<TestDisk>) -> Machine {
        let states = self.devices.save().unwrap();
        let next = Machine::paused(disk);
        copy_memory(&self.mem, &next.mem);
        next.devices.restore(&states).unwrap();
        next
    }

    /// Takes over the driver of a device after [`Machine::successor`].
    pub fn adopt(&self, driver: &Driver) -> Driver {
        Driver {
            mem: self.mem.clone(),
            devices: self.devices.clone(),
            ..driver.clone()
        }
    }

    /// A driver with the device negotiated, its queues live.
    pub fn driver(&self, device: usize, features: u64) -> Driver {
        let driver = Driver::new(self, device);
        driver.start(features);
        driver
    }
}

/// One direction-tagged buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub addr: u64,
    pub len: u32,
    pub write: bool,
}

/// Readable by the device.
pub fn out(addr: u64, len: u32) -> Part {
    Part {
        addr,
        len,
        write: false,
    }
}

/// Writable by the device.
pub fn into(addr: u64, len: u32) -> Part {
    Part {
        addr,
        len,
        write: true,
    }
}

pub const SIZE: u16 = 16;

/// The driver's view of one device.
#[derive(Clone)]
pub struct Driver {
    pub mem: GuestMemory,
    pub devices: Arc<DeviceManager>,
    pub device: usize,
    queues: Vec<Queue>,
    next_buffer: u64,
}

#[derive(Clone, Default)]
struct Queue {
    next_desc: u16,
    next_avail: u16,
    seen_used: u16,
}

impl Driver {
    /// A driver that has not touched the device yet.
    pub fn new(machine: &Machine, device: usize) -> Driver {
        Driver {
            mem: machine.mem.clone(),
            devices: machine.devices.clone(),
            device,
            queues: vec![Queue::default(); 2],
            next_buffer: 0x10_0000 * (1 + device as u64),
        }
    }

    pub fn gsi(&self) -> u32 {
        FIRST_GSI + self.device as u32
    }

    pub fn base(&self) -> u64 {
        MMIO_BASE + self.device as u64 * MMIO_STRIDE
    }

    pub fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.devices.mmio_read(self.base() + offset, &mut word));
        u32::from_le_bytes(word)
    }

    pub fn set(&self, offset: u64, value: u32) {
        assert!(
            self.devices
                .mmio_write(self.base() + offset, &value.to_le_bytes())
        );
    }

    pub fn offered(&self) -> u64 {
        self.set(reg::DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.get(reg::DEVICE_FEATURES));
        self.set(reg::DEVICE_FEATURES_SEL, 1);
        low | u64::from(self.get(reg::DEVICE_FEATURES)) << 32
    }

    /// Resets and asks for `features`; true if the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set(reg::STATUS, 0);
        self.set(reg::STATUS, 1);
        self.set(reg::STATUS, 1 | 2);
        self.set(reg::DRIVER_FEATURES_SEL, 0);
        self.set(reg::DRIVER_FEATURES, features as u32);
        self.set(reg::DRIVER_FEATURES_SEL, 1);
        self.set(reg::DRIVER_FEATURES, (features >> 32) as u32);
        self.set(reg::STATUS, 1 | 2 | 8);
        self.get(reg::STATUS) & 8 != 0
    }

    pub fn desc(&self, queue: usize) -> u64 {
        0x10000 * (1 + self.device as u64 * 2 + queue as u64)
    }

    pub fn avail(&self, queue: usize) -> u64 {
        self.desc(queue) + 0x2000
    }

    pub fn used(&self, queue: usize) -> u64 {
        self.desc(queue) + 0x4000
    }

    pub fn set_up_queue(&self, queue: usize, size: u32, [desc, avail, used]: [u64; 3]) {
        self.set(reg::QUEUE_SEL, queue as u32);
        self.set(reg::QUEUE_NUM, size);
        for (low, addr) in [
            (reg::QUEUE_DESC_LOW, desc),
            (reg::QUEUE_DRIVER_LOW, avail),
            (reg::QUEUE_DEVICE_LOW, used),
        ] {
            self.set(low, addr as u32);
            self.set(low + 4, (addr >> 32) as u32);
        }
        self.set(reg::QUEUE_READY, 1);
    }

    pub fn start(&self, features: u64) {
        assert!(self.negotiate(features | VERSION_1));
        for queue in 0..self.queues.len() {
            self.set(reg::QUEUE_SEL, queue as u32);
            if self.get(reg::QUEUE_NUM_MAX) > 0 {
                let rings = [self.desc(queue), self.avail(queue), self.used(queue)];
                self.set_up_queue(queue, u32::from(SIZE), rings);
                assert_eq!(self.get(reg::QUEUE_READY), 1);
            }
        }
        self.set(reg::STATUS, 1 | 2 | 8 | 4);
        assert_eq!(self.get(reg::STATUS), 15);
    }

    /// Fresh guest memory holding `bytes`.
    pub fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += (bytes.len() as u64).next_multiple_of(4096);
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub fn mem_write(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn put<const N: usize>(&self, addr: u64, bytes: [u8; N]) {
        self.mem.write_slice(&bytes, GuestAddress(addr)).unwrap();
    }

    pub fn write_desc(&self, queue: usize, index: u16, part: Part, flags: u16, next: u16) {
        let at = self.desc(queue) + 16 * u64::from(index);
        let flags = flags | if part.write { 2 } else { 0 };
        self.put(at, part.addr.to_le_bytes());
        self.put(at + 8, part.len.to_le_bytes());
        self.put(at + 12, flags.to_le_bytes());
        self.put(at + 14, next.to_le_bytes());
    }

    /// Offers a chain without telling the device; its head.
    pub fn offer(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let head = self.queues[queue].next_desc;
        for (i, part) in parts.iter().enumerate() {
            let index = self.queues[queue].next_desc;
            let next = (index + 1) % SIZE;
            self.queues[queue].next_desc = next;
            let last = i + 1 == parts.len();
            self.write_desc(queue, index, *part, u16::from(!last), next);
        }
        self.offer_head(queue, head);
        head
    }

    pub fn offer_head(&mut self, queue: usize, head: u16) {
        let slot = self.queues[queue].next_avail % SIZE;
        self.put(
            self.avail(queue) + 4 + 2 * u64::from(slot),
            head.to_le_bytes(),
        );
        self.queues[queue].next_avail = self.queues[queue].next_avail.wrapping_add(1);
        self.set_avail_idx(queue, self.queues[queue].next_avail);
    }

    pub fn set_avail_idx(&self, queue: usize, idx: u16) {
        self.mem
            .store(
                idx.to_le(),
                GuestAddress(self.avail(queue) + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.set(reg::QUEUE_NOTIFY, queue as u32);
    }

    pub fn used_idx(&self, queue: usize) -> u16 {
        let idx: u16 = self
            .mem
            .load(GuestAddress(self.used(queue) + 2), Ordering::SeqCst)
            .unwrap();
        u16::from_le(idx)
    }

    /// The next chain the device returned, if it has: (head, bytes written).
    pub fn poll_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let seen = self.queues[queue].seen_used;
        if self.used_idx(queue) == seen {
            return None;
        }
        let raw = self.bytes(self.used(queue) + 4 + 8 * u64::from(seen % SIZE), 8);
        self.queues[queue].seen_used = seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        Some((word(0) as u16, word(4)))
    }

    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let mut got = None;
        eventually("a used buffer", || {
            got = self.poll_used(queue);
            got.is_some()
        });
        got.unwrap()
    }

    pub fn wait_needs_reset(&self) {
        eventually("DEVICE_NEEDS_RESET", || self.get(reg::STATUS) & 64 != 0);
    }
}

/// Block requests over [`Driver`].
impl Driver {
    pub fn header(&mut self, kind: u32, sector: u64) -> Part {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        out(self.buffer(&bytes), 16)
    }

    /// Offers a request with `data` parts between header and status; (head, address of the status).
    pub fn offer_request(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u16, u64) {
        let header = self.header(kind, sector);
        let status = self.buffer(&[0xaa]);
        let mut parts = vec![header];
        parts.extend_from_slice(data);
        parts.push(into(status, 1));
        (self.offer(0, &parts), status)
    }

    /// Runs a request to its end; the status byte.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> u8 {
        let (head, status) = self.offer_request(kind, sector, data);
        self.kick(0);
        assert_eq!(self.wait_used(0).0, head);
        self.bytes(status, 1)[0]
    }
}
