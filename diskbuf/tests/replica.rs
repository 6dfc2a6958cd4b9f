//! Replica disks and the owner's disk on real files, with the thread that writes the mirrors.

use std::path::Path;
use std::sync::{Arc, Mutex};

use checkpoint::{DISK_RECORD_MAX, DiskOp, DiskRecord, Epoch, Generation, VmId};
use diskbuf::{
    ActivationRecord, DiskSink, DiskbufError, Durability, HeldWrites, Mirror, MirrorError,
    OwnerDisk, ReplicaDisks, Role,
};

const SIZES: [u64; 2] = [8 << 20, 1 << 20];
const GEN: Generation = Generation(1);
const VM: VmId = VmId(1);

fn encoded(disk: u16, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    DiskRecord {
        disk,
        op: DiskOp::Write,
        offset,
        len: data.len() as u32,
        data,
    }
    .encode(&mut out);
    out
}

fn filled(dir: &Path, durability: Durability) -> ReplicaDisks {
    let mut disks = ReplicaDisks::open(dir, VM, &SIZES, durability).unwrap();
    assert_eq!(disks.record(), None);
    disks.begin_full(GEN).unwrap();
    disks.process(Epoch(1), GEN, &[]).unwrap();
    disks
}

/// The stream of an owner, as the chain would hold it.
struct Stream(Mutex<Streamed>);
type Streamed = (Epoch, HeldWrites, Vec<(DiskOp, u64, u32)>);

impl DiskSink for Stream {
    fn disk_write(&self, record: &DiskRecord<'_>) {
        let mut inner = self.0.lock().unwrap();
        let epoch = inner.0;
        inner.1.add(epoch, record).unwrap();
        inner.2.push((record.op, record.offset, record.len));
    }
}

#[test]
fn an_owners_writes_reach_a_replica_and_its_activated_image() {
    for durability in [Durability::Memory, Durability::Disk] {
        let dir = tempfile::tempdir().unwrap();
        let stream = Arc::new(Stream(Mutex::new((
            Epoch(2),
            HeldWrites::new(64 << 20),
            Vec::new(),
        ))));
        let owners: Vec<_> = (0..2u16)
            .map(|n| {
                let path = dir.path().join(format!("owner{n}"));
                let mirror = Mirror::create(path, SIZES[usize::from(n)]).unwrap();
                OwnerDisk::new(n, Arc::new(mirror), stream.clone())
            })
            .collect();
        let mut disks = filled(&dir.path().join("r"), durability);
        for epoch in 2..40u64 {
            let long = vec![epoch as u8; DISK_RECORD_MAX as usize + 512];
            owners[0].write_at(epoch * 4096, &long).unwrap();
            owners[1]
                .write_at(epoch * 512, &[epoch as u8; 512])
                .unwrap();
            owners[0].discard(epoch * 8192, 1024).unwrap();
            owners[1].write_zeroes(0, 2048).unwrap();
            assert!(owners[1].write_at(SIZES[1], &[0; 512]).is_err());
            let writes = {
                let mut inner = stream.0.lock().unwrap();
                inner.0 = Epoch(epoch + 1);
                inner.1.take(Epoch(epoch))
            };
            disks.process(Epoch(epoch), GEN, &writes).unwrap();
        }
        let seen = std::mem::take(&mut stream.0.lock().unwrap().2);
        assert!(
            seen.iter()
                .all(|s| s.0 != DiskOp::Write || s.2 <= DISK_RECORD_MAX)
        );
        assert_eq!(
            seen.len(),
            38 * 5,
            "two records for the long write, and no failed one"
        );

        let paths = disks.activate(Generation(2), Epoch(39)).unwrap();
        for (path, owner) in paths.iter().zip(&owners) {
            // Another process would: the locks are given up.
            let activated = Mirror::open(path).unwrap();
            assert_eq!(activated.size(), owner.size());
            let mut got = vec![0; owner.size() as usize];
            let mut want = got.clone();
            activated.read_at(0, &mut got).unwrap();
            owner.read_at(0, &mut want).unwrap();
            assert!(got == want, "the images differ");
        }
        let record = ActivationRecord::read(dir.path().join("r"))
            .unwrap()
            .unwrap();
        assert_eq!((record.role, record.epoch), (Role::Owner, Epoch(39)));
        assert_eq!((record.generation, record.vm), (Generation(2), VM));
        assert!(matches!(
            disks.process(Epoch(40), Generation(2), &[]),
            Err(DiskbufError::State(_))
        ));
    }
}

