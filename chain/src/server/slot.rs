//! One VM's replica at this host, as the rest of the server sees it: each operation takes the replica's lock once.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation, VmId, codec};

use super::board::Board;
use super::env::{Env, Handover, ServerError, ServerOptions, lock, spawn};
use super::pulses::Pulses;
use super::state::{Beat, End, Lack, State};
use crate::greet::{Hello, Role};
use crate::kept::Buffers;
use crate::link::{FEED_TIMEOUT, HELLO_LIMIT, Link};
use crate::mark::Mark;
use crate::query::{Query, answer_payload};
use crate::replica::{Event, FreezeError, Replica};
use crate::store::{self, ReplicaStore, Rewound, StoreError, Taken};
use crate::view::{View, VmShape};
use crate::wire::{Frame, Kind, Payload, WireError};

/// A checkpoint is copied out in pieces of so many bytes, about ...
const OUT_PIECE: usize = 1 << 20;
/// ... and in between somebody else may have the lock.
const OUT_PAUSE: Duration = Duration::from_micros(200);

/// A joining replica for which so much waits that the chain is held up may take nothing for this long; nobody else waits
/// for it.
const JOINER_PATIENCE: Duration = Duration::from_secs(1);
/// Owners that are told of acknowledgements: there is one, and perhaps connections that it has given up.
const OWNERS_MAX: usize = 8;

/// Whoever needs the replica waits for the frame in hand for so long. A disk that takes longer hangs.
const HANGS: Duration = Duration::from_secs(2);
/// Between two tries to get the lock.
const TRY: Duration = Duration::from_micros(50);

pub(super) struct Slot {
    vm: VmId,
    /// What may be known without the lock.
    pub(super) board: Arc<Board>,
    /// What frames are read into.
    pub(super) buffers: Arc<Buffers>,
    pub(super) beat: Beat,
    pub(super) pulses: Pulses,
    pub(super) state: Mutex<State>,
}

impl Slot {
    pub(super) fn new(
        options: &ServerOptions,
        view: View,
        store: Box<dyn ReplicaStore>,
    ) -> Arc<Self> {
        let (host, missed) = (options.host.clone(), options.missed);
        let replica = match store.holds() {
            Some(mark) => Replica::returned(host, &view, missed, mark),
            None => Replica::new(host, &view, missed),
        };
        let vm = view.vm;
        let buffers = Arc::<Buffers>::default();
        let state = State::new(view, replica, store, buffers.clone());
        Arc::new(Self {
            vm,
            buffers,
            board: state.board.clone(),
            beat: state.beat.clone(),
            pulses: Pulses::default(),
            state: Mutex::new(state),
        })
    }

    /// The replica, unless its disk hangs.
    fn patiently(&self) -> Result<MutexGuard<'_, State>, ServerError> {
        let since = Instant::now();
        loop {
            match self.state.try_lock() {
                Ok(state) => return Ok(state),
                Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if since.elapsed() > HANGS => {
                    return Err(ServerError::Busy(since.elapsed()));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(TRY),
            }
        }
    }

    /// Ends what there is of it: now or, if its disk hangs, on a thread once that is over. Whether it has been done.
    pub(super) fn end(self: Arc<Self>, how: End) -> bool {
        if let Ok(mut state) = self.patiently() {
            state.end(how);
            return true;
        }
        let later = move || lock(&self.state).end(how);
        if let Err(e) = spawn("chain-end", later) {
            tracing::error!("{e}");
        }
        false
    }

    /// Follows a newer configuration; false if it is none.
    pub(super) fn adopt(&self, view: View) -> Result<bool, ServerError> {
        let mut state = self.patiently()?;
        let newer = view.generation > state.replica.generation();
        if newer {
            state.adopt(view);
        }
        Ok(newer)
    }

    pub(super) fn freeze(&self) -> Result<Mark, ServerError> {
        let mut state = self.patiently()?;
        let frozen = state.replica.freeze();
        state.note();
        frozen.map_err(|e| match e {
            FreezeError::Failed(why) => ServerError::Failed(why),
            FreezeError::Empty => StoreError::Empty.into(),
            not_yet @ (FreezeError::Joining(_) | FreezeError::Flowing(_)) => {
                ServerError::Joining(not_yet.to_string())
            }
        })
    }

    pub(super) fn unfreeze(&self, env: &Env) -> Result<(), ServerError> {
        let mut state = self.patiently()?;
        let result = state.run(env, Event::Unfreeze, None);
        state.note();
        if let Err(e) = result {
            tracing::warn!("VM {}: {e}", self.vm);
        }
        Ok(())
    }

    pub(super) fn hand_over(&self, view: &View) -> Result<Handover, ServerError> {
        let (store, mut kept) = {
            let mut state = self.patiently()?;
            let kept = std::mem::take(&mut state.kept);
            // From here on the old owner's frames are answered with a refusal.
            state.replica.adopt(view);
            state.view = view.clone();
            state.note();
            state.hang_up();
            (state.store.take().ok_or(StoreError::Empty)?, kept)
        };
        kept.abandon();
        let Taken {
            mark,
            machine,
            disks,
            ram,
        } = store.hand_over(view.generation)?;
        Ok(Handover {
            epoch: mark.epoch,
            mark,
            machine,
            disks,
            ram,
            kept,
        })
    }

