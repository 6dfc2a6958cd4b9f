//! Crashes at every operation of a replica's life, and damage at every byte: I3, I6 and I7 for disks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use checkpoint::{DiskOp, DiskRecord, Epoch, Generation, VmId};

use crate::error::DiskbufError;
use crate::faulty::{Crash, MemDisk, Rng};
use crate::record::{RecordError, Role};
use crate::replica::{Durability, Mutants, Options, ReplicaDisks};

const DIR: &str = "/vm";
const VM: VmId = VmId(7);
const SECTORS: u64 = 24;
const SIZES: [u64; 2] = [SECTORS * 512, SECTORS * 512];
pub(crate) const GEN: Generation = Generation(3);
/// Epochs processed before the activation.
pub(crate) const LAST: u64 = 9;

type Disks = [Vec<u8>; 2];

pub(crate) fn options(durability: Durability, mutants: Mutants) -> Options {
    Options {
        durability,
        batch_bytes: 9 << 10,
        batch_age: Duration::from_secs(1 << 30),
        high_water: 30 << 10,
        journal_keep: 4 << 10,
        stepped: true,
        mutants,
    }
}

pub(crate) fn open(disk: &MemDisk, options: Options) -> Result<ReplicaDisks, DiskbufError> {
    ReplicaDisks::open_with(Arc::new(disk.clone()), Path::new(DIR), VM, &SIZES, options)
}

/// The writes of one epoch, done to `model` too. Always over both disks, so that half an epoch shows.
fn writes(rng: &mut Rng, model: &mut Disks) -> Vec<Vec<u8>> {
    let mut out = vec![Vec::new()];
    for n in 0..2 + rng.below(6) {
        let disk = (n % 2) as usize;
        let sectors = 1 + rng.below(4);
        let at = rng.below(SECTORS - sectors) * 512;
        let len = sectors * 512;
        let range = at as usize..(at + len) as usize;
        let data: Vec<u8> = (0..len).map(|_| rng.draw() as u8).collect();
        let op = match rng.below(8) {
            0 => DiskOp::Discard,
            1 => DiskOp::WriteZeroes,
            _ => DiskOp::Write,
        };
        let record = DiskRecord {
            disk: disk as u16,
            op,
            offset: at,
            len: len as u32,
            data: if op == DiskOp::Write { &data } else { &[] },
        };
        if op == DiskOp::Write {
            model[disk][range].copy_from_slice(&data);
        } else {
            model[disk][range].fill(0);
        }
        if rng.below(3) == 0 {
            out.push(Vec::new());
        }
        record.encode(out.last_mut().unwrap());
    }
    out
}

/// What a replica was told and what it promised, for the check after a crash.
#[derive(Default)]
pub(crate) struct Told {
    /// Content at each epoch, from the first on that may be found after a crash.
    history: Vec<(Epoch, Disks)>,
    /// The newest epoch with writes that was processed without an error.
    done: Option<Epoch>,
    /// The newest that is durable by what the replica said of its record.
    recorded: Option<Epoch>,
    activated: bool,
}

impl Told {
    fn at(&self, epoch: Epoch) -> Option<&Disks> {
        self.history.iter().find(|h| h.0 == epoch).map(|h| &h.1)
    }

    pub(crate) fn process(
        &mut self,
        disks: &mut ReplicaDisks,
        epoch: Epoch,
        rng: &mut Rng,
    ) -> Result<(), DiskbufError> {
        let mut model = self.history.last().map_or_else(zeros, |h| h.1.clone());
        let list = if epoch.0 % 4 == 3 {
            Vec::new()
        } else {
            writes(rng, &mut model)
        };
        self.history.push((epoch, model));
        disks.process(epoch, GEN, &list)?;
        if !list.is_empty() {
            self.done = Some(epoch);
        }
        self.note(disks);
        Ok(())
    }

    fn note(&mut self, disks: &ReplicaDisks) {
        if let Some(record) = disks.record().filter(|r| r.role != Role::Syncing) {
            self.recorded = self.recorded.max(Some(record.epoch));
        }
    }

