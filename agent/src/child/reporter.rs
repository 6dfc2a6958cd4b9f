//! What a VM process tells its agent, and keeps for the next one while there is none.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint::Generation;

use super::proto::FromChild;
use crate::ipc;

/// Reports kept at most; the oldest go first.
const KEEP: usize = 64;

/// The agent's end of the socket, shared by the threads that report.
#[derive(Clone, Debug)]
pub struct Reporter(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    agent: Option<UnixStream>,
    kept: VecDeque<FromChild>,
    /// The newest generation whose first checkpoint is committed.
    protected: Option<Generation>,
    /// How the guest ended.
    ended: Option<String>,
}

impl Reporter {
    /// Reports to `agent`.
    #[must_use]
    pub fn new(agent: UnixStream) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            agent: Some(agent),
            kept: VecDeque::new(),
            protected: None,
            ended: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends one report; without an agent, what the next one has to know is kept for it.
    pub fn send(&self, message: &FromChild) {
        let mut inner = self.lock();
        match message {
            FromChild::Protected { generation, .. } => inner.protected = Some(*generation),
            FromChild::GuestEnded { how, .. } => inner.ended = Some(how.clone()),
            _ => {}
        }
        let sent = match &inner.agent {
            Some(agent) => ipc::send(agent, message, &[]),
            None => Err(ipc::IpcError::Closed),
        };
        if let Err(e) = sent {
            tracing::debug!("report not sent: {e}");
            // The reading thread finds out by itself; until then nothing more is tried.
            inner.agent = None;
            inner.keep(message);
        }
    }

    /// The agent is gone.
    pub fn disconnect(&self) {
        self.lock().agent = None;
    }

    /// Another agent is there: it is told `first`, and then what was kept.
    ///
    /// # Errors
    /// When it is gone again.
    pub fn connect(&self, agent: UnixStream, first: &FromChild) -> Result<(), ipc::IpcError> {
        let mut inner = self.lock();
        ipc::send(&agent, first, &[])?;
        while let Some(kept) = inner.kept.front() {
            ipc::send(&agent, kept, &[])?;
            inner.kept.pop_front();
        }
        inner.agent = Some(agent);
        Ok(())
    }

    /// The newest generation whose first checkpoint is committed.
    #[must_use]
    pub fn protected(&self) -> Option<Generation> {
        self.lock().protected
    }

    /// How the guest ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<String> {
        self.lock().ended.clone()
    }
}

impl Inner {
    fn keep(&mut self, message: &FromChild) {
        let worth = matches!(
            message,
            FromChild::Protected { .. }
                | FromChild::Refused { .. }
                | FromChild::ChainLost { .. }
                | FromChild::JoinerReady { .. }
                | FromChild::GuestEnded { .. }
                | FromChild::GiveUp { .. }
                | FromChild::Said { .. }
                | FromChild::Fatal(_)
        );
        if worth {
            self.kept.push_back(message.clone());
            while self.kept.len() > KEEP {
                self.kept.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(n: u64) -> FromChild {
        FromChild::Refused {
            generation: Generation(n),
        }
    }

    #[test]
    fn what_the_next_agent_has_to_know_is_kept_in_order_and_bounded() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reporter = Reporter::new(ours);
        drop(theirs);
        reporter.send(&FromChild::Ready);
        for n in 0..100 {
            reporter.send(&lost(n));
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        reporter.connect(ours, &FromChild::Ready).unwrap();
        let mut heard = Vec::new();
        drop(reporter);
        while let Ok((message, _)) = ipc::recv::<FromChild>(&theirs) {
            heard.push(message);
        }
        assert!(matches!(heard[0], FromChild::Ready), "the greeting first");
        assert_eq!(heard.len(), 1 + KEEP);
        let last = heard.last().unwrap();
        assert!(matches!(last, FromChild::Refused { generation } if generation.0 == 99));
    }
}
