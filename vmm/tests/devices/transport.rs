//! The register window: identity, negotiation, the status state machine, queue set-up.

use vmm::devices::mmio::{MAGIC, VENDOR, reg};

use crate::driver::*;
use crate::stand_ins::TestDisk;

fn machine() -> Machine {
    Machine::new(TestDisk::new(1 << 20))
}

#[test]
fn identifies_itself() {
    let machine = machine();
    for (device, id) in [(NET, 1), (BLK, 2), (RNG, 4)] {
        let driver = Driver::new(&machine, device);
        assert_eq!(driver.get(reg::MAGIC_VALUE), MAGIC);
        assert_eq!(driver.get(reg::VERSION), 2);
        assert_eq!(driver.get(reg::DEVICE_ID), id);
        assert_eq!(driver.get(reg::VENDOR_ID), VENDOR);
        assert_eq!(driver.get(reg::CONFIG_GENERATION), 0);
        assert_eq!(driver.get(reg::SHM_LEN_LOW), u32::MAX);
    }
    let places = machine.devices.mmio_slots();
    assert_eq!(places.len(), 3);
    assert_eq!((places[1].addr, places[1].gsi), (0xD000_1000, 17));
    let mut word = [7; 4];
    assert!(!machine.devices.mmio_read(0xD000_3000, &mut word));
    assert!(!machine.devices.mmio_write(0xCFFF_FFFC, &word));
    assert_eq!(word, [7; 4]);
}

#[test]
fn notifications_are_wired_per_queue() {
    let machine = machine();
    let wired = machine.wires.notifications.lock().unwrap().clone();
    assert_eq!(
        wired,
        [
            (0xD000_0050, 0),
            (0xD000_0050, 1),
            (0xD000_1050, 0),
            (0xD000_2050, 0)
        ]
    );
}

#[test]
fn agrees_only_on_what_it_offers() {
    let machine = machine();
    let driver = Driver::new(&machine, BLK);
    let offered = driver.offered();
    // SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, DISCARD, WRITE_ZEROES, EVENT_IDX, VERSION_1.
    let expected = [1, 2, 6, 9, 13, 14, 29, 32]
        .iter()
        .fold(0, |f, b| f | 1u64 << b);
    assert_eq!(offered, expected);
    assert!(driver.negotiate(offered));
    assert!(driver.negotiate(VERSION_1));
    // A legacy driver, indirect descriptors, a feature of another device.
    for refused in [0, 1 << 9, VERSION_1 | 1 << 28, VERSION_1 | 1 << 5, u64::MAX] {
        assert!(!driver.negotiate(refused), "{refused:#x}");
        driver.set(reg::STATUS, 1 | 2 | 8 | 4);
        assert_eq!(driver.get(reg::STATUS) & 4, 0, "started without agreement");
    }
    assert!(driver.negotiate(VERSION_1));
    // Too late.
    driver.set(reg::DRIVER_FEATURES_SEL, 0);
    driver.set(reg::DRIVER_FEATURES, u32::MAX);
    driver.set(reg::STATUS, 15);
    assert_eq!(driver.get(reg::STATUS), 15);
}

#[test]
fn a_feature_beyond_64_bits_fails_the_negotiation() {
    let machine = machine();
    let driver = Driver::new(&machine, NET);
    driver.set(reg::STATUS, 3);
    driver.set(reg::DRIVER_FEATURES_SEL, 1);
    driver.set(reg::DRIVER_FEATURES, 1);
    driver.set(reg::DRIVER_FEATURES_SEL, 2);
    driver.set(reg::DRIVER_FEATURES, 1);
    driver.set(reg::STATUS, 11);
    assert_eq!(driver.get(reg::STATUS), 3);
}

#[test]
fn status_bits_are_taken_back_only_by_a_reset() {
    let machine = machine();
    let driver = machine.driver(NET, 0);
    driver.set(reg::STATUS, 1);
    assert_eq!(driver.get(reg::STATUS), 15);
    driver.set(reg::QUEUE_SEL, 1);
    assert_eq!(driver.get(reg::QUEUE_READY), 1);
    driver.set(reg::STATUS, 0);
    assert_eq!(driver.get(reg::STATUS), 0);
    driver.set(reg::QUEUE_SEL, 1);
    assert_eq!(driver.get(reg::QUEUE_READY), 0);
    // And it starts again.
    driver.start(EVENT_IDX);
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let good = [0x10000, 0x12000, 0x14000];
    let cases: [(u32, [u64; 3]); 12] = [
        (0, good),
        (3, good),
        (512, good),
        (u32::MAX, good),
        (16, [0x10008, 0x12000, 0x14000]),
        (16, [0x10000, 0x12001, 0x14000]),
        (16, [0x10000, 0x12000, 0x14002]),
        (16, [0x10000, 0, 0x14000]),
        (16, [RAM_LOW - 16, 0x12000, 0x14000]),
        (16, [0x10000, HIGH - 2, 0x14000]),
        (16, [0x10000, 0x12000, RAM_LOW]),
        (16, [!15, !1, !3]),
    ];
    let machine = machine();
    for (size, rings) in cases {
        let driver = Driver::new(&machine, RNG);
        assert!(driver.negotiate(VERSION_1));
        driver.set_up_queue(0, size, rings);
        assert_eq!(driver.get(reg::QUEUE_READY), 0, "{size} {rings:x?}");
        assert_ne!(driver.get(reg::STATUS) & 64, 0, "{size} {rings:x?}");
    }
    // The same device is good again after a reset, its rings above 4 GiB.
    let driver = Driver::new(&machine, RNG);
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queue(0, 64, [HIGH, HIGH + 0x2000, HIGH + 0x4000]);
    assert_eq!(driver.get(reg::QUEUE_READY), 1);
    assert_eq!(driver.get(reg::STATUS), 11);
}

