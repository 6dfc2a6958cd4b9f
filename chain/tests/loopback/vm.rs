//! A VM that does not run: its memory, its disk and what a replica should make of them.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use chain::{ChainClient, ClientError, Handover, VmShape};
use checkpoint::{DiskOp, DiskRecord, EncoderOptions, Epoch, MachineState, PageEncoder, RamRange};

pub const PAGES: usize = 64;
pub const DISK: u64 = 1 << 20;

/// What a replica of a VM with a disk of so many bytes needs.
pub fn shape(disk: u64) -> VmShape {
    let half = (PAGES as u64 / 2) * 4096;
    let ram = [0, 1 << 32].map(|start| RamRange { start, len: half });
    VmShape {
        ram: ram.into(),
        vcpus: 1,
        cpu: Default::default(),
        disks: vec![disk],
        config_toml: String::new(),
    }
}

/// Frame number of the n-th page of RAM.
pub fn gfn(n: usize) -> u64 {
    if n < PAGES / 2 {
        n as u64
    } else {
        (1 << 20) + (n - PAGES / 2) as u64
    }
}

#[derive(Clone)]
pub struct Vm {
    pub ram: Vec<[u8; 4096]>,
    shadow: Vec<[u8; 4096]>,
    pub disk: Vec<u8>,
    /// Its disk before its first epoch.
    born: Vec<u8>,
    pub epoch: Epoch,
    written: Vec<(u64, u8)>,
    /// What it does in the epochs after these: differs from owner to owner.
    lives: Vec<(Epoch, u64)>,
    /// All of its memory changes in each epoch, to what nothing compresses.
    pub busy: bool,
    /// Output is held, says its owner.
    pub holds: bool,
}

impl Vm {
    pub fn new() -> Self {
        Self::with_disk(vec![0; DISK as usize])
    }

    /// One whose disk has a content before it lives.
    pub fn with_old_disk(size: u64) -> Self {
        let blocks = 0..size / 512;
        Self::with_disk(blocks.flat_map(|n| [(n % 251) as u8 | 1; 512]).collect())
    }

    fn with_disk(disk: Vec<u8>) -> Self {
        Self {
            born: disk.clone(),
            ram: vec![[0; 4096]; PAGES],
            shadow: vec![[0; 4096]; PAGES],
            disk,
            epoch: Epoch::ZERO,
            written: Vec::new(),
            lives: vec![(Epoch::ZERO, 0)],
            busy: false,
            holds: true,
        }
    }

    /// Something happens: some pages and disk blocks change.
    pub fn run(&mut self, seed: u64) {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        for _ in 0..10 {
            let x = next();
            let page = &mut self.ram[x as usize % PAGES];
            match x >> 60 {
                0..4 => page.fill((x >> 8) as u8),
                _ => page[(x >> 20) as usize % 4096] ^= 0x5a,
            }
            let block = (x >> 32) % (self.disk.len() as u64 / 512);
            let value = (x >> 40) as u8;
            self.disk[block as usize * 512..][..512].fill(value);
            self.written.push((block * 512, value));
        }
        if self.busy {
            for word in self.ram.iter_mut().flat_map(|p| p.chunks_exact_mut(8)) {
                word.copy_from_slice(&next().to_le_bytes());
            }
        }
    }

    /// One epoch, of which nobody but this VM's owner decides what happens in it.
    pub fn live(&mut self) {
        let next = self.epoch.next();
        let begun = |life: &&(Epoch, u64)| life.0 < next;
        let (_, salt) = self.lives.iter().rev().find(begun).expect("born at zero");
        self.run(next.0 * 1000 + salt);
    }

    /// As it was at the end of `epoch`.
    pub fn at(&self, epoch: Epoch) -> Self {
        let mut vm = Self {
            lives: self.lives.clone(),
            busy: self.busy,
            holds: self.holds,
            ..Self::with_disk(self.born.clone())
        };
        while vm.epoch < epoch {
            vm.live();
            vm.epoch = vm.epoch.next();
        }
        vm.written.clear();
        vm.shadow.clone_from(&vm.ram);
        vm
    }

