//! Frames that tell the network where a guest now is: sent by the new owner at activation, on the guest's behalf.
//!
//! A bridge or switch moves a MAC address to the port it last saw it come from, so any broadcast with the guest's source
//! address does; RARP needs no IP address (QEMU announces a migrated guest so), gratuitous ARP also refreshes the
//! neighbours' caches. All are without FCS and padded to Ethernet's 60-byte minimum.
//!
//! Each is one frame that can be lost, and a switch between here and there may not forward yet: [`begin`] says it all
//! five times.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use crate::gate::Gate;
use crate::port::NET_HEADER;

/// What is waited before each repetition.
const WAITS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

const MIN_FRAME: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const RARP_REQUEST: u16 = 3;

/// The gratuitous ARP announcement: a request for one's own address (RFC 5227, section 2.3; RFC 826).
pub fn gratuitous_arp(mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    frame(ETHERTYPE_ARP, ARP_REQUEST, mac, ip, [0; 6], ip)
}

/// The reply form of the announcement (RFC 5944, section 4.6), for hosts that heed only replies.
pub fn gratuitous_arp_reply(mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    frame(ETHERTYPE_ARP, ARP_REPLY, mac, ip, mac, ip)
}

/// A RARP request for one's own MAC (RFC 903): needs no IP address and moves the MAC in every bridge on the way.
pub fn rarp(mac: [u8; 6]) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    frame(ETHERTYPE_RARP, RARP_REQUEST, mac, none, mac, none)
}

/// A network card to be announced: its gate, and frames from the functions above.
pub type Card = (Arc<Gate>, Vec<Vec<u8>>);

/// Announces `cards` now, and four times more, ever later, on a thread of its own.
///
/// The first time is past the hold: the master has given this host the VM. The repetitions go the way of the guest's own
/// output, because by then another host may own it: what is held and never committed is never heard, and a fenced gate
/// ends them.
///
/// # Errors
/// No thread; the first announcement has been made then.
pub fn begin(cards: Vec<Card>) -> io::Result<()> {
    for (gate, frames) in &cards {
        for frame in frames {
            gate.announce(frame);
        }
    }
    std::thread::Builder::new()
        .name("announce".into())
        .spawn(move || repeat(&cards, std::thread::sleep))
        .map(drop)
}

fn repeat(cards: &[Card], mut wait: impl FnMut(Duration)) {
    for pause in WAITS {
        wait(pause);
        if cards.iter().all(|(gate, _)| gate.is_fenced()) {
            return;
        }
        for (gate, frames) in cards {
            for frame in frames {
                // Not taken: the guest itself says so much that its limit is reached. That is announcement enough.
                let _ = gate.send(&[&[0; NET_HEADER], &frame[..]].concat());
            }
        }
    }
}

fn frame(
    ethertype: u16,
    op: u16,
    sender: [u8; 6],
    sender_ip: Ipv4Addr,
    target: [u8; 6],
    target_ip: Ipv4Addr,
) -> Vec<u8> {
    let mut f = Vec::with_capacity(MIN_FRAME);
    f.extend(BROADCAST);
    f.extend(sender);
    f.extend(ethertype.to_be_bytes());
    f.extend(1u16.to_be_bytes()); // hardware: Ethernet
    f.extend(0x0800u16.to_be_bytes()); // protocol: IPv4
    f.extend([6, 4]); // their address lengths
    f.extend(op.to_be_bytes());
    f.extend(sender);
    f.extend(sender_ip.octets());
    f.extend(target);
    f.extend(target_ip.octets());
    f.resize(MIN_FRAME, 0);
    f
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
    const IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    #[test]
    fn the_bytes_are_those_of_the_rfcs() {
        let arp = gratuitous_arp(MAC, IP);
        let head = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1,
        ];
        assert_eq!(arp[..22], head);
        assert_eq!(arp[22..28], MAC);
        assert_eq!(arp[28..32], [10, 77, 0, 2]);
        assert_eq!(arp[32..38], [0; 6]);
        assert_eq!(arp[38..42], [10, 77, 0, 2]);
        assert_eq!(arp[42..], [0; 18]);

        let reply = gratuitous_arp_reply(MAC, IP);
        assert_eq!((reply[21], &reply[32..38]), (2, &MAC[..]));
        assert_eq!(reply.len(), 60);
    }

    fn card(sent: &Arc<std::sync::Mutex<Vec<Vec<u8>>>>) -> Card {
        let mut port = crate::memory::MemoryPort::new(vec![]).expect("a port");
        port.sent = sent.clone();
        (
            Gate::new(port, 1 << 20).expect("a gate"),
            vec![rarp(MAC), gratuitous_arp(MAC, IP)],
        )
    }

    #[test]
    fn it_is_repeated_four_times_ever_later_as_the_guests_own_output() {
        let sent = Arc::default();
        let card = card(&sent);
        let (gate, frames) = (card.0.clone(), card.1.clone());
        let count = || sent.lock().expect("lock").len();
        let mut waited = vec![];
        repeat(std::slice::from_ref(&card), |pause| {
            // One round each, when it is time.
            assert_eq!(count(), waited.len() * frames.len());
            waited.push(pause);
        });
        assert!(waited.is_sorted() && waited.len() == 4, "{waited:?}");
        assert_eq!(count(), 4 * frames.len());
        assert_eq!(sent.lock().expect("lock")[0][NET_HEADER..], frames[0]);
        // Held: it waits for the commit.
        gate.set_hold(true);
        repeat(std::slice::from_ref(&card), |_| {});
        assert_eq!(count(), 4 * frames.len());
        gate.seal(checkpoint::Epoch(1)).expect("first");
        gate.release(checkpoint::Epoch(1)).expect("sealed");
        assert_eq!(count(), 8 * frames.len());
    }

    #[test]
    fn a_fenced_vm_is_not_announced_any_more() {
        let sent = Arc::default();
        let card = card(&sent);
        let mut rounds = 0;
        repeat(std::slice::from_ref(&card), |_| {
            rounds += 1;
            if rounds == 3 {
                card.0.fence();
            }
        });
        assert_eq!((rounds, sent.lock().expect("lock").len()), (3, 4));
        begin(vec![card]).expect("a thread");
        assert_eq!(sent.lock().expect("lock").len(), 4);
    }

    #[test]
    fn rarp_names_the_mac_and_no_address() {
        let f = rarp(MAC);
        assert_eq!(f[12..14], [0x80, 0x35]);
        assert_eq!(f[20..22], [0, 3]);
        assert_eq!((&f[22..28], &f[32..38]), (&MAC[..], &MAC[..]));
        assert_eq!((&f[28..32], &f[38..42]), (&[0; 4][..], &[0; 4][..]));
        assert_eq!(f.len(), 60);
    }
}