#[test]
fn a_long_discard_is_streamed_in_several_records() {
    let dir = tempfile::tempdir().unwrap();
    let size = 10u64 << 30;
    let stream = Arc::new(Stream(Mutex::new((
        Epoch(1),
        HeldWrites::new(1 << 20),
        Vec::new(),
    ))));
    let mirror = Arc::new(Mirror::create(dir.path().join("d"), size).unwrap());
    let disk = OwnerDisk::new(0, mirror, stream.clone());
    disk.discard(0, size).unwrap();
    let seen = &stream.0.lock().unwrap().2;
    assert_eq!(seen.len(), 3);
    let mut at = 0;
    for (_, offset, len) in seen {
        assert_eq!((*offset, len % 512), (at, 0));
        at += u64::from(*len);
    }
    assert_eq!(at, size);
}

#[test]
fn what_was_processed_is_there_after_the_process_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let mut disks = filled(dir.path(), Durability::Memory);
    disks
        .process(Epoch(2), GEN, &[encoded(0, 0, &[2; 512])])
        .unwrap();
    disks
        .process(Epoch(5), GEN, &[encoded(1, 512, &[5; 512])])
        .unwrap();
    drop(disks);
    let mut disks = ReplicaDisks::open(dir.path(), VM, &SIZES, Durability::Memory).unwrap();
    assert_eq!(disks.epoch(), Epoch(5));
    let paths = disks.activate(GEN, Epoch(5)).unwrap();
    assert_eq!(std::fs::read(&paths[0]).unwrap()[..512], [2; 512]);
    assert_eq!(std::fs::read(&paths[1]).unwrap()[512..1024], [5; 512]);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut disks = ReplicaDisks::open(dir.path(), VM, &SIZES, Durability::Disk).unwrap();
    let write = encoded(0, 0, &[1; 512]);
    let early = disks.process(Epoch(1), GEN, &[]);
    assert!(matches!(early, Err(DiskbufError::State(_))));
    disks.begin_full(Generation(5)).unwrap();
    assert!(matches!(
        disks.activate(Generation(5), Epoch::ZERO),
        Err(DiskbufError::State(_))
    ));
    disks.process(Epoch(3), Generation(5), &[]).unwrap();
    let old = disks.process(Epoch(4), Generation(4), std::slice::from_ref(&write));
    assert!(matches!(old, Err(DiskbufError::OldGeneration { .. })));
    let again = disks.process(Epoch(3), Generation(5), std::slice::from_ref(&write));
    assert!(matches!(again, Err(DiskbufError::WrongEpoch { .. })));
    for bad in [
        encoded(0, SIZES[0], &[1; 512]),
        encoded(2, 0, &[1; 512]),
        encoded(1, SIZES[1] - 512, &[1; 1024]),
    ] {
        // The good write before the bad one must not count either.
        let outside = disks.process(Epoch(4), Generation(5), &[write.clone(), bad]);
        assert!(matches!(outside, Err(DiskbufError::OutOfRange { .. })));
    }
    let torn = disks.process(Epoch(4), Generation(5), &[write[..100].to_vec()]);
    assert!(matches!(torn, Err(DiskbufError::Malformed(_))));
    assert!(matches!(
        disks.activate(Generation(5), Epoch(4)),
        Err(DiskbufError::WrongEpoch { .. })
    ));
    let paths = disks.activate(Generation(6), Epoch(3)).unwrap();
    assert!(std::fs::read(&paths[0]).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn directories_are_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let open = |vm, sizes: &[u64]| ReplicaDisks::open(dir.path(), vm, sizes, Durability::Memory);
    let mut disks = filled(dir.path(), Durability::Disk);
    assert!(matches!(open(VM, &SIZES), Err(DiskbufError::InUse(_))));
    let paths = disks.activate(GEN, Epoch(1)).unwrap();
    drop(disks);

    // The VM runs on the images; the host's daemon restarts beside it, and is told later to become a replica again.
    let running = Mirror::open(&paths[0]).unwrap();
    let mut disks = open(VM, &SIZES).unwrap();
    assert_eq!(disks.record().unwrap().role, Role::Owner);
    assert!(matches!(
        disks.begin_full(Generation(2)),
        Err(DiskbufError::Mirror(MirrorError::InUse(_)))
    ));
    assert_eq!(disks.record().unwrap().role, Role::Owner, "still the VM's");
    drop(running);
    disks.begin_full(Generation(2)).unwrap();
    disks.process(Epoch(2), Generation(2), &[]).unwrap();
    drop(disks);

    assert!(matches!(
        open(VmId(2), &SIZES),
        Err(DiskbufError::OtherVm { .. })
    ));
    assert!(matches!(
        open(VM, &[512, SIZES[1]]),
        Err(DiskbufError::OtherSize { .. })
    ));
    std::fs::remove_file(dir.path().join("journal.1")).unwrap();
    assert!(matches!(
        open(VM, &SIZES),
        Err(DiskbufError::Damaged { .. })
    ));
}

