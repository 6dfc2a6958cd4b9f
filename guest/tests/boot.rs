//! The image on a KVM with nothing but RAM, in-kernel interrupt controllers and COM1: what the guest needs of a VMM, and
//! that it goes on without devices. Needs /dev/kvm.

mod harness;

use harness::Machine;

#[test]
fn boots_to_ring_3_without_devices_and_says_so() {
    let mut m = Machine::new(64 << 20, "ip=10.77.0.2/24 pages=0");
    m.run_until("no network device");
    m.run_until("no disk");
    m.run_until("ready");
}

#[test]
fn the_load_loop_dirties_the_pages_asked_for() {
    let mut m = Machine::new(64 << 20, "pages=100 work=10");
    m.run_until("ready");
    m.clear_dirty();
    // However long a pass takes here: until all its pages have shown up, and some passes more.
    for tries in 0.. {
        let dirty = m.dirty_pages();
        if dirty >= 100 {
            break;
        }
        assert!(tries < 1000, "only {dirty} pages dirty after 20 s");
        m.run_ms(20);
    }
    m.run_ms(200);
    let dirty = m.dirty_pages();
    // The pages of the load, and a handful of the guest's own (stack, counters, clock).
    assert!(dirty < 150, "{dirty} pages dirty");
}

#[test]
fn an_idle_guest_sleeps() {
    let mut m = Machine::new(64 << 20, "pages=0");
    m.run_until("ready");
    let busy = m.run_ms(1000);
    assert!(busy < 500, "an idle guest used {busy} ms of 1000 ms");
}

#[test]
fn more_pages_than_there_are_is_cut_to_what_there_is() {
    let mut m = Machine::new(16 << 20, "pages=99999999 work=0");
    m.run_until("pages=99999999 is cut to");
    m.run_until("ready");
}

#[test]
fn a_senseless_command_line_does_no_harm() {
    let mut m = Machine::new(
        64 << 20,
        "ip=1.2.3.4.5/99 gw=x pages=-1 work=18446744073709551616 \u{1}= = quiet",
    );
    m.run_until("ready");
}

#[test]
fn an_exception_is_reported_and_ends_the_machine() {
    let mut m = Machine::new(64 << 20, "pages=0");
    m.run_until("ready");
    m.jump_into(&[0x0f, 0x0b]); // ud2
    m.run_until("FAULT vector 6");
    m.run_until_reset();
}

#[test]
fn a_privileged_instruction_is_an_exception_too() {
    let mut m = Machine::new(64 << 20, "pages=0");
    m.run_until("ready");
    m.jump_into(&[0xfa]); // cli: a #GP that is no request to sleep
    m.run_until("FAULT vector 13");
    m.run_until_reset();
}
