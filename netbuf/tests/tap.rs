//! Real frames over taps and bridges, each test in a network namespace of its own. Needs /dev/net/tun and root.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use checkpoint::Epoch;
use netbuf::netconf::{self, NetconfError};
use netbuf::{Gate, NET_HEADER, Port, SendOutcome, Tap, TapError, announce};

const LIVENESS_MS: libc::c_int = 60_000;
/// IEEE's local experimental EtherType: nothing else in the namespace uses it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 2];
const BROADCAST: [u8; 6] = [0xff; 6];

/// Runs the test on a thread in a new network namespace.
fn in_netns(test: impl FnOnce() + Send + 'static) {
    let run = std::thread::spawn(move || {
        netconf::unshare_netns().expect("a network namespace: run the tests as root");
        test();
    });
    if let Err(panic) = run.join() {
        std::panic::resume_unwind(panic);
    }
}

fn tap(name: &str, bridge: &str) -> Tap {
    let tap = Tap::open(name, true).expect("a tap");
    netconf::add_to_bridge(bridge, name).expect("a port");
    tap.set_up().expect("up");
    tap
}

fn bridge(name: &str) {
    netconf::create_bridge(name).expect("a bridge: does the kernel have CONFIG_BRIDGE?");
    netconf::set_link(name, true).expect("up");
}

fn frame(to: [u8; 6], from: [u8; 6], body: &[u8]) -> Vec<u8> {
    let mut f = vec![0; NET_HEADER];
    f.extend(to);
    f.extend(from);
    f.extend(ETHERTYPE);
    f.extend(body);
    f
}

fn wait_readable(fd: RawFd) -> bool {
    let mut p = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut p, 1, LIVENESS_MS) == 1 }
}

/// The next frame of the tests' own kind: Ethernet, without the virtio header, which is checked.
fn next(port: &dyn Port) -> Vec<u8> {
    next_where(port, |f| f[12..14] == ETHERTYPE)
}

fn next_where(port: &dyn Port, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buf = vec![0xaa; 70_000];
    loop {
        while let Some(n) = port.recv(&mut buf).expect("recv") {
            let (header, ethernet) = buf[..n].split_at(NET_HEADER);
            assert_eq!(
                header,
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
                "virtio header"
            );
            // The kernel speaks too (neighbour discovery, multicast groups).
            if ethernet.len() >= 14 && wanted(ethernet) {
                return ethernet.to_vec();
            }
        }
        assert!(wait_readable(port.fd()), "no frame came");
    }
}

fn bodies(port: &dyn Port, n: usize) -> Vec<u8> {
    (0..n).map(|_| next(port)[14]).collect()
}

/// The guest's side behind a gate, the client's side, and the bridge between them.
fn guest_and_client() -> (Arc<Gate>, Tap) {
    bridge("br0");
    let client = tap("client", "br0");
    let gate = Gate::new(tap("guest", "br0"), 1 << 20).expect("a gate");
    (gate, client)
}

/// Frames pushed while holding, then one past the hold. What arrives before that one has left early: the taps and the
/// bridge keep the order, so no waiting is needed to see that nothing came.
fn output_commit_on_the_wire(gate: &Gate, client: &Tap) -> Result<(), Vec<u8>> {
    gate.set_hold(true);
    for n in 1..=9 {
        gate.send(&frame(BROADCAST, GUEST, &[n; 50])).expect("send");
        if n % 3 == 0 {
            gate.seal(Epoch(u64::from(n) / 3)).expect("newer");
        }
    }
    gate.announce(&frame(BROADCAST, GUEST, &[100; 50])[NET_HEADER..]);
    let first = bodies(client, 1);
    if first != [100] {
        return Err(first);
    }
    gate.release(Epoch(2)).expect("sealed");
    gate.announce(&frame(BROADCAST, GUEST, &[101; 50])[NET_HEADER..]);
    let second = bodies(client, 7);
    if second != [1, 2, 3, 4, 5, 6, 101] {
        return Err(second);
    }
    gate.release(Epoch(3)).expect("sealed");
    let third = bodies(client, 3);
    if third != [7, 8, 9] {
        return Err(third);
    }
    Ok(())
}

