//! Fills a joining replica from the tail's own content, while the chain goes on (the paper's extension of a chain).
//! The guest and its owner take no part in it.
//!
//! Most of it is copied piece by piece, each under the replica's lock for a moment. The last bit is sent between two
//! checkpoints, with the lock held: the joining replica is then at exactly the tail's checkpoint, and is sent from
//! there on what a successor would be.

use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Tally, codec, disk_records, records};

use super::env::{Env, lock};
use super::slot::Slot;
use super::state::{State, other};
use crate::kept::begin_payload;
use crate::link::{HELLO_LIMIT, Link};
use crate::replica::{Base, Event};
use crate::store::{Piece, StoreError};
use crate::wire::{FLAG_INSTALL, Frame, Kind};

/// Bytes copied under the lock at a time, about.
const PIECE: usize = 256 << 10;
/// The rest is sent between two checkpoints once it is no more than this, in bytes ...
const SMALL: u64 = 4 << 20;
/// ... or once this many times the content has been sent: a guest that writes faster than the link carries is slowed
/// down then.
const TIMES: u64 = 4;
const MACHINE_PIECE: usize = 512 << 10;

/// How far the filling of a joining replica is.
#[derive(Debug)]
pub(super) enum Feeding {
    /// The replica asks for it.
    Wanted,
    /// A thread is copying.
    Copying,
    /// Everything but the rest has been sent: it follows once no checkpoint is half received.
    Rest(Filling),
}

/// What has been sent so far.
#[derive(Debug)]
pub(super) struct Filling {
    link: Arc<Link>,
    /// As all its frames, which belong to no checkpoint in particular.
    frame: Frame,
    tally: Tally,
}

impl Filling {
    fn send(&mut self, kind: Kind, flags: u32, payload: &[u8]) -> io::Result<()> {
        let frame = Frame {
            kind,
            flags,
            ..self.frame
        };
        self.link.send(&frame, payload)
    }

    fn piece(&mut self, piece: &Piece) -> io::Result<()> {
        match piece {
            Piece::Pages(bytes) => {
                self.tally.add(bytes, records(bytes).count() as u64, 0);
                self.send(Kind::Pages, 0, bytes)
            }
            Piece::Disk(bytes) => {
                self.tally.add(bytes, 0, disk_records(bytes).count() as u64);
                self.send(Kind::Disk, 0, bytes)
            }
        }
    }
}

/// A joining replica reads a GiB of its disks for each frame of digests.
const DIGESTS_PATIENCE: Duration = Duration::from_secs(60);
const DIGESTS_PAUSE: Duration = Duration::from_millis(2);

/// Why a joining replica was not filled.
#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error(
        "it has not said for {} s what its disks hold",
        DIGESTS_PATIENCE.as_secs()
    )]
    Digests,
    #[error("the configuration has changed")]
    Over,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// If the replica wants a joining one filled over `link`, begins to.
pub(super) fn begin_if_wanted(slot: &Arc<Slot>, env: &Arc<Env>, link: &Arc<Link>) {
    {
        let mut state = lock(&slot.state);
        if !matches!(state.feeding, Some(Feeding::Wanted)) {
            return;
        }
        state.feeding = Some(Feeding::Copying);
    }
    let (feeding, feeder, link) = (slot.clone(), env.clone(), link.clone());
    let spawned = super::env::spawn("chain-feed", move || {
        if let Err(e) = feed(&feeding, &feeder, &link) {
            let mut state = lock(&feeding.state);
            if state.is_down(&link) {
                state.lost_next(&e.to_string());
            }
        }
    });
    if let Err(e) = spawned {
        tracing::error!("{e}");
    }
}

fn follows<'a>(slot: &'a Slot, link: &Arc<Link>) -> Result<MutexGuard<'a, State>, FeedError> {
    let state = lock(&slot.state);
    let copying = matches!(state.feeding, Some(Feeding::Copying));
    if copying && state.is_down(link) {
        return Ok(state);
    }
    Err(FeedError::Over)
}

