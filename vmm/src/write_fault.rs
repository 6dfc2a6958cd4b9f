//! What a write fault under the dirty log costs on this host: about 1 us with nested page tables, 20 us and more without.
//!
//! Measured, not assumed: a small machine of its own writes to some pages, once with all of them protected by the log and once
//! with none.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::dirty::set_slots;
use crate::dirty_log;
use crate::kvm_caps;
use crate::layout::MIN_RAM;
use crate::memory::{self, RamFiles, RamLayout};

/// Pages written in one pass, from [`DATA`] on.
const PAGES: u8 = 200;
/// The quickest of so many passes counts: others were disturbed.
const PASSES: u32 = 6;
const CODE: u64 = 0x1_0000;
const DATA: u32 = 0x10_0000;
const STACK: u64 = 0x8000;
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
/// Page-table entries: present, writable, for ring 3; the last level is a 2 MiB page.
const TABLE: u64 = 0x7;
const LARGE: u64 = 0x87;

static COST: OnceLock<Duration> = OnceLock::new();

/// What a write fault costs, once [`measure_write_fault`] has found out.
#[must_use]
pub fn write_fault() -> Option<Duration> {
    COST.get().copied()
}

/// Measures it, for this process; takes some milliseconds.
///
/// # Errors
/// In words; then nobody knows.
pub fn measure_write_fault() -> Result<Duration, String> {
    if let Some(known) = write_fault() {
        return Ok(known);
    }
    let measured = measure().map_err(|e| e.to_string())?;
    Ok(*COST.get_or_init(|| measured))
}

/// Adds one to the first word of each page, then says so at port 0xe9, and begins again. Ring 3 runs natively everywhere.
fn code() -> Vec<u8> {
    let mut code = vec![0xbb]; // mov ebx, DATA
    code.extend_from_slice(&DATA.to_le_bytes());
    code.extend_from_slice(&[0xb9, PAGES, 0, 0, 0]); // mov ecx, PAGES
    code.extend_from_slice(&[0x48, 0xff, 0x03]); // 1: inc qword [rbx]
    code.extend_from_slice(&[0x48, 0x81, 0xc3, 0x00, 0x10, 0, 0]); // add rbx, 4096
    code.extend_from_slice(&[0x48, 0xff, 0xc9, 0x75, 0xf1]); // dec rcx; jnz 1b
    code.extend_from_slice(&[0xe6, 0xe9, 0xeb, 0xe3]); // out 0xe9, al; jmp to the beginning
    code
}

fn measure() -> Result<Duration, Box<dyn std::error::Error>> {
    let kvm = kvm_caps::open()?;
    let layout = RamLayout::new(MIN_RAM, None)?;
    let memory = memory::map(&layout, &RamFiles::create(&layout)?)?;
    let [pml4, pdpt, directory] = TABLES;
    memory.write_obj(pdpt | TABLE, GuestAddress(pml4))?;
    memory.write_obj(directory | TABLE, GuestAddress(pdpt))?;
    memory.write_obj(LARGE, GuestAddress(directory))?;
    memory.write_slice(&code(), GuestAddress(CODE))?;
    let vm = kvm.create_vm()?;
    let protects = dirty_log::protect_by_name(&vm);
    set_slots(&vm, &memory, KVM_MEM_LOG_DIRTY_PAGES).map_err(|(_, e)| e)?;
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter(&vcpu)?;
    let bytes = memory.iter().next().map_or(0, |r| r.len()) as usize;
    let protect = || -> std::io::Result<()> {
        let mut log = dirty_log::read(&vm, 0, bytes)?;
        match protects {
            dirty_log::Protects::ByName => dirty_log::clear(&vm, 0, bytes, &mut log),
            dirty_log::Protects::ByReading => Ok(()),
        }
    };
    pass(&mut vcpu)?;
    let (mut faulting, mut free) = (Duration::MAX, Duration::MAX);
    for _ in 0..PASSES {
        protect()?;
        faulting = faulting.min(pass(&mut vcpu)?);
        free = free.min(pass(&mut vcpu)?);
    }
    Ok(faulting.saturating_sub(free) / u32::from(PAGES))
}

/// Ring 3, long mode, at [`CODE`].
fn enter(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cr3 = TABLES[0];
    sregs.cr4 = 0x20;
    sregs.cr0 = 0x8000_0011;
    sregs.efer = 0x500;
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x1b,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        type_: 3,
        selector: 0x23,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        // I/O privilege for ring 3.
        rflags: 0x3002,
        rsp: STACK,
        ..Default::default()
    })
}

/// How long one pass takes.
fn pass(vcpu: &mut VcpuFd) -> Result<Duration, Box<dyn std::error::Error>> {
    let begun = Instant::now();
    match vcpu.run()? {
        VcpuExit::IoOut(0xe9, _) => Ok(begun.elapsed()),
        other => Err(format!("the machine that measures write faults left for {other:?}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_fault_costs_something_and_is_measured_once() {
        let cost = measure_write_fault().unwrap();
        println!("a write fault costs {cost:?}");
        assert!(cost > Duration::ZERO && cost < Duration::from_millis(10));
        assert_eq!(measure_write_fault().unwrap(), cost);
        assert_eq!(write_fault(), Some(cost));
    }
}
