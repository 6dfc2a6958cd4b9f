//! The disks' part of a chain's first checkpoint. What the replicas hold already is not sent: an earlier copy may have been
//! interrupted, or they may have been members before.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chain::blocks::{self, Answer, BLOCK};
use checkpoint::{Epoch, Generation};
use diskbuf::Mirror;

use super::{Mode, Owner, OwnerError, lock};
use crate::epoch::queue::Blocks;

/// Blocks that are asked about at a time: the chain reads so much of its disks before it takes the guest's next write.
const WINDOW: usize = 1024;
/// Questions under way, so that owner and chain read at the same time.
const AHEAD: usize = 2;
/// A chain that does not answer for so long is sent everything.
const PATIENCE: Duration = Duration::from_secs(30);
/// Items queued to the shipping thread at most.
const QUEUED: usize = 16;

/// Answers that have come.
#[derive(Debug, Default)]
pub(super) struct Answers(Mutex<VecDeque<(Epoch, Answer)>>);

impl Answers {
    /// The one to that question; older ones are dropped.
    fn take(&self, epoch: Epoch, disk: u16, blocks: &std::ops::Range<u64>) -> Option<Vec<bool>> {
        let mut waiting = lock(&self.0);
        while let Some((of, answer)) = waiting.pop_front() {
            let fits = answer.first == blocks.start
                && answer.equal.len() as u64 == blocks.end - blocks.start;
            if of == epoch && answer.disk == disk && fits {
                return Some(answer.equal);
            }
        }
        None
    }
}

impl Owner {
    /// The chain has compared what it was asked to.
    pub fn compared(&self, generation: Generation, epoch: Epoch, answer: Answer) {
        let pipeline = lock(&self.pipeline);
        if pipeline.generation() == generation && pipeline.mode() == Mode::Syncing {
            lock(&self.answers.0).push_back((epoch, answer));
        }
        drop(pipeline);
        self.changed.notify_all();
    }

    /// Sends what of the disks the chain does not hold.
    pub(super) fn copy_disks(&self, epoch: Epoch) -> Result<(), OwnerError> {
        lock(&self.answers.0).clear();
        for (index, mirror) in self.disks.iter().enumerate() {
            self.copy_disk(epoch, index as u16, mirror)
                .map_err(|source| OwnerError::Disk { index, source })?;
        }
        Ok(())
    }

    fn copy_disk(&self, epoch: Epoch, disk: u16, mirror: &Mirror) -> std::io::Result<()> {
        let total = mirror.size().div_ceil(BLOCK);
        let mut asked = VecDeque::new();
        let mut next = 0;
        let mut ask = true;
        while self.still_syncing() {
            while asked.len() < AHEAD && next < total {
                let first = next;
                next = total.min(first + WINDOW as u64);
                if ask {
                    // Read without the barrier: a write in between is streamed as any other, and makes equal what it touches.
                    let digests = blocks::digests(mirror, first, WINDOW)?;
                    let blocks = Blocks {
                        disk,
                        first,
                        digests,
                    };
                    self.queue.push_compare(epoch, blocks);
                }
                asked.push_back(first..next);
            }
            let Some(window) = asked.pop_front() else {
                return Ok(());
            };
            let equal = match ask {
                true => self.answer(epoch, disk, &window),
                false => None,
            };
            if ask && equal.is_none() && self.still_syncing() {
                tracing::warn!(
                    "the chain has not said for {} s what its disks hold: sending it everything",
                    PATIENCE.as_secs()
                );
                ask = false;
            }
            for (at, block) in window.enumerate() {
                let len = BLOCK.min(mirror.size() - block * BLOCK);
                let equal = equal.as_ref().is_some_and(|equal| equal[at]);
                if !equal {
                    if !self.still_syncing() {
                        return Ok(());
                    }
                    self.copy_block(disk, mirror, block)?;
                }
                self.progress.disk(len, equal);
            }
        }
        Ok(())
    }

    fn copy_block(&self, disk: u16, mirror: &Mirror, block: u64) -> std::io::Result<()> {
        let mut data = Vec::new();
        // The barrier keeps a guest's write from being queued between this read and its queueing: the older content would
        // then overwrite the newer one.
        let barrier = self.queue.barrier().wait_below(QUEUED);
        // Zeros too: what the replicas have there is something else.
        barrier.copy_block(&blocks::record(mirror, disk, block, &mut data)?);
        Ok(())
    }

    /// Waits for an answer; `None` if there is none, or the synchronisation is over.
    fn answer(&self, epoch: Epoch, disk: u16, blocks: &std::ops::Range<u64>) -> Option<Vec<bool>> {
        let deadline = Instant::now() + PATIENCE;
        let mut pipeline = lock(&self.pipeline);
        loop {
            if pipeline.mode() != Mode::Syncing || lock(&self.signals).ends_sync() {
                return None;
            }
            if let Some(equal) = self.answers.take(epoch, disk, blocks) {
                return Some(equal);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            pipeline = self
                .changed
                .wait_timeout(pipeline, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let answers = Answers::default();
        let say = |epoch, disk, first, equal: &[bool]| {
            let answer = Answer {
                disk,
                first,
                equal: equal.to_vec(),
            };
            lock(&answers.0).push_back((Epoch(epoch), answer));
        };
        say(3, 0, 0, &[true; 4]);
        say(4, 1, 0, &[true; 4]);
        say(4, 0, 4, &[true; 4]);
        say(4, 0, 0, &[true; 3]);
        assert_eq!(answers.take(Epoch(4), 0, &(0..4)), None, "none of these");
        say(4, 0, 0, &[true, false]);
        say(4, 0, 2, &[false, true]);
        assert_eq!(answers.take(Epoch(4), 0, &(0..2)), Some(vec![true, false]));
        assert_eq!(answers.take(Epoch(4), 0, &(2..4)), Some(vec![false, true]));
    }
}
