//! Block requests, good and bad.

use vmm::backend::BlockBackend;
use vmm::devices::block::file::{FileDisk, ImageError};
use vmm::devices::mmio::reg;

use crate::driver::*;
use crate::stand_ins::{Asked, TestDisk};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn setup(features: u64) -> (Machine, Driver) {
    let machine = Machine::new(TestDisk::new(1 << 20));
    let driver = machine.driver(BLK, features);
    (machine, driver)
}

#[test]
fn what_is_written_is_read_back() {
    for features in [0, EVENT_IDX] {
        let (machine, mut driver) = setup(features);
        let data: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
        let from = driver.buffer(&data);
        let to = driver.buffer(&[0; 4096]);
        assert_eq!(driver.request(OUT, 8, &[out(from, 4096)]), OK);
        assert_eq!(machine.disk.bytes.lock().unwrap()[4096..8192], data);
        clean(&machine.mem);
        assert_eq!(driver.request(IN, 8, &[into(to, 4096)]), OK);
        assert_eq!(driver.bytes(to, 4096), data);
        // The device's own writes are in the bitmap: data and used ring.
        assert!(is_dirty(&machine.mem, to));
        assert!(is_dirty(&machine.mem, driver.used(0)));
        assert!(!is_dirty(&machine.mem, to + 4096));
    }
}

#[test]
fn data_in_many_pieces_some_empty_across_the_hole() {
    let (machine, mut driver) = setup(0);
    let data: Vec<u8> = (0..1024u32).map(|i| (i / 3) as u8).collect();
    let low = driver.buffer(&data[..100]);
    driver.mem_write(HIGH + 1, &data[100..]);
    let parts = [
        out(low, 100),
        out(0xffff_ffff_ffff_f000, 0),
        out(HIGH + 1, 924),
    ];
    assert_eq!(driver.request(OUT, 0, &parts), OK);
    assert_eq!(machine.disk.bytes.lock().unwrap()[..1024], data);
    let a = driver.buffer(&[0; 700]);
    assert_eq!(
        driver.request(IN, 0, &[into(a, 700), into(HIGH + 5000, 324)]),
        OK
    );
    assert_eq!(driver.bytes(a, 700), data[..700]);
    assert_eq!(driver.bytes(HIGH + 5000, 324), data[700..]);
}

