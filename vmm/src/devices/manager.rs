//! All devices of one machine behind one door: bus addresses, threads, pause, save and restore.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::{BlockBackend, NetBackend};
use crate::devices::block::Block;
use crate::devices::gate::Gated;
use crate::devices::mmio::{MmioDevice, reg};
use crate::devices::net::Net;
use crate::devices::rng::Rng;
use crate::devices::rtc::Rtc;
use crate::devices::serial::Serial;
use crate::devices::virtio::{Interrupt, VirtioDevice};
use crate::devices::worker::{self, Slot};
use crate::devices::{DeviceError, DeviceState, GuestMemory, console};

/// Guest physical address of the first virtio-mmio device.
pub const MMIO_BASE: u64 = 0xD000_0000;
/// Bytes between, and claimed by, virtio-mmio devices.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Places for virtio-mmio devices.
pub const MAX_DEVICES: usize = 8;
/// GSI of the first virtio-mmio device; device i has `FIRST_GSI + i`, edge triggered.
pub const FIRST_GSI: u32 = 16;
/// Ports of the serial console, COM1.
pub const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// Ports of the real-time clock: index and data.
pub const RTC_PORTS: std::ops::RangeInclusive<u16> = 0x70..=0x71;
/// Port of the keyboard controller's commands, of which only the reset pulse exists.
pub const RESET_PORT: u16 = 0x64;
/// The command that pulses the reset line.
const RESET_PULSE: u8 = 0xfe;
/// GSI of the serial port COM1.
pub const SERIAL_GSI: u32 = 4;

/// One network device of the machine.
pub struct NetSpec {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Where its frames go to and come from.
    pub backend: Box<dyn NetBackend>,
}

/// The devices a machine is to have. Order on the bus: net, disks, rng.
pub struct DeviceSpec {
    /// Network devices, `net0`...
    pub net: Vec<NetSpec>,
    /// Disks, `blk0`...
    pub disks: Vec<Arc<dyn BlockBackend>>,
    /// Whether there is an entropy device, `rng0`.
    pub rng: bool,
    /// Where the serial console's output goes.
    pub serial_out: Box<dyn Write + Send>,
    /// Where the serial console's input comes from, if anywhere.
    pub serial_in: Option<OwnedFd>,
    /// Called, on the vCPU's thread, when the guest pulses the reset line (port 0x64, 0xfe).
    pub on_reset: Box<dyn Fn() + Send + Sync>,
}

/// Where a virtio-mmio device sits, for the ACPI tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Interrupt, edge triggered.
    pub gsi: u32,
}

/// How eventfds are tied to the machine: KVM's irqfd and ioeventfd, or nothing in tests.
pub trait Wiring {
    /// Every write to `fd` raises an edge on `gsi`.
    ///
    /// # Errors
    /// KVM's refusal.
    fn irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()>;

    /// A 4-byte guest write of `value` to `addr` signals `fd` without leaving the kernel.
    ///
    /// # Errors
    /// KVM's refusal.
    fn ioeventfd(&self, fd: &EventFd, addr: u64, value: u32) -> io::Result<()>;
}

impl Wiring for VmFd {
    fn irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        self.register_irqfd(fd, gsi).map_err(Into::into)
    }

    fn ioeventfd(&self, fd: &EventFd, addr: u64, value: u32) -> io::Result<()> {
        self.register_ioevent(fd, &IoEventAddress::Mmio(addr), value)
            .map_err(Into::into)
    }
}

/// All devices of one machine. Made paused: nothing moves before the first [`DeviceManager::resume`].
///
/// How interrupts survive a checkpoint: an irqfd injects from a kernel work queue, so an edge raised just before a
/// pause may not be in the captured interrupt controller. Its cause always is in the captured device: the bit in
/// `InterruptStatus` is set before the edge and stays until the guest acknowledges it (the serial port's identification
/// register likewise). The first [`DeviceManager::resume`] after a restore raises the line of every device with such a
/// bit. An edge too many makes a driver look once in vain. In the machine that was captured nothing is lost: the kernel
/// delivers the edge while the vCPUs stand still or after.
///
/// A guest's notification lost likewise (an ioeventfd written but not yet read) is made up for by looking at every queue
/// after a restore.
pub struct DeviceManager {
    places: Vec<MmioSlot>,
    slots: Vec<Arc<Slot>>,
    serial: Arc<Gated<Serial>>,
    serial_control: EventFd,
    rtc: Mutex<Rtc>,
    on_reset: Box<dyn Fn() + Send + Sync>,
    hurry: Arc<AtomicBool>,
    /// The next resume is the first, or the first after a restore.
    fresh: AtomicBool,
    threads: Vec<(Option<Arc<Slot>>, JoinHandle<()>)>,
}

fn os<T>(what: &'static str, result: io::Result<T>) -> Result<T, DeviceError> {
    result.map_err(|source| DeviceError::Os { what, source })
}

fn eventfd() -> Result<EventFd, DeviceError> {
    os("cannot make an eventfd", EventFd::new(EFD_NONBLOCK))
}

