//! What a hostile or broken peer can send, against every decoder of this crate: cut off anywhere, any bit flipped,
//! random bytes, lengths that lie. Always an error or the same value; never a panic, never memory out of proportion.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use checkpoint::{
    DeviceState, DiskOp, DiskRecord, EncoderOptions, Encoding, Epoch, MachineState, PAGE_HEADER,
    PAGE_SIZE, Page, PageEncoder, RamRange, Stage, StageLimits, Tally, codec, disk_records,
    records,
};
use proptest::prelude::*;

/// The system's allocator, remembering each thread's largest request.
struct Watch;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // A thread that is ending has no cell any more; it is no test.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call is handed to the system's allocator as it came; noting the size allocates nothing.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note(new_size);
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static WATCH: Watch = Watch;

/// Largest single allocation that `work` makes, in bytes.
fn largest<T>(work: impl FnOnce() -> T) -> (usize, T) {
    LARGEST.set(0);
    let value = work();
    (LARGEST.get(), value)
}

fn noise(seed: u64) -> Page {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    std::array::from_fn(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    })
}

/// One record of each encoding, with the page it stands for; all against `noise(1)`.
fn each_encoding() -> Vec<(Encoding, Vec<u8>, Page)> {
    let old = noise(1);
    let mut touched = old;
    touched[72..80].fill(1);
    touched[4000] ^= 4;
    let text: Page = std::array::from_fn(|i| b"checkpoint of an epoch "[i % 23]);
    [
        (Encoding::Raw, noise(2)),
        (Encoding::Zero, [0; PAGE_SIZE]),
        (Encoding::Lz4, text),
        (Encoding::Delta, touched),
    ]
    .map(|(encoding, page)| {
        let mut out = Vec::new();
        PageEncoder::new(EncoderOptions { lz4: true }).encode(77, &page, Some(&old), &mut out);
        assert_eq!(out[10], encoding as u8, "the sample is of its kind");
        (encoding, out, page)
    })
    .into()
}

#[test]
fn a_page_record_cut_off_anywhere_is_an_error() {
    for (encoding, good, _) in each_encoding() {
        for cut in 1..good.len() {
            let first = records(&good[..cut]).next();
            assert!(matches!(first, Some(Err(_))), "{encoding:?} cut at {cut}");
        }
    }
}

#[test]
fn a_page_record_with_any_bit_flipped_is_an_error_or_the_same_page() {
    let old = noise(1);
    for (encoding, good, page) in each_encoding() {
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut out = [0xee; PAGE_SIZE];
            for record in records(&bad).take(1).flatten() {
                if record.decode(&old, &mut out).is_ok() {
                    assert_eq!(out, page, "{encoding:?}, bit {bit}");
                    // The frame number is not the page's checksum's to protect, but the digest's (see below).
                    assert!(bit < 64 || record.gfn == 77, "{encoding:?}, bit {bit}");
                }
            }
        }
    }
}

#[test]
fn runs_that_leave_the_page_or_contradict_their_length_are_errors() {
    let record = |payload: &[u8]| {
        let mut out = 0u64.to_le_bytes().to_vec();
        out.extend_from_slice(&(payload.len() as u16).to_le_bytes());
        out.extend_from_slice(&[Encoding::Delta as u8, 0, 0, 0, 0, 0]);
        out.extend_from_slice(payload);
        out
    };
    let many_skips: Vec<u8> = [0xff, 0xff, 0, 0].repeat(1024);
    for payload in [
        &[0xff, 0xff, 1, 0, 9][..],
        &[0xff, 0x0f, 2, 0, 9, 9],
        &[0, 0, 5, 0, 9],
        &[0, 0, 0xff, 0xff],
        &[0, 0, 1],
        &many_skips,
    ] {
        let bytes = record(payload);
        let parsed = records(&bytes).next().unwrap().unwrap();
        let mut out = [0; PAGE_SIZE];
        assert!(parsed.decode(&noise(1), &mut out).is_err(), "{payload:?}");
    }
}