#[test]
fn frames_leave_when_their_epoch_is_released_in_order_and_not_before() {
    in_netns(|| {
        let (gate, client) = guest_and_client();
        output_commit_on_the_wire(&gate, &client).expect("I1");
    });
}

#[test]
fn the_test_on_the_wire_fails_when_output_commit_is_switched_off() {
    in_netns(|| {
        let (gate, client) = guest_and_client();
        gate.break_output_commit(true);
        let early =
            output_commit_on_the_wire(&gate, &client).expect_err("the mutant went unnoticed");
        assert_eq!(early, [1]);
    });
}

#[test]
fn a_fenced_owner_is_not_heard() {
    in_netns(|| {
        let (gate, client) = guest_and_client();
        gate.set_hold(true);
        gate.send(&frame(BROADCAST, GUEST, &[1; 50])).expect("send");
        gate.seal(Epoch(1)).expect("first");
        gate.fence();
        gate.release(Epoch(1)).expect("sealed");
        gate.set_hold(false);
        gate.send(&frame(BROADCAST, GUEST, &[2; 50])).expect("send");
        gate.announce(&frame(BROADCAST, GUEST, &[3; 50])[NET_HEADER..]);
        let other = tap("other", "br0");
        other
            .send(&frame(BROADCAST, CLIENT, &[200; 50]))
            .expect("send");
        assert_eq!(bodies(&client, 1), [200]);
    });
}

#[test]
fn inbound_frames_come_at_once_and_wake_rx_fd() {
    in_netns(|| {
        let (gate, client) = guest_and_client();
        gate.set_hold(true);
        client
            .send(&frame(BROADCAST, CLIENT, &[5; 50]))
            .expect("send");
        assert!(wait_readable(gate.rx_fd()));
        let mut buf = [0; 2048];
        loop {
            let n = gate.recv(&mut buf).expect("recv").expect("a frame");
            if buf[NET_HEADER + 12..NET_HEADER + 14] == ETHERTYPE {
                assert_eq!((buf[NET_HEADER + 14], n), (5, NET_HEADER + 14 + 50));
                break;
            }
        }
        let mut small = [0; NET_HEADER];
        assert!(gate.recv(&mut small).is_err());
    });
}

#[test]
fn with_and_without_the_kernels_header_a_tap_is_the_same() {
    in_netns(|| {
        bridge("br0");
        let with = tap("with", "br0");
        let without = Tap::open("without", false).expect("a tap");
        netconf::add_to_bridge("br0", "without").expect("a port");
        without.set_up().expect("up");
        assert!(with.vnet_hdr() && !without.vnet_hdr());
        // A guest that asks for offloads nobody offered: segmentation, and a checksum far outside of the frame. Passed
        // on, the kernel would refuse the frame or alter it.
        let mut hostile = frame(BROADCAST, GUEST, &[6; 100]);
        hostile[..NET_HEADER]
            .copy_from_slice(&[1, 4, 0xff, 0xff, 1, 0, 0xff, 0xff, 0xff, 0xff, 7, 7]);
        for (from, to) in [(&with, &without), (&without, &with)] {
            from.send(&hostile).expect("send");
            let got = next(to);
            assert_eq!(got, hostile[NET_HEADER..]);
        }
        assert!(with.send(&[0; 5]).is_err());
    });
}

#[test]
fn a_tap_that_is_down_loses_frames_like_a_pulled_cable() {
    in_netns(|| {
        let (gate, client) = guest_and_client();
        netconf::set_link("guest", false).expect("down");
        let out = gate.send(&frame(BROADCAST, GUEST, &[1; 50])).expect("send");
        assert_eq!(out, SendOutcome::Sent);
        assert_eq!(gate.stats().dropped_port, 1);
        netconf::set_link("guest", true).expect("up");
        gate.send(&frame(BROADCAST, GUEST, &[2; 50])).expect("send");
        assert_eq!(bodies(&client, 1), [2]);
    });
}

