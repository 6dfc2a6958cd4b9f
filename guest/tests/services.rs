//! The guest's services over a real tap in a network namespace of this test's own. Needs /dev/kvm, /dev/net/tun, and
//! root or user namespaces. No test harness: the namespace must be entered before there is a second thread.

mod client;
mod harness;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::{Client, GUEST, PATIENCE};
use guest::proto::*;
use harness::Machine;
use harness::virtio::{Kind, Slot, feed, lock};
use netbuf::{Tap, netconf};

/// A running guest.
struct Running {
    stop: Arc<AtomicBool>,
    threads: [JoinHandle<()>; 2],
    net: Arc<Mutex<Slot>>,
    disk: Option<Arc<Mutex<Slot>>>,
}

impl Running {
    fn start(tap: &Arc<Tap>, cmdline: &str, disk: Option<Kind>) -> Running {
        let mut m = Machine::new(64 << 20, &format!("ip={GUEST}/24 {cmdline}"));
        // Not the first slot, and the disk before the card: the guest has to look.
        let disk = disk.map(|d| m.plug(2, d));
        let net = m.plug(5, Kind::Net(Arc::clone(tap)));
        let stop = Arc::new(AtomicBool::new(false));
        let feeder = feed(Arc::clone(&net), Arc::clone(tap), Arc::clone(&stop));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            m.run_until("ready");
            while !seen.load(Ordering::Relaxed) {
                m.run_ms(5);
            }
        });
        Running {
            stop,
            threads: [thread, feeder],
            net,
            disk,
        }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for t in self.threads {
            t.join().expect("a machine's thread");
        }
    }
}

fn main() {
    netconf::unshare_userns_netns().expect("these tests need a network namespace of their own");
    let tap = Arc::new(Tap::open("probe0", true).expect("these tests need /dev/net/tun"));
    netconf::set_addr_v4("probe0", Ipv4Addr::new(10, 77, 0, 1), 24).expect("address");
    netconf::set_link("probe0", true).expect("link up");
    type Test = (&'static str, fn(&Arc<Tap>));
    let tests: [Test; 9] = [
        ("counts_without_a_disk", counts_without_a_disk),
        (
            "the_disk_holds_every_acknowledged_count",
            the_disk_holds_every_acknowledged_count,
        ),
        (
            "a_broken_disk_is_reported_not_hidden",
            a_broken_disk_is_reported_not_hidden,
        ),
        (
            "pipelined_requests_on_several_connections",
            pipelined_requests_on_several_connections,
        ),
        (
            "the_load_is_set_and_makes_passes",
            the_load_is_set_and_makes_passes,
        ),
        ("udp_is_echoed", udp_is_echoed),
        ("pings_are_answered", pings_are_answered),
        ("garbage_does_no_harm", garbage_does_no_harm),
        ("connections_come_and_go", connections_come_and_go),
    ];
    let only = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    for (name, test) in tests {
        if only.as_ref().is_none_or(|o| name.contains(o)) {
            println!("test {name} ...");
            test(&tap);
            println!("test {name} ok");
        }
    }
}

/// By the ping that everybody uses.
fn pings_are_answered(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", None);
    // The guest has to know the client's address first: smoltcp drops the reply that makes it ask,
    // and the host does not ask when it still knows the guest of the test before this one.
    Client::connect().op(Op::Read);
    let output = std::process::Command::new("ping")
        .args(["-c", "3", "-i", "0.2", "-W", "10", GUEST])
        .output()
        .expect("this test needs ping: install the Debian package iputils-ping");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("3 received"), "{said}");
    g.stop();
}

fn counts_without_a_disk(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", None);
    let mut c = Client::connect();
    for n in 1..=100 {
        let a = c.op(Op::Incr);
        assert_eq!(
            (a.counter, a.status, a.disk_counter),
            (n, Status::Ok as u16, 0)
        );
    }
    assert_eq!(c.op(Op::Read).counter, 100);
    assert_eq!(c.op(Op::ReadDisk).status, Status::NoDisk as u16);
    let unknown = c.ask(Request {
        op: 999,
        ..Request::new(Op::Read, 0)
    });
    assert_eq!(unknown.status, Status::BadOp as u16);
    let (a, b) = (c.op(Op::Stats).uptime_us, c.op(Op::Stats).uptime_us);
    assert!(a > 0 && b >= a, "{a} then {b}");
    g.stop();
}

