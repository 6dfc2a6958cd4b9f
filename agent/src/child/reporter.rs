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
        } else if stands(message) {
            // An agent that dies may not have read what it was sent.
            inner.keep(message);
        }
    }

    /// The agent is gone.
    pub fn disconnect(&self) {
        self.lock().agent = None;
    }

    /// Another agent is there: it is told `first`, and then what was kept and is true still.
    ///
    /// # Errors
    /// When it is gone again.
    pub fn connect(&self, agent: UnixStream, first: &FromChild) -> Result<(), ipc::IpcError> {
        let mut inner = self.lock();
        ipc::send(&agent, first, &[])?;
        let newest = match first {
            FromChild::Owns(owns) => owns.generation,
            _ => Generation::ZERO,
        };
        inner
            .kept
            .retain(|kept| generation_of(kept).is_none_or(|of| of >= newest));
        for kept in &inner.kept {
            ipc::send(&agent, kept, &[])?;
        }
        inner.kept.retain(stands);
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
                | FromChild::AttemptFailed { .. }
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

/// Whether it stays true for as long as the configuration does: the next agent has to know it, whoever was told before.
fn stands(message: &FromChild) -> bool {
    matches!(
        message,
        FromChild::Refused { .. }
            | FromChild::ChainLost { .. }
            | FromChild::AttemptFailed { .. }
            | FromChild::JoinerReady { .. }
            | FromChild::GuestEnded { .. }
            | FromChild::GiveUp { .. }
    )
}

/// The configuration that it is about; a refusal is about the one before the newer one.
fn generation_of(message: &FromChild) -> Option<Generation> {
    match message {
        FromChild::Refused { generation }
        | FromChild::ChainLost { generation, .. }
        | FromChild::AttemptFailed { generation, .. }
        | FromChild::JoinerReady { generation } => Some(*generation),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::proto::Owns;

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

    /// The simulation's seed 335: of a chain that was lost only the agent had been told that died before it read it. Nobody
    /// ever protected the VM again.
    #[test]
    fn what_an_agent_was_told_that_died_the_next_one_is_told_too() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reporter = Reporter::new(ours);
        let failed = |n| FromChild::AttemptFailed {
            generation: Generation(n),
            why: "a disk".into(),
        };
        for n in [5, 6] {
            reporter.send(&failed(n));
        }
        drop(theirs);
        let owns = Owns {
            vm: checkpoint::VmId(1),
            host: checkpoint::HostId::new("a").unwrap(),
            registered: crate::child::proto::Registered {
                cluster: checkpoint::ClusterId::NIL,
                revision: 1,
            },
            generation: Generation(6),
            protected: None,
            ended: None,
            frozen: None,
        };
        for _ in 0..2 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let first = FromChild::Owns(Box::new(owns.clone()));
            reporter.connect(ours, &first).unwrap();
            let heard = [(); 2].map(|()| ipc::recv::<FromChild>(&theirs).unwrap().0);
            assert!(matches!(&heard[0], FromChild::Owns(_)));
            let of = generation_of(&heard[1]);
            assert_eq!(of, Some(Generation(6)), "of the newest configuration");
        }
    }
}
