//! Pause, capture, restore and what a guest does to itself, with tiny guests on the KVM at hand.

mod core_support;

use std::io::Write;

use core_support::{
    LONG, between, booted, copy_ram, elf, machine, machine_with_input, read, two_slots,
};
use vmm::{BootSpec, KernelSource, RamFiles, Vm, VmError, VmEvent};

// Reads a device's magic number (MMIO), a port that reads 1, sends the low byte of a counter down the serial line,
// and counts in a register and in memory; switches itself off if a read was wrong.
guest_code!(
    count_start,
    count_end,
    "xorl %ecx, %ecx",
    "movl $0x200000, %esi",
    "2: movl $0xd0000000, %ebx",
    "movl (%rbx), %eax",
    "cmpl $0x74726976, %eax",
    "jne 3f",
    "movl $0x604, %edx",
    "xorl %eax, %eax",
    "inw %dx, %ax",
    "cmpl $1, %eax",
    "jne 3f",
    "movl $0x3f8, %edx",
    "movl %ecx, %eax",
    "outb %al, %dx",
    "incl %ecx",
    "movq %rcx, (%rsi)",
    "jmp 2b",
    "3: movl $0x604, %edx",
    "movl $0x3400, %eax",
    "outw %ax, %dx",
    "jmp 3b",
);

fn count() -> &'static [u8] {
    // SAFETY: the two labels of the block above.
    unsafe { between(&raw const count_start, &raw const count_end) }
}

/// The bytes sent must be the counter's, each exactly once.
fn assert_counts(bytes: &[u8], from: usize) {
    for (index, byte) in bytes.iter().enumerate() {
        assert_eq!(*byte, (from + index) as u8, "byte {index} of the line");
    }
}

fn assert_alive(vm: &Vm) {
    if let Ok(event) = vm.events().try_recv() {
        panic!("{event}");
    }
}

#[test]
fn pauses_lose_and_repeat_nothing() {
    let (vm, line) = booted(1, &two_slots(), count());
    assert_eq!(line.bytes(), b"");
    let mut seen = 0;
    for round in 0..200 {
        vm.resume();
        seen = line.wait(seen + 1 + round % 7).len();
        vm.pause().unwrap();
        let sent = line.bytes().len();
        vm.capture().unwrap();
        // A stopped machine does nothing.
        std::thread::yield_now();
        assert_eq!(line.bytes().len(), sent);
        let counted = read(&vm, 0x20_0000) as usize;
        assert!(
            counted == sent || counted + 1 == sent,
            "{counted} counted, {sent} sent"
        );
    }
    assert_alive(&vm);
    assert_counts(&line.bytes(), 0);
}

#[test]
fn a_captured_machine_goes_on_in_another() {
    let layout = two_slots();
    let (mut vm, mut line) = booted(1, &layout, count());
    let mut base = 0;
    for round in 0..20 {
        vm.resume();
        line.wait(20 + round);
        vm.pause().unwrap();
        let state = vm.capture().unwrap();
        // Through bytes, as it would travel.
        let state = checkpoint::machine::MachineState::decode(&state.encode().unwrap()).unwrap();
        let (next, next_line) = machine(1, &layout, copy_ram(&vm));
        next.restore(&state).unwrap();
        let sent = line.bytes();
        assert_counts(&sent, base);
        next.resume();
        next_line.wait(20);
        assert_alive(&next);
        // The first goes on as well: a capture changes nothing.
        vm.resume();
        let more = line.wait(sent.len() + 20);
        assert_counts(&more, base);
        assert_alive(&vm);
        base += sent.len();
        (vm, line) = (next, next_line);
        assert_counts(&line.wait(20), base);
    }
}

#[test]
fn capture_and_restore_give_the_same_state_back() {
    let layout = two_slots();
    let (vm, line) = booted(2, &layout, count());
    vm.resume();
    line.wait(100);
    vm.pause().unwrap();
    let state = vm.capture().unwrap();
    assert_eq!(state.vcpus.len(), 2);
    let (next, _) = machine(2, &layout, copy_ram(&vm));
    next.restore(&state).unwrap();
    let again = next.capture().unwrap();
    assert_eq!(state.devices, again.devices);
    // Clocks go on; nothing else may differ.
    for (first, second) in state.vcpus.iter().zip(&again.vcpus) {
        assert_eq!(first.len(), second.len());
        let differing = first.iter().zip(second).filter(|(a, b)| a != b).count();
        assert!(
            differing <= 64,
            "{differing} bytes of a vCPU's state differ after a restore"
        );
    }
}

#[test]
fn only_a_paused_machine_is_captured() {
    let (vm, line) = booted(1, &two_slots(), count());
    vm.resume();
    line.wait(1);
    assert!(matches!(vm.capture(), Err(VmError::NotPaused)));
    vm.pause().unwrap();
    vm.pause().unwrap();
    let state = vm.capture().unwrap();
    vm.resume();
    assert!(matches!(vm.restore(&state), Err(VmError::NotPaused)));
    vm.stop();
}