    /// Filling, some epochs, activation.
    fn life(
        &mut self,
        disk: &MemDisk,
        options: Options,
        rng: &mut Rng,
    ) -> Result<(), DiskbufError> {
        let mut disks = open(disk, options)?;
        disks.begin_full(GEN)?;
        let mut model = zeros();
        for buffer in writes(rng, &mut model) {
            for record in checkpoint::disk_records(&buffer) {
                disks.write_full(&record.unwrap())?;
            }
        }
        self.history.push((Epoch::ZERO, model)); // not valid yet: `check` knows
        for epoch in 1..=LAST {
            self.process(&mut disks, Epoch(epoch), rng)?;
        }
        disks.activate(GEN.next(), Epoch(LAST))?;
        self.activated = true;
        Ok(())
    }

    /// Whether the disk, after a crash, is at exactly one complete checkpoint, and not too old a one.
    pub(crate) fn check(
        &self,
        disk: &MemDisk,
        found: Result<ReplicaDisks, DiskbufError>,
        how: Crash,
        durability: Durability,
    ) -> Result<ReplicaDisks, String> {
        let disks = found.map_err(|e| format!("recovery failed: {e}"))?;
        let record = disks.record();
        let promised = if durability == Durability::Disk || how == Crash::KeepAll {
            // The first checkpoint after filling is in the record, not the journal.
            self.done
                .filter(|d| {
                    durability == Durability::Disk || self.recorded.is_some_and(|r| r <= *d)
                })
                .max(self.recorded)
        } else {
            self.recorded
        };
        let Some(record) = record.filter(|r| r.role != Role::Syncing) else {
            return match promised {
                Some(epoch) => Err(format!("epoch {epoch} was promised, nothing is there")),
                None => Ok(disks),
            };
        };
        let epoch = record.epoch;
        if promised > Some(epoch) {
            return Err(format!("{promised:?} was promised, {epoch} is there"));
        }
        if self.activated && record.role != Role::Owner {
            return Err("activated, and not the owner any more".into());
        }
        if record.role == Role::Owner && epoch != Epoch(LAST) {
            return Err(format!("owner at epoch {epoch}"));
        }
        if disks.epoch() != epoch || epoch == Epoch::ZERO {
            return Err(format!("record {epoch}, disks {}", disks.epoch()));
        }
        let model = self
            .at(epoch)
            .ok_or_else(|| format!("epoch {epoch} never was"))?;
        for (n, want) in model.iter().enumerate() {
            if disk.content(&Path::new(DIR).join(format!("disk{n}.img"))) != *want {
                return Err(format!("disk {n} is not at the record's epoch {epoch}"));
            }
        }
        Ok(disks)
    }
}

fn zeros() -> Disks {
    SIZES.map(|size| vec![0; size as usize])
}

/// A crash at operation `at`, another while recovering, and then one in a second life on what was recovered.
fn crash_once(
    durability: Durability,
    mutants: Mutants,
    at: u64,
    seed: u64,
) -> Result<bool, String> {
    let options = options(durability, mutants);
    let how = match seed % 4 {
        0 => Crash::LoseAll,
        1 => Crash::KeepAll,
        _ => Crash::Any,
    };
    let (disk, mut told, mut rng) = (MemDisk::default(), Told::default(), Rng(99));
    disk.crash_at(at);
    let ended = told.life(&disk, options, &mut rng).is_ok();
    let mut rng = Rng(at << 16 | seed);
    // Either the host dies, or only the program, and what was not synced still can be lost later.
    let kill = seed / 4 % 2 == 1;
    let mut disk = if kill {
        disk.killed()
    } else {
        disk.after(how, &mut rng)
    };
    let mut found_how = if kill { Crash::KeepAll } else { how };
    if seed.is_multiple_of(2) {
        disk.crash_at(disk.ops() + 1 + rng.below(12));
        let _ = open(&disk, options);
        disk = disk.after(how, &mut rng);
        found_how = how;
    }
    let mut disks = told.check(&disk, open(&disk, options), found_how, durability)?;
    // The second life goes on from the checkpoint found, with other writes than in the first.
    let base = disk.ops();
    if disks.record().is_some_and(|r| r.role == Role::Replica) {
        let from = disks.epoch();
        told.history.retain(|h| h.0 <= from);
        (told.done, told.recorded) = (Some(from), Some(from));
        disk.crash_at(base + 1 + rng.below(60));
        for epoch in from.0 + 1..from.0 + 8 {
            if told.process(&mut disks, Epoch(epoch), &mut rng).is_err() {
                break;
            }
        }
        drop(disks);
        let disk = disk.after(how, &mut rng);
        told.check(&disk, open(&disk, options), how, durability)
            .map_err(|e| format!("second life: {e}"))?;
    }
    Ok(ended)
}

