//! Frames between an owner and its chain, and along the chain.
//!
//! ```text
//!  0            4             8        16               24          32
//! | magic u32  | version u16 | kind u16 | vm, low u64  | generation u64 | epoch u64 |
//!  32               36               40          44             52             60               64
//! | payload_len u32 | payload CRC u32 | flags u32 | vm, high u64 | reserved [8]=0 | header CRC u32 | payload
//! ```
//!
//! A VM is its UUID's halves. All little endian; both checksums are CRC32C. Every frame bears the generation it was sent in: a receiver refuses
//! any other (invariant I4). Payloads are described in docs/wire-format.md.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use checkpoint::{Epoch, Generation, VmId};

/// Size of a frame's header in bytes.
pub const HEADER: usize = 64;
/// Longest payload in bytes.
pub const PAYLOAD_MAX: usize = (1 << 20) + (512 << 10);
const MAGIC: u32 = u32::from_le_bytes(*b"UCHN");
const VERSION: u16 = 7;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// First on every connection: who greets, and what for.
    Hello = 1,
    /// Answer: the connection stands. The payload is the checkpoint that this replica holds and can go on from, as a
    /// [`crate::Mark`]; empty if there is none.
    HelloOk = 2,
    /// Answer: not yet (the payload says why, UTF-8); try again.
    NotReady = 3,
    /// Answer, to anything: the sender's generation is over; `generation` is the newer one.
    Refused = 4,
    /// A checkpoint begins. With [`FLAG_FULL`] it replaces the whole image, with [`FLAG_INSTALL`] that of a joining
    /// replica. Otherwise the payload says what it is applied to, a [`crate::Mark`], and the generation in which it
    /// was first sent (u64). With [`FLAG_HELD`] the owner holds its output from its capture on, at the latest.
    Begin = 5,
    /// Page records.
    Pages = 6,
    /// Disk records.
    Disk = 7,
    /// A piece of the machine state.
    Machine = 8,
    /// The checkpoint is complete: bincode [`checkpoint::CheckpointEnd`], with [`FLAG_INSTALL`] after the
    /// [`crate::Mark`] that the joining replica then holds.
    End = 9,
    /// The tail has processed every checkpoint up to `epoch`.
    Ack = 10,
    /// The sender lives.
    Heartbeat = 11,
    /// A replica further down is lost: bincode `(HostId, String)`.
    Broken = 12,
    /// The successor has now been sent everything up to `epoch`, which is all that its predecessor held.
    Complete = 13,
    /// The joining replica has everything and can become the tail. Up the chain, to the owner.
    JoinerReady = 14,
    /// The owner has stopped the VM for good at `epoch`, which is committed: the head is to take it over.
    Yield = 15,
    /// To the tail: which checkpoints are there? First and last epoch (u64 each); zero and zero: the newest.
    Query = 16,
    /// Answer: [`crate::Mark`]s, oldest first.
    Answer = 17,
    /// From a joining replica to the tail that fills it: digests of what its mirrors hold, see [`crate::blocks`]. An empty one
    /// ends them.
    Digests = 18,
    /// Down a chain that begins: the owner's digests of disk blocks, see [`crate::blocks`]. A replica replaces those in which
    /// it differs before it passes them on.
    Compare = 19,
    /// Answer, from the tail to the owner: which of these blocks every replica holds already.
    Compared = 20,
    /// Answer to a greeting: this host will not have a replica in this generation; bincode `(HostId, String)`, perhaps of one
    /// further down. Asking again is of no use.
    Declined = 21,
    /// Answer to a greeting that was meant for another host: bincode [`checkpoint::HostId`], who this is.
    Stranger = 22,
    /// Answer to a probe: bincode [`crate::probe::Alive`].
    Alive = 23,
    /// A piece of a file is asked for, see [`crate::files`].
    File = 24,
    /// Answer: the piece.
    FilePart = 25,
}

