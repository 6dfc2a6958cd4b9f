//! Crashes at every operation of a replica's life, and of its recovery, and of the life after that.

use diskbuf::faulty::{Crash, MemDisk, Rng};

use super::model::{Told, open, options};
use crate::store::ReplicaStore;
use crate::store::StoreError;
use crate::store::log::Mutants;

/// A full checkpoint, incremental ones, another full one, more incremental ones.
fn life(
    told: &mut Told,
    disk: &MemDisk,
    mutants: Mutants,
    rng: &mut Rng,
) -> Result<(), StoreError> {
    let mut store = open(disk, options(mutants), true)?;
    for n in 0..22 {
        told.checkpoint(&mut store, rng, n == 0 || n == 14)?;
    }
    Ok(())
}

/// Crash at operation `at`, perhaps another while recovering, and a third in a second life. Whether the first life ended.
fn crash_once(mutants: Mutants, at: u64, seed: u64) -> Result<bool, String> {
    let how = match seed % 4 {
        0 => Crash::LoseAll,
        1 => Crash::KeepAll,
        _ => Crash::Any,
    };
    let (disk, mut told) = (MemDisk::default(), Told::new());
    disk.crash_at(at);
    let ended = life(&mut told, &disk, mutants, &mut Rng(99)).is_ok();
    let mut rng = Rng(at << 16 | seed);
    // Either the host dies, or only the program, and what was not synced still can be lost later.
    let mut disk = match seed / 4 % 2 {
        0 => disk.after(how, &mut rng),
        _ => disk.killed(),
    };
    if seed.is_multiple_of(2) {
        disk.crash_at(disk.ops() + 1 + rng.below(40));
        let _ = open(&disk, options(mutants), false);
        disk = disk.after(how, &mut rng);
    }
    let recovered = |disk: &MemDisk, told: &Told| {
        let mut store =
            open(disk, options(mutants), false).map_err(|e| format!("recovery failed: {e}"))?;
        told.check(&mut store)?;
        Ok::<_, String>(store)
    };
    let mut store = recovered(&disk, &told)?;
    told.resume(store.holds());
    disk.crash_at(disk.ops() + 1 + rng.below(150));
    for _ in 0..9 {
        let full = told.promised.is_none();
        if told.checkpoint(&mut store, &mut rng, full).is_err() {
            break;
        }
    }
    drop(store);
    let disk = disk.after(how, &mut rng);
    recovered(&disk, &told).map_err(|e| format!("second life: {e}"))?;
    Ok(ended)
}

/// All crash points, each with some of the seeds, others each time (all of them with `STORE_SEEDS=all`); the complaints.
fn sweep(mutants: Mutants, seeds: &[u64], some: usize, enough: usize) -> Vec<String> {
    let some = match std::env::var("STORE_SEEDS") {
        Ok(_) => seeds.len(),
        Err(_) => some,
    };
    let mut complaints = Vec::new();
    for at in 1.. {
        let mut ended = true;
        for n in 0..some {
            let seed = seeds[(at as usize * some + n) % seeds.len()];
            match crash_once(mutants, at, seed) {
                Ok(e) => ended &= e,
                Err(e) => {
                    ended = false;
                    complaints.push(format!("crash at operation {at}, seed {seed}: {e}"));
                }
            }
        }
        assert!(at < 5000, "the life must end");
        if ended || complaints.len() >= enough {
            assert!(at > 400 || !complaints.is_empty(), "only {at} crash points");
            println!("{at} crash points");
            break;
        }
    }
    complaints
}

fn clean(seeds: &[u64]) {
    let complaints = sweep(Mutants::default(), seeds, 1, 10);
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn i3_i5_i6_the_host_dies_at_any_operation() {
    clean(&[0, 1, 2, 3]);
}

#[test]
fn i3_i5_i6_the_program_dies_at_any_operation_and_then_the_host() {
    clean(&[4, 5, 6, 7]);
}

fn caught(mutants: Mutants, by: &[&str]) {
    let complaints = sweep(mutants, &[0, 2, 3, 6, 7], 5, 1);
    assert!(
        complaints
            .iter()
            .any(|c| by.iter().any(|by| c.contains(by))),
        "{complaints:#?}"
    );
}

#[test]
fn without_the_sync_of_a_checkpoint_the_judge_complains() {
    let mutants = Mutants {
        no_sync: true,
        ..Mutants::default()
    };
    caught(
        mutants,
        &["was promised", "mirrors are at checkpoint", "is damaged"],
    );
}

#[test]
fn without_looking_at_checksums_the_judge_complains() {
    let mutants = Mutants {
        no_crc: true,
        ..Mutants::default()
    };
    caught(mutants, &["is wrong", "recovery failed"]);
}

#[test]
fn without_the_sync_of_the_directory_the_judge_complains() {
    let mutants = Mutants {
        no_dir_sync: true,
        ..Mutants::default()
    };
    caught(
        mutants,
        &["was promised", "is missing", "mirrors are at checkpoint"],
    );
}

#[test]
fn without_the_fold_journal_the_judge_complains() {
    let mutants = Mutants {
        no_journal: true,
        ..Mutants::default()
    };
    caught(mutants, &["is wrong", "checksum"]);
}

#[test]
fn if_a_torn_checkpoint_is_taken_for_whole_the_judge_complains() {
    let mutants = Mutants {
        torn_is_whole: true,
        ..Mutants::default()
    };
    caught(mutants, &["is wrong", "recovery failed", "never was"]);
}
