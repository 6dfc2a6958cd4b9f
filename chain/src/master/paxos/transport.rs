//! Members' connections: one for each direction of each pair, so that every link is first in, first out.
//!
//! ```text
//! 0         4         6        8         12         16           20
//! | "UPAX"  | ver = 3 | kind   | length  | body CRC | header CRC | bincode body
//! | u32     | u16     | u16    | u32     | u32      | u32        |      all little endian, CRC32C
//! ```
//!
//! Whoever has something to say connects, says [`Hello`] and then only sends; nothing comes back on that connection.
//! A connection that breaks may have lost what was under way: both ends are told once there is a new one. What cannot
//! be sent is not kept: the protocol says again what matters.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use checkpoint::{ClusterId, codec};
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::entry::Pid;
use super::node::PeerMessage;

const MAGIC: u32 = u32::from_le_bytes(*b"UPAX");
const VERSION: u16 = 3;
const HEADER: usize = 20;
const HELLO: u16 = 1;
const MESSAGE: u16 = 2;
const HELLO_LIMIT: usize = 4096;
/// Longest message in bytes: a whole state and what is not yet part of it.
const MESSAGE_LIMIT: usize = 120 << 20;
/// Messages and bytes that wait for a connection to take them; beyond, it counts as broken.
const QUEUE_MAX: usize = 4096;
const QUEUE_BYTES_MAX: usize = 160 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const CONNECT_PAUSE: Duration = Duration::from_millis(100);
/// Heartbeats come several times a second; a peer silent for this long is gone.
const SILENCE: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that does not even acknowledge for this long, in milliseconds, is gone.
const UNACKNOWLEDGED_MS: u32 = 2000;
const CONNECTIONS_MAX: usize = 64;
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// First on every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Hello {
    /// All members' names: members that disagree on who they are do not talk.
    members: Vec<String>,
    from: Pid,
    /// Its cluster, or nil before it knows: members of two clusters must not mix their logs.
    cluster: ClusterId,
}

/// What the connections tell.
#[derive(Debug)]
pub enum Heard {
    /// `from` has connected; earlier connections of it are over.
    Connected(Pid, u64),
    /// Said on that connection.
    Message(Pid, u64, Box<PeerMessage>),
    /// This member has connected to the other.
    Reached(Pid),
}

/// Takes what is heard; false ends the connection.
pub type Hear = Arc<dyn Fn(Heard) -> bool + Send + Sync>;

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn encode<T: Serialize>(kind: u16, value: &T, limit: usize) -> io::Result<Vec<u8>> {
    let body = codec::to_bytes(value, limit).map_err(io::Error::other)?;
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
    out.extend_from_slice(&body);
    Ok(out)
}

/// Reads one frame of `kind`. Memory is taken for what arrives, not for what is announced.
fn receive<T: DeserializeOwned>(mut stream: impl Read, kind: u16, limit: usize) -> io::Result<T> {
    let mut header = [0u8; HEADER];
    stream.read_exact(&mut header)?;
    if word(&header, 0) != MAGIC {
        return Err(io::Error::other("not a member of a master"));
    }
    if crc32c::crc32c(&header[..16]) != word(&header, 16) {
        return Err(io::Error::other("a header's checksum is wrong"));
    }
    let (version, got) = (word(&header, 4) as u16, (word(&header, 4) >> 16) as u16);
    if version != VERSION {
        return Err(io::Error::other(format!(
            "the peer speaks version {version}, this program version {VERSION}"
        )));
    }
    let length = word(&header, 8) as usize;
    if got != kind || length > limit {
        return Err(io::Error::other(format!(
            "a frame of kind {got} and {length} bytes where one of kind {kind} and at most {limit} bytes belongs"
        )));
    }
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body)?;
    if body.len() != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if crc32c::crc32c(&body) != word(&header, 12) {
        return Err(io::Error::other("a frame's checksum is wrong"));
    }
    codec::from_bytes(&body, limit).map_err(io::Error::other)
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// There is a connection to take them.
    up: bool,
    stream: Option<TcpStream>,
}

#[derive(Debug, Default)]
struct Outbox {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Breaks the connection: what waited is lost.
    fn down(queue: &mut Queue) {
        queue.frames.clear();
        (queue.bytes, queue.up) = (0, false);
        if let Some(stream) = queue.stream.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug, Default)]
struct Ending {
    stop: AtomicBool,
    open: AtomicUsize,
    /// Incoming connections by number, to end them.
    incoming: Mutex<Vec<(u64, TcpStream)>>,
}

/// All connections of one member.
pub struct Transport {
    addr: SocketAddr,
    outboxes: Vec<Option<Arc<Outbox>>>,
    ending: Arc<Ending>,
}

