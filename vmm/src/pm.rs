//! ACPI's fixed power-management registers: just enough for a kernel to enable ACPI, to switch off, and to hear of its power
//! button.
//!
//! PM1 event block: status, of which a one that is written clears the bit, and enable; the power button is the only event
//! (ACPI 6.5, 4.8.2.2.1). While one has happened that is enabled the system control interrupt, which is level-triggered, is
//! raised. PM1 control block: a write of `SLP_EN` with the type of S5 ends the machine (4.8.3).

use serde::{Deserialize, Serialize};

use crate::layout::{PM1_CONTROL_PORT, PM1_EVENT_PORT, S5_SLEEP_TYPE};

/// Control bit: the machine is in ACPI mode. Always reads as one, there is no other mode.
const SCI_EN: u16 = 1;
/// Control bit: enter the sleep state whose type is in bits 10-12. Reads as zero.
const SLP_EN: u16 = 1 << 13;

/// Status and enable bit: the power button has been pressed.
const PWRBTN: u16 = 1 << 8;

/// The registers. `Default` is their state at power-on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pm {
    status: u16,
    enable: u16,
    control: u16,
}

/// What a write to the registers asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PmWrite {
    /// Not a register of this block.
    NotOurs,
    /// Stored.
    Done,
    /// The guest switched itself off.
    PowerOff,
}

impl Pm {
    fn bytes(self) -> [u8; 6] {
        let mut all = [0; 6];
        all[..2].copy_from_slice(&self.status.to_le_bytes());
        all[2..4].copy_from_slice(&self.enable.to_le_bytes());
        all[4..6].copy_from_slice(&(self.control | SCI_EN).to_le_bytes());
        all
    }

    fn span(port: u16, len: usize) -> Option<std::ops::Range<usize>> {
        const { assert!(PM1_CONTROL_PORT == PM1_EVENT_PORT + 4) };
        let first = usize::from(port.checked_sub(PM1_EVENT_PORT)?);
        let end = first.checked_add(len)?;
        (end <= 6).then_some(first..end)
    }

    /// Somebody presses the power button.
    pub(crate) fn press(&mut self) {
        self.status |= PWRBTN;
    }

    /// Whether the system control interrupt is raised.
    pub(crate) fn raises(&self) -> bool {
        self.status & self.enable & PWRBTN != 0
    }

    /// Reads `data.len()` bytes at `port`; false if they are not all of this block.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) -> bool {
        let Some(span) = Pm::span(port, data.len()) else {
            return false;
        };
        data.copy_from_slice(&self.bytes()[span]);
        true
    }

    /// Writes `data` at `port`.
    pub(crate) fn write(&mut self, port: u16, data: &[u8]) -> PmWrite {
        let Some(span) = Pm::span(port, data.len()) else {
            return PmWrite::NotOurs;
        };
        let mut all = self.bytes();
        // Of the status register only what is written counts.
        all[..2].fill(0);
        all[span].copy_from_slice(data);
        self.status &= !u16::from_le_bytes([all[0], all[1]]);
        self.enable = u16::from_le_bytes([all[2], all[3]]);
        let control = u16::from_le_bytes([all[4], all[5]]);
        self.control = control & !SLP_EN;
        if control & SLP_EN != 0 && (control >> 10) & 7 == u16::from(S5_SLEEP_TYPE) {
            return PmWrite::PowerOff;
        }
        PmWrite::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switching_off_needs_type_and_enable() {
        let mut pm = Pm::default();
        let s5 = u16::from(S5_SLEEP_TYPE) << 10;
        assert_eq!(pm.write(PM1_CONTROL_PORT, &s5.to_le_bytes()), PmWrite::Done);
        assert_eq!(
            pm.write(PM1_CONTROL_PORT, &(SLP_EN | 1 << 10).to_le_bytes()),
            PmWrite::Done
        );
        assert_eq!(
            pm.write(PM1_CONTROL_PORT, &(SLP_EN | s5).to_le_bytes()),
            PmWrite::PowerOff
        );
    }

    #[test]
    fn acpi_mode_reads_as_on_and_enable_bits_stick() {
        let mut pm = Pm::default();
        let mut two = [0; 2];
        assert!(pm.read(PM1_CONTROL_PORT, &mut two));
        assert_eq!(u16::from_le_bytes(two) & SCI_EN, SCI_EN);
        assert_eq!(pm.write(PM1_EVENT_PORT + 2, &[0x20, 0x01]), PmWrite::Done);
        assert!(pm.read(PM1_EVENT_PORT + 2, &mut two));
        assert_eq!(two, [0x20, 0x01]);
        assert_eq!(pm.write(PM1_EVENT_PORT, &[0xff, 0xff]), PmWrite::Done);
        assert!(pm.read(PM1_EVENT_PORT, &mut two));
        assert_eq!(two, [0, 0]);
    }

    #[test]
    fn l5_the_power_button_raises_the_interrupt_until_the_guest_has_taken_note() {
        let mut pm = Pm::default();
        let status = |pm: &Pm| {
            let mut two = [0; 2];
            assert!(pm.read(PM1_EVENT_PORT, &mut two));
            u16::from_le_bytes(two)
        };
        pm.press();
        assert_eq!(status(&pm), PWRBTN);
        assert!(!pm.raises(), "the guest has not asked to hear of it");
        let enabled = PWRBTN.to_le_bytes();
        assert_eq!(pm.write(PM1_EVENT_PORT + 2, &enabled), PmWrite::Done);
        assert!(pm.raises() && status(&pm) == PWRBTN);
        // Other bits, and the low byte alone, take note of nothing.
        assert_eq!(pm.write(PM1_EVENT_PORT, &[0xff]), PmWrite::Done);
        assert_eq!(pm.write(PM1_EVENT_PORT, &[0xff, 0xfe]), PmWrite::Done);
        assert!(pm.raises());
        assert_eq!(pm.write(PM1_EVENT_PORT, &enabled), PmWrite::Done);
        assert!(!pm.raises() && status(&pm) == 0);
    }

    #[test]
    fn other_ports_are_not_ours() {
        let mut pm = Pm::default();
        assert!(!pm.read(PM1_EVENT_PORT - 1, &mut [0]));
        assert!(!pm.read(PM1_CONTROL_PORT, &mut [0; 4]));
        assert_eq!(pm.write(PM1_CONTROL_PORT + 2, &[0]), PmWrite::NotOurs);
        assert_eq!(pm.write(0xffff, &[0; 8]), PmWrite::NotOurs);
    }
}