#[test]
fn queues_are_set_up_only_after_agreement_and_not_while_live() {
    let machine = machine();
    let driver = Driver::new(&machine, RNG);
    driver.set(reg::STATUS, 3);
    driver.set_up_queue(0, 16, [0x10000, 0x12000, 0x14000]);
    assert_eq!(driver.get(reg::QUEUE_READY), 0);
    let mut driver = machine.driver(RNG, 0);
    driver.set(reg::QUEUE_SEL, 0);
    driver.set(reg::QUEUE_NUM, 3);
    driver.set(reg::QUEUE_DESC_LOW, 1);
    let buffer = driver.buffer(&[0; 64]);
    driver.offer(0, &[into(buffer, 64)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (0, 64));
    // No such queue: nothing there.
    driver.set(reg::QUEUE_SEL, 9);
    assert_eq!(driver.get(reg::QUEUE_NUM_MAX), 0);
    driver.set(reg::QUEUE_READY, 1);
    driver.kick(77);
}

#[test]
fn odd_accesses_do_nothing() {
    let machine = machine();
    let base = 0xD000_0000;
    for len in [0usize, 1, 2, 3, 5, 8, 64] {
        let mut data = vec![0xee; len];
        assert!(machine.devices.mmio_read(base + reg::STATUS, &mut data));
        assert_eq!(data, vec![0; len]);
        assert!(
            machine
                .devices
                .mmio_write(base + reg::STATUS, &vec![1; len])
        );
    }
    let driver = Driver::new(&machine, NET);
    assert_eq!(driver.get(reg::STATUS), 0);
    assert_eq!(driver.get(0x71), 0);
    assert_eq!(driver.get(0x54), 0);
}

#[test]
fn configuration_reads_in_any_width_and_is_read_only() {
    let machine = machine();
    let net = Driver::new(&machine, NET);
    let mut mac = [0; 6];
    for (i, byte) in mac.iter_mut().enumerate() {
        let mut one = [0];
        machine
            .devices
            .mmio_read(net.base() + reg::CONFIG + i as u64, &mut one);
        *byte = one[0];
    }
    assert_eq!(mac, MAC);
    net.set(reg::CONFIG, 0);
    assert_eq!(net.get(reg::CONFIG).to_le_bytes(), MAC[..4]);
    let blk = Driver::new(&machine, BLK);
    let mut capacity = [0; 8];
    machine
        .devices
        .mmio_read(blk.base() + reg::CONFIG, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    assert_eq!(blk.get(reg::CONFIG + 12), 126);
    assert_eq!(blk.get(reg::CONFIG + 20), 512);
    let mut beyond = [9; 8];
    machine.devices.mmio_read(blk.base() + 0xffc, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn interrupts_are_told_and_acknowledged() {
    for features in [0, EVENT_IDX] {
        let machine = machine();
        let mut driver = machine.driver(RNG, features);
        let buffer = driver.buffer(&[0; 4096]);
        driver.offer(0, &[into(buffer, 4096)]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (0, 4096));
        eventually("an edge", || machine.wires.edges(driver.gsi()) > 0);
        assert_eq!(driver.get(reg::INTERRUPT_STATUS), 1);
        driver.set(reg::INTERRUPT_ACK, 1);
        assert_eq!(driver.get(reg::INTERRUPT_STATUS), 0);
        assert_ne!(driver.bytes(buffer, 4096), vec![0; 4096]);
    }
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let machine = machine();
    let mut driver = machine.driver(RNG, 0);
    // VRING_AVAIL_F_NO_INTERRUPT
    driver.put(driver.avail(0), 1u16.to_le_bytes());
    let buffer = driver.buffer(&[0; 64]);
    driver.offer(0, &[into(buffer, 64)]);
    driver.kick(0);
    driver.wait_used(0);
    // A pause waits for the device's turn to be over, so an interrupt would have come by now.
    machine.devices.pause();
    assert_eq!(driver.get(reg::INTERRUPT_STATUS), 0);
}