#[test]
fn a_read_says_how_much_was_written() {
    let (_machine, mut driver) = setup(0);
    let to = driver.buffer(&[0; 512]);
    driver.offer_request(IN, 0, &[into(to, 512)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 513);
    driver.offer_request(FLUSH, 0, &[]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 1);
}

#[test]
fn many_requests_run_in_order_and_a_flush_follows_the_writes() {
    let (machine, mut driver) = setup(EVENT_IDX);
    let data = driver.buffer(&[1; 512]);
    for sector in 0..4 {
        driver.offer_request(OUT, sector, &[out(data, 512)]);
    }
    driver.offer_request(FLUSH, 0, &[]);
    driver.kick(0);
    for _ in 0..5 {
        driver.wait_used(0);
    }
    let mut expected: Vec<_> = (0..4).map(|s| Asked::Write(s * 512, 512)).collect();
    expected.push(Asked::Flush);
    assert_eq!(machine.disk.asked(), expected);
}

#[test]
fn the_ring_wraps() {
    for features in [0, EVENT_IDX] {
        let (machine, mut driver) = setup(features);
        let data = driver.buffer(&[3; 512]);
        for sector in 0..200 {
            assert_eq!(driver.request(OUT, sector, &[out(data, 512)]), OK);
        }
        assert_eq!(machine.disk.asked().len(), 200);
    }
}

#[test]
fn tells_its_id() {
    let (_machine, mut driver) = setup(0);
    let to = driver.buffer(&[0xff; 32]);
    assert_eq!(driver.request(GET_ID, 0, &[into(to, 20)]), OK);
    assert_eq!(driver.bytes(to, 21)[..20], *b"a-disk-of-the-tests\0");
    // A shorter buffer gets a shorter answer, a longer one keeps its end.
    assert_eq!(driver.request(GET_ID, 0, &[into(to + 20, 4)]), OK);
    assert_eq!(driver.bytes(to + 20, 5), *b"a-di\xff");
    assert_eq!(driver.request(GET_ID, 0, &[into(to, 32)]), OK);
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn discards_and_zeroes_ranges() {
    let (machine, mut driver) = setup(0);
    let two = driver.buffer(&[range(2, 2, 0), range(8, 1, 0)].concat());
    assert_eq!(driver.request(DISCARD, 0, &[out(two, 32)]), OK);
    let unmap = driver.buffer(&range(4, 4, 1));
    assert_eq!(driver.request(WRITE_ZEROES, 0, &[out(unmap, 16)]), OK);
    assert_eq!(
        machine.disk.asked(),
        [
            Asked::Discard(1024, 1024),
            Asked::Discard(4096, 512),
            Asked::WriteZeroes(2048, 2048)
        ]
    );
    let cases = [
        (DISCARD, range(0, 1, 1), UNSUPP),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPP),
        (DISCARD, range(2048, 1, 0), IOERR),
        (DISCARD, range(u64::MAX, 1, 0), IOERR),
        (WRITE_ZEROES, range(0, u32::MAX, 0), IOERR),
        (DISCARD, range(0, 0, 0), IOERR),
        (DISCARD, vec![0; 15], IOERR),
        (DISCARD, vec![], IOERR),
        (DISCARD, range(0, 1, 0).repeat(17), IOERR),
    ];
    for (kind, bytes, status) in cases {
        let at = driver.buffer(&bytes);
        assert_eq!(
            driver.request(kind, 0, &[out(at, bytes.len() as u32)]),
            status,
            "{bytes:?}"
        );
    }
    assert_eq!(
        machine.disk.asked().len(),
        3,
        "a bad range reached the disk"
    );
}

#[test]
fn bad_requests_are_refused_and_the_device_lives_on() {
    let (machine, mut driver) = setup(0);
    let page = driver.buffer(&[0; 4096]);
    let cases: &[(u32, u64, Vec<Part>, u8)] = &[
        (77, 0, vec![], UNSUPP),
        (u32::MAX, 0, vec![out(page, 512)], UNSUPP),
        (IN, 2048, vec![into(page, 512)], IOERR),
        (IN, 2047, vec![into(page, 1024)], IOERR),
        (OUT, u64::MAX, vec![out(page, 512)], IOERR),
        (OUT, u64::MAX / 512, vec![out(page, 512)], IOERR),
        (OUT, 0, vec![out(page, 511)], IOERR),
        (IN, 0, vec![into(page, 513)], IOERR),
        (IN, 0, vec![], IOERR),
        (OUT, 0, vec![], IOERR),
        // Data in the wrong direction is no data at all.
        (IN, 0, vec![out(page, 512)], IOERR),
        (OUT, 0, vec![into(page, 512)], IOERR),
        // More than the limits offered: 9 MiB, all in memory.
        (
            IN,
            0,
            vec![into(0, RAM_LOW as u32), into(HIGH, 1 << 20)],
            IOERR,
        ),
    ];
    for (kind, sector, parts, status) in cases {
        assert_eq!(
            driver.request(*kind, *sector, parts),
            *status,
            "{kind} {sector} {parts:?}"
        );
    }
    assert!(machine.disk.asked().is_empty());
    assert_eq!(driver.request(IN, 2047, &[into(page, 512)]), OK);
}

#[test]
fn a_header_cut_short_is_refused() {
    let (_machine, mut driver) = setup(0);
    let (header, status) = (driver.buffer(&[0; 16]), driver.buffer(&[0xaa]));
    driver.offer(0, &[out(header, 15), into(status, 1)]);
    driver.kick(0);
    driver.wait_used(0);
    assert_eq!(driver.bytes(status, 1), [IOERR]);
}

#[test]
fn a_failing_disk_is_an_io_error() {
    struct Failing;
    impl BlockBackend for Failing {
        fn size(&self) -> u64 {
            4096
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Err(std::io::Error::other("a bad sector"))
        }
        fn write_at(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            Err(std::io::Error::other("a bad sector"))
        }
        fn flush(&self) -> std::io::Result<()> {
            Err(std::io::Error::other("a bad disk"))
        }
        fn discard(&self, _: u64, _: u64) -> std::io::Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64) -> std::io::Result<()> {
            Ok(())
        }
        fn id(&self) -> [u8; 20] {
            [0; 20]
        }
    }
    let mut job_runner = crate::hostile::Bare::block(std::sync::Arc::new(Failing));
    for (kind, write) in [(IN, true), (OUT, false), (FLUSH, false)] {
        let data = if kind == FLUSH { 0 } else { 512 };
        assert_eq!(job_runner.request(kind, data, write), IOERR);
    }
}