    pub(super) fn rewind(
        &self,
        shape: &VmShape,
        epoch: Epoch,
        dir: &Path,
    ) -> Result<Rewound, ServerError> {
        let mark = {
            let mut state = lock(&self.state);
            if !state.replica.state().could_resume() {
                return Err(StoreError::Empty.into());
            }
            store::find(state.store.as_deref_mut().ok_or(StoreError::Empty)?, epoch)?
        };
        let files = store::files(&shape.disks, dir)?;
        let disks = files.iter().map(|(path, _)| path.clone()).collect();
        self.of_store(|store| store.out_begin(mark, files))?;
        // Piece by piece, each under the lock for a moment: checkpoints are taken in between.
        while !self.of_store(|store| store.out_next(OUT_PIECE))? {
            std::thread::sleep(OUT_PAUSE);
        }
        let copied = self.of_store(|store| store.out_end().ok_or(StoreError::CopyInterrupted))?;
        let found = copied.finish()?;
        let ram = found.image.fds().into_iter();
        let ram = ram
            .map(|fd| fd.try_clone_to_owned())
            .collect::<Result<_, _>>();
        Ok(Rewound {
            mark: found.mark,
            machine: found.machine,
            ram: ram.map_err(StoreError::from)?,
            disks,
        })
    }

    /// Something with the store of a checkpoint that is being copied out.
    fn of_store<T>(
        &self,
        act: impl FnOnce(&mut dyn ReplicaStore) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut state = lock(&self.state);
        let store = state.store.as_deref_mut();
        act(store.ok_or(StoreError::CopyInterrupted)?)
    }

    /// Answers a greeting; true if the connection stands. Answered under the lock, so that nothing else goes first.
    pub(super) fn greet(
        &self,
        env: &Env,
        frame: &Frame,
        hello: &Hello,
        link: &Arc<Link>,
    ) -> Result<bool, WireError> {
        let mut state = lock(&self.state);
        let mine = state.replica.generation();
        if frame.generation < mine {
            let refusal = Frame {
                generation: mine,
                ..state.own_frame(Kind::Refused, Epoch::ZERO)
            };
            link.post(&refusal, &[])?;
            return Ok(false);
        }
        if let Some(lack) = obstacle(&state, env, frame.generation, hello) {
            let payload = codec::to_bytes(&lack.trouble, HELLO_LIMIT).unwrap_or_default();
            let kind = match lack.is_final {
                true => Kind::Declined,
                false => Kind::NotReady,
            };
            link.post(&state.own_frame(kind, Epoch::ZERO), &payload)?;
            return Ok(false);
        }
        let holds = match hello.role {
            Role::Look => state.replica.resumable(),
            _ => state.replica.hist(),
        };
        let holds = holds.map(|mark| mark.to_bytes());
        let payload = holds.as_ref().map_or(&[][..], |bytes| &bytes[..]);
        link.post(&state.own_frame(Kind::HelloOk, Epoch::ZERO), payload)?;
        // What was acknowledged while nobody listened must not be lost with the old connection.
        let acked = match hello.role {
            Role::Update => state.replica.acked_up(),
            Role::Acks => state.replica.acked(),
            Role::Query | Role::Look | Role::Probe | Role::File => None,
        };
        if let Some(acked) = acked {
            link.post(&state.own_frame(Kind::Ack, acked), &[])?;
        }
        match hello.role {
            Role::Update => {
                state.up = Some(link.clone());
                state.tell_refusal();
            }
            Role::Acks => {
                if state.owners.len() == OWNERS_MAX {
                    state.owners.remove(0).close();
                }
                state.owners.push(link.clone());
            }
            Role::Query | Role::Look | Role::Probe | Role::File => {}
        }
        Ok(true)
    }

    pub(super) fn disconnected(&self, link: &Arc<Link>) {
        let mut state = lock(&self.state);
        if state.is_up(link) {
            state.up = None;
        }
        state.owners.retain(|l| !Arc::ptr_eq(l, link));
    }

    /// Handles one frame from the predecessor.
    pub(super) fn frame(
        &self,
        env: &Env,
        frame: &Frame,
        payload: Payload,
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        self.board.busy(env.now_ms());
        let handled = self.handle(env, frame, payload, link);
        self.board.idle();
        let (down, patience) = handled?;
        // A next replica that is slow holds up who feeds this one, and nobody who needs its lock.
        if let Some(down) = down {
            down.wait_for_room(patience);
        }
        Ok(())
    }

