//! The outage without TCP: a UDP datagram every few milliseconds, and when its echo came.
//!
//! A TCP connection resumes when a retransmission timer fires, up to hundreds of milliseconds after the guest is back;
//! echoes come from the first moment on. Lost datagrams are lost: nothing is sent again.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::timeline::{Gap, Latency, Sample, Timeline, micros};

/// First bytes of a datagram, so that a stray one is not taken for an echo.
const MAGIC: [u8; 8] = *b"UPING\0\0\x01";
const LEN: usize = 16;
/// Datagrams whose echo is still waited for; an older one counts as lost.
const WAITED_FOR: usize = 4096;
/// How often the receiving thread looks whether it should end.
const LOOK: Duration = Duration::from_millis(50);

/// What a pinger saw. Times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PingReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Echoes received.
    pub received: u64,
    /// Sends and receives the network refused: no route, no neighbour, no such port.
    pub refused: u64,
    /// Round-trip times.
    pub latency: Latency,
    /// Longest time between two echoes.
    pub longest_gap_us: u64,
}

struct Shared {
    socket: UdpSocket,
    stop: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Instant)>,
    timeline: Timeline,
    received: u64,
}

/// A pinger running on threads of its own until [`Pinger::stop`] or drop.
pub struct Pinger {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pinger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinger")
            .field("report", &self.report())
            .finish()
    }
}

