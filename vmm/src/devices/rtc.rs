//! The real-time clock: as much of an MC146818 as a stock kernel reads, at ports 0x70 and 0x71.
//!
//! It tells the host's time, so a machine that moves to another host reads that host's clock. Alarms and periodic
//! interrupts do not exist; setting the time is accepted and ignored.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::devices::{DeviceError, DeviceState, state};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// The century's register, as the FADT says.
pub const CENTURY: u8 = 0x32;

/// Register A: 32.768 kHz time base, 1.024 kHz rate; no update in progress.
const A_DEFAULT: u8 = 0x26;
/// Register B: 24-hour mode, BCD.
const B_DEFAULT: u8 = 0x02;
/// Register B: values are binary, not BCD.
const B_BINARY: u8 = 0x04;
/// Register B: 24-hour mode.
const B_24H: u8 = 0x02;
/// Register D: RAM and time valid.
const D_VALID: u8 = 0x80;
/// How long the fields read after the seconds belong to the same instant.
const LATCH: Duration = Duration::from_millis(500);

const NAME: &str = "rtc";
const STATE_VERSION: u16 = 1;

/// What a checkpoint holds of the clock.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    index: u8,
    /// The 128 bytes of CMOS memory; those of the clock unused.
    ram: Vec<u8>,
}

/// A calendar date and time, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calendar {
    /// Full year.
    pub year: u64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 1 (Sunday) to 7.
    pub weekday: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

impl Calendar {
    /// The date of `seconds` since 1970.
    pub fn of(seconds: u64) -> Calendar {
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        // Days from 1 March of year 0, so that a leap day ends its year; 400 years are 146097 days.
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Calendar {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (rest / 3_600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

/// The clock.
pub struct Rtc {
    index: u8,
    ram: [u8; 128],
    latched: Option<(Instant, Calendar)>,
}

impl Default for Rtc {
    fn default() -> Rtc {
        let mut ram = [0; 128];
        ram[usize::from(REG_A)] = A_DEFAULT;
        ram[usize::from(REG_B)] = B_DEFAULT;
        Rtc {
            index: 0,
            ram,
            latched: None,
        }
    }
}

impl Rtc {
    /// A write to port 0x70: chooses a register; bit 7 is the NMI mask and means nothing here.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// A write to port 0x71.
    pub fn write(&mut self, value: u8) {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {}
            REG_A => self.ram[usize::from(REG_A)] = value & 0x7f,
            REG_C | REG_D => {}
            at => self.ram[usize::from(at & 0x7f)] = value,
        }
    }

    /// A read of port 0x71.
    pub fn read(&mut self) -> u8 {
        // A driver reads the seconds first and assumes that no update falls between the fields.
        let fresh = self
            .latched
            .filter(|(at, _)| self.index != SECONDS && at.elapsed() < LATCH);
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                let (_, now) = *self.latched.insert(fresh.unwrap_or_else(now));
                self.field(&now)
            }
            REG_C => 0,
            REG_D => D_VALID,
            at => self.ram[usize::from(at & 0x7f)],
        }
    }

    fn field(&self, now: &Calendar) -> u8 {
        let b = self.ram[usize::from(REG_B)];
        let code = |n: u8| {
            if b & B_BINARY != 0 {
                n
            } else {
                ((n / 10) << 4) | (n % 10)
            }
        };
        match self.index {
            SECONDS => code(now.second),
            MINUTES => code(now.minute),
            HOURS if b & B_24H != 0 => code(now.hour),
            HOURS => {
                let pm = if now.hour >= 12 { 0x80 } else { 0 };
                code((now.hour + 11) % 12 + 1) | pm
            }
            WEEKDAY => code(now.weekday),
            DAY => code(now.day),
            MONTH => code(now.month),
            YEAR => code((now.year % 100) as u8),
            _ => code((now.year / 100 % 100) as u8),
        }
    }

    /// The clock's state.
    ///
    /// # Errors
    /// [`DeviceError::State`].
    pub fn save(&self) -> Result<DeviceState, DeviceError> {
        state::encode(
            NAME,
            STATE_VERSION,
            &Saved {
                index: self.index,
                ram: self.ram.to_vec(),
            },
        )
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`DeviceError::State`] if it is malformed.
    pub fn restore(&mut self, saved: &DeviceState) -> Result<(), DeviceError> {
        let saved: Saved = state::decode(saved, NAME, STATE_VERSION)?;
        self.ram = saved.ram.try_into().map_err(|_| DeviceError::State {
            name: NAME.to_owned(),
            why: "has not 128 bytes of CMOS memory".to_owned(),
        })?;
        self.index = saved.index & 0x7f;
        self.latched = None;
        Ok(())
    }
}

fn now() -> (Instant, Calendar) {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (Instant::now(), Calendar::of(since.as_secs()))
}
