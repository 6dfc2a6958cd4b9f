//! The connection to the next replica: made patiently in the background, then read for acks.

use std::sync::Arc;
use std::time::Duration;

use checkpoint::{Epoch, Generation};

use super::env::{Env, lock, spawn};
use super::slot::Slot;
use super::state::Lack;
use crate::greet::{GreetError, Greeted, Role, greet};
use crate::replica::Event;
use crate::view::{Member, View};
use crate::wire::{self, Frame, Kind, Payload};

/// Between attempts to reach a successor that is not ready: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(160));
/// A replica that is to join has this long to get ready, then the owner is told that it does not.
const JOINER_PATIENCE: Duration = Duration::from_secs(15);
/// A successor that was there has this long to answer again, once the connection to it was ended to ask it for what was missed.
const SUCCESSOR_PATIENCE: Duration = Duration::from_secs(1);

/// Connects to the next replica, if there is one, for as long as this configuration is followed: it may still be creating
/// its image, and however late it comes, it must not be left out for good. A connection that breaks is made again.
pub(super) fn connect(slot: &Arc<Slot>, env: &Arc<Env>) {
    let (view, next) = {
        let state = lock(&slot.state);
        let next = match state.replica.successor() {
            Some(position) => state.view.chain.get(position),
            None if state.replica.is_tail() => state.view.joining.as_ref(),
            None => None,
        };
        (state.view.clone(), next.cloned())
    };
    let Some(member) = next else {
        return;
    };
    let (slot, env) = (slot.clone(), env.clone());
    let spawned = spawn("chain-down", move || keep_up(&slot, &env, &view, &member));
    if let Err(e) = spawned {
        tracing::error!("{e}");
    }
}

/// Connects to `member`, again and again, for as long as this configuration is followed.
fn keep_up(slot: &Arc<Slot>, env: &Arc<Env>, view: &View, member: &Member) {
    let mut pause = RETRY.0;
    // Since it was last said that it cannot be reached.
    let mut unsaid = Duration::ZERO;
    while follows(slot, view.generation) {
        match greet(member, view, Role::Update, &env.options.host) {
            Ok(peer) => {
                // The peer is up, but if it cannot be used: keep backing off.
                if listen(slot, env, view, peer) {
                    pause = RETRY.0;
                }
                unsaid = Duration::ZERO;
            }
            Err(e) => {
                tracing::debug!("next replica {}: {e}", member.host);
                if lacks(slot, view.generation, member, e, unsaid) {
                    unsaid = Duration::ZERO;
                }
            }
        }
        unsaid += pause;
        std::thread::sleep(pause);
        pause = RETRY.1.min(pause * 2);
    }
}

/// There is no next replica yet. Says so to the predecessor, if nobody else will: true then.
fn lacks(
    slot: &Slot,
    generation: Generation,
    member: &Member,
    error: GreetError,
    unsaid: Duration,
) -> bool {
    let mut state = lock(&slot.state);
    if state.replica.generation() != generation {
        return false;
    }
    let lack = Lack {
        is_final: error.is_final(),
        trouble: error.blame(&member.host),
    };
    // A successor that may come is missed by those who wait for the chain. But for a joining replica nobody waits, nor for
    // one that was there when the predecessor connected. A refusal is told at once: the chain can go on without that
    // host.
    let patience = match state.replica.is_tail() {
        true => JOINER_PATIENCE,
        false => SUCCESSOR_PATIENCE,
    };
    let news = lack.is_final && state.lack.as_ref() != Some(&lack);
    let said = news || unsaid >= patience;
    if said {
        state.tell_lack(&lack);
    }
    state.lack = Some(lack);
    said
}

fn follows(slot: &Slot, generation: Generation) -> bool {
    let state = lock(&slot.state);
    state.replica.generation() == generation && state.store.is_some()
}

/// Reads the next replica's acks until the connection ends; false if it was of no use from the beginning.
fn listen(slot: &Arc<Slot>, env: &Arc<Env>, view: &View, peer: Greeted) -> bool {
    let link = Arc::new(peer.link);
    {
        let mut state = lock(&slot.state);
        if state.replica.generation() != view.generation || state.store.is_none() {
            link.close();
            return false;
        }
        state.down = Some(link.clone());
        state.found_next();
        let frame = state.own_frame(Kind::Heartbeat, Epoch::ZERO);
        *lock(&slot.beat) = Some((link.clone(), frame));
        let up = Event::NextUp {
            generation: view.generation,
            holds: peer.holds,
        };
        if let Err(e) = state.run(env, up, None) {
            state.lost_next(&e.to_string());
        }
        if !state.is_down(&link) {
            return false;
        }
    }
    super::joiner::begin_if_wanted(slot, env, &link);
    let mut payload = Payload::default();
    let why = loop {
        let frame = match wire::read(&mut &peer.stream, &mut payload) {
            Ok(frame) => frame,
            Err(e) => break e.to_string(),
        };
        let mut state = lock(&slot.state);
        if !state.is_down(&link) {
            return true;
        }
        match frame.kind {
            Kind::Ack => {
                let ack = Event::NextAck {
                    generation: frame.generation,
                    epoch: frame.epoch,
                };
                if let Err(e) = state.run(env, ack, None) {
                    break e.to_string();
                }
            }
            Kind::Digests => {
                // Whoever copies may take a while to look at them: not with the lock.
                let copier = state.copier().cloned();
                drop(state);
                if let Some(copier) = copier {
                    let _ = copier.digests.send(payload.to_vec());
                }
            }
            Kind::Broken | Kind::JoinerReady => state.pass_up(&frame, &payload),
            Kind::Refused => {
                let newer = Frame {
                    generation: frame.generation,
                    ..state.own_frame(Kind::Refused, Epoch::ZERO)
                };
                if let Some(up) = &state.up {
                    let _ = up.post(&newer, &[]);
                }
            }
            _ => break format!("it sent an unexpected frame ({:?})", frame.kind),
        }
    };
    let mut state = lock(&slot.state);
    if state.is_down(&link) {
        state.lost_next(&why);
    }
    true
}
