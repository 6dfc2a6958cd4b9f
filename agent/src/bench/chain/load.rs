//! Checkpoints of a given size, as fast as a chain takes them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use chain::{ChainClient, ClientError, ClientEvent, Connection};
use checkpoint::{EncoderOptions, Epoch, MachineState, PAGE_SIZE, PageEncoder};
use diskbuf::Durability;
use nix::sys::resource::{UsageWho, getrusage};
use serde::Serialize;

use super::Outcome;
use super::hosts::Hosts;
use crate::bench::Phase;

const FRAME: usize = 256 << 10;
/// Checkpoints under way.
pub const IN_FLIGHT: u64 = 3;

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// Millions of bytes of page records per second.
    pub mb_per_s: f64,
    /// From the first byte of a checkpoint being sent to its ack, milliseconds.
    pub ack_ms: Phase,
    /// Processor cores kept busy by this process, all parts together.
    pub cores: f64,
}

/// The content of a checkpoint.
pub struct Content {
    frames: Vec<Vec<u8>>,
    machine: Vec<u8>,
}

impl Content {
    /// `bytes` of pages that no encoding shortens.
    ///
    /// # Errors
    /// None that can happen: the machine state is small.
    pub fn new(bytes: u64) -> Outcome<Self> {
        let mut encoder = PageEncoder::new(EncoderOptions { lz4: false });
        let (mut frames, mut frame, mut x) = (Vec::new(), Vec::new(), 1u64);
        for gfn in 0..(bytes / PAGE_SIZE as u64).max(1) {
            let mut page = [0u8; PAGE_SIZE];
            for word in page.as_chunks_mut::<8>().0 {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                *word = x.to_le_bytes();
            }
            encoder.encode(gfn, &page, None, &mut frame);
            if frame.len() >= FRAME {
                frames.push(std::mem::take(&mut frame));
            }
        }
        frames.push(frame);
        Ok(Self {
            frames,
            machine: MachineState::default().encode()?,
        })
    }

    fn bytes(&self) -> usize {
        self.frames.iter().map(Vec::len).sum()
    }

    /// Sends it as checkpoint `epoch` to all of `clients`, piece by piece.
    ///
    /// # Errors
    /// The clients'.
    pub fn send(&self, clients: &[ChainClient], epoch: u64) -> Result<(), ClientError> {
        let full = epoch == 1;
        clients
            .iter()
            .try_for_each(|c| c.begin(Epoch(epoch), full, !full))?;
        for frame in &self.frames {
            clients.iter().try_for_each(|c| c.pages(frame))?;
        }
        for client in clients {
            client.machine(&self.machine)?;
            client.end()?;
        }
        Ok(())
    }
}

fn cpu_seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        let (user, system) = (usage.user_time(), usage.system_time());
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        seconds(user) + seconds(system)
    })
}

struct Meter {
    begun: Instant,
    cpu: f64,
}

impl Meter {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            cpu: cpu_seconds(),
        }
    }

    fn rate(&self, bytes: usize, acks: Vec<f64>) -> Rate {
        let seconds = self.begun.elapsed().as_secs_f64();
        Rate {
            mb_per_s: bytes as f64 / seconds / 1e6,
            ack_ms: Phase::of(acks),
            cores: (cpu_seconds() - self.cpu) / seconds,
        }
    }
}

/// The same bytes over a plain TCP connection of the loopback interface.
///
/// # Errors
/// The connection's.
pub fn plain(content: &Content, time: Duration) -> Outcome<Rate> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut to = TcpStream::connect(listener.local_addr()?)?;
    let (mut from, _) = listener.accept()?;
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while from.read(&mut buffer).is_ok_and(|n| n > 0) {}
    });
    let (meter, mut bytes) = (Meter::new(), 0);
    while meter.begun.elapsed() < time {
        for frame in &content.frames {
            to.write_all(frame)?;
        }
        bytes += content.bytes();
    }
    drop(to);
    let _ = reading.join();
    Ok(meter.rate(bytes, Vec::new()))
}

/// A chain of `length` replicas.
///
/// # Errors
/// What keeps it from running.
pub fn chain(
    content: &Content,
    length: usize,
    durability: Durability,
    time: Duration,
) -> Outcome<Rate> {
    let mut hosts = Hosts::new(length, durability)?;
    let all: Vec<usize> = (0..length).collect();
    hosts.decide(&all, true)?;
    drive(content, &[hosts], time)
}

/// `backups` replicas, each fed by the owner itself; a checkpoint is committed once all have it.
///
/// # Errors
/// What keeps it from running.
pub fn fan_out(
    content: &Content,
    backups: usize,
    durability: Durability,
    time: Duration,
) -> Outcome<Rate> {
    let mut all = Vec::new();
    for _ in 0..backups {
        let mut hosts = Hosts::new(1, durability)?;
        hosts.decide(&[0], true)?;
        all.push(hosts);
    }
    drive(content, &all, time)
}

fn drive(content: &Content, chains: &[Hosts], time: Duration) -> Outcome<Rate> {
    let clients: Vec<ChainClient> = chains.iter().map(Hosts::client).collect::<Outcome<_>>()?;
    let mut acks = Vec::new();
    for (hosts, client) in chains.iter().zip(&clients) {
        acks.push(acks_of(hosts.connect(client)?));
    }
    let wait = |epoch: u64| -> Outcome<Instant> {
        let mut latest = Instant::now();
        for acks in &acks {
            loop {
                let (acked, at) = acks.recv().map_err(|_| "the chain is lost")?;
                if acked >= epoch {
                    latest = at;
                    break;
                }
            }
        }
        Ok(latest)
    };
    // The first times take page faults, which belong to no steady state.
    for epoch in 1..=2 {
        content.send(&clients, epoch)?;
        wait(epoch)?;
    }
    let (meter, mut begun, mut latencies) = (Meter::new(), Vec::new(), Vec::new());
    let (mut sent, mut done) = (2u64, 2u64);
    while meter.begun.elapsed() < time || done < sent {
        if meter.begun.elapsed() < time && sent - done < IN_FLIGHT {
            begun.push(Instant::now());
            sent += 1;
            content.send(&clients, sent)?;
        } else {
            done += 1;
            let at = wait(done)?;
            let took = at.duration_since(begun[(done - 3) as usize]);
            latencies.push(took.as_secs_f64() * 1000.0);
        }
    }
    let bytes = (done - 2) as usize * content.bytes();
    Ok(meter.rate(bytes, latencies))
}

/// Acks of a chain and when they came, until it is lost.
pub fn acks_of(connection: std::sync::Arc<Connection>) -> Receiver<(u64, Instant)> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        chain::urgent_thread();
        while let Some(event) = connection.next_event() {
            let ClientEvent::Ack { epoch, .. } = event else {
                return;
            };
            if sender.send((epoch.0, Instant::now())).is_err() {
                return;
            }
        }
    });
    receiver
}
