//! The copy that a joining replica gets (FIELD C1): what it is of, and what it costs whoever is copied.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use checkpoint::{
    DiskOp, DiskRecord, EncoderOptions, Epoch, Generation, MachineState, PAGE_SIZE, PageEncoder,
    RamRange, Tally, disk_records, records,
};
use diskbuf::Durability;
use diskbuf::faulty::{MemDisk, Rng};

use super::model::{Told, VM, open, options, shape};
use crate::blocks::{self, BLOCK};
use crate::mark::Mark;
use crate::store::log::Mutants;
use crate::store::{
    CUT_PAGES, Copying, Cut, MemoryStore, Piece, ReplicaStore, Retention, Source, StoreOptions,
    VmStore, create,
};
use crate::view::VmShape;

/// A joining replica's store, and what it has been sent.
struct Joiner {
    store: VmStore,
    tally: Tally,
    disk_bytes: u64,
    pages: u64,
}

impl Joiner {
    fn new(dir: &Path, shape: VmShape) -> Self {
        let store = VmStore::new(dir, VM, shape, Durability::Memory).unwrap();
        Self {
            store,
            tally: Tally::default(),
            disk_bytes: 0,
            pages: 0,
        }
    }

    /// Begins to be filled: tells the one that fills it what it holds.
    fn begin(&mut self, source: &mut Source) {
        self.store.begin_install(Generation(9), Epoch(0)).unwrap();
        self.tally = Tally::default();
        for (disk, mirror) in (0u16..).zip(self.store.mirrors().iter()) {
            let mut at = 0;
            while let Some(first) = blocks::next_data(mirror, at).unwrap() {
                let run = blocks::run(mirror, first, || {}).unwrap();
                assert!(source.compare(disk, first, &run));
                at = first + run.len() as u64;
            }
        }
    }

    fn take(&mut self, piece: &Piece) {
        match piece {
            Piece::Pages(bytes) => {
                let count = records(bytes).count() as u64;
                self.tally.add(bytes, count, 0);
                self.pages += count;
                self.store.pages(bytes).unwrap();
            }
            Piece::Disk(bytes) => {
                let count = disk_records(bytes).count() as u64;
                self.tally.add(bytes, 0, count);
                self.disk_bytes += bytes.len() as u64;
                self.store.disk(bytes).unwrap();
            }
        }
    }

    fn end(&mut self, mark: Mark, machine: &[u8]) {
        self.tally.add(machine, 0, 0);
        self.store.machine(machine).unwrap();
        let generation = mark.generation.max(Generation(9));
        let end = self.tally.end();
        self.store.prepare(generation, mark, &end).unwrap();
        self.store.commit(mark);
    }
}

/// All pieces of a round.
fn round(source: &mut Source, joiner: &mut Joiner, mut between: impl FnMut()) {
    while let Some(piece) = source.next().unwrap() {
        if let Some(piece) = piece {
            joiner.take(&piece);
        }
        between();
    }
}