    /// Resumed from `epoch` by another owner, where it does other things from then on.
    pub fn resumed(&self, epoch: Epoch) -> Self {
        let mut vm = self.at(epoch);
        vm.lives.retain(|(from, _)| *from < epoch);
        vm.lives.push((epoch, vm.lives.len() as u64));
        vm
    }

    pub fn machine(&self) -> Vec<u8> {
        let state = MachineState {
            vm: self.epoch.0.to_le_bytes().to_vec(),
            ..MachineState::default()
        };
        state.encode().unwrap()
    }

    /// Page and disk records of the next checkpoint.
    pub fn records(&mut self, full: bool) -> (Vec<u8>, Vec<u8>) {
        let mut encoder = PageEncoder::new(EncoderOptions { lz4: true });
        let mut pages = Vec::new();
        if full {
            self.shadow.fill([0; 4096]);
        }
        for (n, page) in self.ram.iter().enumerate() {
            encoder.encode(gfn(n), page, Some(&self.shadow[n]), &mut pages);
        }
        self.shadow.clone_from(&self.ram);
        let mut disk = Vec::new();
        let mut write = |offset: u64, data: &[u8]| {
            DiskRecord {
                disk: 0,
                op: DiskOp::Write,
                offset,
                len: data.len() as u32,
                data,
            }
            .encode(&mut disk);
        };
        if full {
            for offset in (0..self.disk.len() as u64).step_by(64 << 10) {
                write(offset, &self.disk[offset as usize..][..64 << 10]);
            }
        } else {
            for (offset, value) in &self.written {
                write(*offset, &[*value; 512]);
            }
        }
        self.written.clear();
        (pages, disk)
    }

    /// What a part of the disk holds, as a record.
    pub fn disk_record(&self, offset: u64, len: u64) -> Vec<u8> {
        let data = &self.disk[offset as usize..][..len as usize];
        let mut out = Vec::new();
        DiskRecord {
            disk: 0,
            op: DiskOp::Write,
            offset,
            len: len as u32,
            data,
        }
        .encode(&mut out);
        out
    }

    /// Sends everything of the next checkpoint but its end.
    pub fn send_body(&mut self, client: &ChainClient, full: bool) -> Result<(), ClientError> {
        self.epoch = self.epoch.next();
        let (pages, disk) = self.records(full);
        client.begin(self.epoch, full, self.holds)?;
        let size = if full {
            24 + (64 << 10)
        } else {
            4 * (24 + 512)
        };
        disk.chunks(size).try_for_each(|some| client.disk(some))?;
        client.pages(&pages)?;
        client.machine(&self.machine())
    }

    pub fn try_checkpoint(&mut self, client: &ChainClient, full: bool) -> Result<(), ClientError> {
        self.send_body(client, full)?;
        client.end()
    }

    pub fn checkpoint(&mut self, client: &ChainClient, full: bool) {
        self.try_checkpoint(client, full).unwrap();
    }

    /// Checks that what a replica hands over is this VM, bit for bit.
    pub fn check(&self, handover: &Handover) {
        assert_eq!(handover.epoch, self.epoch);
        assert_eq!(handover.mark.epoch, self.epoch);
        assert_eq!(handover.machine, self.machine());
        let half = PAGES / 2;
        for (fd, pages) in handover
            .ram
            .iter()
            .zip([&self.ram[..half], &self.ram[half..]])
        {
            let mut file = File::from(fd.try_clone().unwrap());
            file.seek(SeekFrom::Start(0)).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert!(bytes == pages.concat(), "memory differs");
        }
        let disk = std::fs::read(&handover.disks[0]).unwrap();
        assert!(disk == self.disk, "disk differs");
    }
}
