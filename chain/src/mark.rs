//! Which checkpoint exactly: an epoch's number alone does not say, because after a takeover the new owner reuses the
//! numbers that the old one gave to checkpoints nobody acknowledged.

use std::fmt;

use checkpoint::{Epoch, Generation};
use serde::{Deserialize, Serialize};

/// Size of an encoded mark in bytes.
pub const MARK_SIZE: usize = 24;

/// Names one checkpoint of a VM, across owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mark {
    /// The generation it was first sent in. A generation has one owner, so generation and epoch name one content. Sent
    /// again in a later generation it keeps its name.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
    /// CRC32C over all its payloads, as in [`checkpoint::CheckpointEnd`]: a second witness.
    pub digest: u32,
    /// Whether the owner's output was held from this checkpoint's capture on, at the latest. If not, output flowed that
    /// this checkpoint does not know of, and it is never resumed from.
    ///
    /// Left out where marks are serialised with serde (commands to the master, an agent's messages to its VMs'
    /// processes): these name checkpoints that are resumed from, which are held.
    #[serde(skip, default = "held")]
    pub held: bool,
}

fn held() -> bool {
    true
}

/// In an encoded mark: output was not held.
const FLAG_FLOWING: u8 = 1;

impl Mark {
    /// Little endian: generation u64, epoch u64, digest u32, flags u32 (1: the owner's output was not held).
    #[must_use]
    pub fn to_bytes(self) -> [u8; MARK_SIZE] {
        let mut out = [0; MARK_SIZE];
        out[0..8].copy_from_slice(&self.generation.0.to_le_bytes());
        out[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[16..20].copy_from_slice(&self.digest.to_le_bytes());
        out[20] = if self.held { 0 } else { FLAG_FLOWING };
        out
    }

    /// Reads what [`Mark::to_bytes`] wrote; `None` for anything else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; MARK_SIZE] = bytes.try_into().ok()?;
        let (generation, rest) = bytes.split_first_chunk::<8>()?;
        let (epoch, rest) = rest.split_first_chunk::<8>()?;
        let (digest, rest) = rest.split_first_chunk::<4>()?;
        let held = match rest {
            [0, 0, 0, 0] => true,
            [FLAG_FLOWING, 0, 0, 0] => false,
            _ => return None,
        };
        Some(Self {
            generation: Generation(u64::from_le_bytes(*generation)),
            epoch: Epoch(u64::from_le_bytes(*epoch)),
            digest: u32::from_le_bytes(*digest),
            held,
        })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of generation {}", self.epoch, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_comes_back_and_nothing_else_is_one() {
        let mark = Mark {
            generation: Generation(3),
            epoch: Epoch(1 << 40),
            digest: 0xdead_beef,
            held: true,
        };
        let bytes = mark.to_bytes();
        assert_eq!(Mark::from_bytes(&bytes), Some(mark));
        let flowing = Mark {
            held: false,
            ..mark
        };
        assert_eq!(Mark::from_bytes(&flowing.to_bytes()), Some(flowing));
        assert_ne!(flowing.to_bytes(), bytes);
        assert_eq!(Mark::from_bytes(&bytes[..23]), None);
        assert_eq!(Mark::from_bytes(&[]), None);
        let mut reserved = bytes;
        reserved[23] = 1;
        assert_eq!(Mark::from_bytes(&reserved), None);
        let mut unknown = bytes;
        unknown[20] = 2;
        assert_eq!(Mark::from_bytes(&unknown), None);
    }
}
