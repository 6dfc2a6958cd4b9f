//! What a replica's server does with its store: checkpoints into it, and what its disks hold already.

use checkpoint::{CheckpointEnd, Epoch, codec};

use super::{InHand, State};
use crate::blocks::{self, DIGESTS_MAX};
use crate::kept::end_of;
use crate::link::HELLO_LIMIT;
use crate::replica::Event;
use crate::store::{ReplicaStore, StoreError};
use crate::wire::{Kind, WireError};

impl State {
    /// Marks the blocks in which this replica differs from the owner, and passes the rest of the question on; the tail
    /// answers it.
    pub(super) fn compare(&mut self, hand: InHand<'_>) -> Result<Option<Event>, WireError> {
        let asked = blocks::parse(hand.payload);
        let (disk, first, asked) = asked.ok_or(WireError::Payload(Kind::Compare))?;
        let mut held = Vec::new();
        let failed = self.on_store(|store| {
            held = store.disk_digests(disk, first, asked.len())?;
            Ok(())
        });
        if failed.is_some() {
            return Ok(failed);
        }
        let marked = blocks::marked(asked, &held);
        if let Some(down) = &self.down {
            if let Err(e) = down.send(hand.frame, &blocks::payload(disk, first, &marked)) {
                self.lost_next(&e.to_string());
            }
        } else if self.replica.is_tail() {
            let frame = self.own_frame(Kind::Compared, hand.frame.epoch);
            let answer = blocks::answer(disk, first, &marked);
            self.owners
                .retain(|owner| owner.send(&frame, &answer).is_ok());
        }
        Ok(None)
    }

    /// Tells the one that fills this replica what its disks hold already.
    pub(super) fn say_digests(&mut self, hand: Option<InHand<'_>>) -> Option<Event> {
        let hand = hand?;
        let frame = self.own_frame(Kind::Digests, Epoch::ZERO);
        let mut sent = Ok(());
        let failed = self.on_store(|store| {
            let (mut disk, mut first) = (0, 0);
            while sent.is_ok() {
                let digests = store.disk_digests(disk, first, DIGESTS_MAX)?;
                match (digests.len() as u64, first) {
                    // A disk is never empty: there is none of that number.
                    (0, 0) => break,
                    (0, _) => (disk, first) = (disk + 1, 0),
                    (count, _) => {
                        sent = hand
                            .link
                            .send(&frame, &blocks::payload(disk, first, &digests));
                        first += count;
                    }
                }
            }
            Ok(())
        });
        if sent.and_then(|()| hand.link.send(&frame, &[])).is_err() {
            // It fills again over its next connection.
            hand.link.close();
        }
        failed
    }

    /// The joining replica says what its disks hold; an error if that makes no sense.
    pub(in crate::server) fn digests(&mut self, payload: &[u8]) -> Result<(), WireError> {
        self.digest_frames += 1;
        if payload.is_empty() {
            self.compared = true;
            return Ok(());
        }
        let malformed = WireError::Payload(Kind::Digests);
        let Some((disk, first, digests)) = blocks::parse(payload) else {
            return Err(malformed);
        };
        let fits = match &mut self.store {
            Some(store) => store.copy_compare(disk, first, digests),
            None => true,
        };
        fits.then_some(()).ok_or(malformed)
    }

    /// Does something to the store; the event that follows if it fails.
    pub(super) fn on_store(
        &mut self,
        act: impl FnOnce(&mut dyn ReplicaStore) -> Result<(), StoreError>,
    ) -> Option<Event> {
        let result = match &mut self.store {
            Some(store) => act(store.as_mut()),
            None => Err(StoreError::Empty),
        };
        result.err().map(|e| Event::StoreFailed {
            damaged: e.damages(),
            why: e.to_string(),
        })
    }

    pub(super) fn prepare(&mut self, hand: InHand<'_>) -> Event {
        let generation = self.replica.generation();
        let end = end_of(hand.frame.flags, hand.payload).map_or(&[][..], |(_, end)| end);
        let end: CheckpointEnd = match codec::from_bytes(end, HELLO_LIMIT) {
            Ok(end) => end,
            Err(e) => {
                let why = StoreError::End(e);
                return Event::StoreFailed {
                    damaged: why.damages(),
                    why: why.to_string(),
                };
            }
        };
        let digest = end.digest;
        let mark = self.replica.name_of_open(digest);
        let failed = self.on_store(|store| {
            let mark = mark.ok_or(StoreError::NotOpen)?;
            store.prepare(generation, mark, &end)
        });
        failed.unwrap_or(Event::Prepared { digest })
    }
}
