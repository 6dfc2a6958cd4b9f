//! The power button: a guest that heeds it switches itself off, here or where it goes on.

mod core_support;

use core_support::guests::heeds_its_power_button;
use core_support::{LONG, booted, copy_ram, machine, two_slots};
use vmm::VmEvent;

#[test]
fn l5_a_guest_hears_of_its_power_button() {
    let (vm, line) = booted(1, &two_slots(), heeds_its_power_button());
    vm.resume();
    line.wait(1);
    vm.press_power_button();
    assert_eq!(vm.events().recv_timeout(LONG), Ok(VmEvent::Shutdown));
}

#[test]
fn l5_a_button_that_was_pressed_is_a_part_of_the_checkpoint() {
    let (vm, line) = booted(1, &two_slots(), heeds_its_power_button());
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
