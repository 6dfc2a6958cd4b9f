//! The master's TCP service.
//!
//! ```text
//! | length u32 | CRC32C u32 | bincode body |      little endian; requests and answers alternate on a connection
//! ```

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use checkpoint::codec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Master, MasterError, Rejection, Reply, Request, Snapshot, Wanted};

/// Longest request in bytes: a VM's configuration and little else. Every connection may make the master hold one.
pub(super) const REQUEST_LIMIT: usize = 1 << 20;
/// Longest answer in bytes: all records.
pub(super) const ANSWER_LIMIT: usize = 64 << 20;
/// Connections served at a time; each agent has two.
const CONNECTIONS_MAX: usize = 512;
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Longest that a watch waits.
const WATCH_MAX_MS: u64 = 10_000;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Question {
    Request(Box<Request>),
    Watch { since: u64, timeout_ms: u64 },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Reply(Reply),
    Rejected(Rejection),
    Snapshot(Snapshot),
    /// Nothing was done, nothing is known.
    Failed(String),
    /// It may have been done.
    Unknown(String),
}

/// Serves an engine.
#[derive(Debug)]
pub struct MasterServer {
    addr: SocketAddr,
}

impl MasterServer {
    /// Serves `engine` at `addr` until the process ends.
    ///
    /// # Errors
    /// [`MasterError::Bind`] naming the address.
    pub fn bind(addr: SocketAddr, engine: Arc<dyn Master>) -> Result<Self, MasterError> {
        let fail = |why: io::Error| MasterError::Bind {
            addr,
            why: why.to_string(),
        };
        Self::on(TcpListener::bind(addr).map_err(fail)?, engine)
    }

    /// Serves `engine` to whoever connects, or has connected, to `listener`, until the process ends.
    ///
    /// # Errors
    /// [`MasterError::Bind`].
    pub fn on(listener: TcpListener, engine: Arc<dyn Master>) -> Result<Self, MasterError> {
        let addr = listener.local_addr();
        let addr = addr.unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        let fail = |why: io::Error| MasterError::Bind {
            addr,
            why: why.to_string(),
        };
        let bound = listener.local_addr().map_err(fail)?;
        std::thread::Builder::new()
            .name("master".into())
            .spawn(move || {
                let open = Arc::new(AtomicUsize::new(0));
                for stream in listener.incoming() {
                    let Ok(stream) = stream else {
                        // Out of descriptors, most likely: trying again at once would only burn the processor.
                        std::thread::sleep(ACCEPT_PAUSE);
                        continue;
                    };
                    if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
                        tracing::warn!(
                            "master: {CONNECTIONS_MAX} connections are open; refused one more"
                        );
                        continue;
                    }
                    open.fetch_add(1, Ordering::Relaxed);
                    let (engine, counted) = (engine.clone(), open.clone());
                    let spawned = std::thread::Builder::new()
                        .name("master-conn".into())
                        .spawn(move || {
                            if let Err(e) = serve(&Arc::new(stream), engine.as_ref())
                                && e.kind() != io::ErrorKind::UnexpectedEof
                            {
                                tracing::debug!("master connection: {e}");
                            }
                            counted.fetch_sub(1, Ordering::Relaxed);
                        });
                    if spawned.is_err() {
                        open.fetch_sub(1, Ordering::Relaxed);
                    }
                }
            })
            .map_err(fail)?;
        Ok(Self { addr: bound })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

fn serve(stream: &Arc<TcpStream>, engine: &dyn Master) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    loop {
        let answer = match receive::<Question>(stream, REQUEST_LIMIT)? {
            Question::Request(request) => {
                match engine.request(&request, &Wanted::by(stream.clone())) {
                    Ok(reply) => Answer::Reply(reply),
                    Err(e) => failed(e),
                }
            }
            Question::Watch { since, timeout_ms } => {
                match engine.watch(since, Duration::from_millis(timeout_ms.min(WATCH_MAX_MS))) {
                    Ok(snapshot) => Answer::Snapshot(snapshot),
                    Err(e) => failed(e),
                }
            }
        };
        send(stream, &answer, ANSWER_LIMIT)?;
    }
}

fn failed(error: MasterError) -> Answer {
    match error {
        MasterError::Rejected(rejection) => Answer::Rejected(rejection),
        // What was proposed may be decided yet, and what could not be synced may be on the disk.
        e @ (MasterError::Unknown { .. }
        | MasterError::NoDecision { .. }
        | MasterError::Stopped(_)
        | MasterError::Etcd(_)) => Answer::Unknown(e.to_string()),
        e => Answer::Failed(e.to_string()),
    }
}

pub(super) fn send<T: Serialize>(
    mut stream: &TcpStream,
    value: &T,
    limit: usize,
) -> io::Result<()> {
    let body = codec::to_bytes(value, limit).map_err(io::Error::other)?;
    let mut out = Vec::with_capacity(8 + body.len());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    out.extend_from_slice(&body);
    stream.write_all(&out)
}

pub(super) fn receive<T: DeserializeOwned>(mut stream: &TcpStream, limit: usize) -> io::Result<T> {
    let mut header = [0u8; 8];
    stream.read_exact(&mut header)?;
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let length = word(0) as usize;
    if length > limit {
        return Err(io::Error::other(format!(
            "a message of {length} bytes is over the limit of {limit}"
        )));
    }
    // Grows with what really arrives: a length that lies costs nothing.
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body)?;
    if body.len() != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if crc32c::crc32c(&body) != word(4) {
        return Err(io::Error::other("a message's checksum is wrong"));
    }
    codec::from_bytes(&body, limit).map_err(io::Error::other)
}