fn disk_counter(g: &Running) -> Option<u64> {
    let slot = lock(g.disk.as_ref().expect("has a disk"));
    let Kind::Disk(bytes, _) = &slot.kind else {
        unreachable!("a disk")
    };
    parse_disk_block(bytes[..DISK_BLOCK].try_into().expect("a block"))
}

fn the_disk_holds_every_acknowledged_count(tap: &Arc<Tap>) {
    let mut bytes = vec![0; 128 << 10];
    fill_disk_block(41, (&mut bytes[..DISK_BLOCK]).try_into().expect("a block"));
    let g = Running::start(tap, "", Some(Kind::Disk(bytes, false)));
    let mut c = Client::connect();
    for n in 42..=100 {
        let flags = if n % 2 == 0 { FLAG_FLUSH } else { 0 };
        let a = c.ask(Request {
            flags,
            ..Request::new(Op::Incr, 0)
        });
        assert_eq!(
            (a.counter, a.disk_counter, a.status),
            (n, n, Status::Ok as u16)
        );
        assert_eq!(
            disk_counter(&g),
            Some(n),
            "on the disk when the answer came"
        );
    }
    let a = c.op(Op::ReadDisk);
    assert_eq!((a.disk_counter, a.status), (100, Status::Ok as u16));
    if let Kind::Disk(bytes, _) = &mut lock(g.disk.as_ref().expect("has a disk")).kind {
        bytes[DISK_SECTOR + 9] ^= 1;
    }
    assert_eq!(c.op(Op::ReadDisk).status, Status::DiskTorn as u16);
    g.stop();
}

fn a_broken_disk_is_reported_not_hidden(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", Some(Kind::Disk(vec![0; 128 << 10], true)));
    let mut c = Client::connect();
    let a = c.op(Op::Incr);
    assert_eq!(
        (a.counter, a.disk_counter, a.status),
        (1, 0, Status::DiskError as u16)
    );
    let a = c.ask(Request {
        flags: FLAG_NO_WAIT,
        ..Request::new(Op::Incr, 0)
    });
    assert_eq!((a.counter, a.status), (2, Status::Ok as u16));
    g.stop();
}

fn pipelined_requests_on_several_connections(tap: &Arc<Tap>) {
    const CLIENTS: u64 = 6;
    const ROUNDS: u64 = 50;
    let g = Running::start(
        tap,
        "pages=64 work=100",
        Some(Kind::Disk(vec![0; 128 << 10], false)),
    );
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            std::thread::spawn(|| {
                let mut c = Client::connect();
                let mut last = 0;
                for round in 0..ROUNDS {
                    for _ in 0..MAX_OUTSTANDING {
                        c.send(Request::new(Op::Incr, 0));
                    }
                    for i in 1..=MAX_OUTSTANDING as u64 {
                        let a = c.receive();
                        assert_eq!(a.seq, round * MAX_OUTSTANDING as u64 + i, "in order");
                        assert!(
                            a.counter > last && a.disk_counter >= a.counter,
                            "{a:?} after {last}"
                        );
                        last = a.counter;
                    }
                }
            })
        })
        .collect();
    for c in clients {
        c.join().expect("a client");
    }
    let total = CLIENTS * ROUNDS * MAX_OUTSTANDING as u64;
    assert_eq!(Client::connect().op(Op::Read).counter, total);
    assert_eq!(disk_counter(&g), Some(total));
    g.stop();
}