/// [`Kind::Begin`]: this checkpoint replaces the whole image.
pub const FLAG_FULL: u32 = 1;
/// [`Kind::Begin`], with [`FLAG_FULL`]: disks keep what they hold, and are sent only what differs.
pub const FLAG_KEEP: u32 = 4;
/// [`Kind::Begin`] and [`Kind::End`]: the content of a joining replica.
pub const FLAG_INSTALL: u32 = 2;
/// [`Kind::Broken`]: the replica's host has declined to have one, and will not in this generation.
pub const FLAG_DECLINED: u32 = 8;

/// [`Kind::Begin`]: from this checkpoint's capture on, at the latest, the owner's output is held.
pub const FLAG_HELD: u32 = 16;

impl Kind {
    fn from_u16(n: u16) -> Option<Self> {
        Some(match n {
            1 => Self::Hello,
            2 => Self::HelloOk,
            3 => Self::NotReady,
            4 => Self::Refused,
            5 => Self::Begin,
            6 => Self::Pages,
            7 => Self::Disk,
            8 => Self::Machine,
            9 => Self::End,
            10 => Self::Ack,
            11 => Self::Heartbeat,
            12 => Self::Broken,
            13 => Self::Complete,
            14 => Self::JoinerReady,
            15 => Self::Yield,
            16 => Self::Query,
            17 => Self::Answer,
            18 => Self::Digests,
            19 => Self::Compare,
            20 => Self::Compared,
            21 => Self::Declined,
            22 => Self::Stranger,
            23 => Self::Alive,
            24 => Self::File,
            25 => Self::FilePart,
            _ => return None,
        })
    }
}