/// All crash points; the complaints.
fn sweep(durability: Durability, mutants: Mutants, seeds: u64) -> Vec<String> {
    let mut complaints = Vec::new();
    for at in 1.. {
        let mut ended = true;
        for seed in 0..seeds {
            match crash_once(durability, mutants, at, seed) {
                Ok(e) => ended &= e,
                Err(e) => {
                    ended = false;
                    complaints.push(format!("crash at operation {at}, seed {seed}: {e}"));
                }
            }
        }
        assert!(at < 2000, "the life must end");
        if ended || complaints.len() > 50 {
            assert!(at > 60 || !complaints.is_empty(), "only {at} crash points");
            break;
        }
    }
    complaints
}

#[test]
fn i3_i6_a_crash_at_any_operation_leaves_one_complete_checkpoint() {
    for durability in [Durability::Memory, Durability::Disk] {
        let complaints = sweep(durability, Mutants::default(), 16);
        assert!(complaints.is_empty(), "{durability:?}: {complaints:#?}");
    }
}

#[test]
fn without_the_journals_sync_the_checker_complains() {
    let mutants = Mutants {
        no_journal_sync: true,
        ..Mutants::default()
    };
    for durability in [Durability::Memory, Durability::Disk] {
        let complaints = sweep(durability, mutants, 16);
        // The mix that the sync is there against, and (waiting for the disk) a promise not kept.
        let expected = match durability {
            Durability::Memory => "is not at the record's epoch",
            Durability::Disk => "was promised",
        };
        assert!(
            complaints.iter().any(|c| c.contains(expected)),
            "{durability:?}: {complaints:?}"
        );
    }
}

#[test]
fn without_the_journals_checksum_the_checker_complains() {
    let mutants = Mutants {
        no_crc: true,
        ..Mutants::default()
    };
    for durability in [Durability::Memory, Durability::Disk] {
        assert!(!sweep(durability, mutants, 16).is_empty(), "{durability:?}");
    }
}

/// A replica that was filled and has processed up to [`LAST`], without a batch if `batch_bytes` says so.
pub(crate) fn alive(durability: Durability, batch_bytes: u64) -> (MemDisk, Told, ReplicaDisks) {
    let (disk, mut told) = (MemDisk::default(), Told::default());
    let mut options = options(durability, Mutants::default());
    options.batch_bytes = batch_bytes;
    let mut disks = open(&disk, options).unwrap();
    disks.begin_full(GEN).unwrap();
    let mut rng = Rng(5);
    for epoch in 1..=LAST {
        told.process(&mut disks, Epoch(epoch), &mut rng).unwrap();
    }
    (disk, told, disks)
}

#[test]
fn i7_damage_at_any_byte_of_the_journal_is_found_or_of_no_account() {
    let (disk, told, disks) = alive(Durability::Disk, u64::MAX);
    drop(disks);
    let path = Path::new(DIR).join("journal.0");
    let len = disk.content(&path).len();
    assert!(len > 8 * 512);
    let mut found = 0;
    for at in (0..len).filter(|at| at % 512 < 70 || at % 7 == 0) {
        let bad = disk.with(&path, |bytes| bytes[at] ^= 0x10);
        let opened = open(&bad, options(Durability::Disk, Mutants::default()));
        if matches!(opened, Err(DiskbufError::Damaged { .. })) {
            found += 1;
        } else {
            let disks = told
                .check(&bad, opened, Crash::KeepAll, Durability::Disk)
                .unwrap_or_else(|e| panic!("byte {at}: {e}"));
            assert_eq!(disks.epoch(), told.done.unwrap(), "byte {at}");
        }
    }
    assert!(found > 100, "{found}");
    disk.lose(&path);
    let opened = open(&disk, options(Durability::Disk, Mutants::default()));
    assert!(matches!(opened, Err(DiskbufError::Damaged { .. })));
}

#[test]
fn i7_damage_at_any_byte_of_the_record_is_found_or_of_no_account() {
    let (disk, _, mut disks) = alive(Durability::Memory, 1);
    disks.activate(GEN.next(), Epoch(LAST)).unwrap();
    let newest = disks.record().unwrap();
    drop(disks);
    let path = Path::new(DIR).join("activation");
    let len = disk.content(&path).len();
    let mut found = 0;
    for at in 0..len {
        let bad = disk.with(&path, |bytes| bytes[at] ^= 0x10);
        match open(&bad, options(Durability::Memory, Mutants::default())) {
            Ok(disks) => assert_eq!(disks.record(), Some(newest), "byte {at}"),
            Err(DiskbufError::Record(
                RecordError::Damaged { .. } | RecordError::Version { .. },
            )) => found += 1,
            Err(e) => panic!("byte {at}: {e}"),
        }
    }
    assert!(found >= 512, "{found}");
}

