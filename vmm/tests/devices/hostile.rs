//! A hostile guest: random rings and random register writes. A device may refuse, never panic, hang or stray.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::backend::BlockBackend;
use vmm::devices::GuestMemory;
use vmm::devices::block::Block;
use vmm::devices::mmio::{MmioDevice, reg};
use vmm::devices::net::Net;
use vmm::devices::rng::Rng;
use vmm::devices::virtio::{Interrupt, Turn, VirtioDevice, WAKE_ALL};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{HIGH, MAC, RAM_HIGH, RAM_LOW, memory};
use crate::stand_ins::{End, TestDisk, TestWire};

const SIZE: u16 = 8;
const QUEUE0: u64 = 0x10000;
const QUEUE1: u64 = 0x20000;

/// A device without threads: the test takes their place.
pub struct Bare {
    pub mem: GuestMemory,
    pub mmio: MmioDevice,
}

impl Bare {
    fn new(device: Box<dyn VirtioDevice>) -> Bare {
        let mem = memory();
        let fd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(fd()));
        let hurry = Arc::new(AtomicBool::new(false));
        let mmio = MmioDevice::new(device, mem.clone(), interrupt, fd(), hurry);
        Bare { mem, mmio }
    }

    pub fn block(disk: Arc<dyn BlockBackend>) -> Bare {
        let mut bare = Bare::new(Box::new(Block::new(0, disk)));
        bare.start(0);
        bare
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.mmio.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn start(&mut self, features: u32) {
        self.set(reg::STATUS, 3);
        self.set(reg::DRIVER_FEATURES_SEL, 0);
        self.set(reg::DRIVER_FEATURES, features);
        self.set(reg::DRIVER_FEATURES_SEL, 1);
        self.set(reg::DRIVER_FEATURES, 1);
        self.set(reg::STATUS, 11);
        for (queue, base) in [(0, QUEUE0), (1, QUEUE1)] {
            self.set(reg::QUEUE_SEL, queue);
            self.set(reg::QUEUE_NUM, u32::from(SIZE));
            self.set(reg::QUEUE_DESC_LOW, base as u32);
            self.set(reg::QUEUE_DRIVER_LOW, base as u32 + 0x1000);
            self.set(reg::QUEUE_DEVICE_LOW, base as u32 + 0x2000);
            self.set(reg::QUEUE_READY, 1);
        }
        self.set(reg::STATUS, 15);
        assert_eq!(self.get(reg::STATUS), 15);
    }

    /// What a device's thread does after an event; the turns and jobs it took.
    fn run(&mut self, most: usize) -> usize {
        for turns in 0..most {
            let turn = self.mmio.service(WAKE_ALL);
            if let Some(mut job) = self.mmio.take_job() {
                job.run();
                self.mmio.finish_job(job);
            } else if turn == Turn::Done {
                return turns;
            }
        }
        panic!("still busy after {most} turns");
    }

    /// One block request with `data` bytes at 0x3000; its status.
    pub fn request(&mut self, kind: u32, data: u32, write: bool) -> u8 {
        let put = |at: u64, bytes: &[u8]| self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        put(0x2000, &kind.to_le_bytes());
        put(0x2008, &[0; 8]);
        let flags = if write { 3 } else { 1 };
        for (i, (addr, len, flags)) in [
            (0x2000u64, 16u32, 1u16),
            (0x3000, data, flags),
            (0x6000, 1, 2),
        ]
        .into_iter()
        .enumerate()
        {
            put(
                QUEUE0 + 16 * i as u64,
                &desc(addr, len, flags, i as u16 + 1),
            );
        }
        let mut idx = [0; 2];
        self.mem
            .read_slice(&mut idx, GuestAddress(QUEUE0 + 0x1002))
            .unwrap();
        let idx = u16::from_le_bytes(idx).wrapping_add(1);
        self.mem
            .write_slice(&idx.to_le_bytes(), GuestAddress(QUEUE0 + 0x1002))
            .unwrap();
        self.run(10);
        let mut status = [0xaa];
        self.mem
            .read_slice(&mut status, GuestAddress(0x6000))
            .unwrap();
        status[0]
    }
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}

/// Addresses with a good chance of meaning something: in RAM, at its edges, at the rings themselves, anywhere.
fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0x30000..RAM_LOW).boxed(),
        1 => (QUEUE0..QUEUE1 + 0x4000).boxed(),
        1 => (RAM_LOW - 64..RAM_LOW + 64).boxed(),
        1 => (HIGH..HIGH + RAM_HIGH).boxed(),
        1 => (HIGH + RAM_HIGH - 64..HIGH + RAM_HIGH + 64).boxed(),
        1 => (u64::MAX - 64..=u64::MAX).boxed(),
        1 => any::<u64>().boxed(),
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(12),
        Just(16),
        Just(512),
        0..4096u32,
        0..0x20000u32,
        any::<u32>()
    ]
}

