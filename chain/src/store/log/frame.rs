//! Frames: the pieces of a checkpoint in the log, each with its own checksums. Layout: `docs/store-format.md`.

use crate::mark::{MARK_SIZE, Mark};

/// Size of a frame's header in bytes, and what frames are padded to: a header never lies across two sectors.
pub(super) const HEADER: usize = 64;
/// Longest payload in bytes: above what one message of the chain carries.
pub(super) const PAYLOAD_MAX: usize = 4 << 20;
const MAGIC: &[u8; 4] = b"ULOG";
/// Size of a commit frame's payload in bytes.
pub(super) const COMMIT: usize = 80;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Page records, as received.
    Pages = 1,
    /// Disk records, as received.
    Disk = 2,
    /// A piece of the machine state.
    Machine = 3,
    /// A piece of the disk records that take the checkpoint's disk writes back.
    Undo = 4,
    /// The end of a checkpoint: it counts.
    Commit = 5,
    /// Says that a checkpoint is durable, nothing else.
    Voucher = 6,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub kind: Kind,
    /// Drawn for each filling: no guest knows it, and no frame of an earlier filling bears it.
    pub salt: u64,
    /// Number of the checkpoint in this filling.
    pub lsn: u64,
    /// Checkpoints up to this one were synced before this frame was written.
    pub durable: u64,
    /// Number of the frame in its checkpoint.
    pub index: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Of the payload.
    pub crc: u32,
}

impl Head {
    /// Bytes that the frame takes.
    pub(super) fn span(&self) -> u64 {
        (HEADER as u64 + u64::from(self.len)).next_multiple_of(HEADER as u64)
    }

    /// The frame, padded.
    pub(super) fn frame(mut self, payload: &[u8]) -> Vec<u8> {
        self.len = payload.len() as u32;
        self.crc = crc32c::crc32c(payload);
        let mut out = Vec::with_capacity(self.span() as usize);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&(self.kind as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        for word in [self.salt, self.lsn, self.durable] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.index, self.len, self.crc] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.resize(60, 0);
        out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
        out.extend_from_slice(payload);
        out.resize(self.span() as usize, 0);
        out
    }

    /// The header in `bytes`, if it is one of this filling.
    pub(super) fn parse(bytes: &[u8], salt: u64) -> Option<Self> {
        let h = bytes.first_chunk::<HEADER>()?;
        if h[..4] != *MAGIC {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let kind = match word(4) {
            1 => Kind::Pages,
            2 => Kind::Disk,
            3 => Kind::Machine,
            4 => Kind::Undo,
            5 => Kind::Commit,
            6 => Kind::Voucher,
            _ => return None,
        };
        let head = Self {
            kind,
            salt: long(8),
            lsn: long(16),
            durable: long(24),
            index: word(32),
            len: word(36),
            crc: word(40),
        };
        let good = head.salt == salt
            && head.len as usize <= PAYLOAD_MAX
            && h[44..60].iter().all(|b| *b == 0)
            && crc32c::crc32c(&h[..60]) == word(60);
        good.then_some(head)
    }
}

/// What a commit frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Commit {
    /// The checkpoint.
    pub mark: Mark,
    /// The one before it; none for the first of a filling, whose memory is the base image.
    pub prev: Option<Mark>,
    /// Frames before this one.
    pub frames: u32,
    /// Whether the checkpoint's disk writes can be taken back.
    pub undo: bool,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Page records, which bounds the memory that folding it takes.
    pub pages: u64,
    /// CRC32C over the checksums of their payloads, in order.
    pub digest: u32,
}

const FIRST: u32 = 1;
const NO_UNDO: u32 = 2;

impl Commit {
    /// Encodes.
    pub(super) fn to_bytes(self) -> [u8; COMMIT] {
        let mut out = [0; COMMIT];
        out[..MARK_SIZE].copy_from_slice(&self.mark.to_bytes());
        if let Some(prev) = self.prev {
            out[24..48].copy_from_slice(&prev.to_bytes());
        }
        let first = if self.prev.is_none() { FIRST } else { 0 };
        let undo = if self.undo { 0 } else { NO_UNDO };
        out[48..52].copy_from_slice(&self.frames.to_le_bytes());
        out[52..56].copy_from_slice(&(first | undo).to_le_bytes());
        out[56..64].copy_from_slice(&self.bytes.to_le_bytes());
        out[64..72].copy_from_slice(&self.pages.to_le_bytes());
        out[72..76].copy_from_slice(&self.digest.to_le_bytes());
        out
    }

    /// Decodes; `None` for anything that [`Commit::to_bytes`] does not make.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let b: &[u8; COMMIT] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let flags = word(52);
        if flags & !(FIRST | NO_UNDO) != 0 || word(76) != 0 {
            return None;
        }
        Some(Self {
            mark: Mark::from_bytes(&b[..24])?,
            prev: match flags & FIRST {
                0 => Some(Mark::from_bytes(&b[24..48])?),
                _ => None,
            },
            frames: word(48),
            undo: flags & NO_UNDO == 0,
            bytes: long(56),
            pages: long(64),
            digest: word(72),
        })
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::{Epoch, Generation};
    use proptest::prelude::*;

    use super::*;

    fn mark(n: u64) -> Mark {
        Mark {
            generation: Generation(n),
            epoch: Epoch(n << 32),
            digest: n as u32,
            held: true,
        }
    }

    proptest! {
        #[test]
        fn a_frame_comes_back_and_a_flipped_bit_is_found(
            salt in any::<u64>(), lsn in any::<u64>(), durable in any::<u64>(), index in any::<u32>(),
            kind in 0usize..6, payload in proptest::collection::vec(any::<u8>(), 0..300), flip in 0usize..512,
        ) {
            let kinds = [Kind::Pages, Kind::Disk, Kind::Machine, Kind::Undo, Kind::Commit, Kind::Voucher];
            let head = Head { kind: kinds[kind], salt, lsn, durable, index, len: 0, crc: 0 };
            let mut frame = head.frame(&payload);
            let len = payload.len() as u32;
            let want = Head { len, crc: crc32c::crc32c(&payload), ..head };
            prop_assert_eq!(Head::parse(&frame, salt), Some(want));
            prop_assert_eq!(frame.len() as u64, want.span());
            prop_assert_eq!(Head::parse(&frame, salt.wrapping_add(1)), None);
            frame[flip / 8] ^= 1 << (flip % 8);
            prop_assert_eq!(Head::parse(&frame, salt), None);
        }

        #[test]
        fn a_commit_comes_back_and_hostile_bytes_do_no_harm(
            n in any::<u32>(), first in any::<bool>(), undo in any::<bool>(), bytes in any::<u64>(),
            noise in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let commit = Commit {
                mark: mark(u64::from(n)),
                prev: (!first).then(|| mark(u64::from(n) + 1)),
                frames: n,
                undo,
                bytes,
                pages: bytes ^ 5,
                digest: n,
            };
            let encoded = commit.to_bytes();
            prop_assert_eq!(Commit::from_bytes(&encoded), Some(commit));
            prop_assert_eq!(Commit::from_bytes(&encoded[1..]), None);
            let _ = Commit::from_bytes(&noise);
            let _ = Head::parse(&noise, 0);
        }
    }
}
