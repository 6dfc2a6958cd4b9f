//! Digests of disk blocks: what a replica's mirrors hold already need not be sent to it.
//!
//! A joining replica says what it holds ([`Kind::Digests`](crate::wire::Kind::Digests)). A chain that begins is asked: a
//! [`Kind::Compare`](crate::wire::Kind::Compare) frame bears the owner's digests from the head to the tail, each replica
//! replaces those of the blocks in which it differs by [`DIFFERS`], and the tail answers the owner.
//!
//! ```text
//! payload of a Digests or Compare frame, little endian
//! 0        4        8               16
//! +--------+--------+---------------+---------------------+
//! | disk   | 0      | first block   | 16 bytes per block  |
//! | u32    | u32    | u64           |                     |
//! +--------+--------+---------------+---------------------+
//! ```
//!
//! payload of a Compared frame: the same header, then one byte per block: 1 if every replica holds it, else 0
//!
//! A digest is the first half of the block's BLAKE3 hash, 128 bits; of a block that is all zero it is zero. Two blocks with the
//! same digest are taken for equal, so a checksum would not do: what a guest writes may be made to collide.

use std::io;

use checkpoint::{DiskOp, DiskRecord};
use diskbuf::Mirror;

/// Disks are compared and copied in blocks of this size in bytes, aligned; the last one may be shorter.
pub const BLOCK: u64 = 64 << 10;
/// Most digests in a frame.
pub const DIGESTS_MAX: usize = 16 << 10;
/// Stands for a block in which some replica differs.
pub(crate) const DIFFERS: Digest = [0xff; 16];

const HEADER: usize = 16;

/// Of one block.
pub type Digest = [u8; 16];

/// Blocks between two signs of life of something that reads many.
const SIGN: usize = 64;

/// Digests of what a mirror holds, from block `first` on, at most `count`; none after its end.
///
/// # Errors
/// The mirror's.
pub fn digests(mirror: &Mirror, first: u64, count: usize) -> io::Result<Vec<Digest>> {
    digests_of(mirror, first, count, || {})
}

/// The same; says `progress` in between.
pub(crate) fn digests_of(
    mirror: &Mirror,
    first: u64,
    count: usize,
    progress: impl Fn(),
) -> io::Result<Vec<Digest>> {
    let mut data = Vec::new();
    let blocks = first..mirror.size().div_ceil(BLOCK);
    let digest = |(n, block): (usize, u64)| {
        if n % SIGN == 0 {
            progress();
        }
        match read(mirror, block, &mut data)? {
            true => Ok(digest(&data)),
            false => Ok(Digest::default()),
        }
    };
    blocks.take(count).enumerate().map(digest).collect()
}

/// The first block from `block` on that is not a hole.
///
/// # Errors
/// The mirror's.
pub fn next_data(mirror: &Mirror, block: u64) -> io::Result<Option<u64>> {
    let at = block * BLOCK;
    if at >= mirror.size() {
        return Ok(None);
    }
    let found = mirror.next_data(at)?;
    Ok((found < mirror.size()).then_some(found / BLOCK))
}

/// Digests of the blocks from `first` on, until the next hole, and at most [`DIGESTS_MAX`].
///
/// # Errors
/// The mirror's.
pub(crate) fn run(mirror: &Mirror, first: u64, progress: impl Fn()) -> io::Result<Vec<Digest>> {
    let (mut out, mut data) = (Vec::new(), Vec::new());
    for block in first..mirror.size().div_ceil(BLOCK) {
        if out.len() % SIGN == 0 {
            progress();
        }
        if out.len() == DIGESTS_MAX || !read(mirror, block, &mut data)? {
            break;
        }
        out.push(digest(&data));
    }
    Ok(out)
}

/// Reads a block; false if it is a hole: it is zero then, and `data` has its length only.
fn read(mirror: &Mirror, block: u64, data: &mut Vec<u8>) -> io::Result<bool> {
    let at = block * BLOCK;
    let len = BLOCK.min(mirror.size() - at);
    data.resize(len as usize, 0);
    if mirror.is_hole(at, len) {
        return Ok(false);
    }
    mirror.read_at(at, data)?;
    Ok(true)
}

/// What a block of a disk holds, read into `data`, as the record that makes it so elsewhere: one that is zero makes a hole.
///
/// # Errors
/// The mirror's.
pub fn record<'a>(
    mirror: &Mirror,
    disk: u16,
    block: u64,
    data: &'a mut Vec<u8>,
) -> io::Result<DiskRecord<'a>> {
    let (op, content) = match read(mirror, block, data)? && !is_zero(data) {
        true => (DiskOp::Write, &data[..]),
        false => (DiskOp::WriteZeroes, &[][..]),
    };
    Ok(DiskRecord {
        disk,
        op,
        offset: block * BLOCK,
        len: data.len() as u32,
        data: content,
    })
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// The digest of a block.
#[must_use]
pub fn digest(block: &[u8]) -> Digest {
    let mut out = [0; 16];
    if !is_zero(block) {
        out.copy_from_slice(&blake3::hash(block).as_bytes()[..16]);
    }
    out
}

/// The payload that says them.
pub(crate) fn payload(disk: u16, first: u64, digests: &[Digest]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + digests.len() * 16);
    out.extend(u32::from(disk).to_le_bytes());
    out.extend([0; 4]);
    out.extend(first.to_le_bytes());
    digests.iter().for_each(|digest| out.extend(digest));
    out
}