#[test]
fn a_failed_sync_is_final() {
    for n in 1..=4 {
        let (disk, _, mut disks) = alive(Durability::Disk, 1);
        disk.fail_sync(n);
        let mut rng = Rng(1);
        let failed = (LAST + 1..LAST + 8)
            .find(|e| {
                let list = writes(&mut rng, &mut zeros());
                disks.process(Epoch(*e), GEN, &list).is_err()
            })
            .expect("the failure is reported");
        for _ in 0..2 {
            let later = disks.process(Epoch(failed + 1), GEN, &[]);
            assert!(matches!(later, Err(DiskbufError::Poisoned(_))), "{later:?}");
        }
        assert!(matches!(
            disks.activate(GEN, Epoch(failed)),
            Err(DiskbufError::Poisoned(_))
        ));
        assert!(matches!(
            disks.begin_full(GEN),
            Err(DiskbufError::Poisoned(_))
        ));
    }
}

#[test]
fn epochs_without_writes_cost_no_io_and_activation_few_syncs() {
    let (disk, _, mut disks) = alive(Durability::Memory, u64::MAX);
    let (ops, syncs) = (disk.ops(), disk.syncs());
    for epoch in LAST + 1..LAST + 50 {
        disks.process(Epoch(epoch), GEN, &[]).unwrap();
    }
    assert_eq!(disk.ops(), ops);
    // Two mirrors, journal, record.
    disks.activate(GEN, Epoch(LAST + 49)).unwrap();
    assert!(disk.syncs() - syncs <= 4, "{}", disk.syncs() - syncs);

    let (disk, _, mut disks) = alive(Durability::Memory, 1);
    for epoch in LAST + 1..LAST + 50 {
        disks.process(Epoch(epoch), GEN, &[]).unwrap();
    }
    let syncs = disk.syncs();
    disks.activate(GEN, Epoch(LAST + 49)).unwrap();
    assert_eq!(
        disk.syncs() - syncs,
        1,
        "with nothing pending, the record only"
    );
}

#[test]
fn an_entry_that_was_cut_off_never_comes_back() {
    let (disk, mut told) = (MemDisk::default(), Told::default());
    let options = Options {
        batch_bytes: u64::MAX,
        ..options(Durability::Memory, Mutants::default())
    };
    let mut disks = open(&disk, options).unwrap();
    disks.begin_full(GEN).unwrap();
    told.process(&mut disks, Epoch(1), &mut Rng(1)).unwrap();
    let write = |stamp: u8| {
        let mut out = Vec::new();
        DiskRecord {
            disk: 0,
            op: DiskOp::Write,
            offset: 0,
            len: 512,
            data: &[stamp; 512],
        }
        .encode(&mut out);
        [out]
    };
    for epoch in 2..5 {
        let list = write(epoch as u8);
        disks.process(Epoch(epoch), GEN, &list).unwrap();
    }
    drop(disks);
    // The first of three entries was lost, those after it were not: torn off.
    let path = Path::new(DIR).join("journal.0");
    let disk = disk.with(&path, |bytes| bytes[..512].fill(0));
    let mut disks = open(&disk, options).unwrap();
    assert_eq!(disks.epoch(), Epoch(1));
    // The new second epoch takes the lost one's place, right before the ones that were cut off.
    disks.process(Epoch(2), GEN, &write(0xee)).unwrap();
    drop(disks);
    let disk = disk.killed();
    let disks = open(&disk, options).unwrap();
    assert_eq!(disks.epoch(), Epoch(2));
    let content = disk.content(&Path::new(DIR).join("disk0.img"));
    assert_eq!(content[..512], [0xee; 512]);
}

#[test]
fn without_the_records_second_slot_the_checker_complains() {
    let mutants = Mutants {
        one_slot: true,
        ..Mutants::default()
    };
    for durability in [Durability::Memory, Durability::Disk] {
        let complaints = sweep(durability, mutants, 16);
        assert!(
            complaints
                .iter()
                .any(|c| c.contains("activation record") && c.contains("damaged")),
            "{durability:?}: {complaints:?}"
        );
    }
}
