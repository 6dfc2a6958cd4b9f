//! The shipping thread: takes staged epochs and disk writes off the queue, encodes them and sends them to the head
//! while the guest runs on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use checkpoint::{Encoded, EncoderOptions, Epoch, PAGE_SIZE, PageEncoder};

use super::queue::{Blocks, Item, ShipQueue};
use super::staging::{Shadow, Staging, StagingError};
use super::stats::Recorder;

/// Encoded pages are sent in frames of about this size: small enough that the next replica starts early (cut-through),
/// large enough that headers and system calls do not matter.
const FRAME: usize = 256 << 10;
/// Disk records of at most this many bytes are joined into one frame.
const DISK_FRAME: usize = 256 << 10;

/// Where encoded checkpoints go. The chain's client is one; tests have another.
pub trait Link: Send + Sync {
    /// Announces `epoch`; `full` if it replaces the whole image, except for what [`Link::compare`] finds to be there;
    /// `held` if from the end of the epoch before on output is held until it is acknowledged.
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
    recorder: Arc<Mutex<Recorder>>,
    buffer: Vec<u8>,
    begun: Option<Epoch>,
    first: bool,
    sent: u64,
    encodings: [u64; 5],
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
        recorder: Arc<Mutex<Recorder>>,
    ) -> Self {
        Self {
            queue,
            link,
            shadow,
            encoder: PageEncoder::new(EncoderOptions { lz4 }),
            recorder,
            buffer: Vec::with_capacity(FRAME + 2 * PAGE_SIZE),
            begun: None,
            first,
            sent: 0,
            encodings: [0; 5],
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
        match item {
            Item::Disk { epoch, bytes } => {
                self.begin(epoch)?;
                debug_assert!(bytes.len() <= (1 << 20) + DISK_FRAME);
                self.sent += bytes.len() as u64;
                self.link.disk(epoch, &bytes).map_err(ShipError::Link)
            }
            Item::Compare { epoch, blocks } => {
                self.begin(epoch)?;
                self.link.compare(epoch, &blocks).map_err(ShipError::Link)
            }
            Item::Pages { epoch, staging } => {
                self.begin(epoch)?;
                self.pages(epoch, &staging)?;
                self.queue.give_staging(staging);
                Ok(())
            }
            Item::Checkpoint {
                epoch,
                staging,
                machine,
            } => {
                let started = Instant::now();
                self.begin(epoch)?;
                self.pages(epoch, &staging)?;
                let state = machine
                    .encode()
                    .map_err(|e| ShipError::Machine(e.to_string()))?;
                self.sent += state.len() as u64;
                self.link.machine(epoch, &state).map_err(ShipError::Link)?;
                self.link.end(epoch).map_err(ShipError::Link)?;
                let dirty = staging.len() as u64;
                self.queue.give_staging(staging);
                self.record(started, dirty);
                Ok(())
            }
        }
    }

    fn begin(&mut self, epoch: Epoch) -> Result<(), ShipError> {
        if self.begun != Some(epoch) {
            self.link
                .begin(epoch, self.first, !self.first)
                .map_err(ShipError::Link)?;
            self.begun = Some(epoch);
            self.first = false;
        }
        Ok(())
    }

    fn pages(&mut self, epoch: Epoch, staging: &Staging) -> Result<(), ShipError> {
        for (gfn, page) in staging.pages() {
            let known = self.shadow.is_known(gfn);
            let shadow = self.shadow.page_mut(gfn)?;
            let reference = known.then_some(&*shadow);
            let encoded = self.encoder.encode(gfn, page, reference, &mut self.buffer);
            self.encodings[encoding_index(encoded)] += 1;
            if encoded != Encoded::Unchanged {
                *shadow = *page;
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

    fn flush_pages(&mut self, epoch: Epoch) -> Result<(), ShipError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.sent += self.buffer.len() as u64;
        self.link
            .pages(epoch, &self.buffer)
            .map_err(ShipError::Link)?;
        self.buffer.clear();
        Ok(())
    }

    fn record(&mut self, started: Instant, dirty: u64) {
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        recorder.ship.push(started.elapsed().as_micros() as u64);
        recorder.sent.push(self.sent);
        recorder.dirty.push(dirty);
        for (total, n) in recorder.encodings.iter_mut().zip(self.encodings) {
            *total += n;
        }
        self.sent = 0;
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