/// However much is committed in between: the joining replica becomes what was there at the cut.
#[test]
fn c1_a_copy_is_of_the_moment_at_which_it_was_cut() {
    let retention = Retention {
        checkpoints: 3,
        bytes: 1 << 20,
    };
    for durability in [Durability::Memory, Durability::Disk] {
        let (dir, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = StoreOptions {
            durability,
            retention,
        };
        let (mut store, _) = create(dir.path(), VM, shape(), options).unwrap();
        let store = &mut *store;
        let (mut told, mut rng) = (Told::new(), Rng(11));
        told.checkpoint(store, &mut rng, true).unwrap();
        // The second time and later it holds something already.
        let mut joiner = Joiner::new(there.path(), shape());
        for rounds in 0..12 {
            let Copying(mut source) = store.copy_begin().unwrap();
            let newest = store.base().unwrap().newest_writes();
            joiner.begin(&mut source);
            while !store.base_mut().unwrap().in_mirrors(newest).unwrap() {}
            round(&mut source, &mut joiner, || {
                told.checkpoint(store, &mut rng, false).unwrap();
            });
            for _ in 0..rounds % 4 {
                let fresh = source.fresh();
                source.begin(store.base_mut().unwrap().copy_changes(fresh).unwrap());
                round(&mut source, &mut joiner, || {
                    told.checkpoint(store, &mut rng, false).unwrap();
                });
            }
            let spare = source.spare();
            let cut = store.base_mut().unwrap().copy_cut(spare).unwrap();
            let vm = told.history.last().unwrap().clone();
            assert_eq!(cut.mark, vm.mark);
            rest(store, &mut source, &mut joiner, cut, |store| {
                told.checkpoint(store, &mut rng, false).unwrap();
            });
            store.copy_end();
            let (mark, machine) = joiner.store.machine.clone().unwrap();
            assert_eq!(mark, vm.mark);
            vm.equals(&joiner.store.image, &machine, "joined").unwrap();
            joiner.store.disks.flush().unwrap();
            for n in 0..2 {
                let mut disk = vec![0; vm.disk(n).len()];
                joiner.store.disks.read(n as u16, 0, &mut disk).unwrap();
                assert!(disk == vm.disk(n), "disk {n} of {mark}");
            }
        }
        told.past(store).unwrap();
    }
}

/// What is left at the cut.
fn rest(
    store: &mut dyn ReplicaStore,
    source: &mut Source,
    joiner: &mut Joiner,
    cut: Cut,
    mut between: impl FnMut(&mut dyn ReplicaStore),
) {
    for write in cut.writes {
        joiner.take(&Piece::Disk(write));
        between(store);
    }
    let mut pages = Vec::new();
    for gfns in cut.gfns.chunks(3) {
        between(store);
        store
            .base_mut()
            .unwrap()
            .cut_pages(gfns, &mut pages)
            .unwrap();
        joiner.take(&source.encode(gfns, &pages));
    }
    joiner.end(cut.mark, &cut.machine);
}

/// Nothing is read where others wait for the lock, but the pages of the cut, so many at a time.
#[test]
fn c1_no_step_that_needs_the_lock_looks_at_more_than_a_few_pages() {
    let disk = MemDisk::default();
    let mut store = open(&disk, options(Mutants::default()), true).unwrap();
    let (mut told, mut rng) = (Told::new(), Rng(5));
    for n in 0..30 {
        told.checkpoint(&mut store, &mut rng, n == 0).unwrap();
    }
    let looked = |store: &dyn ReplicaStore| (store.base().unwrap().image.looked(), disk.read());
    let before = looked(&store);
    let Copying(source) = store.copy_begin().unwrap();
    store.base_mut().unwrap().in_mirrors(0).unwrap();
    let (fresh, spare) = (source.fresh(), source.spare());
    store.base_mut().unwrap().copy_changes(fresh).unwrap();
    assert_eq!(looked(&store), before, "to begin, and to begin a round");
    for _ in 0..20 {
        told.checkpoint(&mut store, &mut rng, false).unwrap();
    }
    let before = looked(&store);
    let cut = store.base_mut().unwrap().copy_cut(spare).unwrap();
    assert_eq!(looked(&store), before, "to cut");
    assert!(cut.gfns.len() > 10 && !cut.writes.is_empty());
    let many: Vec<u64> = cut.gfns.iter().copied().cycle().take(1000).collect();
    let mut pages = Vec::new();
    store
        .base_mut()
        .unwrap()
        .cut_pages(&many, &mut pages)
        .unwrap();
    let after = looked(&store);
    assert!(after.0 - before.0 <= CUT_PAGES as u64 && after.1 == before.1);
    assert_eq!(pages.len(), CUT_PAGES);
}

fn allocated(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// 4 GiB of memory and a disk of 20 GiB, of which a guest has touched little: only that is looked at, and the rest takes no
/// room afterwards, on either side.
#[test]
fn c1_what_was_never_touched_is_not_touched_by_a_copy() {
    const RAM: u64 = 4 << 30;
    const DISK: u64 = 20 << 30;
    let half = RAM / 2;
    let shape = VmShape {
        ram: [0, 1 << 32]
            .map(|start| RamRange { start, len: half })
            .into(),
        disks: vec![DISK],
        ..shape()
    };
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut store = MemoryStore::new(
        here.path(),
        VM,
        shape.clone(),
        Durability::Memory,
        Retention::NEWEST,
    )
    .unwrap();
    let mut joiner = Joiner::new(there.path(), shape);
    // Some of everything, up to the ends.
    let gfns = [
        0,
        5,
        300_000,
        (half >> 12) - 1,
        1 << 20,
        (1 << 20) + (half >> 12) - 1,
    ];
    let offsets = [0, 7 << 30, DISK - BLOCK];
    let mut owner = Joiner::new(tempfile::tempdir().unwrap().path(), super::model::shape());
    let (mut pages, mut disk) = (Vec::new(), Vec::new());
    let mut encoder = PageEncoder::new(EncoderOptions { lz4: true });
    for gfn in gfns {
        encoder.encode(gfn, &[gfn as u8 | 1; PAGE_SIZE], None, &mut pages);
    }
    for offset in offsets {
        let data = [(offset >> 20) as u8 | 1; 4096];
        DiskRecord {
            disk: 0,
            op: DiskOp::Write,
            offset,
            len: 4096,
            data: &data,
        }
        .encode(&mut disk);
    }
    let machine = MachineState::default().encode().unwrap();
    let mark = Mark {
        generation: Generation(3),
        epoch: Epoch(1),
        digest: 0,
        held: true,
    };
    store.begin(mark.generation, mark.epoch, true).unwrap();
    store.pages(&pages).unwrap();
    store.disk(&disk).unwrap();
    store.machine(&machine).unwrap();
    owner.tally.add(&pages, gfns.len() as u64, 0);
    owner.tally.add(&disk, 0, offsets.len() as u64);
    owner.tally.add(&machine, 0, 0);
    store
        .prepare(mark.generation, mark, &owner.tally.end())
        .unwrap();
    store.commit(mark);
    let files = |store: &VmStore, dir: &Path| {
        let memory = store.ram_fds().into_iter();
        let memory = memory.map(|fd| File::from(fd.try_clone_to_owned().unwrap()));
        let memory: u64 = memory.map(|file| allocated(&file)).sum();
        (
            memory,
            allocated(&File::open(dir.join("disk0.img")).unwrap()),
        )
    };
    let before = files(store.base().unwrap(), here.path());
    assert_eq!(before.0, (gfns.len() * PAGE_SIZE) as u64);
    assert!(before.1 <= offsets.len() as u64 * BLOCK, "{before:?}");

    let Copying(mut source) = store.copy_begin().unwrap();
    joiner.begin(&mut source);
    round(&mut source, &mut joiner, || {});
    let filled = source.filled();
    assert_eq!(filled.left, 0);
    assert_eq!(
        (joiner.pages, filled.blocks_sent),
        (gfns.len() as u64, offsets.len() as u64)
    );
    let data = (gfns.len() * PAGE_SIZE) as u64 + offsets.len() as u64 * BLOCK;
    // Pages are read some at a time, of which the neighbours of one that is there are zero.
    let most = data + (gfns.len() * CUT_PAGES * PAGE_SIZE) as u64;
    assert!(filled.looked <= most, "{filled:?}, {data} bytes are there");
    let spare = source.spare();
    let cut = store.base_mut().unwrap().copy_cut(spare).unwrap();
    rest(&mut store, &mut source, &mut joiner, cut, |_| {});
    assert_eq!(
        files(store.base().unwrap(), here.path()),
        before,
        "of the one that is copied"
    );
    let joined = files(&joiner.store, there.path());
    assert_eq!(joined.0, before.0);
    assert!(joined.1 <= offsets.len() as u64 * BLOCK, "{joined:?}");
    for gfn in gfns {
        assert_eq!(
            joiner.store.image.page(gfn).unwrap(),
            &[gfn as u8 | 1; PAGE_SIZE]
        );
    }
}