/// Malformed chains that leave nowhere to put a status: the device asks for a reset, and is good again after one.
#[test]
fn broken_chains_need_a_reset() {
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 8] = [
        ("no status", |d| {
            let header = d.header(IN, 0);
            d.offer(0, &[header]);
        }),
        ("a status of no bytes", |d| {
            let header = d.header(IN, 0);
            d.offer(0, &[header, into(0x1000, 0)]);
        }),
        ("a loop", |d| {
            let header = d.header(IN, 0);
            d.write_desc(0, 0, header, 1, 1);
            d.write_desc(0, 1, into(0x1000, 512), 1, 1);
            d.offer_head(0, 0);
        }),
        ("a head beyond the table", |d| d.offer_head(0, SIZE)),
        ("a next beyond the table", |d| {
            let header = d.header(IN, 0);
            d.write_desc(0, 0, header, 1, 500);
            d.offer_head(0, 0);
        }),
        ("readable after writable", |d| {
            let header = d.header(IN, 0);
            d.offer(
                0,
                &[header, into(0x1000, 512), out(0x2000, 16), into(0x3000, 1)],
            );
        }),
        // A good flush but for the flag.
        ("an indirect table", |d| {
            let header = d.header(FLUSH, 0);
            d.write_desc(0, 0, header, 1 | 4, 1);
            d.write_desc(0, 1, into(0x3000, 1), 0, 0);
            d.offer_head(0, 0);
        }),
        ("data in the hole", |d| {
            let header = d.header(IN, 0);
            d.offer(0, &[header, into(RAM_LOW - 256, 512), into(0x3000, 1)]);
        }),
    ];
    for (name, break_it) in breaks {
        let (machine, mut driver) = setup(0);
        break_it(&mut driver);
        driver.kick(0);
        driver.wait_needs_reset();
        assert_eq!(driver.get(reg::INTERRUPT_STATUS) & 2, 2, "{name}: not told");
        assert!(machine.disk.asked().is_empty(), "{name}");
        // Dead until reset.
        let mut late = driver.clone();
        late.offer_request(FLUSH, 0, &[]);
        late.kick(0);
        machine.devices.pause();
        assert_eq!(late.used_idx(0), 0, "{name}");
        machine.devices.resume();
        for ring in [driver.avail(0), driver.used(0)] {
            driver.mem_write(ring, &[0; 256]);
        }
        let mut driver = machine.driver(BLK, 0);
        assert_eq!(driver.request(FLUSH, 0, &[]), OK, "{name}");
    }
}

#[test]
fn an_available_index_that_ran_ahead_needs_a_reset() {
    let (_machine, driver) = setup(0);
    driver.set_avail_idx(0, SIZE + 1);
    driver.kick(0);
    driver.wait_needs_reset();
}

#[test]
fn a_reset_forgets_a_request_that_is_still_running() {
    let (machine, mut driver) = setup(0);
    machine.disk.hang(true);
    let page = HIGH + 0x10000;
    driver.mem_write(page, &[0x55; 512]);
    driver.offer_request(IN, 0, &[into(page, 512)]);
    driver.kick(0);
    eventually("the read", || {
        machine.disk.begun.load(std::sync::atomic::Ordering::SeqCst) == 1
    });
    driver.set(reg::STATUS, 0);
    driver.mem_write(driver.avail(0), &[0; 256]);
    let mut again = machine.driver(BLK, 0);
    machine.disk.hang(false);
    assert_eq!(again.request(FLUSH, 0, &[]), OK);
    assert_eq!(again.used_idx(0), 1, "the forgotten read was returned");
    assert!(
        driver.bytes(page, 512) == [0x55; 512],
        "the forgotten read was written"
    );
}

#[test]
fn image_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let refused = |bytes: usize| {
        std::fs::write(&path, vec![7; bytes]).unwrap();
        FileDisk::open(&path).unwrap_err()
    };
    let odd = refused(1000);
    assert!(matches!(
        odd,
        ImageError::OddSize {
            size: 1000,
            up: 1024,
            ..
        }
    ));
    assert!(odd.to_string().contains("truncate -s 1024"), "{odd}");
    assert!(matches!(refused(0), ImageError::Empty { .. }));
    let missing = FileDisk::open(dir.path().join("none")).unwrap_err();
    assert!(missing.to_string().contains("none"), "{missing}");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let disk = FileDisk::open(&path).unwrap();
    assert_eq!(disk.size(), 8192);
    assert_eq!(&disk.id()[..9], b"disk.img\0");
    disk.write_at(512, &[9; 512]).unwrap();
    disk.write_zeroes(1024, 4096).unwrap();
    disk.discard(0, 512).unwrap();
    disk.flush().unwrap();
    let mut back = vec![0; 1536];
    disk.read_at(512, &mut back).unwrap();
    assert_eq!(back[..512], [9; 512]);
    assert_eq!(back[512..], [0; 1024]);
    let mut end = [1; 512];
    disk.read_at(7680, &mut end).unwrap();
    assert_eq!(end, [7; 512]);
    for bad in [8192, 7681, u64::MAX] {
        assert!(disk.read_at(bad, &mut end).is_err());
        assert!(disk.write_at(bad, &end).is_err());
        assert!(disk.discard(bad, 512).is_err());
        assert!(disk.write_zeroes(bad, 512).is_err());
    }
}
