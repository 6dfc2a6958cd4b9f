//! The shipping thread: takes staged epochs and disk writes off the queue, encodes them and sends them to the head
//! while the guest runs on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use checkpoint::{Encoded, EncoderOptions, Epoch, PAGE_SIZE, PageEncoder};

use super::queue::{Blocks, Content, Item, ShipQueue};
use super::staging::{Shadow, Staging, StagingError};
use super::stats::Measures;

/// Encoded pages are sent in frames of about this size: small enough that the next replica starts early (cut-through),
/// large enough that headers and system calls do not matter.
const FRAME: usize = 256 << 10;

/// Where encoded checkpoints go. The chain's client is one; tests have others. Each call may block while the chain takes
/// nothing: that is the back-pressure, and no error.
pub trait Link: Send + Sync {
    /// Announces `epoch`; `full` if it replaces the whole image, except for what [`Link::compare`] finds to be there. `held` if
    /// output is held from its capture on: the chain may resume the VM from the first such checkpoint, and from none before.
    fn begin(&self, epoch: Epoch, full: bool, held: bool) -> Result<(), String>;
    /// Asks which disk blocks need not be sent.
    fn compare(&self, epoch: Epoch, blocks: &Blocks) -> Result<(), String>;
    /// Encoded page records.
    fn pages(&self, epoch: Epoch, records: &[u8]) -> Result<(), String>;
    /// Encoded disk records.
    fn disk(&self, epoch: Epoch, records: &[u8]) -> Result<(), String>;
    /// The encoded machine state.
    fn machine(&self, epoch: Epoch, state: &[u8]) -> Result<(), String>;
    /// The epoch is complete.
    fn end(&self, epoch: Epoch) -> Result<(), String>;
}

/// Why shipping stopped.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// The chain does not take it.
    #[error("sending to the chain: {0}")]
    Link(String),
    /// A page outside RAM: a bug, reported rather than sent.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// What the replicas have of a page is not what the guest had: it was written, and nothing noticed.
    #[error(
        "frame {0:#x} changed unnoticed: the backups' copy of the memory is wrong, and is made anew"
    )]
    Unnoticed(u64),
    /// The machine state cannot be encoded.
    #[error("encoding the machine state: {0}")]
    Machine(String),
}

/// State of the thread for one configuration.
pub struct Shipper {
    queue: Arc<ShipQueue>,
    link: Arc<dyn Link>,
    shadow: Shadow,
    encoder: PageEncoder,
    measures: Arc<Measures>,
    buffer: Vec<u8>,
    begun: Option<Epoch>,
    first: bool,
    /// Of the epoch in hand, in bytes.
    sent: u64,
    /// Of the epoch in hand, in pages.
    dirty: u64,
    encodings: [u64; 5],
    unchanged: Vec<u64>,
    /// Pages that differed at the last check, and have not been sent since.
    differed: BTreeSet<u64>,
}

impl Shipper {
    /// A shipper that begins with `shadow`: what the replicas have. If `first`, its first epoch replaces the whole image:
    /// `shadow` has to be all zero then, as the image will be.
    #[must_use]
    pub fn new(
        queue: Arc<ShipQueue>,
        link: Arc<dyn Link>,
        shadow: Shadow,
        lz4: bool,
        first: bool,
        measures: Arc<Measures>,
    ) -> Self {
        Self {
            queue,
            link,
            shadow,
            encoder: PageEncoder::new(EncoderOptions { lz4 }),
            measures,
            buffer: Vec::with_capacity(FRAME + 2 * PAGE_SIZE),
            begun: None,
            first,
            sent: 0,
            dirty: 0,
            encodings: [0; 5],
            unchanged: Vec::new(),
            differed: BTreeSet::new(),
        }
    }

    /// Ships until `session` of the queue is over or the link fails.
    ///
    /// # Errors
    /// [`ShipError`]; what was queued stays uncommitted.
    pub fn run(&mut self, session: u64) -> Result<(), ShipError> {
        while let Some(item) = self.queue.next(session) {
            self.ship(item)?;
        }
        Ok(())
    }

