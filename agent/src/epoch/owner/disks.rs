//! The disks' part of a chain's first checkpoint. What the replicas hold already is not sent: an earlier copy may have been
//! interrupted, or they may have been members before.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use chain::blocks::{self, Answer, BLOCK, Digest};
use checkpoint::{Epoch, Generation};
use diskbuf::Mirror;
use diskbuf::mirror::SECTOR;

use super::run::STEP;
use super::{Mode, Owner, OwnerError, lock};
use crate::epoch::queue::{Blocks, encoded};

/// Blocks that are asked about at a time: the chain reads so much of its disks before it takes the guest's next write.
const WINDOW: usize = 1024;
/// Questions under way, so that owner and chain read at the same time.
const AHEAD: usize = 2;
/// Items queued to the shipping thread at most.
const QUEUED: usize = 16;

/// Answers that have come.
#[derive(Debug, Default)]
pub(super) struct Answers(Mutex<VecDeque<(Epoch, Answer)>>);

impl Answers {
    /// The one to that question; older ones are dropped.
    fn take(&self, epoch: Epoch, disk: u16, blocks: &Range<u64>) -> Option<Vec<bool>> {
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
            let now = self.measures.now();
            self.measures.meter().moved(now);
        }
        drop(pipeline);
        self.changed.notify_all();
    }

    /// Sends what of the disks the chain does not hold.
    pub(super) fn copy_disks(&self, epoch: Epoch) -> Result<(), OwnerError> {
        lock(&self.answers.0).clear();
        for (index, mirror) in self.disks.iter().enumerate() {
            self.copy_disk(epoch, index as u16, mirror)?;
        }
        Ok(())
    }

    fn copy_disk(&self, epoch: Epoch, disk: u16, mirror: &Mirror) -> Result<(), OwnerError> {
        let total = mirror.size().div_ceil(BLOCK);
        let mut asked = VecDeque::new();
        let mut next = 0;
        while self.still_syncing() {
            while asked.len() < AHEAD && next < total {
                let first = next;
                next = total.min(first + WINDOW as u64);
                // Read without the barrier: a write in between is streamed as any other, and makes equal what it touches.
                let digests = digests(disk, mirror, first)?;
                self.queue.push_compare(Blocks {
                    disk,
                    first,
                    digests,
                });
                asked.push_back(first..next);
            }
            let Some(window) = asked.pop_front() else {
                return Ok(());
            };
            let Some(equal) = self.answer(epoch, disk, &window) else {
                return Ok(());
            };
            for (block, equal) in window.zip(equal) {
                let len = BLOCK.min(mirror.size() - block * BLOCK);
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

    fn copy_block(&self, disk: u16, mirror: &Mirror, block: u64) -> Result<(), OwnerError> {
        let mut data = Vec::new();
        // Zeros too: what the replicas have there is something else.
        let mut read = || {
            let record = blocks::record(mirror, disk, block, &mut data);
            let record = record.map_err(|e| unreadable(disk, mirror, block..block + 1, e))?;
            Ok::<_, OwnerError>(encoded(&record))
        };
        // A guest's write must not be queued between this read and its queueing: the older content would then overwrite the
        // newer one. The barrier keeps writes, and the pause, waiting, so it is taken without looking at the disk first.
        let writes = self.queue.wait_below(QUEUED);
        let bytes = read()?;
        if !self.queue.barrier().copy_block(bytes, writes) {
            let barrier = self.queue.barrier();
            let (bytes, writes) = (read()?, barrier.writes());
            // Nothing was written meanwhile.
            let _ = barrier.copy_block(bytes, writes);
        }
        Ok(())
    }

    /// Waits for an answer; `None` once the synchronisation is over. Who watches the connection ends one that gets no answers.
    fn answer(&self, epoch: Epoch, disk: u16, blocks: &Range<u64>) -> Option<Vec<bool>> {
        loop {
            if !self.still_syncing() {
                return None;
            }
            if let Some(equal) = self.answers.take(epoch, disk, blocks) {
                return Some(equal);
            }
            let pipeline = lock(&self.pipeline);
            if lock(&self.answers.0).is_empty() {
                drop(
                    self.changed
                        .wait_timeout(pipeline, STEP)
                        .unwrap_or_else(PoisonError::into_inner),
                );
            }
        }
    }
}

fn digests(disk: u16, mirror: &Mirror, first: u64) -> Result<Vec<Digest>, OwnerError> {
    blocks::digests(mirror, first, WINDOW)
        .map_err(|e| unreadable(disk, mirror, first..first + WINDOW as u64, e))
}

/// The error that names the first sector of these blocks which cannot be read; if by now all can, where they begin.
fn unreadable(
    disk: u16,
    mirror: &Mirror,
    blocks: Range<u64>,
    source: std::io::Error,
) -> OwnerError {
    let mut sector = [0; SECTOR as usize];
    let end = mirror.size().min(blocks.end * BLOCK);
    let mut sectors = (blocks.start * BLOCK..end).step_by(SECTOR as usize);
    let offset = sectors.find(|at| mirror.read_at(*at, &mut sector).is_err());
    OwnerError::Disk {
        index: usize::from(disk),
        offset: offset.unwrap_or(blocks.start * BLOCK),
        source,
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