#[test]
fn an_announcement_moves_the_guests_address_to_another_port() {
    in_netns(|| {
        let ip = Ipv4Addr::new(10, 9, 8, 7);
        for (i, said) in [
            announce::rarp(GUEST),
            announce::gratuitous_arp(GUEST, ip),
            announce::gratuitous_arp_reply(GUEST, ip),
        ]
        .into_iter()
        .enumerate()
        {
            let br = format!("br{i}");
            bridge(&br);
            let name = |s: &str| format!("{s}{i}");
            let client = tap(&name("client"), &br);
            let old = Gate::new(tap(&name("old"), &br), 1 << 20).expect("a gate");
            let new = Gate::new(tap(&name("new"), &br), 1 << 20).expect("a gate");
            old.announce(&announce::rarp(GUEST));
            next_where(&client, |f| f[6..12] == GUEST);
            new.announce(&said);
            let seen = next_where(&client, |f| f[6..12] == GUEST);
            assert_eq!(seen, said);
            client.send(&frame(GUEST, CLIENT, &[1; 50])).expect("send");
            client
                .send(&frame(BROADCAST, CLIENT, &[2; 50]))
                .expect("send");
            let received = |g: &Gate, n| {
                let mut got = vec![];
                let mut buf = [0; 2048];
                while got.len() < n {
                    match g.recv(&mut buf).expect("recv") {
                        Some(_) if buf[NET_HEADER + 12..NET_HEADER + 14] == ETHERTYPE => {
                            got.push(buf[NET_HEADER + 14]);
                        }
                        Some(_) => {}
                        None => assert!(wait_readable(g.rx_fd()), "no frame came"),
                    }
                }
                got
            };
            assert_eq!(received(&new, 2), [1, 2]);
            assert_eq!(received(&old, 1), [2], "only the broadcast");
        }
    });
}

#[test]
fn the_hosts_own_stack_reaches_the_guest_over_the_bridge() {
    in_netns(|| {
        let (gate, _client) = guest_and_client();
        let (host, guest) = (Ipv4Addr::new(10, 9, 8, 1), Ipv4Addr::new(10, 9, 8, 2));
        netconf::set_addr_v4("br0", host, 24).expect("an address");
        let socket = UdpSocket::bind((host, 0)).expect("a socket");
        socket.send_to(b"ping", (guest, 7)).expect("send");
        // The host asks who has the guest's address; the answer is what the gratuitous reply looks like.
        let mut buf = [0; 2048];
        let mut udp = vec![];
        while udp.is_empty() {
            let Some(n) = gate.recv(&mut buf).expect("recv") else {
                assert!(wait_readable(gate.rx_fd()), "nothing came");
                continue;
            };
            let f = &buf[NET_HEADER..n];
            if f[12..14] == [8, 6] {
                let mut reply = announce::gratuitous_arp_reply(GUEST, guest);
                reply[..6].copy_from_slice(&f[6..12]);
                reply[32..38].copy_from_slice(&f[6..12]);
                reply[38..42].copy_from_slice(&host.octets());
                gate.announce(&reply);
            } else if f[12..14] == [8, 0] && f[23] == 17 {
                udp = f.to_vec();
            }
        }
        assert_eq!(udp[..6], GUEST);
        assert_eq!(udp[42..46], *b"ping");
        // A checksum the kernel left to a device would be missing here: TUNSETOFFLOAD 0 is what makes it whole.
        let sum: u32 = udp[26..34]
            .chunks_exact(2)
            .chain(udp[34..46].chunks_exact(2))
            .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
            .sum::<u32>()
            + 17
            + 12;
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "UDP checksum");
    });
}

#[test]
fn a_persistent_tap_is_attached_to_by_one_at_a_time() {
    in_netns(|| {
        let first = Tap::open("tap0", true).expect("a tap");
        first.set_persistent(true).expect("persistent");
        let busy = Tap::open("tap0", true).expect_err("two at once");
        assert!(matches!(busy, TapError::Busy { .. }), "{busy}");
        drop(first);
        assert!(netconf::exists("tap0"), "it is persistent");
        // Whatever it was made with: the flags of the newest attach count.
        let again = Tap::open("tap0", false).expect("attached again");
        again.set_persistent(false).expect("not persistent");
        drop(again);
        assert!(!netconf::exists("tap0"));
    });
}

