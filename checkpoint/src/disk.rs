//! Disk records: what the guest did to a disk, as it travels and as it is journalled.
//!
//! ```text
//!  0        2    3      4         8            16            20        24
//! | disk u16 | op u8 | flags u8=0 | len u32 | offset u64 | CRC32C u32 | pad u32=0 | data (Write only) |
//! ```

/// Longest stretch of one record, in bytes.
pub const DISK_RECORD_MAX: u32 = 1 << 20;
/// Size of a record's header in bytes.
pub const DISK_HEADER: usize = 24;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// `data` was written.
    Write = 0,
    /// The content is of no interest any more.
    Discard = 1,
    /// Reads as zero.
    WriteZeroes = 2,
}

/// One disk write, discard or zeroing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRecord<'a> {
    /// The disk's number.
    pub disk: u16,
    /// What.
    pub op: DiskOp,
    /// Where, in bytes.
    pub offset: u64,
    /// How long, in bytes. For [`DiskOp::Write`] the length of `data`, at most [`DISK_RECORD_MAX`].
    pub len: u32,
    /// What was written; of no account for other operations.
    pub data: &'a [u8],
}

/// Why bytes are not disk records.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskRecordError {
    /// The bytes end inside a record.
    #[error("disk record is cut off: {needed} bytes needed, {found} left")]
    Truncated {
        /// Needed.
        needed: usize,
        /// Left.
        found: usize,
    },
    /// An operation this version does not know.
    #[error("disk record with unknown operation {0}")]
    Op(u8),
    /// Reserved bytes are in use, or the range wraps.
    #[error("disk record is malformed")]
    Malformed,
    /// Longer than a record may be.
    #[error("disk record of {0} bytes is over the limit of {DISK_RECORD_MAX}")]
    TooLong(u32),
    /// Damaged.
    #[error("disk record at offset {0} is damaged (its checksum is wrong)")]
    Checksum(u64),
}

impl DiskRecord<'_> {
    /// Appends the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        debug_assert!(
            self.op != DiskOp::Write
                || (self.data.len() == self.len as usize && self.len <= DISK_RECORD_MAX)
        );
        let data = if self.op == DiskOp::Write {
            self.data
        } else {
            &[]
        };
        out.extend_from_slice(&self.disk.to_le_bytes());
        out.extend_from_slice(&[self.op as u8, 0]);
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(data);
    }
}

/// The records in `buf`, each checked. After an error the iterator ends.
pub fn disk_records(buf: &[u8]) -> impl Iterator<Item = Result<DiskRecord<'_>, DiskRecordError>> {
    let mut rest = buf;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let parsed = parse(rest);
        rest = parsed.as_ref().map_or(&[], |(_, rest)| rest);
        Some(parsed.map(|(record, _)| record))
    })
}

fn parse(buf: &[u8]) -> Result<(DiskRecord<'_>, &[u8]), DiskRecordError> {
    let Some((header, rest)) = buf.split_first_chunk::<DISK_HEADER>() else {
        return Err(DiskRecordError::Truncated {
            needed: DISK_HEADER,
            found: buf.len(),
        });
    };
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let op = match header[2] {
        0 => DiskOp::Write,
        1 => DiskOp::Discard,
        2 => DiskOp::WriteZeroes,
        other => return Err(DiskRecordError::Op(other)),
    };
    let len = word(4);
    let offset = u64::from(word(8)) | u64::from(word(12)) << 32;
    if header[3] != 0 || word(20) != 0 || offset.checked_add(u64::from(len)).is_none() {
        return Err(DiskRecordError::Malformed);
    }
    let data_len = if op == DiskOp::Write { len as usize } else { 0 };
    if op == DiskOp::Write && len > DISK_RECORD_MAX {
        return Err(DiskRecordError::TooLong(len));
    }
    let Some((data, rest)) = rest.split_at_checked(data_len) else {
        return Err(DiskRecordError::Truncated {
            needed: data_len,
            found: rest.len(),
        });
    };
    if crc32c::crc32c(data) != word(16) {
        return Err(DiskRecordError::Checksum(offset));
    }
    Ok((
        DiskRecord {
            disk: u16::from_le_bytes([header[0], header[1]]),
            op,
            offset,
            len,
            data,
        },
        rest,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn two() -> Vec<u8> {
        let mut out = Vec::new();
        DiskRecord {
            disk: 1,
            op: DiskOp::Write,
            offset: 4096,
            len: 512,
            data: &[7; 512],
        }
        .encode(&mut out);
        DiskRecord {
            disk: 0,
            op: DiskOp::Discard,
            offset: 0,
            len: 1 << 30,
            data: &[],
        }
        .encode(&mut out);
        out
    }

    #[test]
    fn records_come_back_as_written() {
        let bytes = two();
        let got: Vec<_> = disk_records(&bytes).collect::<Result<_, _>>().unwrap();
        assert_eq!(got.len(), 2);
        assert_eq!(
            (got[0].disk, got[0].offset, got[0].data),
            (1, 4096, &[7; 512][..])
        );
        assert_eq!((got[1].op, got[1].len), (DiskOp::Discard, 1 << 30));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..560) {
            for _ in disk_records(&bytes) {}
            let good = two();
            for _ in disk_records(&good[..cut.min(good.len())]) {}
        }

        #[test]
        fn a_flipped_data_bit_is_found(bit in 0usize..512 * 8) {
            let mut bytes = two();
            bytes[DISK_HEADER + bit / 8] ^= 1 << (bit % 8);
            prop_assert!(disk_records(&bytes).any(|r| r.is_err()));
        }
    }
}
