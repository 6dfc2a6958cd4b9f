//! What is retained, and what it costs.

use diskbuf::faulty::{MemDisk, Rng};

use super::model::{Out, Told, VM, Vm, open, options, shape};
use crate::store::log::{Mutants, Options};
use crate::store::{
    DurableStore, MemoryStore, ReplicaStore, Retention, StoreError, StoreOptions, create,
};

fn marks(told: &Told, newest: usize) -> Vec<crate::Mark> {
    let all = told.history.iter().map(|vm| vm.mark);
    let skip = told.history.len().saturating_sub(newest);
    all.skip(skip).collect()
}

#[test]
fn the_last_k_checkpoints_can_be_asked_for_and_the_log_is_bounded() {
    for (checkpoints, bytes) in [
        (1, 1 << 30),
        (3, 1 << 30),
        (7, 1 << 30),
        (usize::MAX, 50 << 10),
    ] {
        let disk = MemDisk::default();
        let options = Options {
            retention: Retention { checkpoints, bytes },
            fold_pages: 1000,
            ..options(Mutants::default())
        };
        let mut store = open(&disk, options, true).unwrap();
        let (mut told, mut rng) = (Told::new(), Rng(3));
        let mut most = 0;
        for n in 0..120 {
            told.checkpoint(&mut store, &mut rng, n == 0).unwrap();
            let range = store.history().unwrap().range();
            if checkpoints < 100 && n < 100 {
                // The first disk writes that are not recorded would be a cliff; with one checkpoint nothing is recorded.
                assert_eq!(range, marks(&told, checkpoints), "after {n}");
            }
            assert_eq!(range.last(), marks(&told, 1).last());
            most = most.max(store.bytes());
            if n % 10 == 0 {
                told.past(&mut store).unwrap();
            }
        }
        // Segments are 6 KiB, a checkpoint at most some 60 KiB; folding goes in steps.
        assert!(most < 600 << 10, "{checkpoints}, {bytes}: {most} bytes");
        println!("{checkpoints} checkpoints, {bytes} bytes: the log took {most} at most");
    }
}

#[test]
fn what_is_not_retained_is_said_to_be_and_harms_nothing() {
    let disk = MemDisk::default();
    let mut store = open(&disk, options(Mutants::default()), true).unwrap();
    let (mut told, mut rng) = (Told::new(), Rng(3));
    for n in 0..9 {
        told.checkpoint(&mut store, &mut rng, n == 0).unwrap();
    }
    let old = told.history[1].mark;
    let error = Out::begin(&mut store, old).err().unwrap();
    assert!(matches!(error, StoreError::NotRetained(mark) if mark == old));
    assert!(!error.damages());
    let history = store.history().unwrap();
    assert_eq!(history.by_epoch(old.epoch), None);
    let newest = told.history[8].mark;
    assert_eq!(history.by_epoch(newest.epoch), Some(newest));
    assert_eq!(history.latest(), Some(newest));
    told.checkpoint(&mut store, &mut rng, false).unwrap();
    told.check(&mut store).unwrap();
}

#[test]
fn disk_writes_too_many_to_take_back_end_the_past() {
    let disk = MemDisk::default();
    let options = Options {
        undo_bytes: 3 << 10,
        ..options(Mutants::default())
    };
    let mut store = open(&disk, options, true).unwrap();
    let (mut told, mut rng) = (Told::new(), Rng(3));
    let mut short = 0;
    for n in 0..40 {
        told.checkpoint(&mut store, &mut rng, n == 0).unwrap();
        short += usize::from(store.history().unwrap().range().len() < 4);
        told.past(&mut store).unwrap();
    }
    assert!(short > 4, "{short}");
}

/// On real files, with the thread that folds.
#[test]
fn real_files_closed_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let retention = Retention {
        checkpoints: 5,
        bytes: 2 << 20,
    };
    let (mut told, mut rng) = (Told::new(), Rng(8));
    let mut store = DurableStore::create(dir.path(), VM, shape(), retention).unwrap();
    for round in 0..3 {
        for n in 0..150 {
            let full = round == 0 && n == 0;
            told.checkpoint(&mut store, &mut rng, full).unwrap();
        }
        told.past(&mut store).unwrap();
        drop(store);
        store = DurableStore::recover(dir.path(), VM, shape(), retention).unwrap();
        assert_eq!(store.holds(), told.history.last().map(|vm| vm.mark));
        told.check(&mut store).unwrap();
        assert!(store.bytes() < 6 << 20, "{}", store.bytes());
    }
    // Run from: the VM's disks are its own from here on, and there is no checkpoint to come back to.
    let generation = told.history.last().unwrap().mark.generation.next();
    let handover = Box::new(store).hand_over(generation).unwrap();
    assert_eq!(Some(handover.mark), told.history.last().map(|vm| vm.mark));
    let disk0 = std::fs::read(&handover.disks[0]).unwrap();
    assert!(disk0 == told.history.last().unwrap().disk(0));
    let store = DurableStore::recover(dir.path(), VM, shape(), retention).unwrap();
    assert_eq!(store.holds(), None);
}

#[test]
fn another_vms_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let retention = Retention::NEWEST;
    let mut store = DurableStore::create(dir.path(), VM, shape(), retention).unwrap();
    Told::new()
        .checkpoint(&mut store, &mut Rng(1), true)
        .unwrap();
    drop(store);
    let mut other = shape();
    other.ram[0].len += 4096;
    let error = DurableStore::recover(dir.path(), VM, other, retention)
        .err()
        .unwrap();
    assert!(error.to_string().contains("other memory"), "{error}");
}

