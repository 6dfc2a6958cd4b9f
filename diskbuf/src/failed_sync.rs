//! A sync that fails, a program that restarts on what the page cache still shows, and then the host dies too: I3, I7.
//! After a failed sync the kernel takes the pages for clean, so another sync proves nothing about them.

use checkpoint::Epoch;

use crate::crash::{GEN, LAST, alive, open, options};
use crate::faulty::{Crash, Rng};
use crate::record::Role;
use crate::replica::{Durability, Mutants};

/// A failed sync leaves in the page cache what is not on the disk and never will be. The program restarts, reads it
/// there, and then the host dies too, anywhere in the recovery.
#[test]
fn what_a_failed_sync_left_in_the_cache_is_not_relied_on() {
    let mut complaints = Vec::new();
    for nth in 1..=8 {
        for crash in 1..40 {
            for seed in 0..5 {
                let (disk, mut told, mut disks) = alive(Durability::Memory, 9 << 10);
                let mut rng = Rng(seed);
                disk.fail_sync(nth);
                for epoch in LAST + 1..LAST + 60 {
                    if told.process(&mut disks, Epoch(epoch), &mut rng).is_err() {
                        break;
                    }
                }
                drop(disks);
                let mut options = options(Durability::Memory, Mutants::default());
                options.batch_bytes = 9 << 10;
                disk.crash_at(disk.ops() + crash);
                let _ = open(&disk, options);
                let how = if seed == 0 {
                    Crash::LoseAll
                } else {
                    Crash::Any
                };
                let disk = disk.after(how, &mut rng);
                if let Err(e) = told.check(&disk, open(&disk, options), how, Durability::Memory) {
                    complaints.push(format!("sync {nth}, crash {crash}, seed {seed}: {e}"));
                }
            }
        }
    }
    assert!(
        complaints.is_empty(),
        "{}: {:#?}",
        complaints.len(),
        &complaints[..complaints.len().min(12)]
    );
}

/// A role that was read is acted upon: a VM is started on an owner's mirrors. It must not turn back later.
#[test]
fn a_record_that_open_reports_is_durable_even_after_a_failed_sync() {
    let (disk, _, mut disks) = alive(Durability::Memory, 1);
    // Drive the batch under way to its end: the record's sync is then the only one of the activation.
    for epoch in LAST + 1..LAST + 50 {
        disks.process(Epoch(epoch), GEN, &[]).unwrap();
    }
    disk.fail_sync(1);
    assert!(disks.activate(GEN.next(), Epoch(LAST + 49)).is_err());
    drop(disks);
    let options = options(Durability::Memory, Mutants::default());
    let reported = open(&disk, options).unwrap().record();
    assert_eq!(
        reported.map(|r| r.role),
        Some(Role::Owner),
        "the cache has it"
    );
    let disk = disk.after(Crash::LoseAll, &mut Rng(0));
    assert_eq!(open(&disk, options).unwrap().record(), reported);
}
