//! Frames in both directions, back-pressure, malformed buffers.

use vmm::devices::mmio::reg;

use crate::driver::*;
use crate::stand_ins::TestDisk;

const RX: usize = 0;
const TX: usize = 1;

fn setup(features: u64) -> (Machine, Driver) {
    let machine = Machine::new(TestDisk::new(4096));
    let driver = machine.driver(NET, features);
    (machine, driver)
}

impl Driver {
    /// Offers a frame with a header full of rubbish.
    fn offer_frame(&mut self, payload: &[u8]) {
        let header = self.buffer(&[0xff; 12]);
        let at = self.buffer(payload);
        self.offer(TX, &[out(header, 12), out(at, payload.len() as u32)]);
    }
}

fn payload(n: u32) -> Vec<u8> {
    let mut bytes = vec![0x5a; 60];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    bytes
}

/// What arrived on the wire, headers checked and removed.
fn numbers(machine: &Machine) -> Vec<u32> {
    let frames = machine.wire.sent();
    frames
        .iter()
        .map(|frame| {
            assert_eq!(frame[..12], [0; 12], "the guest's header reached the host");
            u32::from_le_bytes(frame[12..16].try_into().unwrap())
        })
        .collect()
}

#[test]
fn frames_go_out() {
    for features in [0, EVENT_IDX] {
        let (machine, mut driver) = setup(features);
        for n in 0..100 {
            driver.offer_frame(&payload(n));
            driver.kick(TX);
            assert_eq!(driver.wait_used(TX).1, 0);
        }
        assert_eq!(numbers(&machine), (0..100).collect::<Vec<_>>());
        eventually("an edge", || machine.wires.edges(driver.gsi()) > 0);
    }
}

#[test]
fn frames_come_in_and_mark_their_pages() {
    for features in [0, EVENT_IDX] {
        let (machine, mut driver) = setup(features);
        let header = driver.buffer(&[0xff; 12]);
        let at = driver.buffer(&[0; 1600]);
        clean(&machine.mem);
        driver.offer(RX, &[into(header, 12), into(at, 1600)]);
        driver.kick(RX);
        machine.wire.inject(&payload(7));
        assert_eq!(driver.wait_used(RX).1, 72);
        assert_eq!(driver.bytes(at, 60), payload(7));
        // A zero header with one buffer, whatever the backend put there.
        let mut expected = [0; 12];
        expected[10] = 1;
        assert_eq!(driver.bytes(header, 12), expected);
        assert!(is_dirty(&machine.mem, header) && is_dirty(&machine.mem, at));
        assert!(is_dirty(&machine.mem, driver.used(RX)));
        eventually("an edge", || machine.wires.edges(driver.gsi()) > 0);
    }
}

#[test]
fn without_buffers_the_backend_is_not_read() {
    for features in [0, EVENT_IDX] {
        let (machine, mut driver) = setup(features);
        for n in 0..40 {
            machine.wire.inject(&payload(n));
        }
        let at = driver.buffer(&[0; 4096]);
        for n in 0..40u16 {
            // Quiet for as long as it takes to come round; frames wait in the backend.
            machine.devices.pause();
            machine.devices.resume();
            assert_eq!(machine.wire.read(), usize::from(n));
            driver.offer(RX, &[into(at, 4096)]);
            driver.kick(RX);
            driver.wait_used(RX);
            assert_eq!(driver.bytes(at + 12, 60), payload(u32::from(n)));
        }
    }
}

#[test]
fn back_pressure_keeps_order_and_loses_nothing() {
    for features in [0, EVENT_IDX] {
        let (machine, mut driver) = setup(features);
        machine.wire.set_room(0);
        let (mut offered, mut returned) = (0u32, 0);
        // Room for three now and then; the guest keeps its ring (8 chains of 2) full all the time.
        while returned < 200 {
            while offered - returned < 8 && offered < 200 {
                driver.offer_frame(&payload(offered));
                offered += 1;
            }
            driver.kick(TX);
            let refused = machine.wire.refused();
            eventually("a refusal, or all sent", || {
                machine.wire.refused() > refused || machine.wire.sent().len() == 200 || refused > 0
            });
            machine.wire.set_room(3);
            eventually("a frame sent", || {
                while driver.poll_used(TX).is_some() {
                    returned += 1;
                }
                machine.wire.sent().len() as u32 == returned && returned > 0
            });
        }
        assert!(machine.wire.refused() > 0, "never full: nothing was tested");
        assert_eq!(numbers(&machine), (0..200).collect::<Vec<_>>());
    }
}

#[test]
fn a_full_backend_is_not_asked_again_before_it_has_room() {
    let (machine, mut driver) = setup(0);
    machine.wire.set_room(0);
    driver.offer_frame(&payload(0));
    driver.kick(TX);
    eventually("a refusal", || machine.wire.refused() == 1);
    driver.offer_frame(&payload(1));
    driver.kick(TX);
    // Meanwhile the other direction works.
    let at = driver.buffer(&[0; 4096]);
    driver.offer(RX, &[into(at, 4096)]);
    driver.kick(RX);
    machine.wire.inject(&payload(5));
    driver.wait_used(RX);
    assert_eq!(machine.wire.refused(), 1);
    assert_eq!(driver.used_idx(TX), 0);
    machine.wire.set_room(100);
    driver.wait_used(TX);
    driver.wait_used(TX);
    assert_eq!(numbers(&machine), [0, 1]);
}

#[test]
fn frames_that_cannot_be_are_dropped_and_returned() {
    let (machine, mut driver) = setup(0);
    let big = driver.buffer(&[0; 65_563]);
    for (addr, len) in [(big, 65_563), (big, 12), (big, 5), (big, 0)] {
        driver.offer(TX, &[out(addr, len)]);
        driver.kick(TX);
        driver.wait_used(TX);
    }
    driver.offer_frame(&payload(3));
    driver.kick(TX);
    driver.wait_used(TX);
    assert_eq!(numbers(&machine), [3]);
    // A frame longer than the guest's buffer is dropped; the buffer serves the next one.
    let small = driver.buffer(&[0; 100]);
    driver.offer(RX, &[into(small, 72)]);
    driver.kick(RX);
    machine.wire.inject(&[1; 61]);
    machine.wire.inject(&payload(9));
    assert_eq!(driver.wait_used(RX), (0, 72));
    assert_eq!(driver.bytes(small + 72, 28), [0; 28]);
}

#[test]
fn the_largest_frame_passes() {
    let (machine, mut driver) = setup(0);
    let at = driver.buffer(&vec![0x77; 65_562]);
    driver.offer(TX, &[out(at, 65_562)]);
    driver.kick(TX);
    driver.wait_used(TX);
    assert_eq!(machine.wire.sent()[0].len(), 65_562);
}

#[test]
fn buffers_in_the_wrong_direction_need_a_reset() {
    for (queue, part) in [(TX, into(0x1000, 100)), (RX, out(0x1000, 4096))] {
        let (machine, mut driver) = setup(0);
        driver.offer(queue, &[part]);
        machine.wire.inject(&payload(0));
        driver.kick(queue);
        driver.wait_needs_reset();
        assert_eq!(driver.get(reg::INTERRUPT_STATUS) & 2, 2);
        assert!(machine.wire.sent().is_empty());
    }
}
