//! The journal: an epoch's disk writes, made atomic over all disks of a VM.
//!
//! ```text
//! files `journal.0` and `journal.1`: entries one after the other, from the file's start, each padded with zeros to a
//! multiple of 512 bytes; whatever follows the last entry is left over from an earlier use of the file
//!
//! one entry, little endian
//!    0            4             6          8          16        24            32        48
//!   | "UJRN" u32 | version=2   | kind u16 | salt u64 | seq u64 | durable u64 | vm u128 | generation u64 |
//!    56          64        68                                          72
//!   | epoch u64 | len u32 | CRC32C u32 of bytes 0..68 and the payload | payload: `len` bytes | zeros |
//!   version u16; kind: 0 the disk records of one epoch (see checkpoint::disk), 1 voucher (no payload)
//! ```
//!
//! * `seq` numbers entries over both files without gaps (a voucher bears the number it vouches for); the activation record says up to which they are in the mirrors.
//! * `salt` is drawn anew at every start and not known to a guest, so no guest can forge an entry in a block it writes,
//!   and no entry from before a crash is taken for one from after it.
//! * `durable`: all entries up to this number were synced before this one was written. An entry that is missing or bad
//!   is a torn tail if no later entry vouches for it (cut off, with all that follows it), and damage if one does. After
//!   a sync a voucher is appended, unsynced, so that the newest entry too is vouched for most of the time.

use std::io;
use std::sync::Arc;

use checkpoint::{Epoch, Generation, VmId};

use crate::layer::LayerFile;

/// Entries begin at multiples of this, in bytes: the disk's own unit of atomicity.
pub(crate) const ALIGN: usize = 512;
/// Size of an entry's header in bytes.
pub(crate) const HEADER: usize = 72;
/// Longest payload, in bytes.
pub(crate) const PAYLOAD_MAX: usize = 1 << 30;
const MAGIC: &[u8; 4] = b"UJRN";
const VERSION: u16 = 2;

/// An entry's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Voucher: says `durable`, nothing else.
    pub voucher: bool,
    /// Draw of this start.
    pub salt: u64,
    /// Number.
    pub seq: u64,
    /// Synced up to here.
    pub durable: u64,
    /// The VM.
    pub vm: VmId,
    /// Generation of the epoch.
    pub generation: Generation,
    /// The epoch.
    pub epoch: Epoch,
}

/// An entry, encoded, padding included.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its header.
    pub head: Head,
    bytes: Vec<u8>,
    payload_len: usize,
}

impl Entry {
    /// Encodes; the payload is `writes` one after the other (at most [`PAYLOAD_MAX`] bytes).
    pub(crate) fn new(head: Head, writes: &[Vec<u8>]) -> Self {
        let len: usize = writes.iter().map(Vec::len).sum();
        let mut bytes = Vec::with_capacity((HEADER + len).next_multiple_of(ALIGN));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&u16::from(head.voucher).to_le_bytes());
        let (low, high) = head.vm.halves();
        for word in [
            head.salt,
            head.seq,
            head.durable,
            low,
            high,
            head.generation.0,
            head.epoch.0,
        ] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&(len as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for write in writes {
            bytes.extend_from_slice(write);
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..68]), &bytes[HEADER..]);
        bytes[68..72].copy_from_slice(&crc.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        Self {
            head,
            bytes,
            payload_len: len,
        }
    }

    /// As it lies in the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The disk records.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.bytes[HEADER..HEADER + self.payload_len]
    }
}

/// What recovery looks for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    /// Entries of this draw only.
    pub salt: u64,
    /// Of this VM.
    pub vm: VmId,
    /// Entries up to this number are of no account.
    pub applied: u64,
    /// Mutant for tests: believe every entry.
    pub no_crc: bool,
}

/// Where an entry lies: which of the files, and at which byte.
pub(crate) type Place = (usize, u64);

/// What recovery found.
pub(crate) struct Found {
    /// Entries `applied + 1 ..`, without a gap.
    pub run: Vec<(Place, Entry)>,
    /// Highest number seen, cut off or not.
    pub highest: u64,
    /// Entries after a gap: torn off.
    pub cut: usize,
}

