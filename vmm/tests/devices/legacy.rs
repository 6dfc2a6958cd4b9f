//! Serial port, clock, reset port.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use vmm::devices::manager::SERIAL_GSI;
use vmm::devices::rtc::Calendar;
use vmm::devices::{DeviceError, DeviceManager, DeviceSpec};

use crate::driver::{Machine, eventually, memory};
use crate::stand_ins::{Output, TestDisk, Wires};

fn inb(devices: &DeviceManager, port: u16) -> u8 {
    let mut byte = [0];
    assert!(devices.pio_read(port, &mut byte));
    byte[0]
}

fn outb(devices: &DeviceManager, port: u16, value: u8) {
    assert!(devices.pio_write(port, &[value]));
}

fn cmos(devices: &DeviceManager, register: u8) -> u8 {
    outb(devices, 0x70, register);
    inb(devices, 0x71)
}

struct Legacy {
    devices: DeviceManager,
    wires: Wires,
    output: Output,
    resets: Arc<AtomicUsize>,
}

fn legacy(serial_in: Option<OwnedFd>) -> Legacy {
    let (wires, output) = (Wires::default(), Output::default());
    let resets = Arc::new(AtomicUsize::new(0));
    let counted = resets.clone();
    let spec = DeviceSpec {
        net: vec![],
        disks: vec![],
        rng: false,
        serial_out: Box::new(output.clone()),
        serial_in,
        on_reset: Box::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        }),
    };
    let devices = DeviceManager::new(memory(), &wires, spec).unwrap();
    devices.resume();
    Legacy {
        devices,
        wires,
        output,
        resets,
    }
}

#[test]
fn prints() {
    let l = legacy(None);
    outb(&l.devices, 0x3f8, b'h');
    // As KVM reports `rep outsb`.
    l.devices.pio_write(0x3f8, b"ello");
    assert_eq!(*l.output.0.lock().unwrap(), b"hello");
    assert_eq!(inb(&l.devices, 0x3fd) & 0x60, 0x60, "not ready to send");
    let mut byte = [1];
    assert!(!l.devices.pio_read(0x400, &mut byte) && !l.devices.pio_write(0x2f8, &byte));
    assert_eq!(byte, [1]);
}

#[test]
fn input_arrives_whole_and_in_order_and_moves_with_the_machine() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let l = legacy(Some(reader.into()));
    outb(&l.devices, 0x3f9, 1);
    // Three times what the FIFO holds.
    let text: Vec<u8> = (0..192u8).collect();
    writer.write_all(&text).unwrap();
    eventually("the interrupt", || l.wires.edges(SERIAL_GSI) > 0);
    let successor = || {
        l.devices.pause();
        let states = l.devices.save().unwrap();
        l.devices.resume();
        let next = legacy(None);
        next.devices.pause();
        next.devices.restore(&states).unwrap();
        // Edges before the resume may go into an interrupt controller that is yet to be restored: they do not count.
        next.wires.edges(SERIAL_GSI);
        next.devices.resume();
        next
    };
    assert!(
        successor().wires.edges(SERIAL_GSI) > 0,
        "a pending interrupt was lost"
    );
    let mut got = Vec::new();
    let read_some = |devices: &DeviceManager, got: &mut Vec<u8>| {
        if inb(devices, 0x3fd) & 1 == 1 {
            got.push(inb(devices, 0x3f8));
        }
    };
    eventually("150 bytes", || {
        read_some(&l.devices, &mut got);
        got.len() >= 150
    });
    // The rest fits into the FIFO.
    drop(writer);
    eventually("the rest in the FIFO", || {
        let next = successor();
        let mut copy = got.clone();
        while inb(&next.devices, 0x3fd) & 1 == 1 {
            copy.push(inb(&next.devices, 0x3f8));
        }
        outb(&next.devices, 0x3f8, b'!');
        assert_eq!(*next.output.0.lock().unwrap(), b"!");
        copy == text
    });
}

