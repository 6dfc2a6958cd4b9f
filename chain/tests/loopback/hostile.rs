//! Peers that are not what they should be, and servers that cannot be.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;

use chain::{ChainClient, ClientError, ReplicaServer, ServerOptions};
use checkpoint::Generation;

use crate::cluster::{Cluster, Owner, PATIENCE, VM, Vm, committed, host};

#[test]
fn a_stranger_is_not_taken_for_the_predecessor_or_the_owner() {
    let cluster = Cluster::new(1);
    let error = ChainClient::new(
        VM,
        host("stranger"),
        cluster.view.generation,
        None,
        chain::KEPT_MAX,
    )
    .connect(&cluster.view)
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("its predecessor is owner, not stranger"),
        "{error}"
    );
    assert!(matches!(error, ClientError::Peer { .. }));
}

#[test]
fn a_second_connection_takes_the_firsts_place() {
    let cluster = Cluster::new(1);
    let first = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&first, true);
    committed(&first, vm.epoch, Generation(2));
    let server = cluster.hosts[0].server();
    let mark = server.freeze(VM).unwrap();
    server.unfreeze(VM).unwrap();
    let second = Owner::new(&cluster.view, Some(mark));
    committed(&second, vm.epoch, Generation(2));
    let mut other = vm.clone();
    other.run(5);
    // The first one's frames end its connection and change nothing.
    while first.connection.heartbeat().is_ok() {
        std::thread::yield_now();
    }
    vm.run(1);
    vm.checkpoint(&second, false);
    committed(&second, vm.epoch, Generation(2));
    assert_eq!(cluster.hosts[0].failed(), None);
}

#[test]
fn a_port_in_use_is_an_error_that_names_address_and_remedy() {
    let cluster = Cluster::bare(1, 6);
    let addr = cluster.hosts[0].server().addr();
    let options = ServerOptions {
        host: host("x"),
        data_dir: "/nonexistent".into(),
        heartbeat: std::time::Duration::from_millis(10),
        missed: 6,
        files: None,
    };
    let (sender, _events) = mpsc::channel();
    let Err(error) = ReplicaServer::bind(addr, options, sender) else {
        panic!("two servers on one address")
    };
    let text = error.to_string();
    assert!(text.contains(&addr.to_string()), "{text}");
    assert!(text.contains("host.toml"), "{text}");
}

#[test]
fn a_name_that_leaves_the_directory_is_refused() {
    let cluster = Cluster::bare(1, 6);
    for name in ["..", "a/b", "/etc", "", "."] {
        let mut view = cluster.view.clone();
        view.name = name.into();
        let result = cluster.hosts[0].server().create(
            view,
            crate::cluster::shape(crate::cluster::DISK),
            diskbuf::Durability::Memory,
        );
        let error = result.expect_err(name).to_string();
        assert!(error.contains("cannot be named"), "{error}");
    }
}

#[test]
fn peers_that_talk_nonsense_are_cut_off_and_others_served_on() {
    let cluster = Cluster::new(1);
    let client = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&client, true);
    let mut x = 88_172_645_463_325_252u64;
    for round in 0..50 {
        let mut peer = TcpStream::connect(cluster.hosts[0].server().addr()).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes: Vec<u8> = (0..64 + round * 7)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect();
        if round % 2 == 0 {
            // A good header of a kind that may not come first, or a greeting that does not decode.
            bytes[..4].copy_from_slice(b"UCHN");
            let kind = 1 + round as u16 % 14;
            bytes[4..8].copy_from_slice(&[3, 0, kind as u8, 0]);
            bytes[32..64].fill(0);
            bytes[32] = 40;
            let payload = crc32c::crc32c(&bytes[64..]);
            bytes[36..40].copy_from_slice(&payload.to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        }
        // The other side may have hung up before everything is out.
        let _ = peer.write_all(&bytes);
        let _ = peer.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = peer.read_to_end(&mut rest);
        vm.run(round);
        vm.checkpoint(&client, false);
    }
    committed(&client, vm.epoch, Generation(2));
    assert_eq!(cluster.hosts[0].failed(), None);
}
