//! An owner that says what a replica is to hold, and a judge that compares.

use std::path::Path;
use std::sync::Arc;

use checkpoint::{
    DiskOp, DiskRecord, EncoderOptions, Epoch, Generation, MachineState, PAGE_SIZE, Page,
    PageEncoder, RamRange, Tally, VmId, disk_records,
};
use diskbuf::faulty::{MemDisk, Rng};
use diskbuf::{Durability, ReplicaDisks};

use crate::image::Image;
use crate::mark::Mark;
use crate::store::durable::DurableStore;
use crate::store::log::{Mutants, Options};
use crate::store::{ReplicaStore, Retention, StoreError};
use crate::view::VmShape;

pub(super) const DIR: &str = "/vm";
pub(super) const VM: VmId = VmId(7);
const SECTORS: u64 = 24;
/// Frames of RAM: two ranges.
const GFNS: [u64; 14] = {
    let mut gfns = [0; 14];
    let mut i = 0;
    while i < 14 {
        gfns[i] = if i < 10 {
            i as u64
        } else {
            (1 << 20) + i as u64 - 10
        };
        i += 1;
    }
    gfns
};

pub(super) fn shape() -> VmShape {
    let range = |start, pages: u64| RamRange {
        start,
        len: pages * PAGE_SIZE as u64,
    };
    VmShape {
        ram: vec![range(0, 10), range(1 << 32, 4)],
        vcpus: 1,
        cpu: Default::default(),
        disks: vec![SECTORS * 512, SECTORS * 512],
        config_toml: String::new(),
    }
}

pub(super) fn options(mutants: Mutants) -> Options {
    Options {
        segment_bytes: 6 << 10,
        fold_pages: 6,
        stepped: true,
        mutants,
        ..Options::new(Retention {
            checkpoints: 4,
            bytes: 60 << 10,
        })
    }
}

pub(super) fn open(
    disk: &MemDisk,
    options: Options,
    fresh: bool,
) -> Result<DurableStore, StoreError> {
    let layer = Arc::new(disk.clone());
    let (dir, shape) = (Path::new(DIR), shape());
    let disks = ReplicaDisks::open_stepped(layer.clone(), dir, VM, &shape.disks, Durability::Disk)
        .map_err(|e| StoreError::Disks(e.to_string()))?;
    DurableStore::over(layer, dir, VM, shape, disks, options, fresh)
}

/// A VM at a checkpoint.
#[derive(Clone)]
pub(super) struct Vm {
    pub mark: Mark,
    pages: Vec<Page>,
    machine: Vec<u8>,
    disks: [Vec<u8>; 2],
}

/// What one checkpoint sends.
struct Sent {
    vm: Vm,
    pages: Vec<Vec<u8>>,
    disk: Vec<Vec<u8>>,
    tally: Tally,
}

impl Vm {
    pub(super) fn new() -> Self {
        Self {
            mark: Mark {
                generation: Generation(3),
                epoch: Epoch(10),
                digest: 0,
                held: true,
            },
            pages: vec![[0; PAGE_SIZE]; GFNS.len()],
            machine: Vec::new(),
            disks: [0, 1].map(|_| vec![0; SECTORS as usize * 512]),
        }
    }

