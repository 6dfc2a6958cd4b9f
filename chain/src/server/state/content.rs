//! What a replica's server does with its store: checkpoints into it, and what its disks hold already. The latter takes long,
//! so that it is done without the replica's lock, by whoever has handled the frame ([`Job`]).

use std::io;
use std::sync::Arc;

use checkpoint::{CheckpointEnd, Epoch, codec};
use diskbuf::Mirror;

use super::{InHand, State};
use crate::blocks::{self, Digest};
use crate::kept::end_of;
use crate::link::{HELLO_LIMIT, Link};
use crate::replica::Event;
use crate::server::env::Env;
use crate::store::{ReplicaStore, StoreError};
use crate::wire::{Frame, Kind, WireError};

/// Something that a frame asks for and that is done before the next one is looked at, without a lock.
pub(in crate::server) struct Job {
    mirrors: Arc<Vec<Mirror>>,
    what: What,
}

enum What {
    /// Tell the one that fills this replica what its disks hold already.
    Say { frame: Frame, link: Arc<Link> },
    /// Mark the blocks in which this replica differs from the owner.
    Compare {
        frame: Frame,
        disk: u16,
        first: u64,
        asked: Vec<Digest>,
    },
}

/// What came of it.
pub(in crate::server) enum Done {
    /// Nothing more is to be done.
    Nothing,
    /// The disks cannot be read.
    Failed(io::Error),
    /// These are the blocks, marked.
    Compared {
        /// The question.
        frame: Frame,
        /// Which disk.
        disk: u16,
        /// From which block on.
        first: u64,
        /// For each the digest, or that some replica differs.
        marked: Vec<Digest>,
    },
}

impl Job {
    /// Does it; says `progress` in between.
    pub(in crate::server) fn run(self, progress: impl Fn()) -> Done {
        match self.what {
            What::Say { frame, link } => {
                for (disk, mirror) in (0u16..).zip(self.mirrors.iter()) {
                    if let Err(e) = say(disk, mirror, &frame, &link, &progress) {
                        return Done::Failed(e);
                    }
                }
                if link.send(&frame, &[]).is_err() {
                    // It fills again over its next connection.
                    link.close();
                }
                Done::Nothing
            }
            What::Compare {
                frame,
                disk,
                first,
                asked,
            } => {
                let held = match self.mirrors.get(usize::from(disk)) {
                    Some(mirror) => blocks::digests_of(mirror, first, asked.len(), &progress),
                    None => Ok(Vec::new()),
                };
                match held {
                    Ok(held) => Done::Compared {
                        frame,
                        disk,
                        first,
                        marked: blocks::marked(&asked, &held),
                    },
                    Err(e) => Done::Failed(e),
                }
            }
        }
    }
}

/// Says what one disk holds: of blocks that are not mentioned, that they are zero. A connection that fails is noticed by
/// whoever reads it.
fn say(
    disk: u16,
    mirror: &Mirror,
    frame: &Frame,
    link: &Link,
    progress: &impl Fn(),
) -> io::Result<()> {
    let mut at = 0;
    while let Some(first) = blocks::next_data(mirror, at)? {
        let digests = blocks::run(mirror, first, progress)?;
        at = first + digests.len() as u64;
        if link
            .send(frame, &blocks::payload(disk, first, &digests))
            .is_err()
        {
            break;
        }
    }
    Ok(())
}

impl State {
    fn job(&mut self, what: What) {
        let base = self.store.as_ref().and_then(|store| store.base());
        let mirrors = base.map(|base| base.mirrors()).unwrap_or_default();
        self.jobs.push(Job { mirrors, what });
    }

    /// The owner asks what this replica's disks hold already.
    pub(super) fn compare(&mut self, hand: InHand<'_>) -> Result<(), WireError> {
        let asked = blocks::parse(hand.payload);
        let (disk, first, asked) = asked.ok_or(WireError::Payload(Kind::Compare))?;
        self.job(What::Compare {
            frame: *hand.frame,
            disk,
            first,
            asked: asked.to_vec(),
        });
        Ok(())
    }

    /// The one that fills this replica has to know it.
    pub(super) fn say_digests(&mut self, hand: Option<InHand<'_>>) {
        if let Some(hand) = hand {
            let frame = self.own_frame(Kind::Digests, Epoch::ZERO);
            let link = hand.link.clone();
            self.job(What::Say { frame, link });
        }
    }

    /// Does what follows from a job, which was asked for over `link`.
    pub(in crate::server) fn done(
        &mut self,
        env: &Env,
        done: Done,
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        if !self.is_up(link) {
            return Ok(());
        }
        match done {
            Done::Nothing => Ok(()),
            Done::Failed(e) => {
                let failed = failed(&StoreError::Disks(e.to_string()));
                self.run(env, failed, None)
            }
            Done::Compared { frame, .. } if frame.generation != self.replica.generation() => Ok(()),
            Done::Compared {
                frame,
                disk,
                first,
                marked,
            } => {
                // The question goes on; the tail answers it.
                if let Some(down) = &self.down {
                    let asked = blocks::payload(disk, first, &marked);
                    if let Err(e) = down.post_down(&frame, &asked) {
                        self.lost_next(&e.to_string());
                    }
                } else if self.replica.is_tail() {
                    let answer = blocks::answer(disk, first, &marked);
                    self.tell_owners(&self.own_frame(Kind::Compared, frame.epoch), &answer);
                }
                Ok(())
            }
        }
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
        result.err().map(|e| failed(&e))
    }

    pub(super) fn prepare(&mut self, hand: InHand<'_>) -> Event {
        let generation = self.replica.generation();
        let end = end_of(hand.frame.flags, hand.payload).map_or(&[][..], |(_, end)| end);
        let end: CheckpointEnd = match codec::from_bytes(end, HELLO_LIMIT) {
            Ok(end) => end,
            Err(e) => return failed(&StoreError::End(e)),
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

fn failed(error: &StoreError) -> Event {
    Event::StoreFailed {
        damaged: error.damages(),
        why: error.to_string(),
    }
}
