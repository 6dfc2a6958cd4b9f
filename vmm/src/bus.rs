//! Where a vCPU's port and memory accesses go.

use std::sync::{Arc, Mutex, PoisonError};

use crate::devices::DeviceManager;
use crate::pm::{Pm, PmWrite};

/// Everything a vCPU can reach outside of RAM and the in-kernel interrupt controllers.
pub(crate) struct Bus {
    devices: Arc<DeviceManager>,
    pm: Mutex<Pm>,
}

impl Bus {
    pub(crate) fn new(devices: Arc<DeviceManager>) -> Bus {
        Bus {
            devices,
            pm: Mutex::new(Pm::default()),
        }
    }

    pub(crate) fn devices(&self) -> &DeviceManager {
        &self.devices
    }

    pub(crate) fn pm(&self) -> Pm {
        *self.pm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_pm(&self, pm: Pm) {
        *self.pm.lock().unwrap_or_else(PoisonError::into_inner) = pm;
    }

    /// Where nothing answers, a bus floats high.
    pub(crate) fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        if !self.devices.mmio_read(addr, data) {
            data.fill(0xff);
        }
    }

    pub(crate) fn mmio_write(&self, addr: u64, data: &[u8]) {
        if !self.devices.mmio_write(addr, data) {
            tracing::trace!("write of {} bytes to nothing at {addr:#x}", data.len());
        }
    }

    pub(crate) fn pio_read(&self, port: u16, data: &mut [u8]) {
        if !self.pm().read(port, data) && !self.devices.pio_read(port, data) {
            data.fill(0xff);
        }
    }

    /// True: the guest switched itself off.
    pub(crate) fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        let ours = self
            .pm
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(port, data);
        match ours {
            PmWrite::PowerOff => return true,
            PmWrite::Done => {}
            PmWrite::NotOurs => {
                self.devices.pio_write(port, data);
            }
        }
        false
    }
}
