//! Pause, save, restore: what is under way goes on exactly once, and nothing moves in between.

use std::sync::atomic::Ordering;

use vmm::devices::DeviceError;
use vmm::devices::mmio::reg;

use crate::driver::*;
use crate::stand_ins::{Asked, TestDisk};

const OUT: u32 = 1;
const IN: u32 = 0;
const TX: usize = 1;

fn disk() -> std::sync::Arc<TestDisk> {
    TestDisk::new(1 << 20)
}

#[test]
fn a_request_under_way_is_run_again_exactly_once() {
    for features in [0, EVENT_IDX] {
        let machine = Machine::new(disk());
        let mut driver = machine.driver(BLK, features);
        machine.disk.hang(true);
        let data = driver.buffer(&[0x42; 1024]);
        let back = driver.buffer(&[0; 512]);
        // One being run, two still in the ring.
        let (first, status) = driver.offer_request(OUT, 4, &[out(data, 1024)]);
        driver.kick(0);
        eventually("the request at the disk", || {
            machine.disk.begun.load(Ordering::SeqCst) == 1
        });
        let (second, _) = driver.offer_request(IN, 5, &[into(back, 512)]);
        let (third, _) = driver.offer_request(4, 0, &[]);
        // Returns although the disk hangs.
        machine.devices.pause();
        let next = machine.successor(disk());
        assert_eq!(driver.used_idx(0), 0);
        machine.disk.hang(false);

        let mut moved = next.adopt(&driver);
        next.devices.resume();
        for head in [first, second, third] {
            assert_eq!(moved.wait_used(0).0, head);
        }
        assert_eq!(moved.bytes(status, 1), [0]);
        assert_eq!(moved.bytes(back, 512), [0x42; 512]);
        next.devices.pause();
        assert_eq!(moved.used_idx(0), 3, "a request was returned twice");
        assert_eq!(
            next.disk.asked(),
            [
                Asked::Write(2048, 1024),
                Asked::Read(2560, 512),
                Asked::Flush
            ]
        );
        // Once delivered it is no longer in the state.
        let bytes = next.disk.bytes.lock().unwrap().clone();
        let third_machine = next.successor(TestDisk::with(bytes));
        third_machine.devices.resume();
        let mut driver = third_machine.adopt(&moved);
        assert_eq!(driver.request(4, 0, &[]), 0);
        assert_eq!(third_machine.disk.asked(), [Asked::Flush]);
    }
}

#[test]
fn a_request_that_ends_while_paused_is_delivered_after_the_resume() {
    let machine = Machine::new(disk());
    machine.disk.bytes.lock().unwrap()[..512].fill(9);
    let mut driver = machine.driver(BLK, 0);
    machine.disk.hang(true);
    let to = driver.buffer(&[0; 512]);
    let (head, status) = driver.offer_request(IN, 0, &[into(to, 512)]);
    driver.kick(0);
    eventually("the request at the disk", || {
        machine.disk.begun.load(Ordering::SeqCst) == 1
    });
    machine.devices.pause();
    clean(&machine.mem);
    machine.disk.hang(false);
    eventually("the disk's answer", || machine.disk.asked().len() == 1);
    // It has its answer; the guest must not see it. A late thread could only make this test miss a fault.
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.used_idx(0), 0);
    assert_eq!(driver.bytes(status, 1), [0xaa]);
    assert_eq!(driver.bytes(to, 512), [0; 512]);
    assert!(!is_dirty(&machine.mem, to) && !is_dirty(&machine.mem, driver.used(0)));
    let states = machine.devices.save().unwrap();
    machine.devices.resume();
    assert_eq!(driver.wait_used(0), (head, 513));
    assert_eq!(driver.bytes(to, 512), [9; 512]);
    assert!(is_dirty(&machine.mem, to) && is_dirty(&machine.mem, driver.used(0)));
    assert_eq!(
        machine.disk.asked().len(),
        1,
        "run twice in the same machine"
    );
    machine.devices.pause();
    assert_ne!(machine.devices.save().unwrap(), states);
}

