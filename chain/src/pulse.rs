//! Heartbeats on a path of their own: datagrams, which no bulk data delays and no retransmission holds up.
//!
//! ```text
//!  0            4             6              8         24               32         40      48               52
//! | magic u32  | version u16 | reserved u16 | vm u128 | generation u64 | from u64 | n u64 | reserved u32=0 | CRC u32 |
//! ```
//!
//! All little endian; the checksum is CRC32C of the 52 bytes before it. A connection's packets that are lost hold up
//! everything behind them for a fifth of a second and more; a datagram that is lost is followed by the next one. What a
//! datagram says is that its sender lives, nothing else: one too many delays a suspicion, one too few leaves it to the
//! heartbeats of the connection. So nothing is ever answered, and what is not understood or not expected is dropped.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};

use checkpoint::{Generation, HostId, VmId};
use nix::time::{ClockId, clock_gettime};

use crate::view::View;

/// Bytes of a datagram.
pub const PULSE: usize = 56;
const MAGIC: u32 = u32::from_le_bytes(*b"UPLS");
const VERSION: u16 = 1;
/// Ticks without a pulse after which older numbers may be those of a sender that has been started anew, on a clock that
/// began anew.
const FORGET: u32 = 20;

/// What one datagram says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// The VM.
    pub vm: VmId,
    /// The generation its sender is in.
    pub generation: Generation,
    /// Who lives, as [`name_of`] says it.
    pub from: u64,
    /// Grows with every datagram of this sender.
    pub n: u64,
}

