//! Digests of disk blocks: what a joining replica's mirrors hold already need not be sent to it.
//!
//! ```text
//! payload of a Digests frame, little endian
//! 0        4        8               16
//! +--------+--------+---------------+---------------------+
//! | disk   | 0      | first block   | 16 bytes per block  |
//! | u32    | u32    | u64           |                     |
//! +--------+--------+---------------+---------------------+
//! ```
//!
//! A digest is the first half of the block's BLAKE3 hash, 128 bits; of a block that is all zero it is zero. Two blocks with the
//! same digest are taken for equal, so a checksum would not do: what a guest writes may be made to collide.

/// Disks are compared and copied in blocks of this size, aligned; the last one may be shorter.
pub(crate) const BLOCK: u64 = 64 << 10;
/// Most digests in a frame.
pub(crate) const DIGESTS_MAX: usize = 16 << 10;

const HEADER: usize = 16;

/// Of one block.
pub(crate) type Digest = [u8; 16];

/// The digest of a block.
pub(crate) fn digest(block: &[u8]) -> Digest {
    let mut out = [0; 16];
    if block.iter().any(|byte| *byte != 0) {
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
    let (header, digests) = payload.split_at_checked(HEADER)?;
    let (digests, rest) = digests.as_chunks::<16>();
    let word = |at: usize| header[at..at + 4].try_into().map(u32::from_le_bytes).ok();
    let disk = u16::try_from(word(0)?).ok()?;
    let first = u64::from_le_bytes(header[8..].try_into().ok()?);
    let fits = rest.is_empty() && !digests.is_empty() && digests.len() <= DIGESTS_MAX;
    (fits && word(4)? == 0).then_some((disk, first, digests))
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
}
