//! A host's part as a VM's owner, reduced to what matters to the chain: what it executed, what it sent, what it let out.

use chain::Mark;
use checkpoint::{Epoch, Generation};

/// What the VM did in one epoch: a number nobody else draws.
pub type Item = u64;

/// Everything the VM has done; epoch `e` is item `e - 1`.
pub type History = Vec<Item>;

pub fn digest(history: &[Item]) -> u32 {
    let bytes: Vec<u8> = history.iter().flat_map(|i| i.to_le_bytes()).collect();
    crc32c::crc32c(&bytes)
}

#[derive(Clone, Debug)]
pub struct Owner {
    pub generation: Generation,
    pub history: History,
    /// Names of the checkpoints sent.
    pub marks: Vec<Mark>,
    /// Connected to the chain of its generation.
    pub connected: bool,
    /// Output is held from the checkpoint on that was captured first in this generation (or goes on being held).
    pub holding: bool,
    /// Newest epoch whose output may be out.
    pub committed: usize,
    /// Newest epoch sent whole in this generation.
    pub sent: usize,
    /// What the next checkpoint is applied to; none: the next one is full.
    pub base: Option<Mark>,
}

impl Owner {
    pub fn new(generation: Generation, history: History) -> Self {
        Self {
            generation,
            committed: history.len(),
            sent: history.len(),
            history,
            marks: Vec::new(),
            connected: false,
            holding: false,
            base: None,
        }
    }

    /// A new configuration; everything begins anew, and what was held goes out.
    pub fn follow(&mut self, generation: Generation) {
        self.generation = generation;
        self.connected = false;
        self.base = None;
    }

    pub fn restart(&mut self) {
        self.holding = false;
        self.committed = self.history.len();
        self.sent = self.history.len();
    }

    /// What the outside has seen of it.
    pub fn visible(&self) -> &[Item] {
        if self.holding {
            &self.history[..self.committed]
        } else {
            &self.history
        }
    }

    pub fn ack(&mut self, epoch: Epoch) -> bool {
        let epoch = epoch.0 as usize;
        if !self.holding || epoch > self.sent || epoch <= self.committed {
            return false;
        }
        self.committed = epoch;
        true
    }
}
