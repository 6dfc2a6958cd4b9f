//! What the shipping thread sends, put into a replica's image, is the owner's memory: over random writes, with every
//! encoding, and with the first checkpoint streamed in pieces.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent::epoch::queue::{Blocks, ShipQueue};
use agent::epoch::ship::{Link, Shipper};
use agent::epoch::staging::{RamView, Shadow, Staging};
use chain::image::Image;
use checkpoint::{Epoch, MachineState, PageBitmap};
use vm_memory::{Bytes, GuestAddress};

const LOW: u64 = 0x40_0000;
const HIGH: u64 = 0x1_0000_0000;
const HIGH_LEN: u64 = 0x10_0000;

/// A replica reduced to its image: incremental pages are staged and applied at the end, as a store does.
struct Replica {
    image: Mutex<Image>,
    full: Mutex<bool>,
    ended: Mutex<Vec<Epoch>>,
}

impl Link for Replica {
    fn begin(&self, _: Epoch, full: bool, _: bool) -> Result<(), String> {
        *self.full.lock().unwrap() = full;
        Ok(())
    }
    fn compare(&self, _: Epoch, _: &Blocks) -> Result<(), String> {
        Ok(())
    }
    fn pages(&self, _: Epoch, records: &[u8]) -> Result<(), String> {
        let mut image = self.image.lock().unwrap();
        let result = if *self.full.lock().unwrap() {
            image.write(records)
        } else {
            image.stage(records)
        };
        result.map_err(|e| e.to_string())
    }
    fn disk(&self, _: Epoch, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn machine(&self, _: Epoch, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn end(&self, epoch: Epoch) -> Result<(), String> {
        self.image.lock().unwrap().apply();
        self.ended.lock().unwrap().push(epoch);
        Ok(())
    }
}

struct Noise(u64);

impl Noise {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// One random write somewhere in RAM; returns its frame.
fn write(memory: &vmm::GuestMemory, noise: &mut Noise) -> u64 {
    let base = if noise.next(2) == 0 {
        noise.next(LOW / 4096)
    } else {
        HIGH / 4096 + noise.next(HIGH_LEN / 4096)
    };
    let mut page = [0u8; 4096];
    memory
        .read_slice(&mut page, GuestAddress(base * 4096))
        .unwrap();
    match noise.next(5) {
        0 => page.fill(0),
        1 => page.fill(noise.next(256) as u8),
        2 => page.iter_mut().for_each(|b| *b = noise.next(256) as u8),
        _ => {
            let at = noise.next(4088) as usize;
            page[at..at + 8].copy_from_slice(&noise.next(u64::MAX).to_le_bytes());
        }
    }
    memory
        .write_slice(&page, GuestAddress(base * 4096))
        .unwrap();
    base
}

#[test]
fn the_replicas_image_becomes_the_owners_memory() {
    for seed in 1..=20u64 {
        let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let memory = vmm::GuestMemory::from_ranges(&[
            (GuestAddress(0), LOW as usize),
            (GuestAddress(HIGH), HIGH_LEN as usize),
        ])
        .unwrap();
        for _ in 0..200 {
            write(&memory, &mut noise);
        }
        let view = RamView::new(&memory);
        let replica = Arc::new(Replica {
            image: Mutex::new(Image::new(&view.ranges()).unwrap()),
            full: Mutex::default(),
            ended: Mutex::default(),
        });
        let queue = Arc::new(ShipQueue::new(1 << 20));
        let session = queue.new_session();
        assert!(queue.activate(session, Epoch(1), false));
        let mut dirty = PageBitmap::new(&view.ranges());
        // The first checkpoint: all pages while writes go on, then what was written meanwhile.
        for range in view.ranges() {
            let mut staging = Staging::default();
            view.copy(range.start / 4096, range.len / 4096, &mut staging)
                .unwrap();
            queue.push_pages(staging, Duration::from_secs(60)).unwrap();
            for _ in 0..20 {
                dirty.set(write(&memory, &mut noise));
            }
        }
        for epoch in 1..=6 {
            let mut staging = queue.take_staging();
            view.copy_dirty(&dirty, &mut staging).unwrap();
            queue.barrier().checkpoint(
                Epoch(epoch),
                staging,
                Box::new(MachineState::default()),
                true,
            );
            dirty.clear();
            if epoch < 6 {
                for _ in 0..30 {
                    dirty.set(write(&memory, &mut noise));
                }
            }
        }
        let shadow = Shadow::new(&view).unwrap();
        let mut shipper = Shipper::new(
            queue.clone(),
            replica.clone(),
            shadow,
            true,
            true,
            Arc::default(),
        );
        let shipping = std::thread::spawn(move || shipper.run(session));
        while replica.ended.lock().unwrap().len() < 6 && !shipping.is_finished() {
            std::thread::yield_now();
        }
        queue.close();
        shipping.join().unwrap().unwrap();
        assert_eq!(
            *replica.ended.lock().unwrap(),
            (1..=6).map(Epoch).collect::<Vec<_>>()
        );
        let image = replica.image.lock().unwrap();
        for range in view.ranges() {
            for gfn in range.start / 4096..(range.start + range.len) / 4096 {
                let mut page = [0u8; 4096];
                memory
                    .read_slice(&mut page, GuestAddress(gfn * 4096))
                    .unwrap();
                assert!(
                    image.page(gfn).unwrap() == &page,
                    "seed {seed}: frame {gfn:#x} differs"
                );
            }
        }
    }
}