impl Transport {
    /// Listens at one's own address and connects to all the others; `members` are all names and addresses, `me` one's own
    /// number, `cluster` what is known of it at any time.
    ///
    /// # Errors
    /// When it cannot listen, or a thread cannot be started.
    pub fn start(
        me: Pid,
        members: &[(String, SocketAddr)],
        cluster: Arc<Mutex<ClusterId>>,
        hear: Hear,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(members[me as usize - 1].1)?;
        let addr = listener.local_addr()?;
        let names: Vec<String> = members.iter().map(|(name, _)| name.clone()).collect();
        let ending = Arc::new(Ending::default());
        let mut outboxes = Vec::new();
        for (i, (name, addr)) in members.iter().enumerate() {
            let peer = i as Pid + 1;
            if peer == me {
                outboxes.push(None);
                continue;
            }
            let outbox = Arc::new(Outbox::default());
            outboxes.push(Some(outbox.clone()));
            let greeter = Greeter {
                me,
                names: names.clone(),
                cluster: cluster.clone(),
            };
            let (ending, hear, addr) = (ending.clone(), hear.clone(), *addr);
            std::thread::Builder::new()
                .name(format!("paxos-to-{name}"))
                .spawn(move || speak(peer, addr, &greeter, &outbox, &ending, &hear))?;
        }
        let accepting = ending.clone();
        std::thread::Builder::new()
            .name("paxos-accept".into())
            .spawn(move || {
                let greeter = Greeter { me, names, cluster };
                accept(&listener, &greeter, &accepting, &hear);
            })?;
        Ok(Self {
            addr,
            outboxes,
            ending,
        })
    }

    /// Sends, if there is a connection and it takes it.
    pub fn send(&self, message: &PeerMessage) {
        let to = message.get_receiver() as usize;
        let Some(Some(outbox)) = self.outboxes.get(to.wrapping_sub(1)) else {
            return;
        };
        if !outbox.lock().up {
            return;
        }
        let frame = encode(MESSAGE, message, MESSAGE_LIMIT);
        let mut queue = outbox.lock();
        match frame {
            Ok(frame)
                if queue.frames.len() < QUEUE_MAX
                    && queue.bytes + frame.len() <= QUEUE_BYTES_MAX =>
            {
                if queue.up {
                    queue.bytes += frame.len();
                    queue.frames.push_back(frame);
                }
            }
            // A hole in a link must be seen as a break.
            _ => Outbox::down(&mut queue),
        }
        outbox.changed.notify_all();
    }

    /// Ends all connections and stops listening.
    pub fn stop(&self) {
        self.ending.stop.store(true, Ordering::SeqCst);
        for outbox in self.outboxes.iter().flatten() {
            Outbox::down(&mut outbox.lock());
            outbox.changed.notify_all();
        }
        let mut incoming = lock(&self.ending.incoming);
        for (_, stream) in incoming.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(incoming);
        // Wakes the accepting thread, which sees that it is over and lets go of the address.
        let _ = TcpStream::connect_timeout(&self.addr, CONNECT_TIMEOUT);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("addr", &self.addr)
            .finish_non_exhaustive()
    }
}

/// Who this member is, to those it connects to and those that connect to it.
#[derive(Clone)]
struct Greeter {
    me: Pid,
    names: Vec<String>,
    cluster: Arc<Mutex<ClusterId>>,
}

impl Greeter {
    fn hello(&self) -> io::Result<Vec<u8>> {
        let hello = Hello {
            members: self.names.clone(),
            from: self.me,
            cluster: *lock(&self.cluster),
        };
        encode(HELLO, &hello, HELLO_LIMIT)
    }

    /// Whether the peer is another member of this master; its number.
    fn check(&self, hello: &Hello) -> io::Result<Pid> {
        let (names, ours) = (&self.names, *lock(&self.cluster));
        if hello.members != *names {
            return Err(io::Error::other(format!(
                "a peer counts {:?} as the master's members, this host {names:?}; make `[master] members` in host.toml the same on all hosts",
                hello.members
            )));
        }
        let from = hello.from;
        if from == self.me || !(1..=names.len() as Pid).contains(&from) {
            return Err(io::Error::other(format!(
                "a peer claims to be member {from}"
            )));
        }
        let theirs = hello.cluster;
        if theirs != ours && theirs != ClusterId::NIL && ours != ClusterId::NIL {
            let name = &names[from as usize - 1];
            return Err(io::Error::other(format!(
                "{name} is a member of cluster {theirs}, this host of {ours}: one of them has a record of another life; find out which, and move its data_dir away"
            )));
        }
        Ok(from)
    }
}

fn speak(
    peer: Pid,
    addr: SocketAddr,
    greeter: &Greeter,
    outbox: &Outbox,
    ending: &Ending,
    hear: &Hear,
) {
    let mut said = false;
    while !ending.stop.load(Ordering::SeqCst) {
        let connected =
            TcpStream::connect_timeout(&addr, CONNECT_TIMEOUT).and_then(|mut stream| {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
                setsockopt(&stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)?;
                stream.write_all(&greeter.hello()?)?;
                let other = stream.try_clone()?;
                Ok((stream, other))
            });
        match connected {
            Ok((mut stream, other)) => {
                {
                    let mut queue = outbox.lock();
                    (queue.up, queue.stream) = (true, Some(other));
                }
                if !hear(Heard::Reached(peer)) {
                    return;
                }
                let why = write_all(&mut stream, outbox, ending);
                if !said {
                    tracing::info!("master: connection to {addr} lost: {why}");
                }
                said = true;
                Outbox::down(&mut outbox.lock());
            }
            Err(e) => {
                if !said {
                    tracing::info!("master: no connection to {addr} yet: {e}");
                }
                said = true;
            }
        }
        let queue = outbox.lock();
        drop(outbox.changed.wait_timeout(queue, CONNECT_PAUSE));
    }
}