    fn run(&self, rng: &mut Rng, full: bool) -> Sent {
        let mut vm = self.clone();
        let mut tally = Tally::default();
        let mut encoder = PageEncoder::new(EncoderOptions { lz4: true });
        let mut pages = vec![Vec::new()];
        for (i, page) in vm.pages.iter_mut().enumerate() {
            match rng.below(6) {
                0 => page.fill_with(|| rng.draw() as u8),
                1 => page.fill(0),
                // Deltas: what makes a page written twice, or not, show.
                2 | 3 => page[8 * rng.below(500) as usize] = rng.draw() as u8,
                _ => {}
            }
            let prev = (!full).then_some(&self.pages[i]);
            let out = pages.last_mut().unwrap();
            encoder.encode(GFNS[i], page, prev, out);
            if rng.below(5) == 0 {
                pages.push(Vec::new());
            }
        }
        let mut disk = vec![Vec::new()];
        let writes = match rng.below(3) {
            0 if !full => 0,
            _ => 2 + rng.below(4),
        };
        for n in 0..writes {
            let disk_no = (n % 2) as usize;
            let sectors = 1 + rng.below(4);
            let at = rng.below(SECTORS - sectors) * 512;
            let range = at as usize..(at + sectors * 512) as usize;
            let data: Vec<u8> = range.clone().map(|_| rng.draw() as u8).collect();
            let op = match rng.below(6) {
                0 => DiskOp::Discard,
                1 => DiskOp::WriteZeroes,
                _ => DiskOp::Write,
            };
            let record = DiskRecord {
                disk: disk_no as u16,
                op,
                offset: at,
                len: data.len() as u32,
                data: if op == DiskOp::Write { &data } else { &[] },
            };
            record.encode(disk.last_mut().unwrap());
            if op == DiskOp::Write {
                vm.disks[disk_no][range].copy_from_slice(&data);
            } else {
                vm.disks[disk_no][range].fill(0);
            }
        }
        if full {
            // All of both disks, as a full checkpoint has them.
            disk = vec![Vec::new()];
            for (n, content) in vm.disks.iter().enumerate() {
                DiskRecord {
                    disk: n as u16,
                    op: DiskOp::Write,
                    offset: 0,
                    len: content.len() as u32,
                    data: content,
                }
                .encode(disk.last_mut().unwrap());
            }
        }
        let machine = MachineState {
            vm: (0..rng.below(1500)).map(|_| rng.draw() as u8).collect(),
            ..MachineState::default()
        };
        vm.machine = machine.encode().unwrap();
        pages.retain(|p| !p.is_empty());
        disk.retain(|d| !d.is_empty());
        for payload in &pages {
            let count = checkpoint::records(payload).count() as u64;
            tally.add(payload, count, 0);
        }
        for payload in &disk {
            let count = disk_records(payload).count() as u64;
            tally.add(payload, 0, count);
        }
        tally.add(&vm.machine, 0, 0);
        vm.mark.epoch = self.mark.epoch.next();
        vm.mark.digest = tally.end().digest;
        Sent {
            vm,
            pages,
            disk,
            tally,
        }
    }
}

/// What a replica was told and what it promised.
pub(super) struct Told {
    /// Every checkpoint that was sent to its end, oldest first.
    pub history: Vec<Vm>,
    /// The newest of them whose `prepare` returned `Ok`.
    pub promised: Option<usize>,
    /// A full checkpoint has begun since.
    pub filling: bool,
}

impl Told {
    pub(super) fn new() -> Self {
        Self {
            history: Vec::new(),
            promised: None,
            filling: true,
        }
    }

    /// Takes the replica's word after a crash.
    pub(super) fn resume(&mut self, at: Option<Mark>) {
        let found = self.history.iter().position(|vm| Some(vm.mark) == at);
        self.history.truncate(found.map_or(0, |found| found + 1));
        self.promised = found;
        self.filling = at.is_none();
    }

    fn vm(&self) -> Vm {
        match self.promised {
            Some(at) => self.history[at].clone(),
            None => Vm::new(),
        }
    }

    /// One checkpoint. Sometimes another one is begun and not finished before.
    pub(super) fn checkpoint(
        &mut self,
        store: &mut dyn ReplicaStore,
        rng: &mut Rng,
        full: bool,
    ) -> Result<(), StoreError> {
        let mut vm = self.vm();
        if full {
            vm.mark.generation = vm.mark.generation.next();
            self.filling = true;
        }
        let generation = vm.mark.generation;
        if rng.below(4) == 0 {
            let dropped = vm.run(rng, full);
            store.begin(generation, dropped.vm.mark.epoch, full)?;
            for payload in &dropped.pages {
                store.pages(payload)?;
            }
        }
        let sent = vm.run(rng, full);
        let machine = sent.vm.machine.clone();
        let mark = sent.vm.mark;
        store.begin(generation, mark.epoch, full)?;
        for payload in &sent.pages {
            store.pages(payload)?;
        }
        for payload in &sent.disk {
            store.disk(payload)?;
        }
        let (a, b) = machine.split_at(machine.len() / 2);
        store.machine(a)?;
        store.machine(b)?;
        self.history.push(sent.vm);
        store.prepare(generation, mark, &sent.tally.end())?;
        self.promised = Some(self.history.len() - 1);
        self.filling = false;
        store.commit(mark);
        Ok(())
    }