fn descriptors() -> impl Strategy<Value = Vec<(u64, u32, u16, u16)>> {
    let flags = prop_oneof![6 => 0..4u16, 1 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    prop::collection::vec((addresses(), lengths(), flags, next), usize::from(SIZE))
}

#[derive(Debug, Clone)]
struct Rings {
    table: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    ahead: u16,
    flags: u16,
}

fn rings() -> impl Strategy<Value = Rings> {
    let head = prop_oneof![10 => 0..SIZE, 1 => any::<u16>()];
    (
        descriptors(),
        prop::collection::vec(head, usize::from(SIZE)),
        prop_oneof![10 => 0..=SIZE, 1 => any::<u16>()],
        any::<u16>(),
    )
        .prop_map(|(table, heads, ahead, flags)| Rings {
            table,
            heads,
            ahead,
            flags,
        })
}

fn put_rings(bare: &Bare, base: u64, rings: &Rings) {
    let put = |at: u64, bytes: &[u8]| bare.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    for (i, &(addr, len, flags, next)) in rings.table.iter().enumerate() {
        put(base + 16 * i as u64, &desc(addr, len, flags, next));
    }
    put(base + 0x1000, &rings.flags.to_le_bytes());
    for (i, head) in rings.heads.iter().enumerate() {
        put(base + 0x1004 + 2 * i as u64, &head.to_le_bytes());
    }
    put(base + 0x1002, &rings.ahead.to_le_bytes());
}

fn any_device(which: u8) -> Bare {
    match which {
        0 => {
            let wire = TestWire::new();
            for _ in 0..20 {
                wire.inject(&[0x5a; 200]);
            }
            Bare::new(Box::new(Net::new(0, MAC, Box::new(End(wire)))))
        }
        // Panics if it is asked for anything beyond its end.
        1 => Bare::new(Box::new(Block::new(0, TestDisk::new(64 << 10)))),
        _ => Bare::new(Box::new(Rng::new(0))),
    }
}

/// Otherwise a device's thread would be woken for ever by a descriptor it cannot serve.
#[test]
fn descriptors_that_cannot_be_served_are_not_listened_to() {
    let wire = TestWire::new();
    let mut bare = Bare::new(Box::new(Net::new(0, MAC, Box::new(End(wire.clone())))));
    assert!(!bare.mmio.wants(0), "listens before the driver is there");
    bare.start(0);
    wire.inject(&[0x5a; 60]);
    wire.set_room(0);
    bare.run(10);
    assert!(
        !bare.mmio.wants(0),
        "listens to frames without a buffer for them"
    );
    assert!(!bare.mmio.wants(1), "listens for room without needing it");
    let put = |at: u64, bytes: &[u8]| bare.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    for (base, flags) in [(QUEUE0, 2), (QUEUE1, 0)] {
        put(base, &desc(0x40000, 100, flags, 0));
        put(base + 0x1002, &1u16.to_le_bytes());
    }
    // A second buffer, so that frames are still wanted after the first.
    put(QUEUE0 + 16, &desc(0x50000, 100, 2, 0));
    put(QUEUE0 + 0x1006, &1u16.to_le_bytes());
    put(QUEUE0 + 0x1002, &2u16.to_le_bytes());
    bare.run(10);
    assert_eq!(wire.read(), 1);
    assert!(bare.mmio.wants(0));
    assert!(bare.mmio.wants(1), "full, and does not listen for room");
}

/// Turns a device may take for two rings of 8, each entry answered or dropped, and a backend's 20 frames.
const MOST: usize = 64;

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn random_rings(which in 0..3u8, first in rings(), second in rings(), event_idx in any::<bool>()) {
        let mut bare = any_device(which);
        bare.start(if event_idx { 1 << 29 } else { 0 });
        put_rings(&bare, QUEUE0, &first);
        put_rings(&bare, QUEUE1, &second);
        // Descriptors that point at the rings let the device overwrite its own available index, so that it may see new
        // entries for ever; bounded turns are only promised otherwise.
        let own_foot = first.table.iter().chain(&second.table).any(|&(addr, len, ..)| {
            addr < QUEUE1 + 0x4000 && addr.saturating_add(u64::from(len)) > QUEUE0
        });
        if own_foot {
            for _ in 0..MOST {
                bare.mmio.service(WAKE_ALL);
                if let Some(mut job) = bare.mmio.take_job() {
                    job.run();
                    bare.mmio.finish_job(job);
                }
            }
        } else {
            bare.run(MOST);
        }
        let status = bare.get(reg::STATUS);
        prop_assert!(status == 15 || status == 15 | 64, "status {status:#x}");
        // Whatever became of it can be saved, restored and reset.
        let saved = bare.mmio.save().unwrap();
        let mut next = any_device(which);
        next.mmio.restore(&saved).unwrap();
        prop_assert_eq!(next.mmio.save().unwrap(), saved);
        bare.set(reg::STATUS, 0);
        bare.start(0);
    }

    /// Chains that are well formed as chains, with every content a block request can have.
    #[test]
    fn random_block_requests(
        kind in prop_oneof![0..16u32, any::<u32>()],
        sector in prop_oneof![0..200u64, any::<u64>()],
        data in prop::collection::vec((0..4096u32, any::<bool>()), 0..6),
        content in prop::collection::vec(any::<u8>(), 256),
        status_len in 0..3u32,
    ) {
        let mut bare = any_device(1);
        bare.start(0);
        let mem = bare.mem.clone();
        let put = |at: u64, bytes: &[u8]| mem.write_slice(bytes, GuestAddress(at)).unwrap();
        put(0x100000, &kind.to_le_bytes());
        put(0x100008, &sector.to_le_bytes());
        let mut parts = vec![(0x100000u64, 16u32, false)];
        let mut data = data;
        data.sort_by_key(|&(_, write)| write);
        for (i, (len, write)) in data.iter().enumerate() {
            let at = 0x200000 + 0x1000 * i as u64;
            put(at, &content);
            parts.push((at, *len, *write));
        }
        parts.push((0x300000, status_len, true));
        let last = parts.len() - 1;
        for (i, (addr, len, write)) in parts.into_iter().enumerate() {
            let flags = u16::from(i < last) | if write { 2 } else { 0 };
            put(QUEUE0 + 16 * i as u64, &desc(addr, len, flags, i as u16 + 1));
        }
        put(0x300000, &[0xaa; 3]);
        put(QUEUE0 + 0x1002, &1u16.to_le_bytes());
        bare.run(MOST);
        let mut used = [0; 2];
        mem.read_slice(&mut used, GuestAddress(QUEUE0 + 0x2002)).unwrap();
        if bare.get(reg::STATUS) == 15 {
            prop_assert_eq!(u16::from_le_bytes(used), 1);
            if status_len > 0 {
                let mut status = [0; 3];
                mem.read_slice(&mut status, GuestAddress(0x300000)).unwrap();
                prop_assert!(status[status_len as usize - 1] <= 2, "no status: {status:?}");
            }
        } else {
            prop_assert_eq!(u16::from_le_bytes(used), 0);
        }
    }

    #[test]
    fn random_register_accesses(
        which in 0..3u8,
        writes in prop::collection::vec(
            (prop_oneof![(0..0x45u64).prop_map(|n| n * 4), any::<u64>()],
             prop_oneof![0..16u32, (0..0x40u32).prop_map(|n| n << 12), any::<u32>()]),
            0..200,
        ),
    ) {
        let mut bare = any_device(which);
        bare.start(0);
        for (offset, value) in writes {
            bare.set(offset, value);
            bare.get(offset);
            for _ in 0..4 {
                bare.mmio.service(WAKE_ALL);
                if let Some(mut job) = bare.mmio.take_job() {
                    job.run();
                    bare.mmio.finish_job(job);
                }
            }
        }
        bare.set(reg::STATUS, 0);
        bare.start(0);
    }

    /// A damaged or forged state is refused or is harmless.
    #[test]
    fn random_states(
        which in 0..3u8,
        cut in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        truncate in any::<bool>(),
    ) {
        let mut bare = any_device(which);
        bare.start(0);
        let mut saved = bare.mmio.save().unwrap();
        for (at, value) in flips {
            let at = at.index(saved.state.len());
            saved.state[at] ^= value;
        }
        if truncate {
            saved.state.truncate(cut.index(saved.state.len()));
        }
        let mut next = any_device(which);
        let restored = next.mmio.restore(&saved);
        prop_assert!(!truncate || restored.is_err(), "a truncated state was taken");
        for _ in 0..MOST {
            next.mmio.service(WAKE_ALL);
            if let Some(mut job) = next.mmio.take_job() {
                job.run();
                next.mmio.finish_job(job);
            }
        }
        next.set(reg::STATUS, 0);
        next.start(0);
    }
}