#[test]
fn a_foreign_image_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk0.img"), [7; 4096]).unwrap();
    let refused = ReplicaDisks::open(dir.path(), VM, &SIZES, Durability::Memory);
    assert!(matches!(refused, Err(DiskbufError::OtherSize { .. })));
    assert_eq!(
        std::fs::read(dir.path().join("disk0.img")).unwrap(),
        [7; 4096]
    );
}

fn read(disks: &ReplicaDisks, disk: usize, offset: u64) -> [u8; 512] {
    let mut block = [0; 512];
    disks.mirrors()[disk].read_at(offset, &mut block).unwrap();
    block
}

#[test]
fn a_flush_brings_everything_processed_into_the_mirrors() {
    for durability in [Durability::Memory, Durability::Disk] {
        let dir = tempfile::tempdir().unwrap();
        let mut disks = filled(dir.path(), durability);
        disks.flush().unwrap();
        for epoch in 2..40u64 {
            let block = [epoch as u8; 512];
            let writes = [
                encoded(0, epoch * 512, &block),
                encoded(1, 0, &block),
                encoded(0, 4 << 20, &vec![epoch as u8; 256 << 10]),
            ];
            disks.process(Epoch(epoch), GEN, &writes).unwrap();
            // Every third time: in between it finds several epochs, and perhaps a batch under way.
            if epoch % 3 == 0 {
                disks.flush().unwrap();
                for earlier in 2..=epoch {
                    assert_eq!(read(&disks, 0, earlier * 512), [earlier as u8; 512]);
                }
                assert_eq!(read(&disks, 1, 0), block);
                assert_eq!(read(&disks, 0, 4 << 20), block);
                // The record says the same: nothing of it depends on the journal any more.
                let record = ActivationRecord::read(dir.path()).unwrap().unwrap();
                assert_eq!((record.role, record.epoch), (Role::Replica, Epoch(epoch)));
            }
        }
        // Once more, with nothing to do, and then the process is gone.
        disks.flush().unwrap();
        disks.flush().unwrap();
        drop(disks);
        let mut disks = ReplicaDisks::open(dir.path(), VM, &SIZES, durability).unwrap();
        assert_eq!(disks.epoch(), Epoch(39));
        assert_eq!(read(&disks, 1, 0), [39; 512]);
        // It goes on as before.
        disks
            .process(Epoch(40), GEN, &[encoded(1, 0, &[40; 512])])
            .unwrap();
        disks.flush().unwrap();
        assert_eq!(read(&disks, 1, 0), [40; 512]);
        disks.activate(GEN, Epoch(40)).unwrap();
    }
}

#[test]
fn mirrors_are_there_for_reading_until_a_vm_runs_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut disks = filled(dir.path(), Durability::Memory);
    let sizes: Vec<u64> = disks.mirrors().iter().map(Mirror::size).collect();
    assert_eq!(sizes, SIZES);
    // While being filled, what was written is in them; there is no checkpoint to flush.
    disks.begin_full(Generation(2)).unwrap();
    let data = [9; 512];
    let record = DiskRecord {
        disk: 1,
        op: DiskOp::Write,
        offset: 512,
        len: 512,
        data: &data,
    };
    disks.write_full(&record).unwrap();
    disks.flush().unwrap();
    assert_eq!(read(&disks, 1, 512), data);
    disks.process(Epoch(7), Generation(2), &[]).unwrap();
    disks.flush().unwrap();
    disks.activate(Generation(3), Epoch(7)).unwrap();
    assert!(disks.mirrors().is_empty(), "another process's now");
    disks.flush().unwrap();
    assert_eq!(
        disks.record().unwrap().role,
        Role::Owner,
        "and they stay so"
    );
}

#[test]
fn handles_cross_threads() {
    fn send<T: Send>() {}
    fn sync<T: Send + Sync>() {}
    send::<ReplicaDisks>();
    sync::<Mirror>();
    sync::<OwnerDisk>();
    sync::<HeldWrites>();
}
