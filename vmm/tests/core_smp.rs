//! Two vCPUs running at once: stopped together, captured, and going on in another machine, each where it was.

mod core_support;

use checkpoint::machine::MachineState;
use core_support::{Line, between, booted, copy_ram, machine, read, two_slots};
use vm_memory::{Bytes, GuestAddress};
use vmm::Vm;

// Waits for a flag at 0x200000, takes a number n from 0x200008, then sends n * 128 + the low 7 bits of its own counter
// down the serial line, without end; the counter is kept in a register and at 0x201000 + n * 4096.
guest_code!(
    both_start,
    both_end,
    "movl $0x200000, %esi",
    "2: movq (%rsi), %rax",
    "testq %rax, %rax",
    "jz 2b",
    "movl $1, %ebx",
    "lock xaddq %rbx, 8(%rsi)",
    "movq %rbx, %rdi",
    "shlq $12, %rdi",
    "addq $0x201000, %rdi",
    "shlq $7, %rbx",
    "xorl %ecx, %ecx",
    "movl $0x3f8, %edx",
    "3: movl %ecx, %eax",
    "andl $127, %eax",
    "orl %ebx, %eax",
    "outb %al, %dx",
    "incl %ecx",
    "movq %rcx, (%rdi)",
    "jmp 3b",
);

/// A machine with two vCPUs at the same place of the code. A second vCPU is started in real mode, which not every
/// KVM at hand can run; so the state of a single one is given to both.
fn two_running() -> (Vm, Line) {
    // SAFETY: the two labels of the block above.
    let code = unsafe { between(&raw const both_start, &raw const both_end) };
    let layout = two_slots();
    let (one, _) = booted(1, &layout, code);
    let state = one.capture().unwrap();
    let two = MachineState {
        vcpus: vec![state.vcpus[0].clone(), state.vcpus[0].clone()],
        ..state
    };
    one.memory()
        .write_obj(1u64, GuestAddress(0x20_0000))
        .unwrap();
    let (vm, line) = machine(2, &layout, copy_ram(&one));
    vm.restore(&two).unwrap();
    (vm, line)
}

/// Checks that both vCPUs' counters come in order, and adds to what each has sent.
fn follow(bytes: &[u8], sent: &mut [usize; 2]) {
    for byte in bytes {
        let sender = usize::from(byte >> 7);
        assert_eq!(
            usize::from(byte & 127),
            sent[sender] % 128,
            "vCPU {sender} after {sent:?}"
        );
        sent[sender] += 1;
    }
}

#[test]
fn both_stop_and_both_go_on_elsewhere() {
    let layout = two_slots();
    let (mut vm, mut line) = two_running();
    let mut sent = [0; 2];
    for round in 1..=20 {
        vm.resume();
        let mut wanted = 0;
        // Until both have got on.
        let before = sent;
        let mut seen = sent;
        while seen[0] < before[0] + round || seen[1] < before[1] + round {
            wanted += 1;
            seen = before;
            follow(&line.wait(wanted), &mut seen);
            wanted = seen.iter().sum::<usize>() - before.iter().sum::<usize>();
        }
        vm.pause().unwrap();
        let bytes = line.bytes();
        let state = vm.capture().unwrap();
        std::thread::yield_now();
        assert_eq!(
            line.bytes().len(),
            bytes.len(),
            "a paused machine sends nothing"
        );
        follow(&bytes, &mut sent);
        for (vcpu, sent) in sent.iter().enumerate() {
            let counted = read(&vm, 0x20_1000 + 0x1000 * vcpu as u64) as usize;
            assert!(
                counted == *sent || counted + 1 == *sent,
                "vCPU {vcpu}: {counted} counted, {sent} sent"
            );
        }
        let (next, next_line) = machine(2, &layout, copy_ram(&vm));
        next.restore(&state).unwrap();
        if let Ok(event) = vm.events().try_recv() {
            panic!("{event}");
        }
        (vm, line) = (next, next_line);
    }
}

#[test]
fn pausing_again_at_once_is_safe() {
    let (vm, line) = two_running();
    for _ in 0..500 {
        vm.resume();
        vm.pause().unwrap();
    }
    vm.resume();
    line.wait(line.bytes().len() + 10);
    vm.pause().unwrap();
    let mut sent = [0; 2];
    follow(&line.bytes(), &mut sent);
}