/// Reads it back; `None` if it is malformed.
pub(crate) fn parse(payload: &[u8]) -> Option<(u16, u64, &[Digest])> {
    let (disk, first) = parse_header(payload)?;
    let (digests, rest) = payload[HEADER..].as_chunks::<16>();
    let fits = rest.is_empty() && !digests.is_empty() && digests.len() <= DIGESTS_MAX;
    fits.then_some((disk, first, digests))
}

fn parse_header(payload: &[u8]) -> Option<(u16, u64)> {
    let header = payload.get(..HEADER)?;
    let word = |at: usize| header[at..at + 4].try_into().map(u32::from_le_bytes).ok();
    let disk = u16::try_from(word(0)?).ok()?;
    let first = u64::from_le_bytes(header[8..].try_into().ok()?);
    (word(4)? == 0).then_some((disk, first))
}

/// `asked` with those replaced in which `held` differs.
pub(crate) fn marked(asked: &[Digest], held: &[Digest]) -> Vec<Digest> {
    let held = held.iter().map(Some).chain(std::iter::repeat(None));
    let pairs = asked.iter().zip(held);
    pairs
        .map(|(asked, held)| {
            held.filter(|held| *held == asked)
                .copied()
                .unwrap_or(DIFFERS)
        })
        .collect()
}

/// The payload that tells the owner of a chain which of these blocks every replica holds.
pub(crate) fn answer(disk: u16, first: u64, marked: &[Digest]) -> Vec<u8> {
    let mut out = payload(disk, first, &[]);
    out.extend(marked.iter().map(|digest| u8::from(*digest != DIFFERS)));
    out
}

/// What a chain says of blocks that it was asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The disk.
    pub disk: u16,
    /// The first block.
    pub first: u64,
    /// For each whether every replica holds it.
    pub equal: Vec<bool>,
}

/// Reads it back; `None` if it is malformed.
pub(crate) fn parse_answer(payload: &[u8]) -> Option<Answer> {
    let (disk, first) = parse_header(payload)?;
    let equal = &payload[HEADER..];
    let fits = !equal.is_empty() && equal.len() <= DIGESTS_MAX && equal.iter().all(|b| *b < 2);
    fits.then(|| Answer {
        disk,
        first,
        equal: equal.iter().map(|b| *b == 1).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_come_back_and_nonsense_does_not() {
        let some = [digest(&[1; 512]), digest(&[0; 512]), digest(b"x")];
        assert_eq!(some[1], [0; 16], "all zero");
        assert!(some[0] != some[2] && some[0] != [0; 16]);
        let payload = payload(3, 7, &some);
        assert_eq!(parse(&payload), Some((3, 7, &some[..])));
        assert_eq!(parse(&payload[1..]), None);
        assert_eq!(parse(&payload[..HEADER]), None, "none at all");
        let mut strange = payload.clone();
        strange[6] = 1;
        assert_eq!(parse(&strange), None, "reserved");
        let many = vec![[1; 16]; DIGESTS_MAX + 1];
        assert_eq!(parse(&super::payload(0, 0, &many)), None);
    }

    #[test]
    fn a_block_is_everywhere_only_if_no_replica_differs() {
        let all = [digest(&[1; 512]), digest(&[0; 512]), digest(b"x")];
        let mut one = all;
        one[0] = digest(b"y");
        let after_one = marked(&all, &one);
        assert_eq!(after_one, [DIFFERS, all[1], all[2]]);
        // One that has the first block cannot take back that another has not, and a shorter disk has no third block.
        let after_two = marked(&after_one, &all[..2]);
        assert_eq!(after_two, [DIFFERS, all[1], DIFFERS]);
        let said = answer(1, 9, &after_two);
        let heard = Answer {
            disk: 1,
            first: 9,
            equal: vec![false, true, false],
        };
        assert_eq!(parse_answer(&said), Some(heard));
        assert_eq!(parse_answer(&said[..HEADER]), None, "nothing said");
        let mut strange = said.clone();
        strange[HEADER] = 2;
        assert_eq!(parse_answer(&strange), None);
    }

    #[test]
    fn a_mirror_s_digests_are_those_of_its_content_holes_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = Mirror::create(dir.path().join("d.img"), 3 * BLOCK + 512).unwrap();
        mirror.write_at(BLOCK, &[7; 512]).unwrap();
        let mut block = vec![0; BLOCK as usize];
        block[..512].fill(7);
        let whole = digests(&mirror, 0, 100).unwrap();
        assert_eq!(whole, [[0; 16], digest(&block), [0; 16], [0; 16]]);
        assert_eq!(digests(&mirror, 1, 1).unwrap(), whole[1..2]);
        assert!(digests(&mirror, 4, 1).unwrap().is_empty(), "after its end");
        // One buffer for all, as left by the one before.
        mirror.write_at(2 * BLOCK, &[0; 512]).unwrap();
        let mut data = Vec::new();
        for (n, op, len) in [
            (1, DiskOp::Write, BLOCK),
            (0, DiskOp::WriteZeroes, BLOCK),
            (2, DiskOp::WriteZeroes, BLOCK),
            (3, DiskOp::WriteZeroes, 512),
        ] {
            let record = record(&mirror, 1, n, &mut data).unwrap();
            assert_eq!((record.op, u64::from(record.len)), (op, len), "block {n}");
            assert_eq!(digest(record.data), whole[n as usize]);
        }
    }
}