fn the_load_is_set_and_makes_passes(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", None);
    let mut c = Client::connect();
    assert_eq!(c.op(Op::Stats).passes, 0);
    assert_eq!(c.ask(Request::set_load(0, 50, 10)).counter, 50);
    let from = Instant::now();
    while c.op(Op::Stats).passes < 10 {
        assert!(from.elapsed() < PATIENCE, "no passes");
    }
    let cut = c.ask(Request::set_load(0, u64::MAX, u64::MAX)).counter;
    assert!(cut > 1000 && cut < (64 << 20) / 4096, "{cut}");
    // Endless work after each page does not keep the guest from answering.
    assert_eq!(c.op(Op::Incr).counter, 1);
    assert_eq!(c.ask(Request::set_load(0, 0, 0)).counter, 0);
    g.stop();
}

fn udp_is_echoed(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", None);
    drop(Client::connect());
    let s = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    s.set_read_timeout(Some(PATIENCE)).expect("timeout");
    for len in [0, 1, 100, 1472] {
        let data = vec![len as u8; len];
        s.send_to(&data, (GUEST, ECHO_PORT)).expect("send");
        let mut b = [0; 2048];
        let (n, _) = s.recv_from(&mut b).expect("the echo");
        assert_eq!(b[..n], data);
    }
    g.stop();
}

fn garbage_does_no_harm(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", None);
    let mut c = Client::connect();
    assert_eq!(c.op(Op::Incr).counter, 1);
    // Frames: every length, every kind of nonsense after a plausible Ethernet + IPv4 beginning; lengths that lie; ids
    // that are none. xorshift, so that a failure repeats.
    let mut x = 0x1234_5678_9abc_def1_u64;
    let mut random = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for round in 0..20_000_u64 {
        let mut frame = vec![0; 12 + (random() % 1515) as usize];
        for b in &mut frame[12..] {
            *b = random() as u8;
        }
        let start: &[u8] = match round % 4 {
            0 => &[],
            1 => b"\x02\x12\x78\x56\x00\x01\x02\x02\x02\x02\x02\x02\x08\x00\x45\x00",
            2 => b"\xff\xff\xff\xff\xff\xff\x02\x02\x02\x02\x02\x02\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01",
            _ => b"\x02\x12\x78\x56\x00\x01\x02\x02\x02\x02\x02\x02\x08\x00\x45\x00\x00\x28\x00\x00\x00\x00\x40\x06",
        };
        let n = start.len().min(frame.len() - 12);
        frame[12..12 + n].copy_from_slice(&start[..n]);
        let claimed = if round % 16 == 15 {
            random() as u32
        } else {
            frame.len() as u32
        };
        let from = Instant::now();
        loop {
            let mut slot = lock(&g.net);
            slot.lies = u32::from(round % 64 == 63);
            if slot.receive(&frame, claimed) {
                break;
            }
            drop(slot);
            assert!(
                from.elapsed() < PATIENCE,
                "the guest takes no frames any more"
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    // A stream that is not the protocol is closed; the others live on.
    let mut bad = Client::connect();
    bad.stream.write_all(&[0x55; 1000]).expect("send");
    let end = bad.stream.read(&mut [0; 16]);
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    assert_eq!(c.op(Op::Incr).counter, 2);
    g.stop();
}

fn connections_come_and_go(tap: &Arc<Tap>) {
    let g = Running::start(tap, "", None);
    for n in 1..=100 {
        let mut c = Client::connect();
        c.send(Request::new(Op::Incr, 0));
        match n % 3 {
            0 => {
                assert_eq!(c.receive().counter, n);
            }
            1 => {
                // Half-closed: the answer still comes, then the end.
                c.stream.shutdown(Shutdown::Write).expect("shutdown");
                assert_eq!(c.receive().counter, n);
                assert_eq!(c.stream.read(&mut [0; 1]).expect("end of stream"), 0);
            }
            _ => {
                // Half a request is left when it goes.
                c.stream
                    .write_all(&REQUEST_MAGIC.to_le_bytes())
                    .expect("send");
                assert_eq!(c.receive().counter, n);
            }
        }
    }
    let mut all: Vec<_> = (0..MAX_CONNECTIONS).map(|_| Client::connect()).collect();
    for c in &mut all {
        assert_eq!(c.op(Op::Read).counter, 100);
    }
    g.stop();
}
