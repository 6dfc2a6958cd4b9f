//! How long updates stand still when a replica is lost, beside the paper's figures (van Renesse & Schneider, OSDI 2004,
//! section 3: message delays until the service goes on, once the failure has been noticed and decided on).

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use diskbuf::Durability;
use serde::Serialize;

use super::Outcome;
use super::hosts::Hosts;
use super::load::{Content, acks_of};
use crate::bench::Phase;
use std::io::{Read, Write};

const REPLICAS: usize = 3;

/// One place in the chain.
#[derive(Clone, Debug, Serialize)]
pub struct Outage {
    /// Which replica was lost.
    pub lost: &'static str,
    /// From the kill to the next acknowledged update, milliseconds: noticing, deciding, connecting, resending.
    pub updates_ms: Phase,
    /// Part of it: from the decision on.
    pub after_decision_ms: Phase,
    /// The same in message delays of this run.
    pub after_decision_delays: f64,
    /// The paper's message delays for updates.
    pub paper_delays: u32,
}

/// A message's way from one process to another, milliseconds.
///
/// # Errors
/// The connection's.
pub fn message_delay() -> Outcome<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut here = TcpStream::connect(listener.local_addr()?)?;
    let (mut there, _) = listener.accept()?;
    here.set_nodelay(true)?;
    there.set_nodelay(true)?;
    let echo = std::thread::spawn(move || {
        let mut message = [0; 64];
        while there.read_exact(&mut message).is_ok() && there.write_all(&message).is_ok() {}
    });
    let mut message = [0; 64];
    let mut times = Vec::new();
    for _ in 0..2000 {
        let begun = Instant::now();
        here.write_all(&message)?;
        here.read_exact(&mut message)?;
        times.push(begun.elapsed().as_secs_f64() * 500.0);
    }
    drop(here);
    let _ = echo.join();
    Ok(Phase::of(times).p50)
}

/// Kills each replica of a chain of three in turn, `runs` times.
///
/// # Errors
/// When a chain does not go on.
pub fn measure(runs: u32, delay: f64) -> Outcome<Vec<Outage>> {
    // "Head: 2 message delays", "middle: 4", "tail: 2" in the paper's analysis of transient outages for updates.
    [("head", 0, 2), ("middle", 1, 4), ("tail", 2, 2)]
        .into_iter()
        .map(|(lost, place, paper_delays)| {
            let (mut all, mut after) = (Vec::new(), Vec::new());
            for _ in 0..runs {
                let (updates, decided) = once(place)?;
                all.push(updates);
                after.push(decided);
            }
            let after_decision_ms = Phase::of(after);
            Ok(Outage {
                lost,
                updates_ms: Phase::of(all),
                after_decision_ms,
                after_decision_delays: after_decision_ms.p50 / delay,
                paper_delays,
            })
        })
        .collect()
}

/// Milliseconds from the kill, and from the decision, to the next ack.
fn once(place: usize) -> Outcome<(f64, f64)> {
    let content = Content::new(64 << 10)?;
    let mut hosts = Hosts::new(REPLICAS, Durability::Memory)?;
    hosts.decide(&[0, 1, 2], true)?;
    let clients = [hosts.client()?];
    let acks = acks_of(hosts.connect(&clients[0])?);
    let mut epoch = 1;
    content.send(&clients, epoch)?;
    while epoch < 50 {
        if acks.recv()?.0 == epoch {
            epoch += 1;
            content.send(&clients, epoch)?;
        }
    }
    // One checkpoint is under way: it has to come through all the same.
    let killed = Instant::now();
    hosts.kill(place);
    // The channel ends when the chain says that a replica is lost, or a connection breaks.
    while acks.recv_timeout(Duration::from_secs(10)).is_ok() {}
    let left: Vec<usize> = (0..REPLICAS).filter(|i| *i != place).collect();
    let decided = Instant::now();
    hosts.decide(&left, false)?;
    let acks = acks_of(hosts.connect(&clients[0])?);
    epoch += 1;
    content.send(&clients, epoch)?;
    loop {
        let (acked, at) = acks
            .recv_timeout(Duration::from_secs(10))
            .map_err(|_| "no update was acknowledged after the loss of a replica")?;
        if acked >= epoch {
            let ms = |from: Instant| at.duration_since(from).as_secs_f64() * 1000.0;
            return Ok((ms(killed), ms(decided)));
        }
    }
}