    /// Whether `store` is at exactly one complete checkpoint, not older than promised, and all it retains are right.
    pub(super) fn check(&self, store: &mut DurableStore) -> Result<(), String> {
        let Some(mark) = store.holds() else {
            return match (self.filling, self.promised) {
                (true, _) | (_, None) => Ok(()),
                (false, Some(at)) => Err(format!(
                    "{} was promised, nothing is there",
                    self.history[at].mark
                )),
            };
        };
        let at = self.history.iter().position(|vm| vm.mark == mark);
        let at = at.ok_or_else(|| format!("checkpoint {mark} never was"))?;
        if self.promised > Some(at) {
            return Err(format!("{mark} is there, a newer one was promised"));
        }
        self.history[at].equals(store.image(), &store.machine_bytes(), "newest")?;
        self.past(store)
    }

    /// Whether everything that `store` says it retains is right.
    pub(super) fn past(&self, store: &mut dyn ReplicaStore) -> Result<(), String> {
        let range = store.history().expect("it answers queries").range();
        for mark in range {
            let vm = self.history.iter().find(|vm| vm.mark == mark);
            let vm = vm.ok_or_else(|| format!("retained checkpoint {mark} never was"))?;
            let mut out = Out::begin(store, mark).map_err(|e| format!("copying {mark}: {e}"))?;
            while !store.out_next(50_000).map_err(|e| e.to_string())? {}
            out.end(store, vm)?;
        }
        Ok(())
    }
}

/// A retained checkpoint that is being copied out.
pub(super) struct Out {
    disks: Vec<std::fs::File>,
}

impl Out {
    pub(super) fn begin(store: &mut dyn ReplicaStore, mark: Mark) -> Result<Self, StoreError> {
        let file = |size: &u64| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(*size).unwrap();
            file
        };
        let disks: Vec<_> = shape().disks.iter().map(file).collect();
        let files = disks
            .iter()
            .map(|f| ("a disk".into(), f.try_clone().unwrap()));
        store.out_begin(mark, files.collect())?;
        Ok(Self { disks })
    }

    /// The copy is complete: it is `vm`, is it not?
    pub(super) fn end(&mut self, store: &mut dyn ReplicaStore, vm: &Vm) -> Result<(), String> {
        use std::os::unix::fs::FileExt;
        let copied = store.out_end().ok_or("the copy is gone")?;
        let found = copied
            .finish()
            .map_err(|e| format!("finishing {}: {e}", vm.mark))?;
        if found.mark != vm.mark {
            return Err(format!("{} was wanted, {} copied", vm.mark, found.mark));
        }
        vm.equals(&found.image, &found.machine, "retained")?;
        for (n, want) in vm.disks.iter().enumerate() {
            let mut disk = vec![0; want.len()];
            self.disks[n].read_exact_at(&mut disk, 0).unwrap();
            if disk != *want {
                return Err(format!(
                    "disk {n} of retained checkpoint {} is wrong",
                    vm.mark
                ));
            }
        }
        Ok(())
    }
}

impl Vm {
    pub(super) fn disk(&self, n: usize) -> &[u8] {
        &self.disks[n]
    }

    pub(super) fn equals(&self, image: &Image, machine: &[u8], what: &str) -> Result<(), String> {
        for (gfn, want) in GFNS.iter().zip(&self.pages) {
            if image.page(*gfn).unwrap() != want {
                return Err(format!("{what} {}: frame {gfn:#x} is wrong", self.mark));
            }
        }
        if machine != self.machine {
            return Err(format!("{what} {}: the machine state is wrong", self.mark));
        }
        Ok(())
    }
}
