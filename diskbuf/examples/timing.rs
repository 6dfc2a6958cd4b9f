//! How long an epoch and an activation take on the disk at hand: `cargo run --release -p diskbuf --example timing DIR`.

use std::time::Instant;

use checkpoint::{DiskOp, DiskRecord, Epoch, Generation, VmId};
use diskbuf::{Durability, ReplicaDisks};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let base = std::env::args().nth(1).ok_or("name an empty directory")?;
    for durability in [Durability::Memory, Durability::Disk] {
        for kib in [0usize, 4, 64, 512] {
            let dir = std::path::Path::new(&base).join(format!("{durability:?}-{kib}"));
            let mut disks = ReplicaDisks::open(&dir, VmId(1), &[1 << 30], durability)?;
            disks.begin_full(Generation(1))?;
            let mut times = Vec::new();
            for epoch in 1..=103u64 {
                let mut buffer = Vec::new();
                for block in 0..kib as u64 / 4 {
                    let offset = (epoch * 7919 + block * 104_729) % (1 << 18) * 4096;
                    let data = [epoch as u8; 4096];
                    let op = DiskOp::Write;
                    let record = DiskRecord {
                        disk: 0,
                        op,
                        offset,
                        len: 4096,
                        data: &data,
                    };
                    record.encode(&mut buffer);
                }
                let began = Instant::now();
                disks.process(Epoch(epoch), Generation(1), &[buffer])?;
                times.push(began.elapsed().as_micros());
                std::thread::sleep(std::time::Duration::from_millis(25));
            }
            let began = Instant::now();
            disks.activate(Generation(2), Epoch(103))?;
            let activation = began.elapsed().as_micros();
            times.sort_unstable();
            println!(
                "{durability:?}, {kib} KiB an epoch: process p50 {} us, p99 {} us, max {} us; activate {activation} us",
                times[51], times[101], times[102]
            );
        }
    }
    Ok(())
}
