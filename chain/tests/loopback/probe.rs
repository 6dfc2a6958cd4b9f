//! Whether a host is alive, and who it is: by what it answers.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use chain::greet::{Hello, Role};
use chain::wire::{self, FLAG_DECLINED, Frame, Kind, Payload};
use chain::{ClientError, Held, Member, ProbeError, Progress, View, look, probe};
use checkpoint::{Epoch, Generation, HostId, codec};

use crate::cluster::{Cluster, PATIENCE, VM, Vm, committed, host, until};

/// Greets a replica as `from`, and what it answers.
fn greeting(
    member: &Member,
    view: &View,
    role: Role,
    from: &HostId,
) -> (TcpStream, Frame, Payload) {
    let mut peer = TcpStream::connect(member.addr).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let hello = Hello {
        role,
        from: from.clone(),
        to: member.host.clone(),
    };
    let frame = Frame {
        kind: Kind::Hello,
        vm: VM,
        generation: view.generation,
        epoch: Epoch::ZERO,
        flags: 0,
    };
    wire::write(&mut peer, &frame, &codec::to_bytes(&hello, 4096).unwrap()).unwrap();
    let mut payload = Payload::default();
    let answer = wire::read(&mut peer, &mut payload).unwrap();
    (peer, answer, payload)
}

fn said(payload: &Payload) -> (HostId, String) {
    codec::from_bytes(payload, 4096).unwrap()
}

fn asked(cluster: &Cluster, i: usize) -> Result<chain::Alive, ProbeError> {
    let member = &cluster.hosts[i].member;
    probe(
        member,
        VM,
        cluster.view.generation,
        &host("owner"),
        PATIENCE,
    )
}

#[test]
fn a_host_says_how_far_its_replica_is() {
    let cluster = Cluster::with_spares(1, 1);
    let owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, Generation(2));
    let alive = asked(&cluster, 0).unwrap();
    assert_eq!(alive.host, host("r0"));
    let at = Progress {
        generation: Generation(2),
        hist: Some(vm.epoch),
        ..Progress::default()
    };
    // The acknowledgement is out before the frame is done with.
    until("no frame is in hand", || {
        asked(&cluster, 0).unwrap().replica.as_ref() == Some(&at)
    });
    assert_eq!(asked(&cluster, 1).unwrap().replica, None, "it has none");
    let server = cluster.hosts[1].server();
    server.decline(VM, Generation(2), "no room".into());
    let declined = asked(&cluster, 1).unwrap().replica.unwrap().declined;
    assert_eq!(declined.as_deref(), Some("no room"));
}

#[test]
fn c2_a_host_that_accepts_and_does_not_answer_is_not_alive() {
    // As of a stopped process: the kernel takes connections for it.
    let stopped = TcpListener::bind("127.0.0.1:0").unwrap();
    let short = Duration::from_millis(50);
    let ask = |addr| {
        probe(
            &Member::new(host("r0"), addr),
            VM,
            Generation(2),
            &host("owner"),
            short,
        )
    };
    let addr = stopped.local_addr().unwrap();
    let silent = ask(addr).unwrap_err();
    assert!(matches!(silent, ProbeError::Silent { .. }), "{silent}");
    assert!(silent.to_string().contains("r0 at 127.0.0.1"), "{silent}");
    drop(stopped);
    let closed = ask(addr).unwrap_err();
    assert!(matches!(closed, ProbeError::Connect { .. }), "{closed}");
}

#[test]
fn c2_the_patience_is_for_the_whole_answer() {
    // It says something all the time, and never the end of it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let member = Member::new(host("r0"), listener.local_addr().unwrap());
    let talks = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut bytes = 0;
        while peer.write_all(&[0]).is_ok() {
            bytes += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        bytes
    });
    let short = Duration::from_millis(300);
    let error = probe(&member, VM, Generation(2), &host("owner"), short).unwrap_err();
    assert!(matches!(error, ProbeError::Silent { .. }), "{error}");
    assert!(
        talks.join().unwrap() < 64,
        "given up before a header was whole"
    );
}

