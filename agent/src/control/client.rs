//! The command line's side of the control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use checkpoint::RequestId;

use super::proto::{Asked, Event, Reply, Request};
use super::status::VmStatus;
use crate::epoch::EpochStats;
use crate::ipc::{self, IpcError};

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The agent cannot be reached.
    #[error(
        "no agent answers at {path}: {source} (start one with `understudy agent --config host.toml`, or name its socket with --control)"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("talking to the agent: {0}")]
    Ipc(#[from] IpcError),
    /// The agent refused.
    #[error("{0}")]
    Refused(String),
    /// It may have been done, or be done yet.
    #[error(
        "it is not known whether this was done: {why} (`understudy outcome {id}` asks again; given again with `--request {id}` it is not done twice)"
    )]
    Unknown {
        /// To ask with.
        id: RequestId,
        /// In words.
        why: String,
    },
    /// The agent answered something else.
    #[error("the agent answered unexpectedly (is it of the same version?)")]
    Unexpected,
}

/// A connection to an agent.
#[derive(Debug)]
pub struct ControlClient {
    stream: UnixStream,
    /// The next request's.
    id: Option<RequestId>,
}

impl ControlClient {
    /// Connects to the agent at `path`.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        UnixStream::connect(path)
            .map(|stream| Self { stream, id: None })
            .map_err(|source| ControlError::Connect {
                path: path.into(),
                source,
            })
    }

    /// The next request is one that was given before, under this id, if there is one.
    #[must_use]
    pub fn again(mut self, id: Option<RequestId>) -> Self {
        self.id = id;
        self
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`ControlError`]; a refusal is one.
    pub fn call(&mut self, request: &Request) -> Result<Reply, ControlError> {
        let id = self.id.take().unwrap_or_else(RequestId::random);
        let asked = Asked {
            id,
            request: request.clone(),
        };
        let lost = |e: IpcError| match request.is_order() {
            true => ControlError::Unknown {
                id,
                why: format!("talking to the agent: {e}"),
            },
            false => e.into(),
        };
        ipc::send(&self.stream, &asked, &[]).map_err(lost)?;
        match ipc::recv::<Reply>(&self.stream).map_err(lost)?.0 {
            Reply::Error(why) => Err(ControlError::Refused(why)),
            Reply::Unknown { id, why } => Err(ControlError::Unknown { id, why }),
            reply => Ok(reply),
        }
    }

    /// Asks for something that has no figures.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn order(&mut self, request: &Request) -> Result<(), ControlError> {
        match self.call(request)? {
            Reply::Ok => Ok(()),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// All VMs the agent knows.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn status(&mut self) -> Result<Vec<VmStatus>, ControlError> {
        match self.call(&Request::Status)? {
            Reply::Status(list) => Ok(list),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// A VM's epoch figures since the last call.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn stats(&mut self, vm: &str) -> Result<EpochStats, ControlError> {
        match self.call(&Request::Stats { vm: vm.into() })? {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// What the vCPUs of a VM (or standby) on the agent's host are at.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn inspect(&mut self, vm: &str) -> Result<Vec<vmm::VcpuReport>, ControlError> {
        match self.call(&Request::Inspect { vm: vm.into() })? {
            Reply::Vcpus(reports) => Ok(reports),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// Events after number `since`.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn events(&mut self, since: u64) -> Result<Vec<Event>, ControlError> {
        match self.call(&Request::Events { since })? {
            Reply::Events(events) => Ok(events),
            _ => Err(ControlError::Unexpected),
        }
    }
}