#[test]
fn a_paused_machine_does_nothing() {
    let machine = Machine::new(disk());
    let mut net = machine.driver(NET, 0);
    let mut blk = machine.driver(BLK, 0);
    let mut rng = machine.driver(RNG, 0);
    machine.devices.pause();
    let states = machine.devices.save().unwrap();
    let at = net.buffer(&[0; 4096]);
    net.offer(0, &[into(at, 4096)]);
    net.offer(TX, &[out(at, 100)]);
    net.kick(0);
    machine.wire.inject(&[1; 60]);
    blk.offer_request(4, 0, &[]);
    blk.kick(0);
    let bytes = rng.buffer(&[0; 64]);
    rng.offer(0, &[into(bytes, 64)]);
    rng.kick(0);
    clean(&machine.mem);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((net.used_idx(0), net.used_idx(TX)), (0, 0));
    assert_eq!((blk.used_idx(0), rng.used_idx(0)), (0, 0));
    for addr in [
        at,
        bytes,
        net.used(0),
        net.used(TX),
        blk.used(0),
        rng.used(0),
    ] {
        assert!(
            !is_dirty(&machine.mem, addr),
            "{addr:#x} written while paused"
        );
    }
    assert!(machine.disk.asked().is_empty() && machine.wire.sent().is_empty());
    assert_eq!(machine.wire.read(), 0);
    assert_eq!(machine.devices.save().unwrap(), states);
    machine.devices.resume();
    net.wait_used(0);
    net.wait_used(TX);
    blk.wait_used(0);
    rng.wait_used(0);
}

#[test]
fn a_frame_refused_for_want_of_room_moves_with_the_machine() {
    for features in [0, EVENT_IDX] {
        let machine = Machine::new(disk());
        let mut driver = machine.driver(NET, features);
        machine.wire.set_room(2);
        for n in 0..5u8 {
            let at = driver.buffer(&[n; 72]);
            driver.offer(TX, &[out(at, 72)]);
        }
        driver.kick(TX);
        eventually("a refusal", || machine.wire.refused() >= 1);
        machine.devices.pause();
        let next = machine.successor(disk());
        let mut moved = next.adopt(&driver);
        next.devices.resume();
        for _ in 0..5 {
            moved.wait_used(TX);
        }
        let first: Vec<u8> = machine.wire.sent().iter().map(|f| f[12]).collect();
        let rest: Vec<u8> = next.wire.sent().iter().map(|f| f[12]).collect();
        assert_eq!((first, rest), (vec![0, 1], vec![2, 3, 4]));
    }
}

#[test]
fn a_lost_notification_and_a_lost_interrupt_are_made_good() {
    for features in [0, EVENT_IDX] {
        let machine = Machine::new(disk());
        let mut driver = machine.driver(RNG, features);
        let bytes = driver.buffer(&[0; 64]);
        driver.offer(0, &[into(bytes, 64)]);
        driver.kick(0);
        driver.wait_used(0);
        eventually("the interrupt", || driver.get(reg::INTERRUPT_STATUS) == 1);
        machine.devices.pause();
        // Offered, and the notification lost on the way: nobody kicks.
        driver.offer(0, &[into(bytes, 64)]);
        let next = machine.successor(disk());
        let mut moved = next.adopt(&driver);
        assert_eq!(
            next.wires.edges(driver.gsi()),
            0,
            "raised before the resume"
        );
        assert_eq!(moved.get(reg::INTERRUPT_STATUS), 1);
        next.devices.resume();
        moved.wait_used(0);
        next.devices.pause();
        // The handler finds the bit and the line was raised.
        assert!(next.wires.edges(driver.gsi()) >= 1);
        // Nothing pending, nothing raised.
        assert_eq!(next.wires.edges(17), 0);
    }
}

