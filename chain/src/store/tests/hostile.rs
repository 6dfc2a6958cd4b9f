//! Damaged, cut, mixed and made-up files: never a panic, never a wrong answer; an error or a complete checkpoint.

use std::path::{Path, PathBuf};

use diskbuf::faulty::{Crash, MemDisk, Rng};
use proptest::prelude::*;

use super::model::{DIR, Told, open, options};
use crate::store::ReplicaStore;
use crate::store::StoreError;
use crate::store::log::{LogError, Mutants};

/// A disk with a log of several segments, a base image that has been folded into, and what it is to hold.
fn sample() -> (MemDisk, Told) {
    sample_of(16)
}

fn sample_of(checkpoints: usize) -> (MemDisk, Told) {
    let (disk, mut told) = (MemDisk::default(), Told::new());
    let mut store = open(&disk, options(Mutants::default()), true).unwrap();
    let mut rng = Rng(5);
    for n in 0..checkpoints {
        told.checkpoint(&mut store, &mut rng, n == 0).unwrap();
    }
    drop(store);
    (disk, told)
}

fn files(disk: &MemDisk) -> Vec<PathBuf> {
    let log = Path::new(DIR).join("log");
    let all = disk.paths().into_iter();
    all.filter(|p| p.parent() == Some(&log)).collect()
}

fn segments(disk: &MemDisk) -> Vec<PathBuf> {
    let log = |p: &PathBuf| p.extension().is_some_and(|e| e == "log");
    files(disk).into_iter().filter(log).collect()
}

/// Opens; `Ok(true)`: an error, said clearly. `Ok(false)`: at a complete checkpoint, all that is retained right.
fn judge(disk: &MemDisk, told: &Told) -> Result<bool, String> {
    match open(disk, options(Mutants::default()), false) {
        Err(e) => {
            assert!(e.damages(), "{e}");
            Ok(true)
        }
        Ok(mut store) => told.check(&mut store).map(|()| false),
    }
}

#[test]
fn i7_a_flipped_bit_anywhere_is_found_or_of_no_account() {
    let (disk, told) = sample();
    assert!(segments(&disk).len() >= 4, "{:?}", files(&disk));
    let mut rng = Rng(1);
    let (mut found, mut tried) = (0, 0);
    for path in files(&disk) {
        let len = disk.content(&path).len();
        for at in 0..len {
            // Headers densely, payloads here and there.
            if at % 4096 >= 96 && rng.below(97) != 0 {
                continue;
            }
            let bad = disk.with(&path, |bytes| bytes[at] ^= 1 << rng.below(8));
            tried += 1;
            match judge(&bad, &told) {
                Ok(damaged) => found += usize::from(damaged),
                Err(e) => panic!("{} byte {at}: {e}", path.display()),
            }
        }
    }
    println!("{tried} flips, {found} reported");
    assert!(found > 500, "{found} of {tried}");
}

/// Where nothing newer has overwritten it yet.
#[test]
fn i7_a_flipped_bit_in_the_base_image_is_found() {
    let (disk, told) = sample_of(2);
    let path = Path::new(DIR).join("log").join("base.img");
    let len = disk.content(&path).len();
    let mut found = 0;
    for at in (0..len).step_by(13) {
        let bad = disk.with(&path, |bytes| bytes[at] ^= 1 << (at % 8));
        match judge(&bad, &told) {
            Ok(true) => found += 1,
            // A page's entry has bits that mean nothing, but they are looked at too.
            Ok(false) => panic!("byte {at} is of no account?"),
            Err(e) => panic!("byte {at}: {e}"),
        }
    }
    assert!(found > 4000, "{found}");
}

/// What was durable and is not there any more is an error. Only when the newest checkpoint is lost together with all
/// that vouches for it, it looks like one that never was completed; the mirrors, if it wrote to disks, still tell.
#[test]
fn a_file_cut_at_any_length_is_found_or_recovered_from() {
    let (disk, mut told) = sample();
    let last = segments(&disk).pop().unwrap();
    let mut older = 0;
    for path in files(&disk) {
        let len = disk.content(&path).len();
        let step = (len / 300).max(1);
        for cut in (0..len).step_by(step) {
            let bad = disk.with(&path, |bytes| bytes.truncate(cut));
            let promised = told.promised;
            if path == last {
                told.promised = None;
            }
            match judge(&bad, &told) {
                Ok(damaged) => older += usize::from(!damaged),
                Err(e) => panic!("{} cut to {cut}: {e}", path.display()),
            }
            told.promised = promised;
        }
    }
    assert!(older > 0);
}

