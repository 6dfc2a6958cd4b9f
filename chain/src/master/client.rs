//! The master as its clients reach it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::server::{ANSWER_LIMIT, Answer, REQUEST_LIMIT, Request, receive, send};
use super::{Command, Master, MasterError, Snapshot};
use crate::view::VmRecord;

/// Every command is idempotent (see [`super::MasterState::apply`]), so a broken connection is tried once more.
const TRIES: u32 = 2;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// If there is another one to try.
const CONNECT_TIMEOUT_OF_SEVERAL: Duration = Duration::from_millis(700);
/// Beyond a watch's own waiting.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A host that does not even acknowledge what is sent to it is gone after this many milliseconds; also while only an
/// answer is awaited, by probes each second.
const UNACKNOWLEDGED_MS: u32 = 1000;

/// A master at one address, or at several of which any will do. One connection for proposals, one for watching and one for
/// reading: neither a decision nor a reader waits behind a watch.
#[derive(Debug)]
pub struct RemoteMaster {
    addresses: Vec<SocketAddr>,
    proposals: Mutex<Connection>,
    watches: Mutex<Connection>,
    reads: Mutex<Connection>,
}

#[derive(Debug, Default)]
struct Connection {
    /// Which of the addresses answered last.
    at: usize,
    stream: Option<TcpStream>,
}

impl RemoteMaster {
    /// The master at `addr`; connects when first asked.
    #[must_use]
    pub fn new(addr: SocketAddr) -> Self {
        Self::of(&[addr])
    }

    /// The master whose members serve at `addresses`, in order of preference; whoever answered last is asked first.
    ///
    /// # Panics
    /// If there is no address.
    #[must_use]
    pub fn of(addresses: &[SocketAddr]) -> Self {
        assert!(!addresses.is_empty(), "a master has an address");
        Self {
            addresses: addresses.to_vec(),
            proposals: Mutex::default(),
            watches: Mutex::default(),
            reads: Mutex::default(),
        }
    }

    /// Asks one after the other until one decides.
    fn call(
        &self,
        connection: &Mutex<Connection>,
        request: &Request,
        wait: Duration,
    ) -> Result<(SocketAddr, Answer), MasterError> {
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        let mut errors = Vec::new();
        for _ in 0..self.addresses.len() {
            let addr = self.addresses[connection.at];
            match self.call_at(addr, &mut connection.stream, request, wait) {
                Ok(answer) => return Ok((addr, answer)),
                Err(e) => errors.push(e),
            }
            connection.stream = None;
            connection.at = (connection.at + 1) % self.addresses.len();
        }
        if errors.len() > 1 {
            return Err(MasterError::Several(errors));
        }
        Err(errors.remove(0))
    }

    fn call_at(
        &self,
        addr: SocketAddr,
        connection: &mut Option<TcpStream>,
        request: &Request,
        wait: Duration,
    ) -> Result<Answer, MasterError> {
        let mut why = String::new();
        // Only an old connection is worth a second try where another master can be tried instead.
        let tries = if self.addresses.len() > 1 && connection.is_none() {
            1
        } else {
            TRIES
        };
        for _ in 0..tries {
            match self.attempt(addr, connection, request, wait) {
                Ok(Answer::Failed(why)) => return Err(MasterError::Engine { addr, why }),
                Ok(answer) => return Ok(answer),
                Err(e) => {
                    *connection = None;
                    why = e.to_string();
                }
            }
        }
        Err(MasterError::Unreachable { addr, why })
    }

    fn attempt(
        &self,
        addr: SocketAddr,
        connection: &mut Option<TcpStream>,
        request: &Request,
        wait: Duration,
    ) -> io::Result<Answer> {
        let stream = match connection {
            Some(stream) => stream,
            None => connection.insert(self.connect(addr)?),
        };
        stream.set_read_timeout(Some(wait + ANSWER_TIMEOUT))?;
        send(stream, request, REQUEST_LIMIT)?;
        receive(stream, ANSWER_LIMIT)
    }

    fn connect(&self, addr: SocketAddr) -> io::Result<TcpStream> {
        let several = self.addresses.len() > 1;
        let timeout = if several {
            CONNECT_TIMEOUT_OF_SEVERAL
        } else {
            CONNECT_TIMEOUT
        };
        let stream = TcpStream::connect_timeout(&addr, timeout)?;
        stream.set_nodelay(true)?;
        if several {
            setsockopt(&stream, sockopt::KeepAlive, &true)?;
            setsockopt(&stream, sockopt::TcpKeepIdle, &1)?;
            setsockopt(&stream, sockopt::TcpKeepInterval, &1)?;
            setsockopt(&stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)?;
        }
        Ok(stream)
    }
}

impl Master for RemoteMaster {
    fn propose(&self, command: &Command) -> Result<VmRecord, MasterError> {
        let request = Request::Propose(command.clone());
        match self.call(&self.proposals, &request, Duration::ZERO)? {
            (_, Answer::Record(record)) => Ok(*record),
            (_, Answer::Rejected(rejection)) => Err(rejection.into()),
            (addr, other) => Err(unexpected(addr, &other)),
        }
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let request = Request::Watch {
            since,
            timeout_ms: timeout.as_millis() as u64,
        };
        let connection = match timeout.is_zero() {
            true => &self.reads,
            false => &self.watches,
        };
        match self.call(connection, &request, timeout)? {
            (_, Answer::Snapshot(snapshot)) => Ok(snapshot),
            (addr, other) => Err(unexpected(addr, &other)),
        }
    }
}

fn unexpected(addr: SocketAddr, answer: &Answer) -> MasterError {
    MasterError::Unreachable {
        addr,
        why: format!("unexpected answer {answer:?}"),
    }
}
