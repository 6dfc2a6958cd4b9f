//! Frames that tell the network where a guest now is: sent by the new owner at activation, on the guest's behalf.
//!
//! A bridge or switch moves a MAC address to the port it last saw it come from, so any broadcast with the guest's source
//! address does; RARP needs no IP address (QEMU announces a migrated guest so), gratuitous ARP also refreshes the
//! neighbours' caches. All are without FCS and padded to Ethernet's 60-byte minimum.

use std::net::Ipv4Addr;

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