#[test]
fn a_checkpoint_of_another_shape_is_refused() {
    let layout = two_slots();
    let (vm, _) = booted(1, &layout, count());
    let state = vm.capture().unwrap();
    let (two, _) = machine(2, &layout, copy_ram(&vm));
    assert!(matches!(two.restore(&state), Err(VmError::Shape(_))));
    let (other, _) = machine(1, &layout, copy_ram(&vm));
    let mut moved = state.clone();
    moved.ram[1].start += 4096;
    assert!(matches!(other.restore(&moved), Err(VmError::Shape(_))));
    let mut torn = state.clone();
    torn.vcpus[0].truncate(100);
    assert!(matches!(
        other.restore(&torn),
        Err(VmError::Vcpu { id: 0, .. })
    ));
    let mut odd = state.clone();
    odd.vm[0] ^= 0xff;
    assert!(matches!(other.restore(&odd), Err(VmError::State(_))));
    other.restore(&state).unwrap();
}

// Sends back every byte that comes down the serial line.
guest_code!(
    echo_start,
    echo_end,
    "2: movl $0x3fd, %edx",
    "inb %dx, %al",
    "testb $1, %al",
    "jz 2b",
    "movl $0x3f8, %edx",
    "inb %dx, %al",
    "outb %al, %dx",
    "jmp 2b",
);

/// A read of the line takes a byte off it. Stopped in the middle of one, the guest must get that byte: a machine
/// captured before the access is completed would read again elsewhere, and the byte would be gone. (Seen to fail with
/// vCPU threads that leave their loop right after serving an exit.)
#[test]
fn an_access_with_a_side_effect_happens_exactly_once() {
    const MOVES: usize = 150;
    // SAFETY: the two labels of the block above.
    let code = unsafe { between(&raw const echo_start, &raw const echo_end) };
    let layout = two_slots();
    let (input, mut typist) = std::io::pipe().unwrap();
    let typing = std::thread::spawn(move || {
        // Until nobody reads any more.
        let mut next = 0u8;
        while typist.write_all(&[next]).is_ok() {
            next = next.wrapping_add(1);
        }
    });
    let boot = |ram| {
        let input = input.try_clone().unwrap().into();
        machine_with_input(1, &layout, ram, Some(input))
    };
    let (mut vm, mut line) = boot(RamFiles::create(&layout).unwrap());
    vm.boot(&BootSpec {
        kernel: KernelSource::Bytes(elf(code)),
        initrd: None,
        cmdline: String::new(),
    })
    .unwrap();
    let mut echoed = 0;
    for round in 0..MOVES {
        vm.resume();
        line.wait(5 + round % 3);
        vm.pause().unwrap();
        let state = vm.capture().unwrap();
        assert_alive(&vm);
        let bytes = line.bytes();
        assert_counts(&bytes, echoed);
        echoed += bytes.len();
        let ram = copy_ram(&vm);
        // Before the next takes over the line.
        vm.stop();
        (vm, line) = boot(ram);
        vm.restore(&state).unwrap();
    }
    drop((vm, input));
    typing.join().unwrap();
}

guest_code!(
    off_start,
    off_end,
    "movl $0x604, %edx",
    "movl $0x3400, %eax",
    "outw %ax, %dx",
    "2: jmp 2b"
);
guest_code!(
    reset_start,
    reset_end,
    "movl $0x64, %edx",
    "movl $0xfe, %eax",
    "outb %al, %dx",
    "2: jmp 2b"
);
// No interrupt table: the first exception is the third.
guest_code!(fault_start, fault_end, "ud2", "2: jmp 2b");

fn event_of(code: &[u8]) -> (Vm, VmEvent) {
    let (vm, _) = booted(2, &two_slots(), code);
    vm.resume();
    let event = vm
        .events()
        .recv_timeout(LONG)
        .expect("the guest ends its run");
    (vm, event)
}

#[test]
fn switching_off_resetting_and_crashing_are_events() {
    // SAFETY: in each line the two labels of one block above.
    let (off, reset, fault) = unsafe {
        (
            between(&raw const off_start, &raw const off_end),
            between(&raw const reset_start, &raw const reset_end),
            between(&raw const fault_start, &raw const fault_end),
        )
    };
    let (vm, event) = event_of(off);
    assert_eq!(event, VmEvent::Shutdown);
    // It is over: no vCPU runs again, and its end is not a checkpoint.
    vm.resume();
    vm.pause().unwrap();
    assert!(matches!(vm.capture(), Err(VmError::Ended)));
    assert!(vm.events().try_recv().is_err());
    assert_eq!(event_of(reset).1, VmEvent::Reset);
    match event_of(fault).1 {
        VmEvent::Crashed { vcpu: 0, reason } => assert!(reason.contains("rip 0x"), "{reason}"),
        other => panic!("{other:?}"),
    }
}
