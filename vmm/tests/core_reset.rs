//! A guest's reset is a reset: the machine boots again in place, whoever captures it meanwhile.

mod core_support;

use core_support::{LONG, between, booted, copy_ram, elf, machine, read, two_slots};
use vm_memory::{Bytes, GuestAddress};
use vmm::{BootSpec, KernelSource, Restart, Vm, VmError, VmEvent};

// Counts its boots at 0x200000, which nothing is loaded to, and at 0x100800, which every boot finds empty. Sends both down the
// serial line, then pulses the reset line.
guest_code!(
    again_start,
    again_end,
    "movl $0x200000, %esi",
    "incq (%rsi)",
    "movl $0x100800, %edi",
    "incq (%rdi)",
    "movl $0x3f8, %edx",
    "movl (%rsi), %eax",
    "outb %al, %dx",
    "movl (%rdi), %eax",
    "outb %al, %dx",
    "movl $0x64, %edx",
    "movl $0xfe, %eax",
    "outb %al, %dx",
    "2: jmp 2b",
);

/// Where it counts its boots.
const BOOTS: u64 = 0x20_0000;

fn again() -> &'static [u8] {
    // SAFETY: the two labels of the block above.
    unsafe { between(&raw const again_start, &raw const again_end) }
}

fn spec() -> BootSpec {
    BootSpec {
        kernel: KernelSource::Bytes(elf(again())),
        initrd: None,
        cmdline: "test".to_owned(),
    }
}

/// At a reset only.
fn restart(spec: BootSpec) -> Restart {
    Restart {
        spec,
        on_reset: true,
        on_crash: false,
        on_power_off: false,
    }
}

fn event(vm: &Vm) -> VmEvent {
    let event = vm.events().recv_timeout(LONG);
    event.expect("the guest pulses its reset line")
}

/// What a machine has sent after so many boots, the first being number `first`.
fn boots(first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(|n| [n as u8, 1]).collect()
}

#[test]
fn l3_a_reset_boots_the_machine_again_as_often_as_it_comes() {
    for vcpus in [1, 2] {
        let (vm, line) = booted(vcpus, &two_slots(), again());
        vm.restarts(Some(restart(spec())));
        vm.resume();
        for n in 1..=30 {
            assert_eq!(event(&vm), VmEvent::Reset);
            assert_eq!(line.wait(2 * n), boots(1, n as u64));
            vm.reset().unwrap();
        }
    }
}

#[test]
fn l3_a_checkpoint_between_the_reset_and_its_doing_is_of_a_machine_that_boots() {
    let (vm, line) = booted(1, &two_slots(), again());
    vm.restarts(Some(restart(spec())));
    vm.resume();
    assert_eq!(event(&vm), VmEvent::Reset);
    vm.pause().unwrap();
    let state = vm.capture().expect("it has not ended");
    let (other, there) = machine(1, &two_slots(), copy_ram(&vm));
    other.restore(&state).unwrap();
    // Whoever was told of the reset comes late.
    vm.reset().unwrap();
    assert_eq!(read(&vm, BOOTS), 1, "it is paused");
    for (vm, line, bytes) in [(&vm, &line, boots(1, 2)), (&other, &there, boots(2, 1))] {
        vm.resume();
        assert_eq!(line.wait(bytes.len()), bytes);
        assert_eq!(event(vm), VmEvent::Reset);
    }
    // The other one was never told what to boot.
    other.pause().unwrap();
    assert!(matches!(other.capture(), Err(VmError::Ended)));
}

#[test]
fn what_is_loaded_for_another_boot_is_noted_as_dirty() {
    let (vm, _) = booted(1, &two_slots(), again());
    vm.restarts(Some(restart(spec())));
    vm.dirty().start().unwrap();
    vm.resume();
    assert_eq!(event(&vm), VmEvent::Reset);
    vm.pause().unwrap();
    // As if the guest had overwritten its kernel, and a checkpoint had taken that.
    vm.memory()
        .write_slice(&[0xcc; 64], GuestAddress(core_support::CODE))
        .unwrap();
    let mut dirty = checkpoint::PageBitmap::new(vm.layout().ranges());
    vm.dirty().harvest(&mut dirty).unwrap();
    vm.capture().unwrap();
    dirty.clear();
    vm.dirty().harvest(&mut dirty).unwrap();
    assert!(dirty.iter().any(|gfn| gfn == core_support::CODE >> 12));
    assert_eq!(
        read(&vm, core_support::CODE).to_le_bytes(),
        again()[..8],
        "its kernel is there again"
    );
}

#[test]
fn a_machine_that_cannot_be_booted_again_says_why() {
    let (vm, _) = booted(1, &two_slots(), again());
    vm.restarts(Some(restart(BootSpec {
        kernel: KernelSource::File("/nowhere/vmlinuz".into()),
        ..spec()
    })));
    vm.resume();
    assert_eq!(event(&vm), VmEvent::Reset);
    vm.reset().unwrap();
    match event(&vm) {
        VmEvent::Crashed { reason, .. } => {
            assert!(reason.contains("/nowhere/vmlinuz"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    vm.pause().unwrap();
    assert!(matches!(vm.capture(), Err(VmError::Ended)));
}

#[test]
fn a_reset_may_come_from_outside() {
    // SAFETY: in each line the two labels of one block.
    let spin = unsafe { between(&raw const spin_start, &raw const spin_end) };
    let (vm, line) = booted(1, &two_slots(), spin);
    assert!(!vm.press_reset(), "nothing is known to boot");
    vm.restarts(Some(restart(BootSpec {
        kernel: KernelSource::Bytes(elf(spin)),
        ..spec()
    })));
    vm.resume();
    for n in 1..=5 {
        line.wait(n);
        assert!(vm.press_reset());
        assert_eq!(event(&vm), VmEvent::Reset);
        vm.reset().unwrap();
    }
    line.wait(6);
}

// Says that it is there, and does nothing more.
guest_code!(
    spin_start,
    spin_end,
    "movl $0x3f8, %edx",
    "movl $0x21, %eax",
    "outb %al, %dx",
    "2: jmp 2b",
);

// Sends a byte, then ends in an exception that nothing handles.
guest_code!(
    crash_start,
    crash_end,
    "movl $0x3f8, %edx",
    "movl $0x3f, %eax",
    "outb %al, %dx",
    "ud2",
    "2: jmp 2b",
);

#[test]
fn a_crash_may_be_a_reset_too() {
    // SAFETY: in each line the two labels of one block.
    let crash = unsafe { between(&raw const crash_start, &raw const crash_end) };
    let (vm, line) = booted(1, &two_slots(), crash);
    let spec = BootSpec {
        kernel: KernelSource::Bytes(elf(crash)),
        ..spec()
    };
    let on = |on_crash| Restart {
        on_crash,
        ..restart(spec.clone())
    };
    vm.restarts(Some(on(true)));
    vm.resume();
    for n in 1..=5 {
        assert!(matches!(event(&vm), VmEvent::Crashed { .. }));
        line.wait(n);
        assert!(vm.waits_for_reset());
        if n == 5 {
            vm.restarts(Some(on(false)));
        }
        vm.reset().unwrap();
    }
    assert!(matches!(event(&vm), VmEvent::Crashed { .. }));
    assert!(!vm.waits_for_reset(), "it is over");
}
