//! Interrupts as ring 3 sees them: local APIC and IOAPIC by their mapped registers, and sleeping.

use core::arch::asm;
use core::sync::atomic::{Ordering, fence};

use crate::boot::{DEVICE_VECTOR, TIMER_VECTOR, WAKE};

const LAPIC: usize = 0xfee0_0000;
const IOAPIC: usize = 0xfec0_0000;
const LAPIC_ID: usize = 0x20;
const LAPIC_TPR: usize = 0x80;
const LAPIC_SVR: usize = 0xf0;
const LAPIC_LVT_TIMER: usize = 0x320;
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_TIMER_INIT: usize = 0x380;
const LAPIC_TIMER_DIVIDE: usize = 0x3e0;
/// KVM's APIC bus runs at 1 GHz unless a VMM asks otherwise (KVM_CAP_X86_APIC_BUS_CYCLES_NS); divided by 16.
const TICKS_PER_US_X16: u64 = 1000;
/// GSI of virtio-mmio slot 0.
const FIRST_GSI: u32 = 16;

/// Writes a 32-bit device register.
pub fn write32(at: usize, v: u32) {
    // SAFETY: callers pass addresses of device registers (LAPIC, IOAPIC, virtio-mmio slots), never RAM.
    unsafe { asm!("mov [{}], {:e}", in(reg) at, in(reg) v, options(nostack, preserves_flags)) };
}

/// Reads a 32-bit device register.
pub fn read32(at: usize) -> u32 {
    let v: u32;
    // SAFETY: as for `write32`; reading has no effect on memory.
    unsafe { asm!("mov {:e}, [{}]", out(reg) v, in(reg) at, options(nostack, preserves_flags)) };
    v
}

/// Enables the local APIC (its timer one-shot) and routes the eight virtio-mmio slots to this CPU, edge triggered.
pub fn init() {
    write32(LAPIC + LAPIC_TPR, 0);
    write32(LAPIC + LAPIC_LVT_LINT0, 1 << 16);
    // Spurious vector 0x5f: its stub is an ordinary interrupt stub.
    write32(LAPIC + LAPIC_SVR, 0x15f);
    write32(LAPIC + LAPIC_TIMER_DIVIDE, 3);
    write32(LAPIC + LAPIC_LVT_TIMER, u32::from(TIMER_VECTOR));
    let id = read32(LAPIC + LAPIC_ID) & 0xff00_0000;
    for i in 0..8 {
        let register = 0x10 + 2 * (FIRST_GSI + i);
        ioapic(register + 1, id);
        ioapic(register, u32::from(DEVICE_VECTOR) + i);
    }
}

fn ioapic(register: u32, v: u32) {
    write32(IOAPIC, register);
    write32(IOAPIC + 0x10, v);
}

/// First half of going to sleep: from here on an interrupt makes [`sleep`] return at once. Between the two the caller
/// looks whether there is work.
pub fn prepare_sleep() {
    WAKE.store(0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
}

/// Sleeps until an interrupt, at most about `us` microseconds.
pub fn sleep(us: u64) {
    let ticks = (us.clamp(1, 1_000_000) * TICKS_PER_US_X16 / 16) as u32;
    write32(LAPIC + LAPIC_TIMER_INIT, ticks.max(1));
    // SAFETY: ring 3 `hlt` is the request to sleep (boot.rs); interrupts only set flags.
    unsafe { asm!("hlt", options(nostack)) };
    // A timer that is still running would only interrupt the load for nothing.
    write32(LAPIC + LAPIC_TIMER_INIT, 0);
}
