//! The probe guest: a small freestanding guest for the demo and the benchmarks.
//!
//! [`IMAGE`] is an ELF that boots by the Linux 64-bit boot protocol; [`proto`] is what it speaks over TCP.
//! `docs/probe-guest.md` describes the guest from inside.

pub mod proto;

/// The probe guest's image: a static x86-64 ELF, linked at 2 MiB, entry point of the Linux 64-bit boot protocol.
/// Built from `image/` by the build script.
pub const IMAGE: &[u8] = include_bytes!(env!("PROBE_IMAGE"));

#[cfg(test)]
mod tests {
    use super::proto::*;

    #[test]
    fn messages_survive_a_round_trip() {
        let r = Request {
            op: 77,
            flags: 0x8001,
            seq: u64::MAX - 1,
            arg0: 3,
            arg1: 1 << 60,
        };
        assert_eq!(Request::from_bytes(&r.to_bytes()), Ok(r));
        let a = Response {
            op: 1,
            status: 3,
            seq: 9,
            counter: 1 << 40,
            passes: 2,
            disk_counter: u64::MAX,
            uptime_us: 5,
        };
        assert_eq!(Response::from_bytes(&a.to_bytes()), Ok(a));
    }

    #[test]
    fn a_wrong_magic_is_refused() {
        let mut b = Request::new(Op::Incr, 1).to_bytes();
        b[0] ^= 1;
        assert!(Request::from_bytes(&b).is_err());
        assert!(Response::from_bytes(&[0; RESPONSE_LEN]).is_err());
    }

    #[test]
    fn a_torn_disk_block_is_recognised() {
        let (mut old, mut new) = ([0; DISK_BLOCK], [0; DISK_BLOCK]);
        fill_disk_block(7, &mut old);
        fill_disk_block(8, &mut new);
        assert_eq!(parse_disk_block(&old), Some(7));
        for cut in 1..DISK_BLOCK / DISK_SECTOR {
            let mut torn = old;
            torn[..cut * DISK_SECTOR].copy_from_slice(&new[..cut * DISK_SECTOR]);
            assert_eq!(parse_disk_block(&torn), None, "cut after {cut} sectors");
        }
        assert_eq!(parse_disk_block(&[0; DISK_BLOCK]), None);
    }
}
