//! The block device (virtio 1.2, 5.2) over a [`BlockBackend`].
//!
//! A request is taken from the ring, recorded as in flight and run by the device's thread *without* the device's lock,
//! so a pause never waits for a disk. The disk's bytes move through a buffer of ours: guest memory is read when the
//! request is taken and written when it is delivered, both under the lock, so nothing moves in a paused machine. A
//! request that ends while paused is delivered at resume: the captured memory shows it pending, the captured state
//! lists it, and a restored machine runs it again with the same effect (reads and writes are idempotent).
//!
//! Requests run in the order of the ring, one at a time, so a flush follows every write before it.

pub mod file;
pub mod request;

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::backend::{BlockBackend, SECTOR};
use crate::devices::ring::{Chain, Ring, RingError};
use crate::devices::virtio::{Io, Turn, VirtioDevice};
use crate::devices::{DeviceError, state};
use request::{MAX_RANGE_SECTORS, MAX_RANGES, Op, SEG_MAX, SIZE_MAX, Status};

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding.
const CONFIG: usize = 60;
/// Largest piece handed to the backend at once, bytes.
const PIECE: usize = 1 << 20;

/// What a checkpoint holds of a block device.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    size: u64,
    /// Heads of the requests taken and not yet delivered, oldest first.
    in_flight: Vec<u16>,
}

/// A request being run without the lock.
pub struct BlockJob {
    /// The transport's reset count when it was taken.
    pub(super) era: u64,
    head: u16,
    op: Result<Op, Status>,
    backend: Arc<dyn BlockBackend>,
    status: Status,
    answer: Vec<u8>,
}

impl BlockJob {
    /// Runs the request; may block for as long as the disk does.
    pub fn run(&mut self) {
        self.status = match &self.op {
            Err(status) => *status,
            Ok(op) => match perform(op, self.backend.as_ref(), &mut self.answer) {
                Ok(()) => Status::Ok,
                Err(error) => {
                    tracing::warn!(%error, "disk request failed");
                    self.answer.clear();
                    Status::IoErr
                }
            },
        };
    }
}

fn perform(op: &Op, disk: &dyn BlockBackend, answer: &mut Vec<u8>) -> std::io::Result<()> {
    match op {
        Op::Read { offset, len } => {
            answer.resize(*len, 0);
            for (i, piece) in answer.chunks_mut(PIECE).enumerate() {
                disk.read_at(offset + (i * PIECE) as u64, piece)?;
            }
            Ok(())
        }
        Op::Write { offset, data } => {
            for (i, piece) in data.chunks(PIECE).enumerate() {
                disk.write_at(offset + (i * PIECE) as u64, piece)?;
            }
            Ok(())
        }
        Op::Flush => disk.flush(),
        Op::Discard(ranges) => ranges.iter().try_for_each(|&(o, l)| disk.discard(o, l)),
        Op::WriteZeroes(ranges) => ranges
            .iter()
            .try_for_each(|&(o, l)| disk.write_zeroes(o, l)),
        Op::GetId(len) => {
            answer.extend_from_slice(&disk.id()[..*len]);
            Ok(())
        }
    }
}

/// The block device.
pub struct Block {
    name: String,
    config: [u8; CONFIG],
    backend: Arc<dyn BlockBackend>,
    chain: Chain,
    /// Heads taken from the ring and not delivered, oldest first.
    in_flight: VecDeque<u16>,
    /// How many of `in_flight`, from the front, have been handed out as jobs.
    started: usize,
}

impl Block {
    /// A block device called `blk<index>`.
    pub fn new(index: usize, backend: Arc<dyn BlockBackend>) -> Block {
        let mut config = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(backend.size() / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        Block {
            name: format!("blk{index}"),
            config,
            backend,
            chain: Chain::default(),
            in_flight: VecDeque::new(),
            started: 0,
        }
    }

    /// Heads taken and not delivered, oldest first.
    pub fn in_flight(&self) -> impl Iterator<Item = u16> + '_ {
        self.in_flight.iter().copied()
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ]
        .iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn reset(&mut self) {
        self.in_flight.clear();
        self.started = 0;
    }

    fn service(&mut self, _io: &mut Io<'_>, _wake: u32) -> Result<Turn, RingError> {
        // All of a block device's work is jobs.
        Ok(Turn::Done)
    }

    fn take_job(&mut self, io: &mut Io<'_>) -> Result<Option<BlockJob>, RingError> {
        if !io.queues[0].ready() {
            return Ok(None);
        }
        // Requests recorded by a checkpoint come before those still in the ring.
        let recorded = self.in_flight.get(self.started).copied();
        let head = match recorded {
            Some(head) => head,
            None => loop {
                if let Some(head) = io.queues[0].pop(io.mem)? {
                    break head;
                }
                if !io.queues[0].listen(io.mem)? {
                    return Ok(None);
                }
            },
        };
        io.queues[0].walk(io.mem, head, &mut self.chain)?;
        let op = request::parse(io.mem, &self.chain, self.backend.size())?;
        if recorded.is_none() {
            self.in_flight.push_back(head);
        }
        self.started += 1;
        Ok(Some(BlockJob {
            era: 0,
            head,
            op,
            backend: Arc::clone(&self.backend),
            status: Status::IoErr,
            answer: Vec::new(),
        }))
    }

    fn finish_job(&mut self, io: &mut Io<'_>, job: BlockJob) -> Result<(), RingError> {
        let Some(at) = self.in_flight.iter().position(|&h| h == job.head) else {
            return Ok(());
        };
        self.in_flight.remove(at);
        self.started = self.started.saturating_sub(1);
        // The guest may have rewritten the descriptors meanwhile, so the chain is checked again.
        io.queues[0].walk(io.mem, job.head, &mut self.chain)?;
        let Some(room) = self.chain.writable().checked_sub(1) else {
            return Err(RingError::Short("a status byte"));
        };
        let len = job
            .answer
            .len()
            .min(usize::try_from(room).unwrap_or(usize::MAX));
        let written = self.chain.scatter(io.mem, 0, &job.answer[..len])?;
        self.chain.scatter(io.mem, room, &[job.status as u8])?;
        // Only what was written from the front on counts (2.7.8.2); the status byte does when nothing is left between.
        let used = if written as u64 == room {
            written + 1
        } else {
            written
        };
        io.queues[0].push_used(io.mem, job.head, used as u32)?;
        io.interrupt_for(0)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        state::to_bytes(
            &self.name,
            &Saved {
                size: self.backend.size(),
                in_flight: self.in_flight.iter().copied().collect(),
            },
        )
    }

    fn restore(&mut self, queues: &[Ring], saved: &[u8]) -> Result<(), DeviceError> {
        let wrong = |why: String| DeviceError::State {
            name: self.name.clone(),
            why,
        };
        let saved: Saved = state::from_bytes(&self.name, saved)?;
        if saved.size != self.backend.size() {
            return Err(wrong(format!(
                "is of a disk of {} bytes, this one has {}",
                saved.size,
                self.backend.size()
            )));
        }
        let entries = queues.first().map_or(0, Ring::size);
        if saved.in_flight.len() > usize::from(entries)
            || saved.in_flight.iter().any(|&head| head >= entries)
        {
            return Err(wrong("lists requests its queue cannot hold".to_owned()));
        }
        self.in_flight = saved.in_flight.into();
        self.started = 0;
        Ok(())
    }
}
