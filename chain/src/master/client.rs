//! The master as its clients reach it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use checkpoint::RequestId;
use nix::sys::socket::{setsockopt, sockopt};

use super::server::{ANSWER_LIMIT, Answer, Question, REQUEST_LIMIT, receive, send};
use super::{Master, MasterError, Reply, Request, Snapshot, Wanted};

/// A request is carried out once however often it is sent (see [`super::MasterState::answer`]), so a broken connection is
/// tried once more.
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
    patience: Duration,
    proposals: Mutex<Connection>,
    watches: Mutex<Connection>,
    reads: Mutex<Connection>,
}

/// Why one address did not answer as hoped.
enum Trouble {
    /// Nothing was done.
    No(MasterError),
    /// The request may have been carried out, or may be yet.
    Maybe(String),
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
            patience: ANSWER_TIMEOUT,
            proposals: Mutex::default(),
            watches: Mutex::default(),
            reads: Mutex::default(),
        }
    }

    /// How long an answer may take, beyond a watch's own waiting, before it is given up.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Asks one after the other until one decides. `id` is that of the request, if it is one that changes something.
    fn call(
        &self,
        connection: &Mutex<Connection>,
        question: &Question,
        id: Option<RequestId>,
        wait: Duration,
    ) -> Result<(SocketAddr, Answer), MasterError> {
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut errors, mut doubts) = (Vec::new(), Vec::new());
        for _ in 0..self.addresses.len() {
            let addr = self.addresses[connection.at];
            match self.call_at(addr, &mut connection.stream, question, wait) {
                Ok(answer) => return Ok((addr, answer)),
                Err(Trouble::No(e)) => errors.push(e),
                Err(Trouble::Maybe(why)) if id.is_some() => doubts.push((addr, why)),
                Err(Trouble::Maybe(why)) => errors.push(MasterError::Engine { addr, why }),
            }
            // Closed, so that what was given up here is not carried out there.
            connection.stream = None;
            connection.at = (connection.at + 1) % self.addresses.len();
        }
        if let (Some(id), false) = (id, doubts.is_empty()) {
            let doubts = doubts
                .iter()
                .map(|(addr, why)| format!("the master at {addr}: {why}"));
            let all: Vec<String> = doubts
                .chain(errors.iter().map(ToString::to_string))
                .collect();
            let why = all.join("; ");
            return Err(MasterError::Unknown { id, why });
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
        question: &Question,
        wait: Duration,
    ) -> Result<Answer, Trouble> {
        let mut maybe = false;
        let mut why = String::new();
        // Only an old connection is worth a second try where another master can be tried instead.
        let tries = if self.addresses.len() > 1 && connection.is_none() {
            1
        } else {
            TRIES
        };
        for _ in 0..tries {
            let stream = match connection {
                Some(stream) => stream,
                None => match self.connect(addr) {
                    Ok(stream) => connection.insert(stream),
                    Err(e) => {
                        why = e.to_string();
                        continue;
                    }
                },
            };
            match self.exchange(stream, question, wait) {
                Ok(Answer::Failed(why)) => {
                    return Err(Trouble::No(MasterError::Engine { addr, why }));
                }
                Ok(Answer::Unknown(why)) => return Err(Trouble::Maybe(why)),
                Ok(answer) => return Ok(answer),
                Err(e) => {
                    *connection = None;
                    maybe = true;
                    why = e.to_string();
                }
            }
        }
        if maybe {
            return Err(Trouble::Maybe(format!("no answer: {why}")));
        }
        Err(Trouble::No(MasterError::Unreachable { addr, why }))
    }

    fn exchange(
        &self,
        stream: &TcpStream,
        question: &Question,
        wait: Duration,
    ) -> io::Result<Answer> {
        stream.set_read_timeout(Some(wait + self.patience))?;
        send(stream, question, REQUEST_LIMIT)?;
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
    fn request(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError> {
        if !wanted.still() {
            return Err(MasterError::GivenUp);
        }
        let question = Question::Request(Box::new(request.clone()));
        match self.call(&self.proposals, &question, Some(request.id), Duration::ZERO)? {
            (_, Answer::Reply(reply)) => Ok(reply),
            (_, Answer::Rejected(rejection)) => Err(rejection.into()),
            (addr, other) => Err(unexpected(addr, &other)),
        }
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let question = Question::Watch {
            since,
            timeout_ms: timeout.as_millis() as u64,
        };
        let connection = match timeout.is_zero() {
            true => &self.reads,
            false => &self.watches,
        };
        match self.call(connection, &question, None, timeout)? {
            (_, Answer::Snapshot(snapshot)) => Ok(snapshot),
            (addr, other) => Err(unexpected(addr, &other)),
        }
    }
}

fn unexpected(addr: SocketAddr, answer: &Answer) -> MasterError {
    MasterError::Engine {
        addr,
        why: format!("unexpected answer {answer:?}"),
    }
}