#[test]
fn an_inherited_descriptor_is_the_same_tap() {
    in_netns(|| {
        let tap = Tap::open("tap%d", false).expect("a tap");
        assert_eq!(tap.name(), "tap0");
        // SAFETY: dup takes no pointers.
        let fd = unsafe { libc::dup(tap.as_raw_fd()) };
        // SAFETY: fd was just returned by dup and nobody else owns it.
        let fd = unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        let same = Tap::from_fd(fd).expect("the tap");
        assert_eq!((same.name(), same.vnet_hdr()), ("tap0", false));
        let other = std::fs::File::open("/dev/null").expect("/dev/null");
        assert!(Tap::from_fd(other.into()).is_err());
    });
}

#[test]
fn what_cannot_be_a_tap_says_why() {
    in_netns(|| {
        let long = Tap::open("sixteen-bytes-xx", true).expect_err("too long");
        assert!(long.to_string().contains("1 to 15 bytes"), "{long}");
        bridge("br0");
        let kind = Tap::open("br0", true).expect_err("a bridge");
        assert!(matches!(kind, TapError::WrongKind { .. }), "{kind}");
        assert!(
            kind.to_string().contains("`br0` exists but is not a tap"),
            "{kind}"
        );
    });
}

#[test]
fn settings_are_made_and_mistakes_named() {
    in_netns(|| {
        bridge("br0");
        assert!(matches!(
            netconf::create_bridge("br0"),
            Err(NetconfError::Exists { .. })
        ));
        let none = netconf::set_link("none", true).expect_err("missing");
        assert!(matches!(none, NetconfError::Missing { .. }), "{none}");
        assert!(netconf::add_to_bridge("br0", "none").is_err());
        assert!(netconf::set_addr_v4("br0", Ipv4Addr::LOCALHOST, 33).is_err());
        netconf::set_addr_v4("br0", Ipv4Addr::new(10, 1, 2, 3), 0).expect("a /0");
        netconf::set_mac("br0", GUEST).expect("a MAC");
        assert_eq!(netconf::mac("br0").expect("its MAC"), GUEST);
        assert!(netconf::set_mac("br0", BROADCAST).is_err());
        netconf::set_mtu("br0", 1400).expect("an MTU");
        let t = tap("t", "br0");
        netconf::remove_from_bridge("br0", "t").expect("removed");
        assert!(netconf::remove_from_bridge("br0", "t").is_err());
        drop(t);
        assert!(netconf::delete_bridge("br0").is_err(), "it is up");
        netconf::set_link("br0", false).expect("down");
        netconf::delete_bridge("br0").expect("deleted");
        assert!(!netconf::exists("br0"));
    });
}

#[test]
fn a_veth_pair_joins_two_network_namespaces() {
    in_netns(|| {
        let (a, b) = (Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 1, 0, 2));
        netconf::create_veth("here", "there").expect("a pair");
        assert!(matches!(
            netconf::create_veth("here", "x"),
            Err(NetconfError::Exists { .. })
        ));
        let (to_us, from_there) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel();
        let there = std::thread::spawn(move || {
            netconf::unshare_netns().expect("a network namespace");
            let ns = std::fs::File::open("/proc/thread-self/ns/net").expect("our namespace");
            to_us.send(ns).expect("send");
            may_go_on
                .recv_timeout(Duration::from_secs(60))
                .expect("the device");
            netconf::set_addr_v4("there", b, 24).expect("an address");
            netconf::set_link("there", true).expect("up");
            UdpSocket::bind((b, 7)).expect("a socket")
        });
        let ns = from_there
            .recv_timeout(Duration::from_secs(60))
            .expect("a namespace");
        netconf::move_to_netns("there", ns.as_fd()).expect("moved");
        assert!(!netconf::exists("there"));
        go_on.send(()).expect("send");
        netconf::set_addr_v4("here", a, 24).expect("an address");
        netconf::set_link("here", true).expect("up");
        let far = there.join().expect("there");
        far.set_read_timeout(Some(Duration::from_secs(60)))
            .expect("timeout");
        let near = UdpSocket::bind((a, 0)).expect("a socket");
        near.send_to(b"over", (b, 7)).expect("send");
        let mut buf = [0; 16];
        let (n, _) = far.recv_from(&mut buf).expect("a datagram");
        assert_eq!(&buf[..n], b"over");
        netconf::delete_link("here").expect("deleted");
        assert!(matches!(
            netconf::delete_link("here"),
            Err(NetconfError::Missing { .. })
        ));
    });
}