fn feed(slot: &Slot, env: &Env, link: &Arc<Link>) -> Result<(), FeedError> {
    let (mut filling, whole) = {
        let mut state = follows(slot, link)?;
        let frame = state.own_frame(Kind::Begin, Epoch::ZERO);
        state.compared = false;
        let store = state.store.as_mut().ok_or(StoreError::Empty)?;
        store.copy_begin()?;
        let filling = Filling {
            link: link.clone(),
            frame,
            tally: Tally::default(),
        };
        (filling, store.copy_left())
    };
    let (flags, payload) = begin_payload(Base::Install);
    filling.send(Kind::Begin, flags, &payload)?;
    compared(slot, link)?;
    let mut sent: u64 = 0;
    loop {
        let piece = {
            let mut state = follows(slot, link)?;
            let state = &mut *state;
            let store = state.store.as_mut().ok_or(StoreError::Empty)?;
            state.board.note_filling(store.copy_filled());
            let rest = store.copy_left() <= SMALL || sent > whole.saturating_mul(TIMES);
            match rest {
                true => None,
                false => store.copy_next(PIECE)?,
            }
        };
        // Sent without the lock: a slow joining replica does not slow the chain down.
        let Some(piece) = piece else { break };
        filling.piece(&piece)?;
        sent += PIECE as u64;
    }
    let mut state = follows(slot, link)?;
    state.feeding = Some(Feeding::Rest(filling));
    // Now, or when the checkpoint that is being received ends.
    send_the_rest(&mut state, env);
    Ok(())
}

/// Waits until the joining replica has said what its disks hold.
fn compared(slot: &Slot, link: &Arc<Link>) -> Result<(), FeedError> {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        {
            let state = follows(slot, link)?;
            if state.compared {
                return Ok(());
            }
            if state.digest_frames != seen {
                (seen, since) = (state.digest_frames, Instant::now());
            }
        }
        if since.elapsed() > DIGESTS_PATIENCE {
            return Err(FeedError::Digests);
        }
        std::thread::sleep(DIGESTS_PAUSE);
    }
}

/// Between two checkpoints: brings the joining replica to exactly what this one holds.
pub(super) fn send_the_rest(state: &mut State, env: &Env) {
    if !matches!(state.feeding, Some(Feeding::Rest(_))) || !state.replica.is_between_checkpoints() {
        return;
    }
    let Some(Feeding::Rest(filling)) = state.feeding.take() else {
        return;
    };
    let generation = filling.frame.generation;
    // Nobody waits for a joining replica, least of all with the lock held.
    if let Err(e) = filling.link.set_queued() {
        return state.lost_next(&e.to_string());
    }
    if let Err(e) = rest(state, filling) {
        return state.lost_next(&e.to_string());
    }
    if let Err(e) = state.run(env, Event::JoinerFed { generation }, None) {
        state.lost_next(&e.to_string());
    }
}

fn rest(state: &mut State, mut filling: Filling) -> Result<(), FeedError> {
    let mark = state.replica.hist().ok_or(StoreError::Empty)?;
    let store = state.store.as_mut().ok_or(StoreError::Empty)?;
    while let Some(piece) = store.copy_next(PIECE)? {
        filling.piece(&piece)?;
    }
    let filled = store.copy_filled().unwrap_or_default();
    tracing::info!(
        "a joining replica has been filled: {} pages sent, {} disk blocks sent, {} it had",
        filled.pages_sent,
        filled.blocks_sent,
        filled.blocks_equal
    );
    state.board.note_filled(filled);
    let store = state.store.as_mut().ok_or(StoreError::Empty)?;
    store.copy_end();
    let machine = store.machine_state().ok_or(StoreError::Empty)?;
    for piece in machine.chunks(MACHINE_PIECE) {
        filling.tally.add(piece, 0, 0);
        filling.send(Kind::Machine, 0, piece)?;
    }
    let mut payload = mark.to_bytes().to_vec();
    payload.extend(codec::to_bytes(&filling.tally.end(), HELLO_LIMIT).map_err(other)?);
    filling.send(Kind::End, FLAG_INSTALL, &payload)?;
    Ok(())
}
