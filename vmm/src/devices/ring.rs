//! One split virtqueue, seen from the device, with every word of the guest's checked (virtio 1.2, 2.7).
//!
//! `virtio-queue` keeps the indices and the notification arithmetic. Descriptor chains are walked here, because its
//! iterator ends quietly at a malformed chain and follows indirect tables nobody negotiated; a device has to tell a
//! short chain from a lie.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::devices::GuestMemory;

/// How a guest broke a queue. The device answers with `DEVICE_NEEDS_RESET`.
#[derive(Debug, Error)]
pub enum RingError {
    /// Addresses or size out of bounds or misaligned when the queue was made ready.
    #[error("queue set up with {0}")]
    Setup(&'static str),
    /// The rings lie outside memory, or the available index ran ahead of the ring.
    #[error("queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A descriptor index beyond the table.
    #[error("descriptor {index} in a table of {size}")]
    Index {
        /// What the guest wrote.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// More descriptors in a chain than the table has.
    #[error("descriptor chain loops")]
    Loop,
    /// An indirect descriptor, which was not offered.
    #[error("indirect descriptor without the feature")]
    Indirect,
    /// A device-readable descriptor after a device-writable one, or a writable one where none belongs.
    #[error("descriptor with the wrong direction")]
    Direction,
    /// A buffer not wholly in RAM.
    #[error("buffer of {len} bytes at {addr:#x} is outside memory")]
    Range {
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// A chain too short to carry what it must.
    #[error("descriptor chain without {0}")]
    Short(&'static str),
    /// Guest memory refused an access inside a buffer that was checked.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A piece of guest memory inside a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

/// A checked descriptor chain: what the device may read, then what it may write.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Index of the first descriptor; what the used ring names.
    pub head: u16,
    /// Device-readable pieces in order.
    pub read: Vec<Piece>,
    /// Device-writable pieces in order.
    pub write: Vec<Piece>,
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|p| u64::from(p.len)).sum()
}

/// Calls `each` with (address, range of the caller's buffer) for the part of `pieces` covering `len` bytes from
/// `skip`; returns the bytes covered.
fn cover<E>(
    pieces: &[Piece],
    mut skip: u64,
    len: usize,
    mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), E>,
) -> Result<usize, E> {
    let mut done = 0;
    for piece in pieces {
        let piece_len = u64::from(piece.len);
        if skip >= piece_len {
            skip -= piece_len;
            continue;
        }
        let here = ((piece_len - skip) as usize).min(len - done);
        if here == 0 {
            break;
        }
        // The piece was checked to lie in memory, so the sum does not wrap.
        each(GuestAddress(piece.addr + skip), done..done + here)?;
        done += here;
        skip = 0;
    }
    Ok(done)
}

impl Chain {
    /// Bytes the device may read.
    pub fn readable(&self) -> u64 {
        total(&self.read)
    }

    /// Bytes the device may write.
    pub fn writable(&self) -> u64 {
        total(&self.write)
    }

    /// Copies from the readable part, beginning `skip` bytes in, into `buf`; returns the bytes copied.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn gather(&self, mem: &GuestMemory, skip: u64, buf: &mut [u8]) -> Result<usize, RingError> {
        let len = buf.len();
        cover(&self.read, skip, len, |addr, range| {
            mem.read_slice(&mut buf[range], addr).map_err(Into::into)
        })
    }

    /// Copies `buf` into the writable part, beginning `skip` bytes in; returns the bytes copied. The pages are marked
    /// dirty in `mem`'s bitmap.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn scatter(&self, mem: &GuestMemory, skip: u64, buf: &[u8]) -> Result<usize, RingError> {
        cover(&self.write, skip, buf.len(), |addr, range| {
            mem.write_slice(&buf[range], addr).map_err(Into::into)
        })
    }
}

/// A queue as saved: registers and positions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Entries chosen by the driver.
    pub size: u16,
    /// Whether the driver made it live.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Guest physical address of the available ring.
    pub avail: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Next entry to take from the available ring.
    pub next_avail: u16,
    /// Next entry to fill in the used ring.
    pub next_used: u16,
}

/// A live or not yet live virtqueue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    max: u16,
    /// As the driver wrote them; checked when it makes the queue ready.
    regs: RingState,
    event_idx: bool,
    /// Whether the driver was last asked to notify; unknown after a restore. Without `EVENT_IDX` the request stands
    /// until changed, and writing it again would only dirty the page.
    listening: Option<bool>,
}

impl Ring {
    /// A queue of at most `max` entries, a power of two; anything else is rounded down to one.
    pub fn new(max: u16) -> Ring {
        let max = match max.min(32_768) {
            0 => 1,
            n => 1 << n.ilog2(),
        };
        Ring {
            queue: Queue::new(max).unwrap_or_default(),
            max,
            regs: RingState {
                size: max,
                ..RingState::default()
            },
            event_idx: false,
            listening: None,
        }
    }

    /// Most entries the driver may choose.
    pub fn max(&self) -> u16 {
        self.max
    }

    /// Whether the driver made it live.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// The driver's registers, writable until the queue is ready.
    pub fn regs_mut(&mut self) -> Option<&mut RingState> {
        (!self.ready()).then_some(&mut self.regs)
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.listening = None;
        self.regs = RingState {
            size: self.max,
            ..RingState::default()
        };
    }