    /// The next replica, and for how long it may take nothing.
    fn handle(
        &self,
        env: &Env,
        frame: &Frame,
        payload: Payload,
        link: &Arc<Link>,
    ) -> Result<(Option<Arc<Link>>, Duration), WireError> {
        let jobs = {
            let mut state = lock(&self.state);
            let handled = state.frame(env, frame, payload, link);
            let jobs = std::mem::take(&mut state.jobs);
            handled.map(|()| jobs)?
        };
        for job in jobs {
            let done = job.run(|| self.board.busy(env.now_ms()));
            lock(&self.state).done(env, done, link)?;
        }
        let state = lock(&self.state);
        let patience = match state.replica.is_tail() {
            true => JOINER_PATIENCE,
            false => FEED_TIMEOUT,
        };
        Ok((state.down.clone(), patience))
    }

    /// The owner does not run the VM any more.
    pub(super) fn yielded(&self, env: &Env, frame: &Frame) -> Result<(), WireError> {
        let event = Event::Yield {
            generation: frame.generation,
            epoch: frame.epoch,
        };
        lock(&self.state).run(env, event, None)
    }

    /// Answers a query from what has been processed, if this is (still) the tail in the asker's generation.
    pub(super) fn query(
        &self,
        frame: &Frame,
        payload: &[u8],
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        if frame.kind != Kind::Query {
            return Err(WireError::OutOfPlace(
                frame.kind,
                "this connection is for queries only",
            ));
        }
        let query = Query::from_bytes(payload).ok_or(WireError::Payload(Kind::Query))?;
        let (answer, frame) = {
            let mut state = lock(&self.state);
            let replica = &state.replica;
            if frame.generation != replica.generation()
                || !replica.is_tail()
                || !replica.state().could_resume()
            {
                let refusal = Frame {
                    generation: replica.generation(),
                    ..state.own_frame(Kind::Refused, Epoch::ZERO)
                };
                return Ok(link.post(&refusal, &[])?);
            }
            let newest = replica.hist();
            let kept = state.store.as_mut().and_then(|store| store.history());
            let marks = kept.map_or_else(|| newest.into_iter().collect(), |past| past.range());
            (
                query.pick(&marks),
                state.own_frame(Kind::Answer, Epoch::ZERO),
            )
        };
        Ok(link.send(&frame, &answer_payload(&answer))?)
    }

    pub(super) fn tick(&self, env: &Env) {
        self.pulses.beat();
        let beat = lock(&self.beat).clone();
        if let Some((down, frame)) = beat {
            // A failure shows on the thread that reads the successor's acks; that one reports it.
            let _ = down.send_if_idle(&frame);
        }
        let Ok(mut state) = self.state.try_lock() else {
            return;
        };
        if self.board.is_busy() {
            return;
        }
        let now_ms = env.now_ms();
        let heard = self.pulses.tick(env, &state);
        if heard || state.up.as_ref().is_some_and(|up| up.has_unread()) {
            // Unread is not silence either: this host is late with reading.
            let _ = state.run(env, Event::Heard { now_ms }, None);
        }
        if let Err(e) = state.run(env, Event::Tick { now_ms }, None) {
            tracing::warn!("VM {}: {e}", self.vm);
        }
    }
}

/// What keeps a greeting from being accepted, and whose fault it is.
fn obstacle(state: &State, env: &Env, generation: Generation, hello: &Hello) -> Option<Lack> {
    let here = |why: String| Some(Lack::passing((env.options.host.clone(), why)));
    if generation > state.replica.generation() {
        return here(format!("has not been told of generation {generation} yet"));
    }
    if hello.role == Role::Look {
        let (owner, from) = (&state.view.owner, &hello.from);
        return (from != owner)
            .then(|| here(format!("{from} is not the owner, {owner} is")))
            .flatten();
    }
    if let Some(why) = state.replica.failed() {
        return here(format!("this replica has failed: {why}"));
    }
    let view = &state.view;
    let predecessor = match view.position(&env.options.host) {
        Some(0) => &view.owner,
        Some(position) => &view.chain[position - 1].host,
        None if view.is_joining(&env.options.host) => &view.chain.last()?.host,
        None => return here("is no member of the chain".into()),
    };
    match hello.role {
        Role::Update => {
            if hello.from != *predecessor {
                let from = &hello.from;
                return here(format!("its predecessor is {predecessor}, not {from}"));
            }
            if state.replica.successor().is_none() || state.down.is_some() {
                return None;
            }
            match &state.lack {
                Some(lack) => Some(lack.clone()),
                None => here("is not connected to the next replica yet".into()),
            }
        }
        Role::Acks | Role::Query if !state.replica.is_tail() => here("is not the tail".into()),
        Role::Query if !state.replica.state().could_resume() => {
            here("holds no complete checkpoint yet".into())
        }
        Role::Query | Role::Look | Role::Probe | Role::File => None,
        Role::Acks if hello.from != state.view.owner => {
            let owner = &state.view.owner;
            here(format!("{} is not the owner, {owner} is", hello.from))
        }
        Role::Acks => None,
    }
}
