//! Filling mirrors that keep what they hold: for whoever fills them to leave out what is equal.

use checkpoint::{DiskOp, DiskRecord, Epoch};

use crate::crash::{GEN, LAST, alive, open, options};
use crate::faulty::{Crash, Rng};
use crate::record::Role;
use crate::replica::{Durability, Mutants, ReplicaDisks};

fn content(disks: &ReplicaDisks) -> Vec<Vec<u8>> {
    let read = |mirror: &crate::Mirror| {
        let mut content = vec![0; mirror.size() as usize];
        mirror.read_at(0, &mut content).unwrap();
        content
    };
    disks.mirrors().iter().map(read).collect()
}

#[test]
fn content_stays_and_counts_for_nothing_until_it_is_filled() {
    let (disk, _, mut disks) = alive(Durability::Memory, 9 << 10);
    disks.flush().unwrap();
    let before = content(&disks);
    assert!(before.iter().any(|disk| disk.iter().any(|byte| *byte != 0)));
    disks.begin_refill(GEN).unwrap();
    assert_eq!(content(&disks), before);
    let record = disk.after(Crash::LoseAll, &mut Rng(1));
    let lost = open(&record, options(Durability::Memory, Mutants::default())).unwrap();
    assert_eq!(
        lost.record().map(|r| r.role),
        Some(Role::Syncing),
        "durably, before anything is written"
    );
    // One sector differs: only that is sent.
    let data = [0x5a; 512];
    let record = DiskRecord {
        disk: 0,
        op: DiskOp::Write,
        offset: 512,
        len: 512,
        data: &data,
    };
    disks.write_full(&record).unwrap();
    disks.process(Epoch(LAST + 9), GEN, &[]).unwrap();
    disks.flush().unwrap();
    let mut wanted = before;
    wanted[0][512..1024].copy_from_slice(&data);
    drop(disks);
    let again = open(&disk, options(Durability::Memory, Mutants::default())).unwrap();
    assert_eq!(again.record().map(|r| r.role), Some(Role::Replica));
    assert_eq!((again.epoch(), content(&again)), (Epoch(LAST + 9), wanted));
}