#[test]
fn the_past_in_memory_is_exact_and_bounded() {
    for (checkpoints, bytes) in [(1, 1 << 30), (5, 1 << 30), (usize::MAX, 90 << 10)] {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention { checkpoints, bytes };
        let durability = diskbuf::Durability::Memory;
        let mut store = MemoryStore::new(dir.path(), VM, shape(), durability, retention).unwrap();
        let (mut told, mut rng) = (Told::new(), Rng(4));
        let mut longest = 0;
        for n in 0..60 {
            told.checkpoint(&mut store, &mut rng, n % 25 == 0).unwrap();
            let range = store.history().unwrap().range();
            if checkpoints < 100 {
                assert_eq!(range, marks(&told, checkpoints.min(n % 25 + 1)));
            }
            longest = longest.max(range.len());
            assert!(store.bytes() <= bytes);
            told.past(&mut store).unwrap();
        }
        assert!(longest == checkpoints || checkpoints > 100 && longest > 3);
        let asked = Out::begin(&mut store, Vm::new().mark);
        assert!(matches!(asked, Err(StoreError::NotRetained(_))));
    }
}

/// One store of each kind, with the folder that it is in.
fn stores(retention: Retention) -> Vec<(tempfile::TempDir, Box<dyn ReplicaStore>)> {
    [diskbuf::Durability::Memory, diskbuf::Durability::Disk]
        .into_iter()
        .map(|durability| {
            let dir = tempfile::tempdir().unwrap();
            let options = StoreOptions {
                durability,
                retention,
            };
            let (store, _) = create(dir.path(), VM, shape(), options).unwrap();
            (dir, store)
        })
        .collect()
}

/// However much of it has been copied when checkpoints replace it: the copy is of the moment when it began.
#[test]
fn a_checkpoint_is_copied_out_while_others_are_committed() {
    let retention = Retention {
        checkpoints: 6,
        bytes: 1 << 20,
    };
    for (_dir, mut store) in stores(retention) {
        let store = &mut *store;
        let (mut told, mut rng) = (Told::new(), Rng(6));
        for n in 0..20 {
            told.checkpoint(store, &mut rng, n == 0).unwrap();
        }
        for piece in [1, 4096, 70_000, 300_000] {
            for back in [0, 1, 5] {
                let vm = told.history[told.history.len() - 1 - back].clone();
                let mut out = Out::begin(store, vm.mark).unwrap();
                let busy = Out::begin(store, vm.mark).err().unwrap();
                assert!(matches!(busy, StoreError::CopyBusy) && !busy.damages());
                // The past that it is made from may be gone for others before it is done.
                while !store.out_next(piece).unwrap() {
                    told.checkpoint(store, &mut rng, false).unwrap();
                }
                out.end(store, &vm).unwrap();
            }
        }
        told.past(store).unwrap();
    }
}

#[test]
fn a_copy_of_a_replica_that_is_filled_anew_says_so() {
    let retention = Retention {
        checkpoints: 3,
        bytes: 1 << 20,
    };
    for (_dir, mut store) in stores(retention) {
        let store = &mut *store;
        let (mut told, mut rng) = (Told::new(), Rng(7));
        for n in 0..6 {
            told.checkpoint(store, &mut rng, n == 0).unwrap();
        }
        let mark = told.history[5].mark;
        // In the middle of it ...
        Out::begin(store, mark).unwrap();
        assert!(!store.out_next(1).unwrap());
        told.checkpoint(store, &mut rng, true).unwrap();
        assert!(matches!(
            store.out_next(1),
            Err(StoreError::CopyInterrupted)
        ));
        assert!(store.out_end().is_none());
        // ... and while what leads back is read: from the log there is nothing to be read any more.
        let mark = told.history.last().unwrap().mark;
        Out::begin(store, mark).unwrap();
        while !store.out_next(1 << 20).unwrap() {}
        let copied = store.out_end().unwrap();
        told.checkpoint(store, &mut rng, true).unwrap();
        match copied.finish() {
            Ok(found) => assert_eq!(found.mark, mark, "it was all there already"),
            Err(e) => assert!(matches!(e, StoreError::CopyInterrupted), "{e}"),
        }
        told.past(store).unwrap();
    }
}

/// What the copy cannot write is the copy's misfortune, not the replica's.
#[test]
fn a_copy_that_cannot_be_written_harms_nothing() {
    let retention = Retention {
        checkpoints: 3,
        bytes: 1 << 20,
    };
    for (dir, mut store) in stores(retention) {
        let store = &mut *store;
        let (mut told, mut rng) = (Told::new(), Rng(9));
        for n in 0..6 {
            told.checkpoint(store, &mut rng, n == 0).unwrap();
        }
        let path = dir.path().join("read-only");
        std::fs::write(&path, []).unwrap();
        let file = || (path.clone(), std::fs::File::open(&path).unwrap());
        let files = shape().disks.iter().map(|_| file()).collect();
        store.out_begin(told.history[5].mark, files).unwrap();
        for _ in 0..20 {
            told.checkpoint(store, &mut rng, false).unwrap();
        }
        let failed = store.out_next(1 << 20).unwrap_err();
        assert!(failed.to_string().contains("read-only"), "{failed}");
        assert!(!failed.damages());
        told.checkpoint(store, &mut rng, false).unwrap();
        told.past(store).unwrap();
    }
}
