//! The guest's clock: microseconds since boot, never backwards.
//!
//! Source: kvmclock where the host has it (its host keeps it right across hosts of different TSC speed), else the TSC
//! with its frequency from CPUID or measured against the PIT. Only differences between two readings count. After a
//! restore on another host a reading may be smaller than the last (then no time has passed) or far larger: a step is
//! worth [`MAX_STEP_US`] at most, because a machine that stood still must not see every timer expire at once.

use core::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};

use crate::boot::{HAVE_KVMCLOCK, KVMCLOCK};
use crate::log;

/// The most one reading may advance the clock, microseconds. The guest reads it every 20 ms at the latest.
const MAX_STEP_US: u64 = 1_000_000;

/// The clock; there is one.
pub struct Clock {
    kvmclock: bool,
    tsc_khz: u64,
    last_ns: u64,
    now_ns: u64,
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is in every x86-64 and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

impl Clock {
    /// Finds the best source and starts at 0.
    pub fn new() -> Clock {
        // SAFETY: a byte written before ring 3 began.
        let kvmclock = unsafe { (&raw const HAVE_KVMCLOCK).read_volatile() } == 1;
        let (tsc_khz, how) = frequency(kvmclock);
        log!(
            "clock {}, tsc {tsc_khz} kHz ({how})",
            if kvmclock { "kvmclock" } else { "tsc" }
        );
        let mut c = Clock {
            kvmclock,
            tsc_khz,
            last_ns: 0,
            now_ns: 0,
        };
        c.last_ns = c.raw_ns();
        c
    }

    /// Microseconds since boot.
    pub fn now_us(&mut self) -> u64 {
        let raw = self.raw_ns();
        let step = raw.saturating_sub(self.last_ns).min(MAX_STEP_US * 1000);
        self.last_ns = raw;
        self.now_ns += step;
        self.now_ns / 1000
    }

    /// TSC ticks in `us` microseconds (at most an hour's worth).
    pub fn ticks(&self, us: u64) -> u64 {
        us.min(3_600_000_000) * self.tsc_khz / 1000
    }

    fn raw_ns(&self) -> u64 {
        if self.kvmclock {
            kvmclock_ns()
        } else {
            (u128::from(tsc()) * 1_000_000 / u128::from(self.tsc_khz)) as u64
        }
    }
}

/// Reads word `i` of the kvmclock page.
fn word(i: usize) -> u32 {
    // SAFETY: the page has 8 words (i < 8 in all uses); the host changes it, hence volatile.
    unsafe { (&raw const KVMCLOCK).cast::<u32>().add(i).read_volatile() }
}

/// pvclock (Linux, Documentation/virt/kvm/x86/msr.rst): version, pad, tsc_timestamp, system_time, mul, shift.
fn kvmclock_ns() -> u64 {
    loop {
        let version = word(0);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        let stamp = u64::from(word(2)) | u64::from(word(3)) << 32;
        let system = u64::from(word(4)) | u64::from(word(5)) << 32;
        let (mul, shift) = (word(6), word(7) as i8);
        let delta = tsc().wrapping_sub(stamp);
        // A TSC behind the stamp would wrap to centuries.
        let delta = if (delta as i64) < 0 { 0 } else { delta };
        let delta = if shift < 0 {
            delta.checked_shr(shift.unsigned_abs().into()).unwrap_or(0)
        } else {
            delta.checked_shl(shift.unsigned_abs().into()).unwrap_or(0)
        };
        let ns = system.wrapping_add(((u128::from(delta) * u128::from(mul)) >> 32) as u64);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        if version & 1 == 0 && version == word(0) {
            return ns;
        }
    }
}

/// TSC frequency in kHz (never 0) and where it is known from.
fn frequency(kvmclock: bool) -> (u64, &'static str) {
    if kvmclock {
        let (mul, shift) = (u64::from(word(6)), word(7) as i8);
        if mul != 0 && (-31..=31).contains(&shift) {
            // ns = (ticks << shift) * mul >> 32
            let khz = (1_000_000u64 << 32) / mul;
            let khz = if shift < 0 {
                khz << -shift
            } else {
                khz >> shift
            };
            if plausible(khz) {
                return (khz, "kvmclock");
            }
        }
    }
    let max = __cpuid(0).eax;
    if max >= 0x15 {
        let l = __cpuid_count(0x15, 0);
        if l.eax != 0 {
            let khz = u64::from(l.ecx) * u64::from(l.ebx) / u64::from(l.eax) / 1000;
            if plausible(khz) {
                return (khz, "cpuid 0x15");
            }
        }
    }
    let hv = __cpuid(0x4000_0000);
    if __cpuid(1).ecx & 1 << 31 != 0 && hv.eax >= 0x4000_0010 && hv.eax < 0x4000_1000 {
        let khz = u64::from(__cpuid(0x4000_0010).eax);
        if plausible(khz) {
            return (khz, "cpuid 0x40000010");
        }
    }
    if max >= 0x16 {
        let khz = u64::from(__cpuid(0x16).eax & 0xffff) * 1000;
        if plausible(khz) {
            return (khz, "cpuid 0x16");
        }
    }
    match pit() {
        Some(khz) => (khz, "pit"),
        None => (2_000_000, "assumed"),
    }
}

fn plausible(khz: u64) -> bool {
    (100_000..20_000_000).contains(&khz)
}

/// Measures the TSC over 10 ms of PIT channel 2 (gate and output at port 0x61). None if the PIT does not count.
fn pit() -> Option<u64> {
    const TICKS: u16 = 11_932;
    let gate = inb(0x61);
    outb(0x61, gate & !2 | 1);
    outb(0x43, 0xb0);
    outb(0x42, TICKS as u8);
    outb(0x42, (TICKS >> 8) as u8);
    let from = tsc();
    for _ in 0..1_000_000 {
        if inb(0x61) & 0x20 != 0 {
            let khz = (tsc() - from) / 10;
            return plausible(khz).then_some(khz);
        }
    }
    None
}

fn outb(port: u16, v: u8) {
    // SAFETY: PIT and port 0x61 only; no memory is touched.
    unsafe { core::arch::asm!("out dx, al", in("dx") port, in("al") v, options(nomem, nostack)) };
}

fn inb(port: u16) -> u8 {
    let v: u8;
    // SAFETY: as for `outb`.
    unsafe { core::arch::asm!("in al, dx", in("dx") port, out("al") v, options(nomem, nostack)) };
    v
}
