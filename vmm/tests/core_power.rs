//! The power button: a guest that heeds it switches itself off, here or where it goes on.

mod core_support;

use core_support::{LONG, between, booted, copy_ram, machine, two_slots};
use vmm::VmEvent;

// Enables the button's event, says so, waits for it, takes note of it, and switches itself off if the register says that it has.
guest_code!(
    button_start,
    button_end,
    "movl $0x602, %edx",
    "movl $0x100, %eax",
    "outw %ax, %dx",
    "movl $0x3f8, %edx",
    "movl $0x72, %eax",
    "outb %al, %dx",
    "2: movl $0x600, %edx",
    "xorl %eax, %eax",
    "inw %dx, %ax",
    "testl $0x100, %eax",
    "jz 2b",
    "movl $0x100, %eax",
    "outw %ax, %dx",
    "inw %dx, %ax",
    "testl $0x100, %eax",
    "jnz 3f",
    "movl $0x604, %edx",
    "movl $0x3400, %eax",
    "outw %ax, %dx",
    "3: jmp 3b",
);

fn button() -> &'static [u8] {
    // SAFETY: the two labels of the block above.
    unsafe { between(&raw const button_start, &raw const button_end) }
}

#[test]
fn l5_a_guest_hears_of_its_power_button() {
    let (vm, line) = booted(1, &two_slots(), button());
    vm.resume();
    line.wait(1);
    vm.press_power_button();
    assert_eq!(vm.events().recv_timeout(LONG), Ok(VmEvent::Shutdown));
}

#[test]
fn l5_a_button_that_was_pressed_is_a_part_of_the_checkpoint() {
    let (vm, line) = booted(1, &two_slots(), button());
    vm.resume();
    line.wait(1);
    vm.pause().unwrap();
    vm.press_power_button();
    let state = vm.capture().unwrap();
    let (other, _) = machine(1, &two_slots(), copy_ram(&vm));
    other.restore(&state).unwrap();
    for vm in [&vm, &other] {
        vm.resume();
        assert_eq!(vm.events().recv_timeout(LONG), Ok(VmEvent::Shutdown));
    }
}
