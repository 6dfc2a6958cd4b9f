//! ACPI's fixed power-management registers: just enough for a kernel to enable ACPI and to switch off.
//!
//! PM1 event block: status (no event ever happens) and enable. PM1 control block: a write of `SLP_EN` with the type
//! of S5 ends the machine (ACPI 6.5, 4.8.3). The system control interrupt is never raised.

use serde::{Deserialize, Serialize};

use crate::layout::{PM1_CONTROL_PORT, PM1_EVENT_PORT, S5_SLEEP_TYPE};

/// Control bit: the machine is in ACPI mode. Always reads as one, there is no other mode.
const SCI_EN: u16 = 1;
/// Control bit: enter the sleep state whose type is in bits 10-12. Reads as zero.
const SLP_EN: u16 = 1 << 13;

/// The registers. `Default` is their state at power-on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pm {
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
        all[span].copy_from_slice(data);
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
    fn other_ports_are_not_ours() {
        let mut pm = Pm::default();
        assert!(!pm.read(PM1_EVENT_PORT - 1, &mut [0]));
        assert!(!pm.read(PM1_CONTROL_PORT, &mut [0; 4]));
        assert_eq!(pm.write(PM1_CONTROL_PORT + 2, &[0]), PmWrite::NotOurs);
        assert_eq!(pm.write(0xffff, &[0; 8]), PmWrite::NotOurs);
    }
}