fn clone(fd: &EventFd) -> Result<EventFd, DeviceError> {
    os("cannot duplicate an eventfd", fd.try_clone())
}

impl DeviceManager {
    /// Makes the devices, wires them and starts their threads, paused.
    ///
    /// # Errors
    /// [`DeviceError::TooMany`], or a refusal by the operating system.
    pub fn new(
        mem: GuestMemory,
        wiring: &dyn Wiring,
        spec: DeviceSpec,
    ) -> Result<DeviceManager, DeviceError> {
        let wanted = spec.net.len() + spec.disks.len() + usize::from(spec.rng);
        if wanted > MAX_DEVICES {
            return Err(DeviceError::TooMany {
                wanted,
                room: MAX_DEVICES,
            });
        }
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for (i, net) in spec.net.into_iter().enumerate() {
            devices.push(Box::new(Net::new(i, net.mac, net.backend)));
        }
        for (i, disk) in spec.disks.into_iter().enumerate() {
            devices.push(Box::new(Block::new(i, disk)));
        }
        if spec.rng {
            devices.push(Box::new(Rng::new(0)));
        }

        // Set until the first resume, like the gates' own flags.
        let hurry = Arc::new(AtomicBool::new(true));
        let line = eventfd()?;
        os(
            "cannot wire the serial interrupt",
            wiring.irqfd(&line, SERIAL_GSI),
        )?;
        let (drained, serial_control) = (eventfd()?, eventfd()?);
        let port = os(
            "cannot make the serial port",
            Serial::new(spec.serial_out, line, clone(&drained)?),
        )?;
        let mut manager = DeviceManager {
            places: Vec::new(),
            slots: Vec::new(),
            serial: Arc::new(Gated::new(port, Arc::clone(&hurry))),
            serial_control,
            rtc: Mutex::new(Rtc::default()),
            on_reset: spec.on_reset,
            hurry,
            fresh: AtomicBool::new(true),
            threads: Vec::new(),
        };
        for (i, device) in devices.into_iter().enumerate() {
            manager.add(i, &mem, wiring, device)?;
        }
        if let Some(input) = spec.serial_in {
            let control = clone(&manager.serial_control)?;
            let serial = Arc::clone(&manager.serial);
            let thread = console::spawn(serial, input, drained, control);
            manager
                .threads
                .push((None, os("cannot start the console", thread)?));
        }
        Ok(manager)
    }

    fn add(
        &mut self,
        index: usize,
        mem: &GuestMemory,
        wiring: &dyn Wiring,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), DeviceError> {
        let place = MmioSlot {
            addr: MMIO_BASE + index as u64 * MMIO_STRIDE,
            len: MMIO_STRIDE,
            gsi: FIRST_GSI + index as u32,
        };
        let (line, kick) = (eventfd()?, eventfd()?);
        os(
            "cannot wire a device's interrupt",
            wiring.irqfd(&line, place.gsi),
        )?;
        for queue in 0..device.queue_sizes().len() {
            os(
                "cannot wire a device's notification",
                wiring.ioeventfd(&kick, place.addr + reg::QUEUE_NOTIFY, queue as u32),
            )?;
        }
        let interrupt = Arc::new(Interrupt::new(line));
        let mmio = MmioDevice::new(
            device,
            mem.clone(),
            Arc::clone(&interrupt),
            clone(&kick)?,
            Arc::clone(&self.hurry),
        );
        let slot = Arc::new(Slot {
            device: Gated::new(mmio, Arc::clone(&self.hurry)),
            interrupt,
            kick,
            control: eventfd()?,
            busy: AtomicBool::new(false),
        });
        let thread = os(
            "cannot start a device's thread",
            worker::spawn(Arc::clone(&slot)),
        )?;
        self.threads.push((Some(Arc::clone(&slot)), thread));
        self.slots.push(slot);
        self.places.push(place);
        Ok(())
    }

    /// The virtio-mmio devices, in bus order.
    pub fn mmio_slots(&self) -> &[MmioSlot] {
        &self.places
    }

    fn find(&self, addr: u64) -> Option<(&Slot, u64)> {
        let from_base = addr.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(from_base / MMIO_STRIDE).ok()?;
        Some((self.slots.get(index)?, from_base % MMIO_STRIDE))
    }

