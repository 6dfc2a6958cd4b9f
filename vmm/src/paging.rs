//! The state the first vCPU begins in: page tables, descriptor table, registers.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::Entry;
use crate::layout::{BOOT_STACK, GDT, HIGH_RAM_START, PAGE, PAGE_TABLES_END, PML4};
use crate::memory::{GuestMemory, RamLayout};
use crate::msrs;

/// Page-table entry: present, writable.
const TABLE: u64 = 0x3;
/// As [`TABLE`], and a 2 MiB page.
const LARGE: u64 = 0x83;
const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;

/// The descriptors: null, unused, 64-bit code (selector 0x10), data (selector 0x18), as boot.rst asks for.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Writes page tables that map the low 4 GiB (devices included) and as much RAM above as there is table space for
/// (17 GiB) to themselves with 2 MiB pages, and the descriptor table.
///
/// # Errors
/// Guest memory too small for them; [`crate::layout::MIN_RAM`] is not.
pub(crate) fn write_tables(
    memory: &GuestMemory,
    layout: &RamLayout,
) -> Result<(), GuestMemoryError> {
    let end = layout
        .ranges()
        .last()
        .map_or(0, |r| r.start + r.len)
        .max(HIGH_RAM_START);
    let pdpt = PML4 + PAGE;
    let directories = end.div_ceil(GIB).min((PAGE_TABLES_END - pdpt) / PAGE - 1);
    memory.write_obj(pdpt | TABLE, GuestAddress(PML4))?;
    for gib in 0..directories {
        let directory = pdpt + PAGE + gib * PAGE;
        memory.write_obj(directory | TABLE, GuestAddress(pdpt + gib * 8))?;
        let pages: Vec<u8> = (0..ENTRIES)
            .flat_map(|i| ((gib * GIB + (i << 21)) | LARGE).to_le_bytes())
            .collect();
        memory.write_slice(&pages, GuestAddress(directory))?;
    }
    let descriptors: Vec<u8> = DESCRIPTORS.iter().flat_map(|d| d.to_le_bytes()).collect();
    memory.write_slice(&descriptors, GuestAddress(GDT))
}

fn segment(selector: u16) -> kvm_segment {
    let code = selector == CODE;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if code { 0xB } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// Turns `sregs`, as KVM made them, into long mode with flat segments over the tables of [`write_tables`].
fn enter_long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = segment(CODE);
    let data = segment(DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&DESCRIPTORS) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// The general registers at `entry`.
fn registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: 2,
        ..Default::default()
    }
}

/// The floating-point unit after FNINIT, with SSE exceptions masked.
fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37F,
        mxcsr: 0x1F80,
        ..Default::default()
    }
}

/// Default memory type (IA32_MTRR_DEF_TYPE): write-back, enabled.
const MTRR_DEF_TYPE: (u32, u64) = (0x2FF, 1 << 11 | 6);
/// IA32_MISC_ENABLE: fast strings.
const MISC_ENABLE: (u32, u64) = (0x1A0, 1);
/// Local APIC: LINT0, and its value as the way of the 8259's interrupts.
const LVT_LINT0: (usize, u32) = (0x350, 0x700);
/// Local APIC: LINT1, and its value as the NMI.
const LVT_LINT1: (usize, u32) = (0x360, 0x400);

/// Puts vCPU `id` into the state firmware would leave it in: the first at `entry`, the others waiting to be started.
///
/// # Errors
/// KVM's refusal.
pub(crate) fn prepare(vcpu: &VcpuFd, id: u8, entry: Entry) -> Result<(), std::io::Error> {
    msrs::write(vcpu, &[MTRR_DEF_TYPE, MISC_ENABLE]).map_err(std::io::Error::other)?;
    let mut lapic = vcpu.get_lapic()?;
    for (at, value) in [LVT_LINT0, LVT_LINT1] {
        for (reg, byte) in lapic.regs[at..].iter_mut().zip(value.to_le_bytes()) {
            *reg = byte as _;
        }
    }
    vcpu.set_lapic(&lapic)?;
    vcpu.set_fpu(&fpu())?;
    if id == 0 {
        let mut sregs = vcpu.get_sregs()?;
        enter_long_mode(&mut sregs);
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&registers(entry))?;
    }
    Ok(())
}