    /// Makes the queue live with the registers as written.
    ///
    /// # Errors
    /// [`RingError::Setup`] naming the register; the queue stays dead.
    pub fn enable(&mut self, mem: &GuestMemory, event_idx: bool) -> Result<(), RingError> {
        let r = &self.regs;
        let mut q = Queue::new(self.max)?;
        q.try_set_size(r.size)
            .map_err(|_| RingError::Setup("a bad size"))?;
        q.try_set_desc_table_address(GuestAddress(r.desc))
            .map_err(|_| RingError::Setup("a misaligned descriptor table"))?;
        q.try_set_avail_ring_address(GuestAddress(r.avail))
            .map_err(|_| RingError::Setup("a misaligned available ring"))?;
        q.try_set_used_ring_address(GuestAddress(r.used))
            .map_err(|_| RingError::Setup("a misaligned used ring"))?;
        q.set_event_idx(event_idx);
        q.set_next_avail(r.next_avail);
        q.set_next_used(r.next_used);
        q.set_ready(true);
        // Address 0 means "never set" to virtio-queue's iterator.
        if r.avail == 0 || !q.is_valid(mem) {
            return Err(RingError::Setup("rings outside memory"));
        }
        self.queue = q;
        self.event_idx = event_idx;
        self.regs.ready = true;
        Ok(())
    }

    /// Registers and positions, for a checkpoint.
    pub fn save(&self) -> RingState {
        let mut state = self.regs.clone();
        state.ready = self.ready();
        if state.ready {
            state.next_avail = self.queue.next_avail();
            state.next_used = self.queue.next_used();
        }
        state
    }

    /// Takes over a saved queue.
    ///
    /// # Errors
    /// [`RingError::Setup`] if it could not have been live in this memory.
    pub fn restore(
        &mut self,
        mem: &GuestMemory,
        state: &RingState,
        event_idx: bool,
    ) -> Result<(), RingError> {
        self.reset();
        self.regs = state.clone();
        self.regs.ready = false;
        if state.ready {
            self.enable(mem, event_idx)?;
        }
        Ok(())
    }

    /// Whether the driver has offered a chain not yet taken.
    ///
    /// # Errors
    /// [`RingError::Queue`].
    pub fn available(&self, mem: &GuestMemory) -> Result<bool, RingError> {
        let idx = self.queue.avail_idx(mem, Ordering::Acquire)?;
        Ok(idx.0 != self.queue.next_avail())
    }

    /// Takes the next offered chain's head.
    ///
    /// # Errors
    /// [`RingError::Queue`] if the available index ran ahead of the ring.
    pub fn pop(&mut self, mem: &GuestMemory) -> Result<Option<u16>, RingError> {
        let mut iter = self.queue.iter(mem)?;
        Ok(iter.next().map(|chain| chain.head_index()))
    }

    /// Gives the chain just taken back: the next [`Ring::pop`] returns it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Reads and checks the chain at `head` into `chain`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn walk(&self, mem: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head;
        chain.read.clear();
        chain.write.clear();
        let size = self.queue.size();
        let mut index = head;
        for _ in 0..size {
            if index >= size {
                return Err(RingError::Index { index, size });
            }
            // `enable` checked that the whole table is in memory.
            let at = GuestAddress(self.queue.desc_table() + 16 * u64::from(index));
            let desc: Descriptor = mem.read_obj(at)?;
            if u32::from(desc.flags()) & VRING_DESC_F_INDIRECT != 0 {
                return Err(RingError::Indirect);
            }
            let piece = Piece {
                addr: desc.addr().0,
                len: desc.len(),
            };
            // Empty pieces carry nothing, so their address is nobody's concern.
            if piece.len > 0 {
                let (to, access) = if desc.is_write_only() {
                    (&mut chain.write, Permissions::Write)
                } else {
                    if !chain.write.is_empty() {
                        return Err(RingError::Direction);
                    }
                    (&mut chain.read, Permissions::Read)
                };
                if !mem.check_range(desc.addr(), piece.len as usize, access) {
                    return Err(RingError::Range {
                        addr: piece.addr,
                        len: piece.len,
                    });
                }
                to.push(piece);
            }
            if !desc.has_next() {
                return Ok(());
            }
            index = desc.next();
        }
        Err(RingError::Loop)
    }

    /// Returns the chain at `head` to the driver with `written` bytes in it.
    ///
    /// # Errors
    /// [`RingError::Queue`].
    pub fn push_used(
        &mut self,
        mem: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        Ok(self.queue.add_used(mem, head, written)?)
    }

    /// Asks the driver not to notify; a hint.
    ///
    /// # Errors
    /// [`RingError::Queue`].
    pub fn quiet(&mut self, mem: &GuestMemory) -> Result<(), RingError> {
        if self.listening != Some(false) {
            self.queue.disable_notification(mem)?;
            self.listening = Some(false);
        }
        Ok(())
    }

    /// Asks the driver to notify again; true if a chain was offered meanwhile, so that nothing will notify of it.
    ///
    /// # Errors
    /// [`RingError::Queue`].
    pub fn listen(&mut self, mem: &GuestMemory) -> Result<bool, RingError> {
        if self.listening == Some(true) && !self.event_idx {
            return self.available(mem);
        }
        let more = self.queue.enable_notification(mem)?;
        self.listening = Some(true);
        Ok(more)
    }

    /// Whether the driver wants an interrupt for what was returned since the last call.
    ///
    /// # Errors
    /// [`RingError::Queue`].
    pub fn wants_interrupt(&mut self, mem: &GuestMemory) -> Result<bool, RingError> {
        let wanted = self.queue.needs_notification(mem)?;
        if self.event_idx {
            return Ok(wanted);
        }
        let flags: u16 = mem.load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Entries in the table.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
}
