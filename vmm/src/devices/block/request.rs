//! Block requests: what the guest asked, checked before a disk sees it (virtio 1.2, 5.2.6).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::backend::SECTOR;
use crate::devices::GuestMemory;
use crate::devices::ring::{Chain, RingError};

/// Segments of data per request, offered as `seg_max`: a full queue of 256 holds two of them at least.
pub const SEG_MAX: u32 = 126;
/// Bytes per segment, offered as `size_max`.
pub const SIZE_MAX: u32 = 64 << 10;
/// Most bytes of data in one request; more is an I/O error. What a driver keeping the two limits above can ask for.
pub const MAX_DATA: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Sectors in one such range: 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Bytes of the request header.
const HEADER: u64 = 16;
/// Bytes of one range.
const RANGE: u64 = 16;
/// `unmap`, the one flag a write-zeroes range may have.
const FLAG_UNMAP: u32 = 1;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or out of bounds.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// Not a request this device knows.
    Unsupp = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What to do. Offsets and lengths in bytes, checked to be within the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `len` bytes.
    Read {
        /// Where from.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Write `data`.
    Write {
        /// Where to.
        offset: u64,
        /// The guest's data as it was when the request was taken.
        data: Vec<u8>,
    },
    /// Make completed writes durable.
    Flush,
    /// Discard ranges of (offset, length).
    Discard(Vec<(u64, u64)>),
    /// Zero ranges of (offset, length).
    WriteZeroes(Vec<(u64, u64)>),
    /// Answer with at most this many bytes of the disk's id.
    GetId(usize),
}

/// Reads the request in `chain` for a disk of `size` bytes: the operation, or the status to end it with at once.
///
/// # Errors
/// [`RingError::Short`] if there is no byte to put a status into; the request cannot even be refused.
pub fn parse(mem: &GuestMemory, chain: &Chain, size: u64) -> Result<Result<Op, Status>, RingError> {
    let Some(room) = chain.writable().checked_sub(1) else {
        return Err(RingError::Short("a status byte"));
    };
    let Some(sent) = chain.readable().checked_sub(HEADER) else {
        return Ok(Err(Status::IoErr));
    };
    let mut header = [0u8; HEADER as usize];
    chain.gather(mem, 0, &mut header)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes([
        header[8], header[9], header[10], header[11], header[12], header[13], header[14],
        header[15],
    ]);
    Ok(match kind {
        VIRTIO_BLK_T_IN => {
            data_range(sector, room, size).map(|(offset, len)| Op::Read { offset, len })
        }
        VIRTIO_BLK_T_OUT => match data_range(sector, sent, size) {
            Ok((offset, len)) => {
                let mut data = vec![0; len];
                chain.gather(mem, HEADER, &mut data)?;
                Ok(Op::Write { offset, data })
            }
            Err(status) => Err(status),
        },
        VIRTIO_BLK_T_FLUSH => Ok(Op::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Op::GetId(room.min(20) as usize)),
        VIRTIO_BLK_T_DISCARD => ranges(mem, chain, sent, size, 0)?.map(Op::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => {
            ranges(mem, chain, sent, size, FLAG_UNMAP)?.map(Op::WriteZeroes)
        }
        _ => Err(Status::Unsupp),
    })
}

/// Checks a data transfer; (offset, length) in bytes.
fn data_range(sector: u64, len: u64, size: u64) -> Result<(u64, usize), Status> {
    if len == 0 || !len.is_multiple_of(SECTOR) || len > MAX_DATA {
        return Err(Status::IoErr);
    }
    let offset = within(sector, len / SECTOR, size)?;
    Ok((offset, len as usize))
}

/// Checks that `count` sectors from `sector` lie on the disk; the offset in bytes.
fn within(sector: u64, count: u64, size: u64) -> Result<u64, Status> {
    match sector.checked_add(count) {
        Some(end) if end <= size / SECTOR => Ok(sector * SECTOR),
        _ => Err(Status::IoErr),
    }
}

/// Ranges of a discard or write-zeroes request, whose flags may be `allowed`.
#[allow(clippy::type_complexity)]
fn ranges(
    mem: &GuestMemory,
    chain: &Chain,
    sent: u64,
    size: u64,
    allowed: u32,
) -> Result<Result<Vec<(u64, u64)>, Status>, RingError> {
    if sent == 0 || !sent.is_multiple_of(RANGE) || sent / RANGE > u64::from(MAX_RANGES) {
        return Ok(Err(Status::IoErr));
    }
    let mut bytes = vec![0; sent as usize];
    chain.gather(mem, HEADER, &mut bytes)?;
    Ok(bytes
        .chunks_exact(RANGE as usize)
        .map(|raw| one_range(raw, size, allowed))
        .collect())
}

fn one_range(raw: &[u8], size: u64, allowed: u32) -> Result<(u64, u64), Status> {
    let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
    let (count, flags) = (word(8), word(12));
    if flags & !allowed != 0 {
        // An unknown flag must be refused as unsupported (5.2.6.2).
        return Err(Status::Unsupp);
    }
    if count == 0 || count > MAX_RANGE_SECTORS {
        return Err(Status::IoErr);
    }
    let offset = within(sector, u64::from(count), size)?;
    Ok((offset, u64::from(count) * SECTOR))
}
