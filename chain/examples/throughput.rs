//! Throughput and commit latency of chains of one to three replicas on the loopback interface, beside a plain TCP
//! stream of the same bytes in the same run. `cargo run --release -p chain --example throughput -- [MiB per epoch [disk]]`;
//! with `disk` every checkpoint is on each replica's disk (below `TMPDIR`) before it is acknowledged.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use chain::{
    ChainClient, ClientEvent, Member, ReplicaServer, ServerOptions, View, VmShape, urgent_thread,
};
use checkpoint::{
    EncoderOptions, Epoch, Generation, HostId, MachineState, PageEncoder, RamRange, VmId,
};
use diskbuf::Durability;

const RAM: u64 = 256 << 20;
const FRAME: usize = 256 << 10;
const IN_FLIGHT: u64 = 3;
const TIME: Duration = Duration::from_secs(3);

fn main() {
    let mib: u64 = std::env::args()
        .nth(1)
        .and_then(|a| a.parse().ok())
        .unwrap_or(4);
    let frames = incompressible(mib << 20);
    let bytes: usize = frames.iter().map(Vec::len).sum();
    println!("{mib} MiB of incompressible pages per epoch, {IN_FLIGHT} epochs in flight");
    plain(&frames, bytes);
    for length in 1..=3 {
        chain(length, &frames, bytes);
    }
}

/// Page records of that much memory that no encoding shortens, in frames.
fn incompressible(bytes: u64) -> Vec<Vec<u8>> {
    let mut encoder = PageEncoder::new(EncoderOptions { lz4: true });
    let (mut frames, mut frame, mut x) = (Vec::new(), Vec::new(), 1u64);
    for gfn in 0..bytes / 4096 {
        let mut page = [0u8; 4096];
        for word in page.chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            word.copy_from_slice(&x.to_le_bytes());
        }
        encoder.encode(gfn, &page, None, &mut frame);
        if frame.len() >= FRAME {
            frames.push(std::mem::take(&mut frame));
        }
    }
    frames.push(frame);
    frames
}

fn report(what: &str, epochs: u64, bytes: usize, elapsed: Duration, mut latencies: Vec<u128>) {
    let rate = epochs as f64 * bytes as f64 / elapsed.as_secs_f64() / 1e6;
    latencies.sort_unstable();
    let at = |p: usize| latencies.get(latencies.len() * p / 100).copied();
    let (p50, p99) = (at(50).unwrap_or(0), at(99).unwrap_or(0));
    println!("{what:>20}: {rate:7.0} MB/s   commit p50 {p50:6} us, p99 {p99:6} us");
}

fn plain(frames: &[Vec<u8>], bytes: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut to = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
    let (mut from, _) = listener.accept().expect("accept");
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while from.read(&mut buffer).is_ok_and(|n| n > 0) {}
    });
    let (begun, mut epochs) = (Instant::now(), 0);
    while begun.elapsed() < TIME {
        for frame in frames {
            to.write_all(frame).expect("the reader lives");
        }
        epochs += 1;
    }
    drop(to);
    let _ = reading.join();
    report("plain TCP", epochs, bytes, begun.elapsed(), Vec::new());
}

fn durability() -> Durability {
    match std::env::args().nth(2).as_deref() {
        Some("disk") => Durability::Disk,
        _ => Durability::Memory,
    }
}

fn chain(length: usize, frames: &[Vec<u8>], bytes: usize) {
    let host = |name: &str| HostId::new(name).expect("a name");
    let (events, _kept) = channel();
    let dirs: Vec<_> = (0..length)
        .map(|_| tempfile::tempdir().expect("a directory"))
        .collect();
    let servers: Vec<ReplicaServer> = dirs
        .iter()
        .enumerate()
        .map(|(i, dir)| {
            let options = ServerOptions {
                host: host(&format!("r{i}")),
                data_dir: dir.path().into(),
                heartbeat: Duration::from_millis(10),
                missed: 1000,
            };
            let any = "127.0.0.1:0".parse().expect("an address");
            ReplicaServer::bind(any, options, events.clone()).expect("a port")
        })
        .collect();
    let members = servers.iter().enumerate().map(|(i, server)| Member {
        host: host(&format!("r{i}")),
        addr: server.addr(),
    });
    let view = View {
        vm: VmId(1),
        name: "vm".into(),
        generation: Generation(2),
        owner: host("owner"),
        chain: members.collect(),
    };
    let shape = VmShape {
        ram: vec![RamRange { start: 0, len: RAM }],
        vcpus: 1,
        disks: vec![],
        config_toml: String::new(),
    };
    for server in &servers {
        server
            .create(view.clone(), shape.clone(), durability())
            .expect("memory for an image");
    }
    let client = loop {
        match ChainClient::connect(&view.owner, &view) {
            Ok(client) => break client,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let machine = MachineState::default().encode().expect("small");
    std::thread::scope(|scope| {
        let (acked, acks) = channel();
        let client = &client;
        scope.spawn(move || {
            urgent_thread();
            while let Some(event) = client.next_event() {
                let ClientEvent::Ack { epoch, .. } = event else {
                    return;
                };
                if acked.send((epoch, Instant::now())).is_err() {
                    return;
                }
            }
        });
        // Page faults of the first time belong to no steady state.
        ship(client, 1, frames, &machine);
        wait(&acks, 1);
        let (begun, mut sent_at, mut latencies) = (Instant::now(), vec![], vec![]);
        let (mut sent, mut done) = (1u64, 1u64);
        while begun.elapsed() < TIME || done < sent {
            if begun.elapsed() < TIME && sent - done < IN_FLIGHT {
                sent += 1;
                ship(client, sent, frames, &machine);
                sent_at.push(Instant::now());
            } else {
                done += 1;
                let at = wait(&acks, done);
                latencies.push(at.duration_since(sent_at[done as usize - 2]).as_micros());
            }
        }
        report(
            &format!("chain of {length}"),
            done - 1,
            bytes,
            begun.elapsed(),
            latencies,
        );
        client.close();
    });
}

fn ship(client: &ChainClient, epoch: u64, frames: &[Vec<u8>], machine: &[u8]) {
    let epoch = Epoch(epoch);
    client
        .begin(epoch, epoch == Epoch(1))
        .and_then(|()| frames.iter().try_for_each(|f| client.pages(epoch, f)))
        .and_then(|()| client.machine(epoch, machine))
        .and_then(|()| client.end(epoch))
        .expect("the chain lives");
}

fn wait(acks: &Receiver<(Epoch, Instant)>, epoch: u64) -> Instant {
    loop {
        let (acked, at) = acks.recv().expect("the chain lives");
        if acked.0 >= epoch {
            return at;
        }
    }
}
