//! H19: a connection that stands still is not death while heartbeats come by datagram; two silent paths are, and so is a
//! datagram that means something else.
//!
//! Whether somebody suspects too early is seen without a clock: another replica, further down its chain and so of more
//! patience, is cut off at the same time. Once that one suspects, the other one would have long before.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chain::ServerEvent;
use chain::pulse::{Pulse, name_of};
use checkpoint::{Generation, HostId, VmId};

use crate::cluster::{Cluster, Owner, PATIENCE, VM, Vm, committed, host, until};

/// Ticks of 10 ms until the head suspects; one further down takes five times as long, or nine times. Generous: on a
/// machine that is busy with other tests, a heartbeat may come late.
const MISSED: u32 = 60;

/// A chain of `length` that has committed something, and its owner.
fn begun(length: usize) -> (Cluster, Owner) {
    let mut cluster = Cluster::bare(length, MISSED);
    cluster.create(0..length);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    (cluster, owner)
}

/// Neither connection nor datagram passes.
fn cut_off(cluster: &Cluster, which: usize) {
    cluster.hosts[which].wire.lose_datagrams();
    cluster.hosts[which].wire.hold();
}

fn suspects(cluster: &Cluster, which: usize) {
    let event = cluster.hosts[which].events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, ServerEvent::Suspect { .. }), "{event:?}");
}

fn has_not_suspected(cluster: &Cluster, which: usize) {
    let event = cluster.hosts[which].events.try_recv();
    assert!(event.is_err(), "{event:?}");
}

/// Does something again and again, until it is dropped.
struct Again {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Again {
    fn and_again(mut act: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                act();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// As an owner's heartbeat thread does it.
    fn heartbeat(owner: &Owner) -> Self {
        let connection = owner.connection.clone();
        Self::and_again(move || {
            let _ = connection.heartbeat();
        })
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.thread.take().unwrap().join();
    }
}

#[test]
fn h19_an_owner_whose_connection_stands_still_is_heard_by_datagram() {
    let (cluster, owner) = begun(2);
    let beats = Again::heartbeat(&owner);
    cluster.hosts[0].wire.hold();
    cut_off(&cluster, 1);
    suspects(&cluster, 1);
    has_not_suspected(&cluster, 0);
    // Both ways are silent.
    drop(beats);
    suspects(&cluster, 0);
}

#[test]
fn h19_without_datagrams_an_owner_is_heard_by_its_connection_as_before() {
    let (cluster, owner) = begun(2);
    let _beats = Again::heartbeat(&owner);
    cluster.hosts[0].wire.lose_datagrams();
    cut_off(&cluster, 1);
    suspects(&cluster, 1);
    has_not_suspected(&cluster, 0);
    assert!(
        cluster.hosts[0].wire.datagrams() > 0,
        "they came, and were lost"
    );
    cluster.hosts[0].wire.hold();
    suspects(&cluster, 0);
}

#[test]
fn h19_a_replica_whose_connection_stands_still_is_heard_by_its_successor() {
    let (cluster, _owner) = begun(3);
    cluster.hosts[1].wire.hold();
    cut_off(&cluster, 2);
    suspects(&cluster, 2);
    has_not_suspected(&cluster, 1);
    cluster.hosts[1].wire.lose_datagrams();
    suspects(&cluster, 1);
}

#[test]
fn h19_a_replica_that_has_failed_is_missed_although_its_host_lives() {
    let (cluster, owner) = begun(2);
    // A checkpoint that is not whole.
    owner.begin(checkpoint::Epoch(2), false, true).unwrap();
    owner.end().unwrap();
    until("the head has failed", || {
        cluster.hosts[0].failed().is_some()
    });
    suspects(&cluster, 1);
}

/// The head suspects although it is sent these, by whoever.
fn is_not_heard(spoil: impl Fn(&mut Pulse) + Send + 'static, cut: usize) {
    let (cluster, _owner) = begun(1);
    let to = cluster.hosts[0].server().addr();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut pulse = Pulse {
        vm: VM,
        generation: Generation(2),
        from: name_of(&host("owner")),
        n: 1,
    };
    let _spoilt = Again::and_again(move || {
        pulse.n += 1;
        let mut said = pulse;
        spoil(&mut said);
        let _ = socket.send_to(&said.to_bytes()[cut..], to);
    });
    suspects(&cluster, 0);
}

#[test]
fn h19_what_is_not_its_owners_in_its_generation_is_ignored() {
    is_not_heard(|said| said.vm = VmId(9), 0);
    is_not_heard(|said| said.generation = Generation(1), 0);
    is_not_heard(|said| said.generation = Generation(3), 0);
    is_not_heard(|said| said.from = name_of(&HostId::new("r0").unwrap()), 0);
    is_not_heard(|said| said.n = 5, 0);
    is_not_heard(|_| {}, 1);
}

#[test]
fn h19_the_same_datagrams_unspoilt_are_heard() {
    let (cluster, _owner) = begun(2);
    let to = cluster.hosts[0].server().addr();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut n = 1 << 60;
    let _spoken = Again::and_again(move || {
        n += 1;
        let pulse = Pulse {
            vm: VM,
            generation: Generation(2),
            from: name_of(&host("owner")),
            n,
        };
        let _ = socket.send_to(&pulse.to_bytes(), to);
    });
    cut_off(&cluster, 1);
    suspects(&cluster, 1);
    has_not_suspected(&cluster, 0);
}

/// A way to `target` on which the first connections are made and then stand still.
fn stalling(target: std::net::SocketAddr, mut still: usize) -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for client in listener.incoming().flatten() {
            if still > 0 {
                still -= 1;
                held.push(client);
                continue;
            }
            let server = std::net::TcpStream::connect(target).unwrap();
            let ends = [&client, &server].map(|end| end.try_clone().unwrap());
            for (mut from, mut to) in [
                (client, server),
                (ends[1].try_clone().unwrap(), ends[0].try_clone().unwrap()),
            ] {
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            }
        }
    });
    addr
}

#[test]
fn h19_a_host_is_alive_if_any_of_several_questions_is_answered() {
    let (cluster, _owner) = begun(1);
    let mut member = cluster.hosts[0].member.clone();
    let target = cluster.hosts[0].server().addr();
    let from = host("owner");
    member.addr = stalling(target, 2);
    let alive = chain::probe(&member, VM, Generation(2), &from, PATIENCE).unwrap();
    assert_eq!(alive.host, member.host);
    // One that never answers is silent, however often it is asked.
    member.addr = stalling(target, usize::MAX);
    let patience = Duration::from_millis(450);
    let silent = chain::probe(&member, VM, Generation(2), &from, patience).unwrap_err();
    assert!(
        matches!(silent, chain::ProbeError::Silent { .. }),
        "{silent}"
    );
}