#[test]
fn negotiation_survives_half_way() {
    let machine = Machine::new(disk());
    let driver = Driver::new(&machine, NET);
    assert!(driver.negotiate(VERSION_1 | 1 << 5));
    driver.set_up_queue(0, 16, [0x10000, 0x12000, 0x14000]);
    driver.set(reg::QUEUE_SEL, 1);
    driver.set(reg::QUEUE_NUM, 8);
    driver.set(reg::QUEUE_DESC_LOW, 0x20000);
    machine.devices.pause();
    let next = machine.successor(disk());
    let driver = next.adopt(&driver);
    next.devices.resume();
    assert_eq!(driver.get(reg::STATUS), 11);
    driver.set(reg::QUEUE_DRIVER_LOW, 0x22000);
    driver.set(reg::QUEUE_DEVICE_LOW, 0x24000);
    driver.set(reg::QUEUE_READY, 1);
    assert_eq!(driver.get(reg::QUEUE_READY), 1);
    driver.set(reg::STATUS, 15);
    assert_eq!(driver.get(reg::STATUS), 15);
    machine.devices.resume();
}

#[test]
fn a_broken_device_stays_broken() {
    let machine = Machine::new(disk());
    let driver = machine.driver(BLK, 0);
    driver.set_avail_idx(0, 1000);
    driver.kick(0);
    driver.wait_needs_reset();
    machine.devices.pause();
    let next = machine.successor(disk());
    let driver = next.adopt(&driver);
    next.devices.resume();
    assert_eq!(driver.get(reg::STATUS), 15 | 64);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let machine = Machine::new(disk());
    assert!(matches!(machine.devices.save(), Err(DeviceError::Running)));
    machine.driver(NET, 0);
    machine.devices.pause();
    let states = machine.devices.save().unwrap();
    let names: Vec<&str> = states.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["net0", "blk0", "rng0", "serial", "rtc"]);

    let fresh = Machine::paused(disk());
    assert!(matches!(
        fresh.devices.restore(&states[1..]),
        Err(DeviceError::Set { .. })
    ));
    let mut swapped = states.clone();
    swapped.swap(0, 1);
    let refused = fresh.devices.restore(&swapped).unwrap_err();
    assert!(refused.to_string().contains("net0"), "{refused}");
    let mut newer = states.clone();
    newer[3].version += 1;
    let refused = fresh.devices.restore(&newer).unwrap_err();
    assert!(refused.to_string().contains("serial"), "{refused}");
    let mut longer = states.clone();
    longer[4].state.push(0);
    assert!(fresh.devices.restore(&longer).is_err());
    // Another disk than the checkpoint's.
    let refused = Machine::paused(TestDisk::new(4096))
        .devices
        .restore(&states)
        .unwrap_err();
    assert!(refused.to_string().contains("1048576"), "{refused}");
    // And after all the refusals the right one is taken.
    fresh.devices.restore(&states).unwrap();
    assert_eq!(fresh.devices.save().unwrap(), states);
    fresh.devices.resume();
    assert!(matches!(
        fresh.devices.restore(&states),
        Err(DeviceError::Running)
    ));
}

#[test]
fn traffic_under_many_pauses_loses_nothing() {
    let machine = Machine::new(disk());
    let mut net = machine.driver(NET, EVENT_IDX);
    let mut blk = machine.driver(BLK, EVENT_IDX);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let pauser = {
        let (stop, devices) = (stop.clone(), machine.devices.clone());
        std::thread::spawn(move || {
            let mut pauses = 0;
            while !stop.load(Ordering::SeqCst) {
                devices.pause();
                devices.save().unwrap();
                devices.resume();
                pauses += 1;
            }
            pauses
        })
    };
    let data = blk.buffer(&[1; 512]);
    let frame = net.buffer(&[0; 72]);
    for n in 0..300u64 {
        assert_eq!(blk.request(OUT, n, &[out(data, 512)]), 0);
        net.mem_write(frame + 12, &n.to_le_bytes());
        net.offer(TX, &[out(frame, 72)]);
        net.kick(TX);
        net.wait_used(TX);
    }
    stop.store(true, Ordering::SeqCst);
    assert!(pauser.join().unwrap() > 10);
    assert_eq!(machine.disk.asked().len(), 300);
    let sent: Vec<u64> = machine
        .wire
        .sent()
        .iter()
        .map(|f| u64::from_le_bytes(f[12..20].try_into().unwrap()))
        .collect();
    assert_eq!(sent, (0..300).collect::<Vec<_>>());
}
