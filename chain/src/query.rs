//! Queries: which checkpoints of a VM there are (van Renesse & Schneider: queries go to the tail, which answers from `Hist`
//! without waiting for updates).
//!
//! The paper's servers stop when they fail. Here a replica may only be cut off, and think itself the tail long after the
//! master has decided otherwise. So an answer counts only if the master, asked *after* it came, still has the
//! configuration in which it was given: at that moment the tail was the tail.

use std::time::{Duration, Instant};

use checkpoint::{Epoch, HostId, VmId};

use crate::greet::{GreetError, Role, greet};
use crate::mark::{MARK_SIZE, Mark};
use crate::master::{Master, MasterError};
use crate::view::View;
use crate::wire::{self, Frame, Kind, Payload, WireError};

/// Most checkpoints in one answer: the newest of those asked for.
pub const ANSWER_MAX: usize = 4096;
/// How long the tail may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts while a chain is being changed.
const RETRY: Duration = Duration::from_millis(5);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// The newest checkpoint.
    Latest,
    /// The checkpoint of that epoch.
    Epoch(Epoch),
    /// Those from the first to the last of these epochs.
    Range(Epoch, Epoch),
}

impl Query {
    /// Little endian: first epoch u64, last epoch u64; zero and zero: the newest.
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let (first, last) = match self {
            Self::Latest => (0, 0),
            Self::Epoch(epoch) => (epoch.0, epoch.0),
            Self::Range(first, last) => (first.0, last.0.max(1)),
        };
        let mut out = [0; 16];
        out[..8].copy_from_slice(&u64::to_le_bytes(first));
        out[8..].copy_from_slice(&u64::to_le_bytes(last));
        out
    }

    /// Reads it back; `None` if it is malformed.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (first, last) = bytes.split_at_checked(8)?;
        let number = |b: &[u8]| b.try_into().ok().map(u64::from_le_bytes);
        Some(match (number(first)?, number(last)?) {
            (0, 0) => Self::Latest,
            (first, last) => Self::Range(Epoch(first), Epoch(last)),
        })
    }

    /// Picks from the checkpoints that there are, oldest first.
    pub(crate) fn pick(self, all: &[Mark]) -> Vec<Mark> {
        let picked: Vec<Mark> = match self {
            Self::Latest => all.last().copied().into_iter().collect(),
            Self::Epoch(epoch) => Self::Range(epoch, epoch).pick(all),
            Self::Range(first, last) => all
                .iter()
                .filter(|mark| (first..=last).contains(&mark.epoch))
                .copied()
                .collect(),
        };
        picked[picked.len().saturating_sub(ANSWER_MAX)..].to_vec()
    }
}

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The master.
    #[error(transparent)]
    Master(#[from] MasterError),
    /// There is no such VM.
    #[error("the master knows no VM {0}")]
    Unknown(VmId),
    /// Nobody holds a checkpoint.
    #[error("{0} is not protected: no replica holds a checkpoint of it")]
    NoChain(String),
    /// The tail did not answer.
    #[error("backup {host}, the tail of {vm}'s chain, does not answer: {why}")]
    Tail {
        /// Which.
        host: HostId,
        /// The VM.
        vm: String,
        /// Why.
        why: String,
    },
}

/// Asks the tail of `vm`'s chain; again, if the chain is changed meanwhile, until `patience` is over.
///
/// # Errors
/// [`QueryError`].
pub fn query(
    master: &dyn Master,
    vm: VmId,
    from: &HostId,
    query: Query,
    patience: Duration,
) -> Result<Vec<Mark>, QueryError> {
    let deadline = Instant::now() + patience;
    loop {
        let view = view(master, vm)?;
        let answer = ask(&view, from, query);
        match answer {
            Ok(marks) if self::view(master, vm)?.generation == view.generation => {
                return Ok(marks);
            }
            Err(e) if Instant::now() >= deadline => return Err(e),
            _ => std::thread::sleep(RETRY),
        }
    }
}