    fn ship(&mut self, item: Item) -> Result<(), ShipError> {
        let Item {
            epoch,
            held,
            content,
        } = item;
        let started = Instant::now();
        if let Content::Check(whole) = &content {
            return self.check(whole);
        }
        self.begin(epoch, held)?;
        match content {
            Content::Check(_) => {}
            Content::Disk(bytes) => {
                self.link.disk(epoch, &bytes).map_err(ShipError::Link)?;
                self.count(epoch, bytes.len());
            }
            Content::Compare(blocks) => {
                self.link.compare(epoch, &blocks).map_err(ShipError::Link)?;
                self.count(epoch, 0);
            }
            Content::Pages(staging) => {
                self.pages(epoch, &staging)?;
                self.queue.give_staging(staging);
            }
            Content::Checkpoint { staging, machine } => {
                self.pages(epoch, &staging)?;
                let state = machine
                    .encode()
                    .map_err(|e| ShipError::Machine(e.to_string()))?;
                self.link.machine(epoch, &state).map_err(ShipError::Link)?;
                self.link.end(epoch).map_err(ShipError::Link)?;
                self.count(epoch, state.len());
                self.queue.give_staging(staging);
                self.queue
                    .tell_unchanged(std::mem::take(&mut self.unchanged));
                self.record(started);
            }
        }
        Ok(())
    }

    fn begin(&mut self, epoch: Epoch, held: bool) -> Result<(), ShipError> {
        if self.begun != Some(epoch) {
            self.link
                .begin(epoch, self.first, held)
                .map_err(ShipError::Link)?;
            self.begun = Some(epoch);
            self.first = false;
        }
        Ok(())
    }

    /// The link has taken so many bytes.
    fn count(&mut self, epoch: Epoch, bytes: usize) {
        self.sent += bytes as u64;
        let now = self.measures.now();
        self.measures.meter().sent(epoch, bytes as u64, now);
    }

    fn pages(&mut self, epoch: Epoch, staging: &Staging) -> Result<(), ShipError> {
        self.dirty += staging.len() as u64;
        for (gfn, page) in staging.pages() {
            let known = self.shadow.is_known(gfn);
            let shadow = self.shadow.page_mut(gfn)?;
            let reference = known.then_some(&*shadow);
            let encoded = self.encoder.encode(gfn, page, reference, &mut self.buffer);
            self.encodings[encoding_index(encoded)] += 1;
            self.differed.remove(&gfn);
            match encoded {
                Encoded::Unchanged => self.unchanged.push(gfn),
                _ => *shadow = *page,
            }
            if !known {
                self.shadow.learn(gfn);
            }
            if self.buffer.len() >= FRAME {
                self.flush_pages(epoch)?;
            }
        }
        self.flush_pages(epoch)
    }

    /// Whether the replicas have what the guest had, as far as it is known what they have. A read from a disk may be under way in
    /// a pause: what it changes is noted after it, and sent before the next check.
    fn check(&mut self, whole: &Staging) -> Result<(), ShipError> {
        let mut differ = BTreeSet::new();
        for (gfn, page) in whole.pages() {
            if self.shadow.is_known(gfn) && self.shadow.page_mut(gfn)? != page {
                if self.differed.contains(&gfn) {
                    return Err(ShipError::Unnoticed(gfn));
                }
                differ.insert(gfn);
            }
        }
        self.differed = differ;
        Ok(())
    }

    fn flush_pages(&mut self, epoch: Epoch) -> Result<(), ShipError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.link
            .pages(epoch, &self.buffer)
            .map_err(ShipError::Link)?;
        self.count(epoch, self.buffer.len());
        self.buffer.clear();
        Ok(())
    }

    fn record(&mut self, started: Instant) {
        let measures = self.measures.clone();
        let mut recorder = measures.recorder();
        recorder.ship.push(started.elapsed().as_micros() as u64);
        recorder.sent.push(std::mem::take(&mut self.sent));
        recorder.dirty.push(std::mem::take(&mut self.dirty));
        for (total, n) in recorder.encodings.iter_mut().zip(self.encodings) {
            *total += n;
        }
        self.encodings = [0; 5];
    }
}

fn encoding_index(encoded: Encoded) -> usize {
    match encoded {
        Encoded::Unchanged => 0,
        Encoded::Zero => 1,
        Encoded::Delta => 2,
        Encoded::Lz4 => 3,
        Encoded::Raw => 4,
    }
}
