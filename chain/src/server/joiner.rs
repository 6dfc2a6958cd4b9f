//! Fills a joining replica from the tail's own content, while the chain goes on (the paper's extension of a chain).
//! The guest and its owner take no part in it, and do not feel it: a thread reads memory and mirrors beside the replica,
//! whose lock it takes for moments only.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Tally, codec, disk_records, records};

use super::env::{Env, lock, spawn};
use super::slot::Slot;
use super::state::{Copier, Feeding, State};
use crate::blocks;
use crate::kept::begin_payload;
use crate::link::{HELLO_LIMIT, Link};
use crate::replica::Base;
use crate::store::{CUT_PAGES, Copying, Cut, Piece, Source, StoreError};
use crate::wire::{FLAG_INSTALL, Frame, Kind, WireError};

/// The rest is cut off between two checkpoints once a round was no more than this, in bytes ...
const SMALL: u64 = 4 << 20;
/// ... or once rounds do not get smaller any more, or there were so many.
const ROUNDS: usize = 16;
const MACHINE_PIECE: usize = 512 << 10;
/// A joining replica reads up to a GiB of its disks for each frame of digests.
const DIGESTS_PATIENCE: Duration = Duration::from_secs(60);
/// Frames of digests that wait to be looked at.
const DIGESTS_WAITING: usize = 4;
/// Between two looks at something that others do.
const PAUSE: Duration = Duration::from_micros(500);

/// What has been sent so far.
struct Filling {
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
    Wire(#[from] WireError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// If the replica wants a joining one filled over `link`, begins to.
pub(super) fn begin_if_wanted(slot: &Arc<Slot>, env: &Arc<Env>, link: &Arc<Link>) {
    let (sender, digests) = sync_channel(DIGESTS_WAITING);
    let copier = Copier::new(link.clone(), sender);
    {
        let mut state = lock(&slot.state);
        if !matches!(state.feeding, Some(Feeding::Wanted)) {
            return;
        }
        state.feeding = Some(Feeding::Copying(copier.clone()));
    }
    let (slot, env) = (slot.clone(), env.clone());
    let spawned = spawn("chain-feed", move || {
        if let Err(e) = feed(&slot, &env, &copier, digests) {
            let mut state = lock(&slot.state);
            if state.is_down(&copier.link) && copier.is_alive() {
                state.lost_next(&e.to_string());
            }
        }
    });
    if let Err(e) = spawned {
        tracing::error!("{e}");
    }
}

/// The replica, if it is still to be copied.
fn copied<'a>(slot: &'a Slot, copier: &Copier) -> Result<MutexGuard<'a, State>, FeedError> {
    let state = lock(&slot.state);
    // A copier that is not alive any more may have been followed by another one.
    match copier.is_alive() && state.is_down(&copier.link) {
        true => Ok(state),
        false => Err(FeedError::Over),
    }
}

fn feed(
    slot: &Slot,
    env: &Env,
    copier: &Copier,
    digests: Receiver<Vec<u8>>,
) -> Result<(), FeedError> {
    let (mut filling, mut source, newest) = {
        let mut state = copied(slot, copier)?;
        let filling = Filling {
            link: copier.link.clone(),
            frame: state.own_frame(Kind::Begin, Epoch::ZERO),
            tally: Tally::default(),
        };
        let store = state.store.as_mut().ok_or(StoreError::Empty)?;
        let Copying(source) = store.copy_begin()?;
        (filling, source, state.base()?.newest_writes())
    };
    let (flags, payload) = begin_payload(Base::Install);
    filling.send(Kind::Begin, flags, &payload)?;
    compare(&mut source, copier, &digests)?;
    // Whoever says more than that is not waited for.
    drop(digests);
    settle(slot, copier, newest)?;
    send_round(slot, copier, &mut filling, &mut source)?;
    let mut before = u64::MAX;
    for _ in 0..ROUNDS {
        let fresh = source.fresh();
        let (changes, newest) = {
            let mut state = copied(slot, copier)?;
            let base = state.base()?;
            (base.copy_changes(fresh)?, base.newest_writes())
        };
        let bytes = changes.bytes();
        if changes.writes.is_none() {
            // They are read from the mirrors.
            settle(slot, copier, newest)?;
        }
        source.begin(changes);
        send_round(slot, copier, &mut filling, &mut source)?;
        if bytes <= SMALL || bytes >= before {
            break;
        }
        before = bytes;
    }
    send_rest(slot, env, copier, filling, source)
}