/// Writes what waits until the connection breaks; says why.
fn write_all(stream: &mut TcpStream, outbox: &Outbox, ending: &Ending) -> String {
    loop {
        let frame = {
            let mut queue = outbox.lock();
            loop {
                if ending.stop.load(Ordering::SeqCst) || !queue.up {
                    return "it was ended here".into();
                }
                if let Some(frame) = queue.frames.pop_front() {
                    queue.bytes -= frame.len();
                    break frame;
                }
                let waited = outbox.changed.wait(queue);
                queue = waited.unwrap_or_else(PoisonError::into_inner);
            }
        };
        if let Err(e) = stream.write_all(&frame) {
            return e.to_string();
        }
    }
}

fn accept(listener: &TcpListener, greeter: &Greeter, ending: &Arc<Ending>, hear: &Hear) {
    let mut number = 0u64;
    for stream in listener.incoming() {
        if ending.stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else {
            std::thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        if ending.open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            tracing::warn!(
                "master: {CONNECTIONS_MAX} members' connections are open; refused one more"
            );
            continue;
        }
        number += 1;
        let Ok(other) = stream.try_clone() else {
            continue;
        };
        lock(&ending.incoming).push((number, other));
        ending.open.fetch_add(1, Ordering::Relaxed);
        let (listening, hear, greeter) = (ending.clone(), hear.clone(), greeter.clone());
        let spawned = std::thread::Builder::new()
            .name("paxos-from".into())
            .spawn(move || {
                if let Err(e) = listen(&stream, number, &greeter, &hear)
                    && e.kind() != io::ErrorKind::UnexpectedEof
                    && !listening.stop.load(Ordering::SeqCst)
                {
                    tracing::warn!("master: a member's connection ends: {e}");
                }
                let _ = stream.shutdown(Shutdown::Both);
                lock(&listening.incoming).retain(|(n, _)| *n != number);
                listening.open.fetch_sub(1, Ordering::Relaxed);
            });
        if spawned.is_err() {
            lock(&ending.incoming).retain(|(n, _)| *n != number);
            ending.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn listen(stream: &TcpStream, number: u64, greeter: &Greeter, hear: &Hear) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    let hello: Hello = receive(stream, HELLO, HELLO_LIMIT)?;
    let from = greeter.check(&hello)?;
    if !hear(Heard::Connected(from, number)) {
        return Ok(());
    }
    loop {
        let message: PeerMessage = receive(stream, MESSAGE, MESSAGE_LIMIT)?;
        if !hear(Heard::Message(from, number, Box::new(message))) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use omnipaxos::messages::ballot_leader_election::{BLEMessage, HeartbeatMsg, HeartbeatRequest};
    use proptest::prelude::*;

    fn message() -> PeerMessage {
        PeerMessage::BLE(BLEMessage {
            from: 1,
            to: 2,
            msg: HeartbeatMsg::Request(HeartbeatRequest { round: 7 }),
        })
    }

    #[test]
    fn damage_of_any_bit_is_found_and_cuts_are_too() {
        let good = encode(MESSAGE, &message(), MESSAGE_LIMIT).unwrap();
        receive::<PeerMessage>(&good[..], MESSAGE, MESSAGE_LIMIT).unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(receive::<PeerMessage>(&bad[..], MESSAGE, MESSAGE_LIMIT).is_err());
            }
            assert!(receive::<PeerMessage>(&good[..at], MESSAGE, MESSAGE_LIMIT).is_err());
        }
    }

    #[test]
    fn a_length_that_lies_takes_no_memory() {
        let mut frame = Vec::new();
        frame.extend_from_slice(&MAGIC.to_le_bytes());
        frame.extend_from_slice(&VERSION.to_le_bytes());
        frame.extend_from_slice(&MESSAGE.to_le_bytes());
        frame.extend_from_slice(&(MESSAGE_LIMIT as u32).to_le_bytes());
        frame.extend_from_slice(&0u32.to_le_bytes());
        frame.extend_from_slice(&crc32c::crc32c(&frame).to_le_bytes());
        let e = receive::<PeerMessage>(&frame[..], MESSAGE, MESSAGE_LIMIT).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn honest_frames_around_nonsense_never_panic(
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut frame = encode(MESSAGE, &message(), MESSAGE_LIMIT).unwrap();
            frame.truncate(8);
            frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
            frame.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
            frame.extend_from_slice(&crc32c::crc32c(&frame).to_le_bytes());
            frame.extend_from_slice(&body);
            let _ = receive::<PeerMessage>(&frame[..], MESSAGE, MESSAGE_LIMIT);
        }
    }
}
