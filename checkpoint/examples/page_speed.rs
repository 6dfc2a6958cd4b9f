//! Measures the page encoder and decoder: nanoseconds per page and bytes per record, for the pages guests make.
//!
//! `cargo run --release -p checkpoint --example page_speed`. Figures, not a test: nothing here can fail on a slow
//! machine. Each batch's best time of many rounds counts, so that a busy machine shows little. The pages of one kind
//! do not fit the L2 cache together, as an epoch's do not.

use std::hint::black_box;
use std::time::Instant;

use checkpoint::{EncoderOptions, PAGE_SIZE, Page, PageEncoder, records};

const PAGES: usize = 2048;
/// Pages timed at once: few enough that most batches are not interrupted.
const BATCH: usize = 32;
const ROUNDS: u32 = 20;

/// A kind of page: its name, and how the new content comes from the old.
type Kind = (&'static str, fn(&Page, u64) -> Page);

fn main() {
    println!(
        "{:<28} {:>10} {:>10} {:>8}",
        "page", "encode ns", "decode ns", "bytes"
    );
    let kinds: [Kind; 8] = [
        ("unchanged", |old, _| *old),
        ("zero", |_, _| [0; PAGE_SIZE]),
        ("1 word changed", |old, seed| words(old, seed, 1)),
        ("8 words changed", |old, seed| words(old, seed, 8)),
        ("64 words changed", |old, seed| words(old, seed, 64)),
        ("every other word changed", |old, _| every_other(old)),
        ("text, rewritten", |_, seed| text(seed)),
        ("noise, rewritten", |_, seed| noise(seed ^ 0x5555)),
    ];
    for (name, new) in kinds {
        let old: Vec<Page> = (0..PAGES as u64).map(noise).collect();
        let new: Vec<Page> = old.iter().zip(0u64..).map(|(o, i)| new(o, i)).collect();
        let mut encoder = PageEncoder::new(EncoderOptions { lz4: true });
        let mut out = Vec::with_capacity(BATCH * (PAGE_SIZE + 16));
        let mut best = vec![(u128::MAX, u128::MAX); PAGES / BATCH];
        let mut bytes = 0;
        for _ in 0..ROUNDS {
            bytes = 0;
            for (batch, best) in best.iter_mut().enumerate() {
                out.clear();
                let range = batch * BATCH..(batch + 1) * BATCH;
                let start = Instant::now();
                for gfn in range {
                    black_box(encoder.encode(gfn as u64, &new[gfn], Some(&old[gfn]), &mut out));
                }
                best.0 = best.0.min(start.elapsed().as_nanos());
                bytes += out.len();
                let mut page = [0; PAGE_SIZE];
                let start = Instant::now();
                for record in records(&out) {
                    let record = record.expect("our own records");
                    record
                        .decode(&old[record.gfn as usize], &mut page)
                        .expect("our own records");
                    black_box(&page);
                }
                best.1 = best.1.min(start.elapsed().as_nanos());
            }
        }
        let encode = best.iter().map(|b| b.0).sum::<u128>() / PAGES as u128;
        let decode = best.iter().map(|b| b.1).sum::<u128>() / PAGES as u128;
        println!("{name:<28} {encode:>10} {decode:>10} {:>8}", bytes / PAGES);
    }
}

fn noise(seed: u64) -> Page {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    std::array::from_fn(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    })
}

fn words(old: &Page, seed: u64, count: u64) -> Page {
    let mut new = *old;
    for i in 0..count {
        let word = (seed.wrapping_mul(0x9e37_79b9).wrapping_add(i * 509) % 512) as usize;
        new[word * 8] ^= 0xff;
    }
    new
}

fn every_other(old: &Page) -> Page {
    let mut new = *old;
    for word in (0..512).step_by(2) {
        new[word * 8] ^= 0xff;
    }
    new
}

fn text(seed: u64) -> Page {
    const WORDS: [&[u8]; 8] = [
        b"checkpoint ",
        b"epoch ",
        b"the ",
        b"replica ",
        b"of ",
        b"a ",
        b"machine ",
        b"page ",
    ];
    let source = noise(seed);
    let mut bytes = source
        .iter()
        .flat_map(|b| WORDS[usize::from(b & 7)].iter().copied());
    std::array::from_fn(|_| bytes.next().unwrap_or(b' '))
}