/// A frame without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The VM.
    pub vm: VmId,
    /// The sender's generation.
    pub generation: Generation,
    /// The epoch it belongs to, where it does.
    pub epoch: Epoch,
    /// `FLAG_*`.
    pub flags: u32,
}

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection ended between frames.
    #[error("the connection was closed")]
    Closed,
    /// The connection failed, or ended inside a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer speaks something else.
    #[error("not a chain peer (magic {0:#010x})")]
    Magic(u32),
    /// Another version.
    #[error(
        "the peer speaks version {0} of the chain protocol, this program version {VERSION}: install the same understudy on all hosts"
    )]
    Version(u16),
    /// A kind this version does not know.
    #[error("frame of unknown kind {0}")]
    Kind(u16),
    /// Too long.
    #[error("frame of {0} bytes is over the limit of {PAYLOAD_MAX}")]
    TooLong(usize),
    /// Damaged on the way.
    #[error("{0} checksum is wrong")]
    Checksum(&'static str),
    /// A flag that this version does not know, or not on this kind of frame, or a reserved byte that is not zero.
    #[error("a {0:?} frame has flags or reserved bytes that this version does not know")]
    Reserved(Kind),
    /// A payload that is not what this kind of frame carries.
    #[error("a {0:?} frame's payload is malformed")]
    Payload(Kind),
    /// A frame that the peer may not send here.
    #[error("a {0:?} frame is out of place: {1}")]
    OutOfPlace(Kind, &'static str),
}

/// A frame's header as bytes, for a payload of that length and checksum.
fn header(frame: &Frame, length: usize, crc: u32) -> [u8; HEADER] {
    let mut h = [0u8; HEADER];
    h[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    h[4..6].copy_from_slice(&VERSION.to_le_bytes());
    h[6..8].copy_from_slice(&(frame.kind as u16).to_le_bytes());
    let (low, high) = frame.vm.halves();
    h[8..16].copy_from_slice(&low.to_le_bytes());
    h[16..24].copy_from_slice(&frame.generation.0.to_le_bytes());
    h[24..32].copy_from_slice(&frame.epoch.0.to_le_bytes());
    h[32..36].copy_from_slice(&(length as u32).to_le_bytes());
    h[36..40].copy_from_slice(&crc.to_le_bytes());
    h[40..44].copy_from_slice(&frame.flags.to_le_bytes());
    h[44..52].copy_from_slice(&high.to_le_bytes());
    let crc = crc32c::crc32c(&h[..60]);
    h[60..64].copy_from_slice(&crc.to_le_bytes());
    h
}

/// A payload as received, with the checksum that it bears and that has been verified. Reused from frame to frame; a clone
/// shares the content, so that a frame may be kept and wait to be sent without a copy.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    bytes: Arc<Vec<u8>>,
    crc: u32,
}

impl Payload {
    /// The buffer, empty, for another content; a new one if somebody still needs the one there is.
    fn empty(&mut self) -> &mut Vec<u8> {
        if Arc::get_mut(&mut self.bytes).is_none() {
            self.bytes = Arc::default();
        }
        let bytes = Arc::make_mut(&mut self.bytes);
        bytes.clear();
        bytes
    }

    /// Replaces the content by one that is to be sent.
    pub fn fill(&mut self, content: &[u8]) {
        self.empty().extend_from_slice(content);
        self.crc = crc32c::crc32c(content);
    }

    /// The checksum that it bears.
    pub(crate) fn crc(&self) -> u32 {
        self.crc
    }

    /// Memory it takes, in bytes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}

impl std::ops::Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Writes one frame.
///
/// # Errors
/// The connection's; [`io::ErrorKind::InvalidInput`] for a payload over [`PAYLOAD_MAX`].
pub fn write(to: &mut impl Write, frame: &Frame, payload: &[u8]) -> io::Result<()> {
    write_parts(to, frame, payload, crc32c::crc32c(payload))
}

/// Writes a frame on as it was read: its payload keeps the checksum it came with, so that damage in this host's
/// memory shows at the next one.
///
/// # Errors
/// As [`write`].
pub fn forward(to: &mut impl Write, frame: &Frame, payload: &Payload) -> io::Result<()> {
    write_parts(to, frame, payload, payload.crc)
}

fn write_parts(to: &mut impl Write, frame: &Frame, payload: &[u8], crc: u32) -> io::Result<()> {
    let header = Header::new(frame, payload.len(), crc)?;
    let mut done = 0;
    while done < HEADER + payload.len() {
        match to.write_vectored(&header.rest(payload, done)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A frame's header, ready to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Header([u8; HEADER]);

impl Header {
    /// For a payload of that length and checksum.
    pub(crate) fn new(frame: &Frame, length: usize, crc: u32) -> io::Result<Self> {
        if length > PAYLOAD_MAX {
            let long = WireError::TooLong(length);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, long));
        }
        Ok(Self(header(frame, length, crc)))
    }

    /// What is left of header and payload once `done` bytes of both have been sent.
    pub(crate) fn rest<'a>(&'a self, payload: &'a [u8], done: usize) -> [IoSlice<'a>; 2] {
        if done < HEADER {
            [IoSlice::new(&self.0[done..]), IoSlice::new(payload)]
        } else {
            [IoSlice::new(&payload[done - HEADER..]), IoSlice::new(&[])]
        }
    }
}

/// Reads one frame; `payload` is replaced by its payload, verified.
///
/// # Errors
/// [`WireError`]; afterwards the connection is of no use. Never panics, never allocates over [`PAYLOAD_MAX`].
pub fn read(from: &mut impl Read, payload: &mut Payload) -> Result<Frame, WireError> {
    let mut h = [0u8; HEADER];
    let mut got = 0;
    while got < HEADER {
        match from.read(&mut h[got..]) {
            Ok(0) if got == 0 => return Err(WireError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let (frame, length, crc) = parse(&h)?;
    let bytes = payload.empty();
    bytes.reserve(length);
    let read = from.take(length as u64).read_to_end(bytes)?;
    if read != length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    if crc32c::crc32c(payload) != crc {
        return Err(WireError::Checksum("a frame's payload"));
    }
    payload.crc = crc;
    Ok(frame)
}

fn parse(h: &[u8; HEADER]) -> Result<(Frame, usize, u32), WireError> {
    let word = |at: usize| u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    if word(0) != MAGIC {
        return Err(WireError::Magic(word(0)));
    }
    if crc32c::crc32c(&h[..60]) != word(60) {
        return Err(WireError::Checksum("a frame's header"));
    }
    let (version, kind) = (word(4) as u16, (word(4) >> 16) as u16);
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    let kind = Kind::from_u16(kind).ok_or(WireError::Kind(kind))?;
    let length = word(32) as usize;
    if length > PAYLOAD_MAX {
        return Err(WireError::TooLong(length));
    }
    let flags = word(40);
    let known = match kind {
        Kind::Begin => FLAG_FULL | FLAG_KEEP | FLAG_INSTALL | FLAG_HELD,
        Kind::End => FLAG_INSTALL,
        Kind::Broken => FLAG_DECLINED,
        _ => 0,
    };
    if flags & !known != 0 || h[52..60] != [0; 8] {
        return Err(WireError::Reserved(kind));
    }
    let frame = Frame {
        kind,
        vm: VmId::from_halves(long(8), long(44)),
        generation: Generation(long(16)),
        epoch: Epoch(long(24)),
        flags,
    };
    Ok((frame, length, word(36)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Frame {
        Frame {
            kind: Kind::Begin,
            vm: VmId(0x0123_4567_89ab_4cde_8f01_2345_6789_abcd),
            generation: Generation(3),
            epoch: Epoch(99),
            flags: 1,
        }
    }

    fn bytes(payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out, &sample(), payload).unwrap();
        out
    }

    #[test]
    fn a_frame_comes_back() {
        let mut payload = Payload::default();
        assert_eq!(
            read(&mut &bytes(b"hello")[..], &mut payload).unwrap(),
            sample()
        );
        assert_eq!(&payload[..], b"hello");
    }

    #[test]
    fn an_end_between_frames_is_not_one_inside() {
        let mut payload = Payload::default();
        assert!(matches!(
            read(&mut &[][..], &mut payload),
            Err(WireError::Closed)
        ));
        let bytes = bytes(b"hello");
        for cut in 1..bytes.len() {
            assert!(
                matches!(
                    read(&mut &bytes[..cut], &mut payload),
                    Err(WireError::Io(_))
                ),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn what_a_later_version_might_mean_is_refused() {
        let mut flags = sample();
        flags.kind = Kind::Pages;
        let mut out = Vec::new();
        write(&mut out, &flags, b"").unwrap();
        assert!(matches!(
            read(&mut &out[..], &mut Payload::default()),
            Err(WireError::Reserved(Kind::Pages))
        ));
        let mut reserved = bytes(b"");
        reserved[55] = 1;
        let crc = crc32c::crc32c(&reserved[..60]);
        reserved[60..64].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(
            read(&mut &reserved[..], &mut Payload::default()),
            Err(WireError::Reserved(_))
        ));
    }

    #[test]
    fn damage_between_reading_and_forwarding_shows_at_the_next_host() {
        let mut payload = Payload::default();
        let frame = read(&mut &bytes(b"hello")[..], &mut payload).unwrap();
        let mut out = Vec::new();
        forward(&mut out, &frame, &payload).unwrap();
        assert_eq!(out, bytes(b"hello"));
        Arc::make_mut(&mut payload.bytes)[2] ^= 1;
        out.clear();
        forward(&mut out, &frame, &payload).unwrap();
        assert!(matches!(
            read(&mut &out[..], &mut Payload::default()),
            Err(WireError::Checksum(_))
        ));
    }

    #[test]
    fn a_payload_over_the_limit_is_neither_sent_nor_taken() {
        let long = vec![0; PAYLOAD_MAX + 1];
        assert!(write(&mut Vec::new(), &sample(), &long).is_err());
        let mut lie = header(&sample(), PAYLOAD_MAX + 1, 0).to_vec();
        lie.extend_from_slice(&long);
        assert!(matches!(
            read(&mut &lie[..], &mut Payload::default()),
            Err(WireError::TooLong(_))
        ));
    }

    proptest! {
        #[test]
        fn every_flipped_bit_is_found(bit in 0usize..(HEADER + 100) * 8) {
            let mut bytes = bytes(&[5; 100]);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(read(&mut &bytes[..], &mut Payload::default()).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), fix in any::<bool>()) {
            if fix && bytes.len() >= HEADER {
                bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
                let crc = crc32c::crc32c(&bytes[..60]);
                bytes[60..64].copy_from_slice(&crc.to_le_bytes());
            }
            let mut payload = Payload::default();
            let _ = read(&mut &bytes[..], &mut payload);
            prop_assert!(payload.bytes.capacity() <= PAYLOAD_MAX + 64);
        }
    }
}