/// A host's name in 64 bits.
#[must_use]
pub fn name_of(host: &HostId) -> u64 {
    let hash = blake3::hash(host.as_str().as_bytes());
    let bytes = hash.as_bytes().first_chunk();
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Pulse {
    /// The datagram.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; PULSE] {
        let mut out = [0; PULSE];
        out[..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[8..24].copy_from_slice(&self.vm.0.to_le_bytes());
        let words = [self.generation.0, self.from, self.n];
        for (to, word) in out[24..48].chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[..52]);
        out[52..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` for anything else than a whole pulse of this version.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Pulse> {
        let bytes: &[u8; PULSE] = bytes.try_into().ok()?;
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u64::from_le_bytes(*b))
        };
        let begins = u64::from(MAGIC) | u64::from(VERSION) << 32;
        let crc = u64::from(crc32c::crc32c(&bytes[..52])) << 32;
        // The reserved fields are zero, as part of these two words.
        if word(0) != begins || word(48) != crc {
            return None;
        }
        let vm = bytes[8..].first_chunk();
        let pulse = Pulse {
            vm: VmId(vm.map_or(0, |b| u128::from_le_bytes(*b))),
            generation: Generation(word(24)),
            from: word(32),
            n: word(40),
        };
        // A number too large for a VM's would be cut to another one's.
        (pulse.to_bytes() == *bytes).then_some(pulse)
    }
}

/// Whom a replica expects to hear: its predecessor, in its own generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The replica's generation.
    pub generation: Generation,
    /// The predecessor, as [`name_of`] says it.
    pub from: u64,
}

impl Expected {
    /// The predecessor of `host` in `view`; `None` if it has no place there.
    #[must_use]
    pub fn of(host: &HostId, view: &View) -> Option<Expected> {
        let before = match view.position(host) {
            Some(0) => &view.owner,
            Some(position) => &view.chain[position - 1].host,
            None if view.is_joining(host) => &view.chain.last()?.host,
            None => return None,
        };
        Some(Expected {
            generation: view.generation,
            from: name_of(before),
        })
    }
}

/// What a replica has heard, as a plain state machine.
#[derive(Clone, Debug, Default)]
pub struct Ear {
    expected: Option<Expected>,
    newest: Option<u64>,
    /// Where a sender that has been started anew may have begun: believed once it goes on from there.
    begun: Option<u64>,
    heard: bool,
    quiet: u32,
}

impl Ear {
    /// A pulse has come; false if it does not count: another generation's, another host's, or an old one that was delayed
    /// or repeated on its way.
    pub fn hear(&mut self, pulse: &Pulse) -> bool {
        let said = Expected {
            generation: pulse.generation,
            from: pulse.from,
        };
        if self.expected != Some(said) {
            return false;
        }
        if self.newest.is_some_and(|newest| pulse.n <= newest) {
            let grows = self.begun.is_some_and(|begun| pulse.n > begun);
            if self.quiet < FORGET || !grows {
                self.begun = (self.quiet >= FORGET).then_some(pulse.n);
                return false;
            }
        }
        self.begun = None;
        self.newest = Some(pulse.n);
        self.heard = true;
        true
    }

    /// One heartbeat's time has passed, and this is who is expected now. Whether that one has been heard since the last tick.
    pub fn tick(&mut self, expected: Option<Expected>) -> bool {
        if self.expected != expected {
            *self = Ear {
                expected,
                ..Ear::default()
            };
        }
        let heard = std::mem::take(&mut self.heard);
        self.quiet = if heard {
            0
        } else {
            self.quiet.saturating_add(1)
        };
        heard
    }
}

/// Says that this host lives, for one VM in one generation, to whoever comes after it.
#[derive(Debug)]
pub struct Voice {
    socket: UdpSocket,
    to: SocketAddr,
    vm: VmId,
    generation: Generation,
    from: u64,
    n: AtomicU64,
}

impl Voice {
    /// Nothing is said yet.
    ///
    /// # Errors
    /// No socket.
    pub fn new(to: SocketAddr, from: &HostId, view: &View) -> io::Result<Voice> {
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.set_nonblocking(true)?;
        // Another voice of this sender's in the same generation, later, begins with greater numbers.
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
        let micros = now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000;
        Ok(Voice {
            socket,
            to,
            vm: view.vm,
            generation: view.generation,
            from: name_of(from),
            n: AtomicU64::new(micros),
        })
    }

    /// Whether it still says what is so: to `to`, in `generation`.
    #[must_use]
    pub fn is(&self, to: SocketAddr, generation: Generation) -> bool {
        self.to == to && self.generation == generation
    }

    /// Says it once. What cannot be sent is left to the heartbeats of the connection.
    pub fn beat(&self) {
        let pulse = Pulse {
            vm: self.vm,
            generation: self.generation,
            from: self.from,
            n: self.n.fetch_add(1, Ordering::Relaxed),
        };
        let _ = self.socket.send_to(&pulse.to_bytes(), self.to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pulse(generation: u64, from: u64, n: u64) -> Pulse {
        Pulse {
            vm: VmId(7),
            generation: Generation(generation),
            from,
            n,
        }
    }

    fn expected(generation: u64, from: u64) -> Option<Expected> {
        Some(Expected {
            generation: Generation(generation),
            from,
        })
    }

    #[test]
    fn the_layout_is_the_one_documented() {
        let bytes = pulse(3, 0x0807_0605_0403_0201, 9).to_bytes();
        assert_eq!(bytes[..8], *b"UPLS\x01\0\0\0");
        assert_eq!(
            bytes[8..24],
            [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            bytes[24..40],
            [3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(bytes[40..52], [9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[52..], crc32c::crc32c(&bytes[..52]).to_le_bytes());
    }

    #[test]
    fn another_version_and_reserved_fields_are_not_guessed_at() {
        for at in [0, 4, 6, 7, 48, 51] {
            let mut bytes = pulse(3, 5, 9).to_bytes();
            bytes[at] ^= 0x40;
            let crc = crc32c::crc32c(&bytes[..52]);
            bytes[52..].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(Pulse::from_bytes(&bytes), None, "byte {at}");
        }
    }

    #[test]
    fn only_the_predecessor_in_this_generation_is_heard() {
        let mut ear = Ear::default();
        assert!(!ear.hear(&pulse(3, 5, 1)), "nobody is expected yet");
        assert!(!ear.tick(expected(3, 5)));
        for (generation, from) in [(2, 5), (4, 5), (3, 6)] {
            assert!(
                !ear.hear(&pulse(generation, from, 1)),
                "{generation} {from}"
            );
        }
        assert!(!ear.tick(expected(3, 5)));
        assert!(ear.hear(&pulse(3, 5, 1)));
        assert!(ear.tick(expected(3, 5)));
        assert!(!ear.tick(expected(3, 5)), "that was before the last tick");
        // What was heard in the generation before says nothing about this one.
        assert!(ear.hear(&pulse(3, 5, 2)));
        assert!(!ear.tick(expected(4, 5)));
        assert!(!ear.hear(&pulse(3, 5, 3)));
        assert!(ear.hear(&pulse(4, 5, 1)));
        assert!(!ear.tick(None) && !ear.hear(&pulse(4, 5, 2)));
    }

    #[test]
    fn what_was_delayed_or_repeated_on_its_way_is_no_sign_of_life_until_the_sender_may_have_begun_anew()
     {
        let mut ear = Ear::default();
        ear.tick(expected(3, 5));
        assert!(ear.hear(&pulse(3, 5, 100)));
        for n in [100, 99, 1] {
            assert!(!ear.hear(&pulse(3, 5, n)));
        }
        assert!(ear.hear(&pulse(3, 5, 102)));
        ear.tick(expected(3, 5));
        for _ in 0..FORGET - 1 {
            assert!(!ear.tick(expected(3, 5)));
            assert!(!ear.hear(&pulse(3, 5, 1)));
        }
        ear.tick(expected(3, 5));
        // The same one over and over is no sign of life; one that goes on from there is.
        for _ in 0..3 {
            assert!(!ear.hear(&pulse(3, 5, 1)));
        }
        assert!(ear.hear(&pulse(3, 5, 2)));
        assert!(!ear.hear(&pulse(3, 5, 2)));
        assert!(ear.hear(&pulse(3, 5, 3)));
        assert!(ear.tick(expected(3, 5)));
    }

    #[test]
    fn a_later_voice_in_the_same_generation_is_heard() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = receiver.local_addr().unwrap();
        let (from, view) = (HostId::new("a").unwrap(), view());
        let mut ear = Ear::default();
        ear.tick(Some(Expected {
            generation: view.generation,
            from: name_of(&from),
        }));
        for _ in 0..2 {
            let voice = Voice::new(to, &from, &view).unwrap();
            for _ in 0..3 {
                voice.beat();
                let mut bytes = [0; 100];
                let n = receiver.recv(&mut bytes).unwrap();
                assert!(ear.hear(&Pulse::from_bytes(&bytes[..n]).unwrap()));
            }
        }
    }

    fn view() -> View {
        let member = |name: &str| {
            let addr = "127.0.0.1:1".parse().unwrap();
            crate::view::Member::new(HostId::new(name).unwrap(), addr)
        };
        View {
            vm: VmId(7),
            name: "vm".into(),
            generation: Generation(3),
            owner: HostId::new("a").unwrap(),
            chain: vec![member("b"), member("c")],
            joining: Some(member("d")),
            history: crate::view::History::default(),
        }
    }

    #[test]
    fn each_place_expects_the_one_before_it() {
        let view = view();
        for (host, before) in [
            ("b", Some("a")),
            ("c", Some("b")),
            ("d", Some("c")),
            ("a", None),
        ] {
            let found = Expected::of(&HostId::new(host).unwrap(), &view);
            let from = before.map(|name| name_of(&HostId::new(name).unwrap()));
            assert_eq!(found.map(|e| e.from), from, "{host}");
        }
    }

    proptest! {
        #[test]
        fn every_pulse_comes_back(vm: u128, generation: u64, from: u64, n: u64) {
            let pulse = Pulse { vm: VmId(vm), generation: Generation(generation), from, n };
            prop_assert_eq!(Pulse::from_bytes(&pulse.to_bytes()), Some(pulse));
        }

        #[test]
        fn every_flipped_bit_is_found(bit in 0..PULSE * 8) {
            let mut bytes = pulse(3, 5, 9).to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Pulse::from_bytes(&bytes), None);
        }

        #[test]
        fn hostile_bytes_are_nothing(mut bytes in proptest::collection::vec(any::<u8>(), 0..100), fix in any::<bool>()) {
            if fix && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(b"UPLS\x01\0\0\0");
            }
            prop_assert_eq!(Pulse::from_bytes(&bytes), None);
        }
    }
}