#[test]
fn tells_the_time() {
    let l = legacy(None);
    let bcd = |v: u8| u64::from(v >> 4) * 10 + u64::from(v & 15);
    let read = |devices: &DeviceManager| {
        let [s, mi, h, d, mo, y, c] =
            [0u8, 2, 4, 7, 8, 9, 0x32].map(|register| bcd(cmos(devices, register)));
        (c * 100 + y, mo, d, h, mi, s)
    };
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let before = now();
    let got = read(&l.devices);
    let after = now();
    let possible: Vec<_> = (before..=after)
        .map(|t| {
            let c = Calendar::of(t);
            let n = u64::from;
            (
                c.year,
                n(c.month),
                n(c.day),
                n(c.hour),
                n(c.minute),
                n(c.second),
            )
        })
        .collect();
    assert!(possible.contains(&got), "{got:?} not in {possible:?}");
    assert_eq!(
        cmos(&l.devices, 0x0a) & 0x80,
        0,
        "an update that never ends"
    );
    assert_eq!(cmos(&l.devices, 0x0b), 2);
    assert_eq!(cmos(&l.devices, 0x0d), 0x80);
    // Binary and 12-hour modes.
    outb(&l.devices, 0x70, 0x0b);
    outb(&l.devices, 0x71, 4);
    let hour = cmos(&l.devices, 4);
    assert!((1..=12).contains(&(hour & 0x7f)), "{hour:#x}");
}

#[test]
fn knows_the_calendar() {
    let date = |t| {
        let c = Calendar::of(t);
        (
            c.year, c.month, c.day, c.weekday, c.hour, c.minute, c.second,
        )
    };
    // Checked against date(1).
    assert_eq!(date(0), (1970, 1, 1, 5, 0, 0, 0));
    assert_eq!(date(951_782_399), (2000, 2, 28, 2, 23, 59, 59));
    assert_eq!(date(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
    assert_eq!(date(951_868_800), (2000, 3, 1, 4, 0, 0, 0));
    assert_eq!(date(1_735_689_599), (2024, 12, 31, 3, 23, 59, 59));
    assert_eq!(date(4_107_542_400), (2100, 3, 1, 2, 0, 0, 0));
}

#[test]
fn the_clock_moves_with_the_machine() {
    let l = legacy(None);
    outb(&l.devices, 0x70, 0x55);
    outb(&l.devices, 0x71, 99);
    l.devices.pause();
    let states = l.devices.save().unwrap();
    let next = legacy(None);
    next.devices.pause();
    next.devices.restore(&states).unwrap();
    next.devices.resume();
    // The index too.
    assert_eq!(inb(&next.devices, 0x71), 99);
}

#[test]
fn resets() {
    let l = legacy(None);
    assert_eq!(inb(&l.devices, 0x64) & 2, 0);
    outb(&l.devices, 0x64, 0xd1);
    assert_eq!(l.resets.load(Ordering::SeqCst), 0);
    outb(&l.devices, 0x64, 0xfe);
    assert_eq!(l.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn the_bus_has_eight_places() {
    let disks = (0..9)
        .map(|_| -> Arc<dyn vmm::backend::BlockBackend> { TestDisk::new(512) })
        .collect();
    let spec = DeviceSpec {
        net: vec![],
        disks,
        rng: false,
        serial_out: Box::new(std::io::sink()),
        serial_in: None,
        on_reset: Box::new(|| {}),
    };
    let refused = DeviceManager::new(memory(), &Wires::default(), spec)
        .err()
        .unwrap();
    assert!(matches!(
        refused,
        DeviceError::TooMany { wanted: 9, room: 8 }
    ));
}

#[test]
fn ends_with_its_threads_even_if_a_disk_hangs() {
    let machine = Machine::new(TestDisk::new(4096));
    machine.disk.hang(true);
    let mut driver = machine.driver(crate::driver::BLK, 0);
    driver.offer_request(4, 0, &[]);
    driver.kick(0);
    eventually("the flush", || {
        machine.disk.begun.load(Ordering::SeqCst) == 1
    });
    machine.devices.pause();
    drop(driver);
    drop(machine);
}