impl Pinger {
    /// Pings `addr` (the guest's address and [`guest::proto::ECHO_PORT`]) once every `every`.
    ///
    /// # Errors
    /// No socket or no thread. An address nobody answers at is no error.
    pub fn start(addr: SocketAddr, every: Duration) -> io::Result<Pinger> {
        let any: SocketAddr = if addr.is_ipv4() {
            ([0; 4], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(addr)?;
        socket.set_read_timeout(Some(LOOK))?;
        let shared = Arc::new(Shared {
            socket,
            stop: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            state: Mutex::default(),
        });
        let mut pinger = Pinger {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        let receiver = shared.clone();
        // Each added as soon as it runs: an error on the way ends the others by drop.
        pinger
            .threads
            .push(spawn("ping-recv", move || receiver.receive())?);
        pinger
            .threads
            .push(spawn("ping-send", move || shared.send(every))?);
        Ok(pinger)
    }

    /// When the first echo later than `t` came, if it has.
    pub fn first_reply_after(&self, t: Instant) -> Option<Instant> {
        self.shared.lock().timeline.first_after(t)
    }

    /// The longest stretch without echoes that ended after `t`.
    pub fn longest_gap_after(&self, t: Instant) -> Option<Gap> {
        self.shared.lock().timeline.longest_gap_after(t)
    }

    /// A copy of all echoes so far.
    pub fn timeline(&self) -> Timeline {
        self.shared.lock().timeline.clone()
    }

    /// The figures so far.
    pub fn report(&self) -> PingReport {
        let state = self.shared.lock();
        PingReport {
            sent: self.shared.sent.load(Ordering::Relaxed),
            received: state.received,
            refused: self.shared.refused.load(Ordering::Relaxed),
            latency: state.timeline.latency(),
            longest_gap_us: state.timeline.longest_gap().map_or(0, |g| micros(g.len())),
        }
    }

    /// Stops and reports.
    pub fn stop(mut self) -> PingReport {
        self.end();
        self.report()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for t in self.threads.drain(..) {
            t.thread().unpark();
            let _ = t.join();
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(f)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn send(&self, every: Duration) {
        let mut due = Instant::now();
        let mut seq = 0u64;
        while !self.stopped() {
            let mut datagram = [0; LEN];
            datagram[..8].copy_from_slice(&MAGIC);
            datagram[8..].copy_from_slice(&seq.to_le_bytes());
            {
                let mut state = self.lock();
                if state.waiting.len() == WAITED_FOR {
                    state.waiting.pop_front();
                }
                state.waiting.push_back((seq, Instant::now()));
            }
            // A connected socket also reports here what ICMP said about an earlier datagram.
            match self.socket.send(&datagram) {
                Ok(_) => self.sent.fetch_add(1, Ordering::Relaxed),
                Err(_) => self.refused.fetch_add(1, Ordering::Relaxed),
            };
            seq += 1;
            due = (due + every).max(Instant::now());
            // At least a moment, so that an interval of zero does not flood a bounded queue.
            let nap = due.saturating_duration_since(Instant::now());
            std::thread::park_timeout(nap.max(Duration::from_micros(50)));
        }
    }

    fn receive(&self) {
        let mut buf = [0; 2 * LEN];
        while !self.stopped() {
            match self.socket.recv(&mut buf) {
                Ok(LEN) if buf[..8] == MAGIC => {
                    let now = Instant::now();
                    let seq = u64::from_le_bytes(std::array::from_fn(|i| buf[8 + i]));
                    self.lock().echoed(seq, now);
                }
                Ok(_) => {}
                Err(e) if super::conn::is_timeout(&e) => {}
                Err(_) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl State {
    /// Books the echo of a datagram still waited for; a second echo of one is ignored.
    fn echoed(&mut self, seq: u64, received: Instant) {
        let Ok(i) = self.waiting.binary_search_by_key(&seq, |(s, _)| *s) else {
            return;
        };
        if let Some((_, sent)) = self.waiting.remove(i) {
            self.received += 1;
            self.timeline.push(Sample {
                seq,
                counter: 0,
                sent,
                received,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVENESS: Duration = Duration::from_secs(60);

    fn wait_until(mut ready: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIVENESS;
        while !ready() {
            assert!(Instant::now() < deadline, "did not happen");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn echoes_are_counted_and_an_outage_is_a_gap() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        server.set_read_timeout(Some(LIVENESS)).expect("timeout");
        let pinger = Pinger::start(server.local_addr().expect("addr"), Duration::from_millis(1))
            .expect("a pinger");
        let mut buf = [0; 64];
        let mut echo = |drop: bool| {
            let (n, from) = server.recv_from(&mut buf).expect("a datagram");
            if !drop {
                server.send_to(&buf[..n], from).expect("send");
            }
        };
        for _ in 0..20 {
            echo(false);
        }
        wait_until(|| pinger.report().received == 20);
        let down = Instant::now();
        for _ in 0..30 {
            echo(true);
        }
        assert_eq!(pinger.first_reply_after(down), None);
        let up = Instant::now();
        echo(false);
        wait_until(|| pinger.first_reply_after(down).is_some());
        let gap = pinger.longest_gap_after(down).expect("a gap");
        assert!(gap.from <= down && gap.to >= up);
        // A stray, a repeated and an unknown echo are nothing.
        let (n, from) = server.recv_from(&mut buf).expect("a datagram");
        let before = pinger.report().received;
        server.send_to(b"stray", from).expect("send");
        let mut unknown = buf;
        unknown[8..16].fill(0xff);
        server.send_to(&unknown[..n], from).expect("send");
        server.send_to(&buf[..n], from).expect("send");
        server.send_to(&buf[..n], from).expect("send");
        wait_until(|| pinger.report().received > before);
        let (n, from) = server.recv_from(&mut buf).expect("a datagram");
        server.send_to(&buf[..n], from).expect("send");
        wait_until(|| pinger.report().received >= before + 2);
        let report = pinger.stop();
        assert_eq!(report.received, before + 2);
        assert!(report.sent >= 53 && report.longest_gap_us > 0);
    }

    #[test]
    fn nobody_there_is_counted_and_no_error() {
        let gone = UdpSocket::bind("127.0.0.1:0")
            .and_then(|s| s.local_addr())
            .expect("a port");
        let pinger = Pinger::start(gone, Duration::from_millis(1)).expect("a pinger");
        wait_until(|| pinger.report().refused > 0);
        assert_eq!(pinger.stop().received, 0);
    }
}
