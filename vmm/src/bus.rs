//! Where a vCPU's port and memory accesses go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::DeviceManager;
use crate::pm::{Pm, PmWrite};

/// Everything a vCPU can reach outside of RAM and the in-kernel interrupt controllers.
pub(crate) struct Bus {
    devices: Arc<DeviceManager>,
    pm: Mutex<Pm>,
    /// Sets the level of the system control interrupt's line.
    sci: Box<dyn Fn(bool) + Send + Sync>,
}

impl Bus {
    pub(crate) fn new(
        devices: Arc<DeviceManager>,
        sci: impl Fn(bool) + Send + Sync + 'static,
    ) -> Bus {
        Bus {
            devices,
            pm: Mutex::new(Pm::default()),
            sci: Box::new(sci),
        }
    }

    pub(crate) fn devices(&self) -> &DeviceManager {
        &self.devices
    }

    fn registers(&self) -> MutexGuard<'_, Pm> {
        self.pm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pm(&self) -> Pm {
        *self.registers()
    }

    /// The line's level is no part of the interrupt controllers' state: it is set anew.
    pub(crate) fn set_pm(&self, pm: Pm) {
        let mut registers = self.registers();
        *registers = pm;
        (self.sci)(pm.raises());
    }

    /// Somebody presses the power button.
    pub(crate) fn press_power_button(&self) {
        let mut registers = self.registers();
        registers.press();
        (self.sci)(registers.raises());
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
        let ours = {
            let mut registers = self.registers();
            let before = registers.raises();
            let ours = registers.write(port, data);
            // Under the lock, so that the line is at the level of the registers.
            if registers.raises() != before {
                (self.sci)(!before);
            }
            ours
        };
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
