//! One question at a time: the plain connection to the probe guest.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use guest::proto::{BadMagic, Op, REQUEST_LEN, RESPONSE_LEN, Request, Response};
use nix::sys::socket::{setsockopt, sockopt};
use thiserror::Error;

use super::ledger::LedgerError;

/// Time for one attempt to connect: a guest still booting drops the SYN, and TCP's own next one comes after a second.
const ATTEMPT: Duration = Duration::from_millis(250);
/// Pause after an attempt that was refused at once.
const BETWEEN: Duration = Duration::from_millis(20);

/// Why the probe guest could not be asked.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// No connection within the time given.
    #[error("no connection to the probe guest at {addr} within {within:?}: {source}")]
    Connect {
        /// The guest's address.
        addr: SocketAddr,
        /// The time given.
        within: Duration,
        /// Why the last attempt failed.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the probe guest broke: {0}")]
    Broken(#[source] io::Error),
    /// No answer within the time given; the connection is of no use afterwards.
    #[error("no answer from the probe guest within {0:?}")]
    NoAnswer(Duration),
    /// The peer does not speak the protocol.
    #[error(transparent)]
    BadMagic(#[from] BadMagic),
    /// The peer does not keep to the protocol.
    #[error(transparent)]
    Protocol(#[from] LedgerError),
    /// The operation was not done.
    #[error("operation {op}: the probe guest answered with status {status}")]
    Status {
        /// The operation's number.
        op: u16,
        /// The status's number, see `guest::proto::Status`.
        status: u16,
    },
    /// The client was stopped, or its connection broke before the answer came.
    #[error("the probe client gave up before an answer came")]
    Stopped,
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(#[source] io::Error),
}

/// Connects, trying again until `within` has passed: the guest may still be booting, or be between two owners.
///
/// Sets `TCP_NODELAY`, and `TCP_USER_TIMEOUT` where given: how long sent data may stay unacknowledged before the
/// kernel gives the connection up (else about 15 minutes).
///
/// # Errors
/// [`ProbeError::Connect`] with the last attempt's failure.
pub fn connect(
    addr: SocketAddr,
    within: Duration,
    user_timeout: Option<Duration>,
) -> Result<TcpStream, ProbeError> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let tried =
            TcpStream::connect_timeout(&addr, left.clamp(Duration::from_millis(1), ATTEMPT))
                .and_then(|s| set_options(&s, user_timeout).map(|()| s));
        match tried {
            Ok(stream) => return Ok(stream),
            Err(source) if Instant::now() >= deadline => {
                return Err(ProbeError::Connect {
                    addr,
                    within,
                    source,
                });
            }
            Err(_) => std::thread::sleep(BETWEEN),
        }
    }
}

fn set_options(s: &TcpStream, user_timeout: Option<Duration>) -> io::Result<()> {
    s.set_nodelay(true)?;
    if let Some(t) = user_timeout {
        let ms = u32::try_from(t.as_millis()).unwrap_or(u32::MAX);
        setsockopt(s, sockopt::TcpUserTimeout, &ms)?;
    }
    Ok(())
}

/// A connection with at most one question open.
#[derive(Debug)]
pub struct ProbeConn {
    stream: TcpStream,
    seq: u64,
    timeout: Duration,
}

impl ProbeConn {
    /// Connects, trying again until `within` has passed; answers are waited for as long, too (see
    /// [`ProbeConn::set_timeout`]).
    ///
    /// # Errors
    /// [`ProbeError::Connect`].
    pub fn connect(addr: SocketAddr, within: Duration) -> Result<ProbeConn, ProbeError> {
        Ok(ProbeConn {
            stream: connect(addr, within, None)?,
            seq: 0,
            timeout: within.max(Duration::from_millis(1)),
        })
    }

    /// How long an answer is waited for.
    pub fn set_timeout(&mut self, t: Duration) {
        self.timeout = t.max(Duration::from_millis(1));
    }

    /// Asks, and waits for the answer. The request's `seq` is replaced by this connection's own.
    ///
    /// # Errors
    /// Any [`ProbeError`] but `Status`: the caller looks at the answer's. The connection is of no use afterwards.
    pub fn call(&mut self, request: Request) -> Result<Response, ProbeError> {
        self.seq += 1;
        let request = Request {
            seq: self.seq,
            ..request
        };
        self.stream
            .write_all(&request.to_bytes())
            .map_err(ProbeError::Broken)?;
        let mut answer = [0; RESPONSE_LEN];
        self.read_exact(&mut answer)?;
        let answer = Response::from_bytes(&answer)?;
        if answer.seq != request.seq {
            return Err(LedgerError::OutOfOrder {
                got: answer.seq,
                want: request.seq,
            }
            .into());
        }
        if answer.op != request.op {
            let (seq, op) = (answer.seq, answer.op);
            return Err(LedgerError::WrongOp { seq, op }.into());
        }
        Ok(answer)
    }

    /// Sets the guest's load: `pages` dirtied per pass, `work` iterations after each. Returns the pages in force.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn set_load(&mut self, pages: u64, work: u64) -> Result<u64, ProbeError> {
        ok(self.call(Request::set_load(0, pages, work))?).map(|a| a.counter)
    }

    /// The guest's counters.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn stats(&mut self) -> Result<Response, ProbeError> {
        ok(self.call(Request::new(Op::Stats, 0))?)
    }

    /// Adds one to the guest's counter; returns its value.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn incr(&mut self) -> Result<u64, ProbeError> {
        ok(self.call(Request::new(Op::Incr, 0))?).map(|a| a.counter)
    }

    fn read_exact(&mut self, buf: &mut [u8; RESPONSE_LEN]) -> Result<(), ProbeError> {
        let deadline = Instant::now() + self.timeout;
        let mut have = 0;
        while have < buf.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ProbeError::NoAnswer(self.timeout));
            }
            self.stream
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))
                .map_err(ProbeError::Broken)?;
            match self.stream.read(&mut buf[have..]) {
                Ok(0) => return Err(ProbeError::Broken(closed())),
                Ok(n) => have += n,
                Err(e) if is_timeout(&e) => {}
                Err(e) => return Err(ProbeError::Broken(e)),
            }
        }
        Ok(())
    }
}

/// An answer whose status is `Ok`.
pub(super) fn ok(answer: Response) -> Result<Response, ProbeError> {
    if answer.status == 0 {
        return Ok(answer);
    }
    Err(ProbeError::Status {
        op: answer.op,
        status: answer.status,
    })
}

pub(super) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the guest")
}

pub(super) fn is_timeout(e: &io::Error) -> bool {
    // Not TimedOut: that is ETIMEDOUT, TCP giving the connection up.
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

// The layout the two sides agree on; a change of it must be noticed here.
const _: () = assert!(REQUEST_LEN == 32 && RESPONSE_LEN == 48);
