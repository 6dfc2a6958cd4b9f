//! Taps on bridges that other programs change, each test in a network namespace of its own. Needs /dev/net/tun and root.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use netbuf::netconf::{self, LinkState};
use netbuf::{Cable, Gate, NET_HEADER, Port, Tap, Watcher, announce, bridge, bridge_warnings};

const PATIENCE: Duration = Duration::from_secs(60);
/// IEEE's local experimental EtherType: nothing else in the namespace uses it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 2];
const WITNESS: [u8; 6] = [2, 0, 0, 0, 0, 3];
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

fn make_bridge(name: &str) {
    netconf::create_bridge(name).expect("a bridge");
    netconf::set_link(name, true).expect("up");
}

fn delete_bridge(name: &str) {
    netconf::set_link(name, false).expect("down");
    netconf::delete_bridge(name).expect("deleted");
}

fn tap(name: &str, on: &str) -> Tap {
    let tap = Tap::open(name, true).expect("a tap");
    bridge::quieten(name).expect("quiet");
    bridge::join(on, name).expect("a port");
    tap
}

/// As an agent builds a standby's network card.
fn standby(name: &str, on: &str) -> Arc<Gate> {
    let gate = Gate::new(Tap::open(name, true).expect("a tap"), 1 << 20).expect("a gate");
    gate.stand_by();
    bridge::quieten(name).expect("quiet");
    bridge::join(on, name).expect("a port");
    gate
}

fn link(name: &str) -> LinkState {
    let links = netconf::links().expect("the interfaces");
    let found = links.into_iter().find(|link| link.name == name);
    found.unwrap_or_else(|| panic!("no {name}"))
}

fn is_port(tap: &str, bridge: &str) -> bool {
    link(tap).master == Some(link(bridge).index)
}

fn frame(to: [u8; 6], from: [u8; 6], body: u8) -> Vec<u8> {
    let mut f = vec![0; NET_HEADER];
    f.extend(to);
    f.extend(from);
    f.extend(ETHERTYPE);
    f.extend([body; 50]);
    f
}

fn readable(fd: RawFd, ms: libc::c_int) -> bool {
    let mut p = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut p, 1, ms) == 1 }
}

/// The next frame, if one comes in this time; without its virtio header. What the kernel says itself is passed over.
fn next_within(port: &dyn Port, ms: libc::c_int) -> Option<Vec<u8>> {
    let mut buf = vec![0; 2048];
    loop {
        while let Some(n) = port.recv(&mut buf).expect("recv") {
            let f = &buf[NET_HEADER..n];
            if f.len() > 14 && [GUEST, CLIENT, WITNESS].iter().any(|mac| f[6..12] == *mac) {
                return Some(f.to_vec());
            }
        }
        if !readable(port.fd(), ms) {
            return None;
        }
    }
}