#[test]
fn i3_who_is_reached_at_an_address_says_who_it_is_whatever_it_is_asked_for() {
    let cluster = Cluster::new(2);
    let mut view = cluster.view.clone();
    let wrong = cluster.hosts[1].member.addr;
    view.chain[0].addr = wrong;
    let names = |text: &str| {
        let says = format!("r0 at {wrong} answers as host r1: [peers] in host.toml");
        assert!(text.contains(&says), "{text}");
    };
    let from = host("owner");
    let error = probe(&view.chain[0], VM, view.generation, &from, PATIENCE).unwrap_err();
    assert!(matches!(error, ProbeError::Stranger(_)), "{error:?}");
    names(&error.to_string());
    let client = chain::ChainClient::new(VM, from.clone(), view.generation, None, chain::KEPT_MAX);
    match client.connect(&view) {
        Err(ClientError::Peer { why, .. }) => names(&why),
        other => panic!("{other:?}"),
    }
    match look(&view.chain[0], &view, &from) {
        Held::Unknown(why) => names(&why),
        other => panic!("{other:?}"),
    }
    for role in [
        Role::Update,
        Role::Acks,
        Role::Query,
        Role::Look,
        Role::Probe,
    ] {
        let (_, answer, payload) = greeting(&view.chain[0], &view, role, &from);
        assert_eq!(answer.kind, Kind::Stranger, "{role:?}");
        let found: HostId = codec::from_bytes(&payload, 4096).unwrap();
        assert_eq!(found, host("r1"));
    }
}

#[test]
fn c4_a_refusal_is_not_a_request_to_try_again() {
    let mut cluster = Cluster::bare(2, 1_000_000);
    let view = cluster.view.clone();
    let ask = || {
        let (_, answer, payload) = greeting(&view.chain[0], &view, Role::Update, &host("owner"));
        (answer.kind, said(&payload))
    };
    assert_eq!(ask().0, Kind::NotReady, "nobody has told it yet");
    cluster.create([0]);
    assert_eq!(ask().0, Kind::NotReady, "its successor may still come");
    let successor = cluster.hosts[1].server();
    successor.decline(VM, cluster.view.generation, "no bridge br0".into());
    until("the head says so", || ask().0 == Kind::Declined);
    let (who, why) = ask().1;
    assert_eq!(who, host("r1"), "whoever declines, not who says it");
    assert!(why.contains("no bridge br0"), "{why}");
}

#[test]
fn c4_what_was_declined_in_one_generation_may_be_possible_in_the_next() {
    let mut cluster = Cluster::bare(1, 1_000_000);
    let server = cluster.hosts[0].server();
    server.decline(VM, cluster.view.generation, "no room".into());
    let kind = |cluster: &Cluster| {
        let head = &cluster.view.chain[0];
        greeting(head, &cluster.view, Role::Update, &host("owner"))
            .1
            .kind
    };
    assert_eq!(kind(&cluster), Kind::Declined);
    cluster.anew_silently(&[0]);
    assert_eq!(kind(&cluster), Kind::NotReady);
    cluster.create([0]);
    assert_eq!(kind(&cluster), Kind::HelloOk);
}

#[test]
fn c4_an_owner_hears_at_once_that_a_joining_host_declines() {
    // Whether it is connected already or comes later.
    for before in [true, false] {
        let mut cluster = Cluster::with_spares(2, 1);
        cluster.reconfigure_silently(&[0, 1], Some(2));
        let generation = cluster.view.generation;
        cluster.hosts[2]
            .server()
            .decline(VM, generation, "no room".into());
        let owner = |view: &View| {
            let mut found = None;
            until("the chain stands", || {
                let made = greeting(&view.chain[0], view, Role::Update, &host("owner"));
                let stands = made.1.kind == Kind::HelloOk;
                found = stands.then_some(made.0);
                stands
            });
            found.unwrap()
        };
        let refused = |peer: &mut TcpStream| {
            let mut payload = Payload::default();
            let frame = wire::read(peer, &mut payload).unwrap();
            assert_eq!((frame.kind, frame.flags), (Kind::Broken, FLAG_DECLINED));
            assert_eq!(said(&payload).0, host("r2"));
        };
        cluster.tell_only(&[0, 1]);
        if !before {
            // Told once, and to nobody who listens any more.
            refused(&mut owner(&cluster.view));
        }
        refused(&mut owner(&cluster.view));
    }
}
