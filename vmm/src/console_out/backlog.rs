//! Bytes that wait to be written: a bounded queue that drops its oldest.

use std::collections::VecDeque;

/// Most bytes handed out at once: so much is out of the queue's reach while it is written.
const PIECE: usize = 64 << 10;

/// The queue. No I/O, no locks.
pub struct Backlog {
    bytes: VecDeque<u8>,
    limit: usize,
    dropped: u64,
    burst: u64,
}

impl Backlog {
    /// An empty queue for at most `limit` bytes.
    pub fn new(limit: usize) -> Backlog {
        Backlog {
            bytes: VecDeque::new(),
            limit,
            dropped: 0,
            burst: 0,
        }
    }

    /// Appends; what is too much is dropped, oldest first. True if a burst of drops begins with this.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        self.bytes.extend(bytes);
        let excess = self.bytes.len().saturating_sub(self.limit);
        self.bytes.drain(..excess);
        let begins = excess > 0 && self.burst == 0;
        self.burst += excess as u64;
        self.dropped += excess as u64;
        begins
    }

    /// The oldest bytes, at most one piece, and how many were dropped in the burst that ends with this.
    pub fn take(&mut self) -> (Vec<u8>, u64) {
        let n = self.bytes.len().min(PIECE);
        (
            self.bytes.drain(..n).collect(),
            std::mem::take(&mut self.burst),
        )
    }

    /// Counts bytes that were taken and could not be written.
    pub fn lost(&mut self, bytes: u64) {
        self.dropped += bytes;
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes dropped or lost so far.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}