    /// A vCPU's read of guest physical `addr`; false: no device there, `data` untouched.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((slot, offset)) = self.find(addr) else {
            return false;
        };
        // The guest's interrupt handler reads this on every interrupt: not behind a device's batch.
        if let (reg::INTERRUPT_STATUS, Ok(word)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *word = slot.interrupt.status().to_le_bytes();
        } else {
            slot.device.access().read(offset, data);
        }
        true
    }

    /// A vCPU's write; false: no device there.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((slot, offset)) = self.find(addr) else {
            return false;
        };
        if let (reg::INTERRUPT_ACK, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            slot.interrupt.acknowledge(u32::from_le_bytes(word));
        } else {
            slot.device.access().write(offset, data);
        }
        true
    }

    /// A vCPU's port read; false: no device there, `data` untouched. More than one byte means a repeated read of one
    /// register, as KVM reports string instructions.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = self.serial.access();
            data.fill_with(|| serial.read((port - SERIAL_PORTS.start()) as u8));
        } else if RTC_PORTS.contains(&port) {
            let mut rtc = self.rtc.lock().unwrap_or_else(PoisonError::into_inner);
            // The index register is write-only.
            data.fill_with(|| {
                if port == *RTC_PORTS.end() {
                    rtc.read()
                } else {
                    0xff
                }
            });
        } else if port == RESET_PORT {
            // Neither buffer full: a kernel waiting to pulse the reset line does so at once.
            data.fill(0);
        } else {
            return false;
        }
        true
    }

    /// A vCPU's port write; false: no device there. More than one byte as for [`DeviceManager::pio_read`].
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = self.serial.access();
            for &byte in data {
                serial.write((port - SERIAL_PORTS.start()) as u8, byte);
            }
        } else if RTC_PORTS.contains(&port) {
            let mut rtc = self.rtc.lock().unwrap_or_else(PoisonError::into_inner);
            for &byte in data {
                if port == *RTC_PORTS.end() {
                    rtc.write(byte);
                } else {
                    rtc.select(byte);
                }
            }
        } else if port == RESET_PORT {
            if data.contains(&RESET_PULSE) {
                (self.on_reset)();
            }
        } else {
            return false;
        }
        true
    }

    /// Stops the devices. After return no device thread touches queues or guest memory until
    /// [`DeviceManager::resume`]. Never waits for a disk: a disk request running goes on running into a buffer and is
    /// delivered after the resume. The vCPUs must be stopped first.
    pub fn pause(&self) {
        self.hurry.store(true, Ordering::SeqCst);
        for slot in &self.slots {
            slot.device.pause();
        }
        self.serial.pause();
    }

    /// Lets the devices go on. The first time, and after a restore, every queue is looked at once and every pending
    /// interrupt raised again, so a notification lost on the way through a checkpoint cannot hang the guest.
    pub fn resume(&self) {
        let fresh = self.fresh.swap(false, Ordering::SeqCst);
        self.hurry.store(false, Ordering::SeqCst);
        for slot in &self.slots {
            if fresh {
                slot.interrupt.raise_pending();
                let _ = slot.control.write(1);
            }
            slot.device.resume();
        }
        if fresh {
            self.serial.access().raise_pending();
            let _ = self.serial_control.write(1);
        }
        self.serial.resume();
    }

    /// Whether a device's thread is inside a disk, with something the guest had asked for. It may be, while paused.
    pub fn is_busy(&self) -> bool {
        self.slots.iter().any(|s| s.busy.load(Ordering::SeqCst))
    }

    /// The state of every device, in bus order, then `serial` and `rtc`; only while paused.
    ///
    /// # Errors
    /// [`DeviceError::Running`], or [`DeviceError::State`] if a state cannot be encoded.
    pub fn save(&self) -> Result<Vec<DeviceState>, DeviceError> {
        self.must_be_paused()?;
        let mut states = Vec::with_capacity(self.slots.len() + 2);
        for slot in &self.slots {
            states.push(slot.device.access().save()?);
        }
        states.push(self.serial.access().save()?);
        let rtc = self.rtc.lock().unwrap_or_else(PoisonError::into_inner);
        states.push(rtc.save()?);
        Ok(states)
    }

    /// Puts saved states into the same set of devices, freshly made; only while paused.
    ///
    /// # Errors
    /// [`DeviceError::Running`]; [`DeviceError::State`] if the set or any state does not fit: the devices must then not
    /// be resumed.
    pub fn restore(&self, states: &[DeviceState]) -> Result<(), DeviceError> {
        self.must_be_paused()?;
        if states.len() != self.slots.len() + 2 {
            return Err(DeviceError::Set {
                saved: states.iter().map(|s| s.name.clone()).collect(),
                have: self.slots.len() + 2,
            });
        }
        // Each `restore` checks that the state bears its own device's name, so the set fits if all of them succeed.
        let (virtio, rest) = states.split_at(self.slots.len());
        for (slot, state) in self.slots.iter().zip(virtio) {
            slot.device.access().restore(state)?;
        }
        self.serial.access().restore(&rest[0])?;
        let mut rtc = self.rtc.lock().unwrap_or_else(PoisonError::into_inner);
        rtc.restore(&rest[1])?;
        self.fresh.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn must_be_paused(&self) -> Result<(), DeviceError> {
        if self.slots.iter().all(|s| s.device.is_paused()) && self.serial.is_paused() {
            Ok(())
        } else {
            Err(DeviceError::Running)
        }
    }
}

impl Drop for DeviceManager {
    fn drop(&mut self) {
        for slot in &self.slots {
            slot.device.stop();
            let _ = slot.control.write(1);
        }
        self.serial.stop();
        let _ = self.serial_control.write(1);
        for (slot, thread) in self.threads.drain(..) {
            // A thread inside a disk that never answers must not hold the whole machine's end up; it ends by itself.
            if !slot.is_some_and(|s| s.busy.load(Ordering::SeqCst)) {
                let _ = thread.join();
            }
        }
    }
}