fn machine() -> MachineState {
    MachineState {
        ram: vec![RamRange {
            start: 0,
            len: 1 << 30,
        }],
        vm: vec![1; 300],
        vcpus: vec![vec![2; 500], vec![3; 500]],
        devices: vec![DeviceState {
            name: "blk0".into(),
            version: 2,
            state: vec![4; 90],
        }],
    }
}

#[test]
fn a_machine_state_cut_off_or_flipped_anywhere_is_an_error() {
    let good = machine().encode().unwrap();
    for cut in 0..good.len() {
        assert!(MachineState::decode(&good[..cut]).is_err(), "cut at {cut}");
    }
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(MachineState::decode(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn lengths_that_lie_are_found_before_memory_is_claimed() {
    // Any eight bytes of the body as a huge length; the checksum is made to fit, as a hostile peer's would.
    let good = machine().encode().unwrap();
    for at in 16..good.len() - 8 {
        for lie in [u64::MAX, 1 << 62, 1 << 40, 1 << 26] {
            let mut bad = good.clone();
            bad[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            let crc = crc32c::crc32c(&bad[16..]);
            bad[12..16].copy_from_slice(&crc.to_le_bytes());
            let (most, _) = largest(|| MachineState::decode(&bad));
            assert!(most <= 2 << 20, "{most} bytes claimed for a lie at {at}");
        }
    }
}

fn disk_sample() -> Vec<u8> {
    let mut out = Vec::new();
    for (op, data) in [
        (DiskOp::Write, &[7; 600][..]),
        (DiskOp::Discard, &[]),
        (DiskOp::WriteZeroes, &[]),
    ] {
        let len = if op == DiskOp::Write { 600 } else { 4096 };
        DiskRecord {
            disk: 1,
            op,
            offset: 512,
            len,
            data,
        }
        .encode(&mut out);
    }
    out
}

#[test]
fn disk_records_cut_off_anywhere_are_an_error_or_the_whole_ones_before() {
    let good = disk_sample();
    let all: Vec<_> = disk_records(&good).map(Result::unwrap).collect();
    for cut in 0..good.len() {
        let got: Vec<_> = disk_records(&good[..cut]).collect();
        let whole = got.iter().filter(|r| r.is_ok()).count();
        for (got, want) in got.iter().flatten().zip(&all) {
            assert_eq!(got, want);
        }
        let at_a_border = [0, 624, 648].contains(&cut);
        assert_eq!(got.len() == whole, at_a_border, "cut at {cut}");
    }
}

#[test]
fn a_record_that_is_no_write_carries_no_data_whatever_it_is_given() {
    for op in [DiskOp::Discard, DiskOp::WriteZeroes] {
        let mut out = Vec::new();
        DiskRecord {
            disk: 0,
            op,
            offset: 0,
            len: 512,
            data: &[1; 512],
        }
        .encode(&mut out);
        let got: Vec<_> = disk_records(&out).collect::<Result<_, _>>().unwrap();
        assert_eq!(got.len(), 1);
        assert_eq!((got[0].op, got[0].len, got[0].data), (op, 512, &[][..]));
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Pages,
    Disk,
    Machine,
}

/// One checkpoint's payloads in order, and what their sender says of them.
fn checkpoint() -> (Vec<(Part, Vec<u8>)>, Tally) {
    let mut parts: Vec<_> = each_encoding()
        .into_iter()
        .map(|(_, bytes, _)| (Part::Pages, bytes))
        .collect();
    parts.insert(2, (Part::Disk, disk_sample()));
    parts.push((Part::Machine, machine().encode().unwrap()));
    let mut tally = Tally::default();
    for (part, bytes) in &parts {
        let (pages, disk) = match part {
            Part::Pages => (1, 0),
            Part::Disk => (0, 3),
            Part::Machine => (0, 0),
        };
        tally.add(bytes, pages, disk);
    }
    (parts, tally)
}

/// Stages `parts`, going on after errors as a careless caller would; whether they pass for a whole checkpoint.
fn passes(parts: &[(Part, Vec<u8>)], sent: &Tally, limits: StageLimits) -> bool {
    let mut stage = Stage::new(Epoch(9), limits);
    for (part, bytes) in parts {
        let _ = match part {
            Part::Pages => stage.add_pages(bytes.clone()),
            Part::Disk => stage.add_disk(bytes.clone()),
            Part::Machine => stage.add_machine(bytes),
        };
    }
    stage.finish(&sent.end()).is_ok()
}

const ROOMY: StageLimits = StageLimits {
    pages: 1 << 20,
    disk: 1 << 20,
};

#[test]
fn i3_no_bit_of_a_checkpoint_can_change_on_the_way() {
    let (parts, sent) = checkpoint();
    assert!(passes(&parts, &sent, ROOMY));
    for part in 0..parts.len() {
        for bit in 0..parts[part].1.len() * 8 {
            let mut bad = parts.clone();
            bad[part].1[bit / 8] ^= 1 << (bit % 8);
            assert!(!passes(&bad, &sent, ROOMY), "part {part}, bit {bit}");
        }
    }
}

#[test]
fn i3_no_part_can_be_missing_doubled_or_out_of_order() {
    let (parts, sent) = checkpoint();
    for i in 0..parts.len() {
        let mut missing = parts.clone();
        missing.remove(i);
        assert!(!passes(&missing, &sent, ROOMY), "without part {i}");
        let mut doubled = parts.clone();
        doubled.insert(i, parts[i].clone());
        assert!(!passes(&doubled, &sent, ROOMY), "part {i} twice");
        if i > 0 {
            let mut swapped = parts.clone();
            swapped.swap(i - 1, i);
            assert!(!passes(&swapped, &sent, ROOMY), "part {i} too early");
        }
    }
}

#[test]
fn i3_what_was_refused_for_its_size_is_not_counted_as_arrived() {
    let (parts, sent) = checkpoint();
    for limits in [
        StageLimits {
            pages: 100,
            ..ROOMY
        },
        StageLimits { disk: 100, ..ROOMY },
    ] {
        assert!(!passes(&parts, &sent, limits));
    }
}

#[test]
fn payloads_of_no_bytes_take_no_memory() {
    let mut stage = Stage::new(Epoch(1), ROOMY);
    let (most, ()) = largest(|| {
        for _ in 0..10_000 {
            stage.add_pages(Vec::new()).unwrap();
            stage.add_disk(Vec::new()).unwrap();
        }
    });
    assert!(most < 1024, "{most} bytes for nothing");
}

proptest! {
    #[test]
    fn random_bytes_are_taken_by_no_decoder_for_more_than_they_are(
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        let (most, ()) = largest(|| {
            let mut out = [0; PAGE_SIZE];
            for record in records(&bytes).flatten() {
                let _ = record.decode(&[0; PAGE_SIZE], &mut out);
            }
            for record in disk_records(&bytes) {
                let _ = record;
            }
            let _ = MachineState::decode(&bytes);
            let _ = codec::from_bytes::<MachineState>(&bytes, 1 << 20);
        });
        prop_assert!(most <= 2 << 20, "{} bytes claimed", most);
    }

    #[test]
    fn well_formed_headers_around_random_payloads_are_errors_or_pages(
        payload in proptest::collection::vec(any::<u8>(), 1..4097),
        encoding in 2u8..4,
    ) {
        let mut bytes = vec![0; PAGE_HEADER];
        bytes[8..10].copy_from_slice(&(payload.len() as u16).to_le_bytes());
        bytes[10] = encoding;
        bytes.extend_from_slice(&payload);
        let record = records(&bytes).next().unwrap().unwrap();
        let mut out = [0; PAGE_SIZE];
        // The checksum in the header is 0; a page of that checksum would be a find.
        prop_assert!(record.decode(&noise(1), &mut out).is_err());
    }
}