#[test]
fn i7_a_missing_file_is_damage() {
    let (disk, _) = sample();
    let segments = segments(&disk);
    for (n, path) in files(&disk).into_iter().enumerate() {
        let needed = !path.ends_with("fold");
        if !needed || segments.last() == Some(&path) {
            continue;
        }
        let bad = disk.with(&path, |_| ());
        bad.lose(&path);
        let error = open(&bad, options(Mutants::default()), false).err();
        assert!(
            matches!(error, Some(StoreError::Log(LogError::Damaged { .. }))),
            "file {n}: {error:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    /// Several things at once: bits flipped, bytes cut off or put in anywhere, in any of the files.
    #[test]
    fn any_damage_is_an_error_or_a_complete_checkpoint(
        harm in proptest::collection::vec((any::<u16>(), any::<u32>(), 0u8..4, any::<u8>()), 1..5),
    ) {
        let (mut disk, mut told) = SAMPLE.with(|(disk, told)| {
            (disk.killed(), Told { history: told.history.clone(), ..Told::new() })
        });
        for (file, at, what, value) in harm {
            let files = files(&disk);
            let path = &files[usize::from(file) % files.len()];
            disk = disk.with(path, |bytes| {
                let at = at as usize % bytes.len().max(1);
                match what {
                    _ if bytes.is_empty() => {}
                    0 => bytes[at] ^= value | 1,
                    1 => bytes.truncate(at),
                    2 => drop(bytes.splice(at..at, [value; 64])),
                    _ => drop(bytes.drain(at..(at + 64).min(bytes.len()))),
                }
            });
        }
        // What was promised is judged where one thing is harmed at a time.
        told.filling = true;
        if let Err(e) = judge(&disk, &told) {
            return Err(TestCaseError::fail(e));
        }
    }
}

thread_local! {
    static SAMPLE: (MemDisk, Told) = sample();
}

#[test]
fn nonsense_in_any_file_is_an_error_and_no_panic() {
    let (disk, mut told) = sample();
    let last = segments(&disk).pop().unwrap();
    let promised = told.promised;
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let files = files(&disk);
        let path = &files[rng.below(files.len() as u64) as usize];
        let other = disk.content(&files[rng.below(files.len() as u64) as usize]);
        let bad = disk.with(path, |bytes| match rng.below(4) {
            // Another file's content.
            0 => *bytes = other,
            // Noise.
            1 => {
                let len = rng.below(40_000);
                *bytes = (0..len).map(|_| rng.draw() as u8).collect();
            }
            // A piece moved, overlapping.
            2 if bytes.len() > 1024 => {
                let from = rng.below(bytes.len() as u64 - 512) as usize / 64 * 64;
                let to = rng.below(bytes.len() as u64 - 512) as usize / 64 * 64;
                bytes.copy_within(from..from + 512, to);
            }
            // Grown.
            _ => bytes.extend((0..rng.below(9000)).map(|_| rng.draw() as u8)),
        });
        // As when it is cut: see above.
        told.promised = promised.filter(|_| *path != last);
        if let Err(e) = judge(&bad, &told) {
            panic!("seed {seed}, {}: {e}", path.display());
        }
    }
}

/// Numbers with a good checksum that no writer ever wrote.
#[test]
fn sealed_nonsense_is_an_error_and_no_panic() {
    let (disk, told) = sample();
    let reseal = |bytes: &mut [u8], from: usize, size: usize| {
        let crc = crc32c::crc32c(&bytes[from..from + size - 4]);
        bytes[from + size - 4..from + size].copy_from_slice(&crc.to_le_bytes());
    };
    let values = [
        0,
        1,
        63,
        u64::MAX,
        1 << 62,
        (1 << 62) + 1,
        u64::from(u32::MAX),
    ];
    let mut tried = 0;
    for path in files(&disk) {
        let content = disk.content(&path);
        let (size, places): (usize, Vec<usize>) = match path.file_name().unwrap().to_str() {
            Some("manifest") => (128, vec![0, 2048, 4096, 6144]),
            Some("fold") => (64, vec![0]),
            Some("base.img") => continue,
            _ => {
                let frame = |at: &usize| content[*at..].starts_with(b"ULOG") || *at == 0;
                (64, (0..content.len()).step_by(64).filter(frame).collect())
            }
        };
        for at in places {
            if at + size > content.len() {
                continue;
            }
            for field in (4..size - 4).step_by(4) {
                let value: u64 = values[(tried % values.len() as u64) as usize];
                tried += 1;
                let bad = disk.with(&path, |bytes| {
                    let n = 8.min(size - 4 - field);
                    bytes[at + field..at + field + n].copy_from_slice(&value.to_le_bytes()[..n]);
                    reseal(bytes, at, size);
                });
                // A forged manifest may say anything, for example that there is nothing.
                let mut told_less = Told::new();
                told_less.history = told.history.clone();
                if let Err(e) = judge(&bad, &told_less) {
                    assert!(
                        e.contains("damaged"),
                        "{} {at}+{field}: {e}",
                        path.display()
                    );
                }
            }
        }
    }
    assert!(tried > 1000, "{tried}");
}

#[test]
fn a_replica_that_found_damage_is_filled_anew() {
    let (disk, _) = sample();
    for path in files(&disk) {
        let bad = disk.with(&path, |bytes| {
            let len = bytes.len();
            bytes.iter_mut().step_by(3).for_each(|b| *b ^= 0x55);
            bytes.truncate(len - 1);
        });
        let mut store = open(&bad, options(Mutants::default()), true).unwrap();
        assert_eq!(store.holds(), None);
        let mut told = Told::new();
        // An owner of a newer generation than the one that filled it before.
        for n in 0..8 {
            told.checkpoint(&mut store, &mut Rng(n), n == 0).unwrap();
        }
        drop(store);
        let disk = bad.after(Crash::LoseAll, &mut Rng(0));
        assert_eq!(judge(&disk, &told), Ok(false), "{}", path.display());
    }
}

/// After a failed sync nothing is believed: not by the store, which takes nothing any more, and not by the next program.
#[test]
fn i7_a_failed_sync_is_final_and_nothing_it_left_in_the_cache_is_relied_on() {
    for nth in 1..=14 {
        for seed in 0..12 {
            let (disk, mut told) = (MemDisk::default(), Told::new());
            let mut store = open(&disk, options(Mutants::default()), true).unwrap();
            let mut rng = Rng(seed);
            for n in 0..6 {
                told.checkpoint(&mut store, &mut rng, n == 0).unwrap();
            }
            disk.fail_sync(nth);
            let failed = (0..12).find_map(|_| told.checkpoint(&mut store, &mut rng, false).err());
            let failed = failed.expect("the failure is reported");
            assert!(failed.damages(), "{failed}");
            let again = told.checkpoint(&mut store, &mut Rng(1), false);
            assert!(again.is_err());
            drop(store);
            // The program restarts on what the cache shows; then the host dies, anywhere in the recovery or after it.
            let found = {
                disk.crash_at(disk.ops() + rng.below(60));
                open(&disk, options(Mutants::default()), false)
                    .ok()
                    .and_then(|store| store.holds())
            };
            let how = match seed % 3 {
                0 => Crash::LoseAll,
                _ => Crash::Any,
            };
            let after = disk.after(how, &mut rng);
            match open(&after, options(Mutants::default()), false) {
                Ok(mut store) => {
                    told.check(&mut store)
                        .unwrap_or_else(|e| panic!("sync {nth}, seed {seed}: {e}"));
                    assert!(
                        store.holds() >= found,
                        "sync {nth} ({failed}), seed {seed}: {found:?} then {:?}",
                        store.holds()
                    );
                }
                Err(e) => panic!("sync {nth}, seed {seed}: {e}"),
            }
        }
    }
}