/// Reads both files.
///
/// # Errors
/// `Err(Ok(seq))`: entry `seq` is missing or damaged though it was durable. `Err(Err(e))`: cannot read.
pub(crate) fn recover(
    files: &[Arc<dyn LayerFile>],
    wanted: Wanted,
) -> Result<Found, Result<u64, io::Error>> {
    let mut entries: Vec<(Place, Entry)> = Vec::new();
    for (n, file) in files.iter().enumerate() {
        let end = file.len().map_err(Err)?;
        let mut at = 0;
        while let Some(found) = next(&**file, at, end, wanted).map_err(Err)? {
            at = found.0;
            if found.1.head.seq > wanted.applied {
                let begin = at - found.1.bytes.len() as u64;
                entries.push(((n, begin), found.1));
            }
        }
    }
    let vouched = entries
        .iter()
        .map(|(_, e)| e.head.durable)
        .max()
        .unwrap_or(0);
    entries.retain(|(_, e)| !e.head.voucher);
    entries.sort_by_key(|(_, e)| e.head.seq);
    entries.dedup_by_key(|(_, e)| e.head.seq);
    let highest = entries.last().map_or(wanted.applied, |(_, e)| e.head.seq);
    let whole = entries
        .iter()
        .zip(wanted.applied.saturating_add(1)..)
        .take_while(|((_, e), seq)| e.head.seq == *seq)
        .count();
    if wanted.applied + (whole as u64) < vouched {
        return Err(Ok(wanted.applied + whole as u64 + 1));
    }
    let cut = entries.split_off(whole).len();
    Ok(Found {
        run: entries,
        highest,
        cut,
    })
}

/// The next good entry at or after `at`, and where it ends.
fn next(
    file: &dyn LayerFile,
    mut at: u64,
    end: u64,
    wanted: Wanted,
) -> io::Result<Option<(u64, Entry)>> {
    const WINDOW: u64 = 64 << 10;
    let mut window = vec![0; WINDOW as usize];
    while at + HEADER as u64 <= end {
        let n = (end - at).min(WINDOW) as usize;
        file.read_at(at, &mut window[..n])?;
        for (i, sector) in window[..n].chunks(ALIGN).enumerate() {
            let here = at + (i * ALIGN) as u64;
            if let Some((head, len, crc)) = parse(sector, wanted)
                && let Some(entry) = load(file, here, end, head, len, crc, wanted.no_crc)?
            {
                return Ok(Some((here + entry.bytes.len() as u64, entry)));
            }
        }
        at += n as u64;
    }
    Ok(None)
}

fn parse(sector: &[u8], wanted: Wanted) -> Option<(Head, usize, u32)> {
    let header = sector.first_chunk::<HEADER>()?;
    let word = |at: usize| {
        let mut w = [0; 8];
        w.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(w)
    };
    let kind = u16::from_le_bytes([header[6], header[7]]);
    let version = u16::from_le_bytes([header[4], header[5]]);
    if header[..4] != *MAGIC || version != VERSION || kind > 1 {
        return None;
    }
    let head = Head {
        voucher: kind == 1,
        salt: word(8),
        seq: word(16),
        durable: word(24),
        vm: VmId::from_halves(word(32), word(40)),
        generation: Generation(word(48)),
        epoch: Epoch(word(56)),
    };
    let len = word(64) as u32 as usize;
    let fits = len <= PAYLOAD_MAX && (kind == 0 || len == 0);
    (head.salt == wanted.salt && head.vm == wanted.vm && fits).then_some((
        head,
        len,
        (word(64) >> 32) as u32,
    ))
}

fn load(
    file: &dyn LayerFile,
    at: u64,
    end: u64,
    head: Head,
    len: usize,
    crc: u32,
    no_crc: bool,
) -> io::Result<Option<Entry>> {
    let total = (HEADER + len).next_multiple_of(ALIGN);
    if at + total as u64 > end {
        return Ok(None);
    }
    let mut bytes = vec![0; total];
    file.read_at(at, &mut bytes)?;
    let found = crc32c::crc32c_append(crc32c::crc32c(&bytes[..68]), &bytes[HEADER..HEADER + len]);
    Ok((found == crc || no_crc).then_some(Entry {
        head,
        bytes,
        payload_len: len,
    }))
}