/// Hears what the joining replica's disks hold.
fn compare(
    source: &mut Source,
    copier: &Copier,
    digests: &Receiver<Vec<u8>>,
) -> Result<(), FeedError> {
    let mut since = Instant::now();
    loop {
        if !copier.is_alive() {
            return Err(FeedError::Over);
        }
        match digests.recv_timeout(Duration::from_millis(50)) {
            Ok(payload) if payload.is_empty() => return Ok(()),
            Ok(payload) => {
                let malformed = WireError::Payload(Kind::Digests);
                let Some((disk, first, said)) = blocks::parse(&payload) else {
                    return Err(malformed.into());
                };
                if !source.compare(disk, first, said) {
                    return Err(malformed.into());
                }
                since = Instant::now();
            }
            Err(RecvTimeoutError::Timeout) if since.elapsed() < DIGESTS_PATIENCE => {}
            Err(_) => return Err(FeedError::Digests),
        }
    }
}

/// Waits until the mirrors have all writes up to `newest`.
fn settle(slot: &Slot, copier: &Copier, newest: u64) -> Result<(), FeedError> {
    // A disk that hangs ends this with the configuration.
    while !copied(slot, copier)?.base()?.in_mirrors(newest)? {
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn send_round(
    slot: &Slot,
    copier: &Copier,
    filling: &mut Filling,
    source: &mut Source,
) -> Result<(), FeedError> {
    while let Some(piece) = source.next()? {
        if !copier.is_alive() {
            return Err(FeedError::Over);
        }
        if let Some(piece) = piece {
            filling.piece(&piece)?;
        }
        slot.board.note_filling(Some(source.filled()));
    }
    Ok(())
}

/// Sends what has changed until some moment between two checkpoints, which the joining replica then holds.
fn send_rest(
    slot: &Slot,
    env: &Env,
    copier: &Copier,
    mut filling: Filling,
    mut source: Source,
) -> Result<(), FeedError> {
    let mut cut = cut_off(slot, env, copier, &source)?;
    for write in cut.writes {
        filling.piece(&Piece::Disk(write))?;
    }
    cut.gfns.sort_unstable();
    let mut pages = Vec::with_capacity(CUT_PAGES);
    for gfns in cut.gfns.chunks(CUT_PAGES) {
        copied(slot, copier)?.base()?.cut_pages(gfns, &mut pages)?;
        filling.piece(&source.encode(gfns, &pages))?;
    }
    for piece in cut.machine.chunks(MACHINE_PIECE) {
        filling.tally.add(piece, 0, 0);
        filling.send(Kind::Machine, 0, piece)?;
    }
    let mut payload = cut.mark.to_bytes().to_vec();
    let end = codec::to_bytes(&filling.tally.end(), HELLO_LIMIT).map_err(io::Error::other)?;
    payload.extend(end);
    filling.send(Kind::End, FLAG_INSTALL, &payload)?;
    // It follows the checkpoints since then.
    filling.link.release()?;
    copied(slot, copier)?.end_filling();
    let filled = source.filled();
    slot.board.note_filled(filled);
    tracing::info!(
        "a joining replica has been filled: {} pages sent, {} disk blocks sent, {} it had",
        filled.pages_sent,
        filled.blocks_sent,
        filled.blocks_equal
    );
    Ok(())
}

/// Cuts, now or when the checkpoint that is being received ends.
fn cut_off(slot: &Slot, env: &Env, copier: &Copier, source: &Source) -> Result<Cut, FeedError> {
    let spare = source.spare();
    {
        let mut state = copied(slot, copier)?;
        state.feeding = Some(Feeding::Rest(copier.clone(), spare));
        state.cut_if_due(env);
    }
    loop {
        let mut state = copied(slot, copier)?;
        match state.feeding.take() {
            Some(Feeding::Cut(copier, cut)) => {
                state.feeding = Some(Feeding::Finishing(copier));
                return Ok(cut);
            }
            other => state.feeding = other,
        }
        drop(state);
        std::thread::sleep(PAUSE);
    }
}
