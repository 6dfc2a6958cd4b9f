//! Tiny guests for the tests of the machine itself: flat 64-bit code in a minimal ELF file, entered at 1 MiB.
//!
//! They run in ring 0 and use plain instructions only, so that they run on every KVM, one that emulates ring 0 included.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod guests;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[allow(unused_imports, reason = "each test binary uses a part")]
pub use guests::{CODE, between, elf};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::layout::HIGH_RAM_START;
use vmm::{BootSpec, GuestMemory, KernelSource, RamFiles, RamLayout, Vm, VmSpec};

/// A liveness bound: far beyond what anything here takes.
pub const LONG: Duration = Duration::from_secs(60);

/// A serial line the tests read.
#[derive(Clone, Default)]
pub struct Line(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Line {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().unwrap().extend_from_slice(data);
        self.0.1.notify_all();
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Line {
    /// What came so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().clone()
    }

    /// Waits until `count` bytes came.
    pub fn wait(&self, count: usize) -> Vec<u8> {
        let guard = self.0.0.lock().unwrap();
        let (guard, waited) = self
            .0
            .1
            .wait_timeout_while(guard, LONG, |b| b.len() < count)
            .unwrap();
        assert!(
            !waited.timed_out(),
            "the guest sent {} bytes, {count} were awaited",
            guard.len()
        );
        guard.clone()
    }
}

/// A machine with `vcpus` and a random-number device, whose console goes to the line.
pub fn machine(vcpus: u8, layout: &RamLayout, ram: RamFiles) -> (Vm, Line) {
    machine_with_input(vcpus, layout, ram, None)
}

/// As [`machine`], with something to read on the serial line.
pub fn machine_with_input(
    vcpus: u8,
    layout: &RamLayout,
    ram: RamFiles,
    serial_in: Option<OwnedFd>,
) -> (Vm, Line) {
    let line = Line::default();
    let spec = VmSpec {
        cpu: Default::default(),
        vcpus,
        ram: layout.clone(),
        net: Vec::new(),
        disks: Vec::new(),
        rng: true,
        serial_out: Box::new(line.clone()),
        serial_in,
    };
    let vm = Vm::new(spec, ram).unwrap_or_else(|e| panic!("this test needs KVM: {e}"));
    (vm, line)
}

/// A machine with `code` booted in it, still paused.
pub fn booted(vcpus: u8, layout: &RamLayout, code: &[u8]) -> (Vm, Line) {
    let (vm, line) = machine(vcpus, layout, RamFiles::create(layout).unwrap());
    let spec = BootSpec {
        kernel: KernelSource::Bytes(elf(code)),
        initrd: None,
        cmdline: "test".to_owned(),
    };
    vm.boot(&spec).unwrap();
    (vm, line)
}

/// 4 MiB below the hole and 4 MiB above: two memory slots.
pub fn two_slots() -> RamLayout {
    RamLayout::new(8 << 20, Some(4 << 20)).unwrap()
}

/// All of guest memory, range after range.
pub fn memory_bytes(memory: &GuestMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.extend(bytes);
    }
    all
}

/// A copy of `vm`'s memory in files of its own.
pub fn copy_ram(vm: &Vm) -> RamFiles {
    let files = RamFiles::create(vm.layout()).unwrap();
    let copy = vmm::memory::map(vm.layout(), &files).unwrap();
    for region in vm.memory().iter() {
        let mut bytes = vec![0; region.len() as usize];
        vm.memory()
            .read_slice(&mut bytes, region.start_addr())
            .unwrap();
        copy.write_slice(&bytes, region.start_addr()).unwrap();
    }
    files
}

/// The page frame numbers whose content differs, for the layout of [`two_slots`].
pub fn differing(before: &[u8], after: &[u8]) -> Vec<u64> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    let low = (4u64 << 20) >> 12;
    pages
        .filter(|(_, (a, b))| a != b)
        .map(|(index, _)| match index as u64 {
            index if index < low => index,
            index => index - low + (HIGH_RAM_START >> 12),
        })
        .collect()
}

/// A u64 of guest memory.
pub fn read(vm: &Vm, address: u64) -> u64 {
    vm.memory().read_obj(GuestAddress(address)).unwrap()
}