fn next(port: &dyn Port) -> Vec<u8> {
    next_within(port, 60_000).expect("no frame came")
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Client and standby are on the bridge; then a witness is put on it. Once that one is heard, so would be the standby.
fn spanning_tree(standby: impl FnOnce() -> Arc<Gate>) -> (Tap, Arc<Gate>, Tap) {
    make_bridge("br0");
    netconf::set_stp("br0", true).expect("a spanning tree");
    netconf::set_forward_delay("br0", Duration::from_secs(2)).expect("the shortest");
    let client = tap("client", "br0");
    let gate = standby();
    let witness = tap("witness", "br0");
    until("the witness is heard", || {
        witness.send(&frame(BROADCAST, WITNESS, 1)).expect("send");
        next_within(&client, 20).is_some()
    });
    while next_within(&client, 0).is_some() {}
    (client, gate, witness)
}

/// The standby is activated: who of it and the witness, who speaks after it, is heard first?
fn first_heard(client: &Tap, gate: &Gate, witness: &Tap) -> Vec<u8> {
    gate.activate();
    netconf::set_link("guest", true).expect("up");
    gate.announce(&announce::rarp(GUEST));
    witness.send(&frame(BROADCAST, WITNESS, 2)).expect("send");
    next(client)
}

#[test]
fn h6_a_standbys_tap_forwards_at_once_when_it_is_activated() {
    in_netns(|| {
        let (client, gate, witness) = spanning_tree(|| standby("guest", "br0"));
        let heard = first_heard(&client, &gate, &witness);
        assert_eq!(heard, announce::rarp(GUEST));
        client.send(&frame(GUEST, CLIENT, 9)).expect("send");
        let mut buf = [0; 2048];
        until("the guest is reached", || {
            gate.recv(&mut buf).expect("recv").is_some() && buf[NET_HEADER..NET_HEADER + 6] == GUEST
        });
    });
}

#[test]
fn h6_the_test_fails_for_a_tap_that_comes_up_at_activation() {
    in_netns(|| {
        let (client, gate, witness) = spanning_tree(|| {
            let tap = Tap::open("guest", true).expect("a tap");
            netconf::add_to_bridge("br0", "guest").expect("a port");
            Gate::new(tap, 1 << 20).expect("a gate")
        });
        let heard = first_heard(&client, &gate, &witness);
        assert_eq!(heard[6..12], WITNESS, "the mutant went unnoticed");
    });
}

#[test]
fn h6_a_standby_neither_speaks_nor_is_known_nor_hears() {
    in_netns(|| {
        make_bridge("br0");
        let (client, witness) = (tap("client", "br0"), tap("witness", "br0"));
        let gate = standby("guest", "br0");
        assert!(link("guest").up && is_port("guest", "br0"));
        // Whatever tries to speak in its name.
        gate.send(&frame(BROADCAST, GUEST, 1)).expect("send");
        gate.announce(&announce::rarp(GUEST));
        announce::begin(vec![(gate.clone(), vec![announce::rarp(GUEST)])]).expect("a thread");
        client.send(&frame(GUEST, CLIENT, 2)).expect("send");
        // The bridge does not know the guest's address: the frame for it goes to everybody.
        assert_eq!(next(&witness)[6..12], CLIENT);
        for n in 0..20 {
            witness.send(&frame(BROADCAST, WITNESS, n)).expect("send");
        }
        assert_eq!(
            next(&client)[6..12],
            WITNESS,
            "nothing of the standby's before"
        );
        assert!(!readable(gate.rx_fd(), 0), "it would be woken");
        assert!(gate.stats().dropped_standby >= 2, "{:?}", gate.stats());
        gate.activate();
        let mut buf = [0; 2048];
        assert_eq!(gate.recv(&mut buf).expect("recv"), None, "old frames");
        witness.send(&frame(BROADCAST, WITNESS, 77)).expect("send");
        until("it hears", || gate.recv(&mut buf).expect("recv").is_some());
        assert_eq!(buf[NET_HEADER + 14], 77);
    });
}

#[test]
fn h6_a_persistent_tap_of_a_standby_that_was_killed_hears_again() {
    in_netns(|| {
        make_bridge("br0");
        let client = tap("client", "br0");
        let killed = Tap::open("guest", true).expect("a tap");
        killed.set_persistent(true).expect("persistent");
        killed.set_deaf(true).expect("deaf");
        drop(killed);
        let again = tap("guest", "br0");
        client.send(&frame(BROADCAST, CLIENT, 1)).expect("send");
        assert_eq!(next(&again)[6..12], CLIENT);
        again.set_persistent(false).expect("not persistent");
    });
}

#[test]
fn h6_the_host_itself_is_not_at_a_taps_end_and_its_bridge_keeps_its_address() {
    in_netns(|| {
        make_bridge("br0");
        let addresses =
            || std::fs::read_to_string("/proc/thread-self/net/if_inet6").expect("IPv6 addresses");
        netconf::create_veth("eth0", "far").expect("a pair");
        netconf::set_mac("eth0", [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff]).expect("a MAC");
        for name in ["eth0", "far"] {
            netconf::set_link(name, true).expect("up");
        }
        netconf::add_to_bridge("br0", "eth0").expect("a port");
        let mac = netconf::mac("br0").expect("its MAC");
        let _quiet = tap("quiet", "br0");
        assert_eq!(netconf::mac("br0").expect("its MAC"), mac);
        assert_eq!(netconf::mac("quiet").expect("a MAC")[0], 0xfe);
        // One that is not: to see that there would be an address.
        let _other = Tap::open("other", true).expect("a tap");
        netconf::set_link("other", true).expect("up");
        until("the other tap has an address", || {
            addresses().contains("other")
        });
        assert!(!addresses().contains("quiet"), "{}", addresses());
    });
}

/// A bridge with a port that takes 9000 bytes.
fn jumbo() {
    make_bridge("br0");
    netconf::create_veth("eth0", "far").expect("a pair");
    for name in ["far", "eth0"] {
        netconf::set_mtu(name, 9000).expect("an MTU");
        netconf::set_link(name, true).expect("up");
    }
}

#[test]
fn h8_a_tap_leaves_the_bridges_largest_packet_as_it_is() {
    in_netns(|| {
        jumbo();
        netconf::add_to_bridge("br0", "eth0").expect("a port");
        assert_eq!(link("br0").mtu, 9000);
        let _tap = tap("guest", "br0");
        assert_eq!((link("br0").mtu, link("guest").mtu), (9000, 9000));
        // As it was before: to see that the bridge would be lowered.
        let _other = Tap::open("other", true).expect("a tap");
        netconf::add_to_bridge("br0", "other").expect("a port");
        assert_eq!(link("br0").mtu, 1500);
    });
}

fn watch(cables: &[(&str, &str)]) -> (Watcher, Receiver<String>) {
    let (sender, said) = channel();
    let cables = cables.iter().map(|(tap, on)| Cable::new(tap, on)).collect();
    let say = Box::new(move |words| {
        let _ = sender.send(words);
    });
    (Watcher::start(cables, say).expect("a watcher"), said)
}

fn hear(said: &Receiver<String>, what: &str) {
    let words = said.recv_timeout(PATIENCE).expect("nothing was said");
    assert!(words.contains(what), "{words}");
}

#[test]
fn h7_a_bridge_that_is_made_again_gets_its_taps_back_standbys_too() {
    in_netns(|| {
        make_bridge("br0");
        make_bridge("br1");
        let owner = Gate::new(tap("owner", "br0"), 1 << 20).expect("a gate");
        let waiting = standby("waiting", "br0");
        let _elsewhere = tap("elsewhere", "br1");
        let (_watcher, said) = watch(&[("owner", "br0"), ("waiting", "br0"), ("elsewhere", "br1")]);
        for _ in 0..3 {
            delete_bridge("br0");
            hear(&said, "`br0` is gone");
            hear(&said, "`br0` is gone");
            assert_eq!(link("owner").master, None);
            make_bridge("br0");
            hear(&said, "`br0` is there again");
            hear(&said, "`br0` is there again");
            assert!(is_port("owner", "br0") && is_port("waiting", "br0"));
        }
        assert!(is_port("elsewhere", "br1"));
        let client = tap("client", "br0");
        owner.announce(&announce::rarp(GUEST));
        assert_eq!(next(&client), announce::rarp(GUEST));
        waiting.activate();
        waiting.announce(&announce::gratuitous_arp_reply(GUEST, [10, 0, 0, 1].into()));
        assert_eq!(next(&client)[..14][12..], [8, 6]);
        assert!(said.try_recv().is_err(), "nothing more to say");
    });
}

#[test]
fn h7_a_tap_that_is_taken_off_or_set_down_is_put_back() {
    in_netns(|| {
        make_bridge("br0");
        let _gate = standby("guest", "br0");
        let (watcher, said) = watch(&[("guest", "br0")]);
        netconf::remove_from_bridge("br0", "guest").expect("taken off");
        hear(&said, "had been taken off bridge `br0`: put back");
        assert!(is_port("guest", "br0"));
        netconf::set_link("guest", false).expect("down");
        hear(&said, "had been set down: set up again");
        assert!(link("guest").up);
        // What somebody wants otherwise is left to them.
        make_bridge("br1");
        drop(watcher);
        netconf::remove_from_bridge("br0", "guest").expect("taken off");
        netconf::add_to_bridge("br1", "guest").expect("put elsewhere");
        let (_watcher, said) = watch(&[("guest", "br0")]);
        hear(&said, "has been put on `br1`: left there");
        assert!(is_port("guest", "br1"));
    });
}

#[test]
fn h8_a_bridge_that_is_made_again_is_not_held_low_by_the_tap_that_was_there_first() {
    in_netns(|| {
        jumbo();
        let _gate = standby("guest", "br0");
        assert_eq!(link("guest").mtu, 1500, "nothing says more yet");
        let (_watcher, _said) = watch(&[("guest", "br0")]);
        netconf::add_to_bridge("br0", "eth0").expect("a port");
        until("the bridge takes what its network card takes", || {
            link("br0").mtu == 9000
        });
        assert_eq!(link("guest").mtu, 9000);
    });
}

#[test]
fn h6_a_bridge_that_delays_new_ports_is_named() {
    in_netns(|| {
        make_bridge("br0");
        assert_eq!(bridge_warnings("br0"), Vec::<String>::new());
        netconf::set_stp("br0", true).expect("a spanning tree");
        netconf::set_forward_delay("br0", Duration::from_secs(15)).expect("a delay");
        let said = bridge_warnings("br0");
        assert!(said.len() == 1 && said[0].contains("for 30 s"), "{said:?}");
        netconf::set_stp("br0", false).expect("none");
        assert_eq!(bridge_warnings("br0"), Vec::<String>::new());
        assert!(bridge_warnings("br7")[0].contains("no bridge `br7`"));
        assert!(bridge_warnings("lo")[0].contains("`lo` is an interface, but no bridge"));
    });
}
