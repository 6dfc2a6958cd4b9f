//! The master as its clients reach it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::server::{ANSWER_LIMIT, Answer, REQUEST_LIMIT, Request, receive, send};
use super::{Command, Master, MasterError, Snapshot};
use crate::view::VmRecord;

/// Every command is idempotent (see [`super::MasterState::apply`]), so a broken connection is tried once more.
const TRIES: u32 = 2;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Beyond a watch's own waiting.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A master at an address. One connection for proposals, one for watching: a decision never waits behind a watch.
#[derive(Debug)]
pub struct RemoteMaster {
    addr: SocketAddr,
    proposals: Mutex<Option<TcpStream>>,
    watches: Mutex<Option<TcpStream>>,
}

impl RemoteMaster {
    /// The master at `addr`; connects when first asked.
    #[must_use]
    pub fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            proposals: Mutex::default(),
            watches: Mutex::default(),
        }
    }

    fn call(
        &self,
        connection: &Mutex<Option<TcpStream>>,
        request: &Request,
        wait: Duration,
    ) -> Result<Answer, MasterError> {
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        let mut why = String::new();
        for _ in 0..TRIES {
            match attempt(self.addr, &mut connection, request, wait) {
                Ok(Answer::Failed(failed)) => {
                    return Err(MasterError::Engine {
                        addr: self.addr,
                        why: failed,
                    });
                }
                Ok(answer) => return Ok(answer),
                Err(e) => {
                    *connection = None;
                    why = e.to_string();
                }
            }
        }
        Err(MasterError::Unreachable {
            addr: self.addr,
            why,
        })
    }
}

fn attempt(
    addr: SocketAddr,
    connection: &mut Option<TcpStream>,
    request: &Request,
    wait: Duration,
) -> io::Result<Answer> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect_timeout(&addr, CONNECT_TIMEOUT)?;
            stream.set_nodelay(true)?;
            connection.insert(stream)
        }
    };
    stream.set_read_timeout(Some(wait + ANSWER_TIMEOUT))?;
    send(stream, request, REQUEST_LIMIT)?;
    receive(stream, ANSWER_LIMIT)
}

impl Master for RemoteMaster {
    fn propose(&self, command: &Command) -> Result<VmRecord, MasterError> {
        match self.call(
            &self.proposals,
            &Request::Propose(command.clone()),
            Duration::ZERO,
        )? {
            Answer::Record(record) => Ok(*record),
            Answer::Rejected(rejection) => Err(rejection.into()),
            other => Err(unexpected(self.addr, &other)),
        }
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let request = Request::Watch {
            since,
            timeout_ms: timeout.as_millis() as u64,
        };
        match self.call(&self.watches, &request, timeout)? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            other => Err(unexpected(self.addr, &other)),
        }
    }
}

fn unexpected(addr: SocketAddr, answer: &Answer) -> MasterError {
    MasterError::Unreachable {
        addr,
        why: format!("unexpected answer {answer:?}"),
    }
}