fn view(master: &dyn Master, vm: VmId) -> Result<View, QueryError> {
    let snapshot = master.read()?;
    let record = snapshot.records.into_iter().find(|r| r.view.vm == vm);
    Ok(record.ok_or(QueryError::Unknown(vm))?.view)
}

fn ask(view: &View, from: &HostId, query: Query) -> Result<Vec<Mark>, QueryError> {
    let tail = view
        .chain
        .last()
        .ok_or_else(|| QueryError::NoChain(view.name.clone()))?;
    let failed = |why: String| QueryError::Tail {
        host: tail.host.clone(),
        vm: view.name.clone(),
        why,
    };
    let peer =
        greet(tail, view, Role::Query, from).map_err(|e: GreetError| failed(e.to_string()))?;
    let exchange = || -> Result<Vec<Mark>, WireError> {
        peer.stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let frame = Frame {
            kind: Kind::Query,
            vm: view.vm,
            generation: view.generation,
            epoch: Epoch::ZERO,
            flags: 0,
        };
        peer.link.send(&frame, &query.to_bytes())?;
        let mut payload = Payload::default();
        let frame = wire::read(&mut &peer.stream, &mut payload)?;
        if frame.kind != Kind::Answer || frame.generation != view.generation {
            return Err(WireError::OutOfPlace(
                frame.kind,
                "it does not answer a query",
            ));
        }
        marks(&payload).ok_or(WireError::Payload(Kind::Answer))
    };
    exchange().map_err(|e| failed(e.to_string()))
}

/// The payload of an answer: marks, oldest first.
pub(crate) fn answer_payload(marks: &[Mark]) -> Vec<u8> {
    marks.iter().flat_map(|mark| mark.to_bytes()).collect()
}

fn marks(payload: &[u8]) -> Option<Vec<Mark>> {
    let (whole, rest) = payload.as_chunks::<MARK_SIZE>();
    if !rest.is_empty() || whole.len() > ANSWER_MAX {
        return None;
    }
    whole.iter().map(|bytes| Mark::from_bytes(bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::Generation;

    fn all(epochs: std::ops::Range<u64>) -> Vec<Mark> {
        let mark = |epoch| Mark {
            generation: Generation(2),
            epoch: Epoch(epoch),
            digest: 7,
            held: true,
        };
        epochs.map(mark).collect()
    }

    #[test]
    fn queries_and_answers_come_back() {
        for query in [
            Query::Latest,
            Query::Range(Epoch(0), Epoch(u64::MAX)),
            Query::Range(Epoch(3), Epoch(9)),
        ] {
            assert_eq!(Query::from_bytes(&query.to_bytes()), Some(query));
        }
        assert_eq!(Query::from_bytes(&[0; 15]), None);
        let some = all(5..9);
        assert_eq!(marks(&answer_payload(&some)), Some(some.clone()));
        assert_eq!(marks(&answer_payload(&some)[1..]), None);
        assert_eq!(marks(&[0xff; MARK_SIZE]), None, "reserved bytes");
    }

    #[test]
    fn what_is_asked_for_is_picked_and_answers_are_bounded() {
        let there = all(5..9);
        assert_eq!(Query::Latest.pick(&there), all(8..9));
        assert_eq!(Query::Epoch(Epoch(6)).pick(&there), all(6..7));
        assert_eq!(Query::Epoch(Epoch(4)).pick(&there), []);
        assert_eq!(Query::Range(Epoch(0), Epoch(6)).pick(&there), all(5..7));
        assert_eq!(Query::Latest.pick(&[]), []);
        let many = all(0..10_000);
        let picked = Query::Range(Epoch(0), Epoch(u64::MAX)).pick(&many);
        assert_eq!(picked, all(10_000 - ANSWER_MAX as u64..10_000));
    }
}
