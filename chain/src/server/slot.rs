//! One VM's replica at this host: state machine, store and links, under one lock.

use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use checkpoint::{CheckpointEnd, Epoch, Generation, HostId, VmId, codec};

use super::connection::Greeting;
use super::{ReplicaStatus, ServerError, ServerEvent, ServerOptions, Shared, lock};
use crate::link::{HELLO_LIMIT, Hello, Link, Role};
use crate::replica::{Action, Replica, Verdict};
use crate::store::{Handover, StoreError, VmStore};
use crate::view::View;
use crate::wire::{self, FLAG_FULL, Frame, Kind, WireError};

/// How long a successor may take to come up before its predecessor gives up trying.
const SUCCESSOR_PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Slot {
    vm: VmId,
    /// A frame is being handled: the stream is not silent, however long that takes.
    busy: AtomicBool,
    /// Where heartbeats go and what they say; apart from `state`, so that a checkpoint being processed delays none.
    beat: Mutex<Option<(Arc<Link>, Frame)>>,
    state: Mutex<State>,
}

struct State {
    view: View,
    replica: Replica,
    store: Option<VmStore>,
    up: Option<Arc<Link>>,
    down: Option<Arc<Link>>,
    owners: Vec<Arc<Link>>,
}

impl Slot {
    pub(super) fn new(options: &ServerOptions, view: View, store: VmStore) -> Arc<Self> {
        let replica = Replica::new(options.host.clone(), &view, options.missed);
        Arc::new(Self {
            vm: view.vm,
            busy: AtomicBool::new(false),
            beat: Mutex::default(),
            state: Mutex::new(State {
                view,
                replica,
                store: Some(store),
                up: None,
                down: None,
                owners: Vec::new(),
            }),
        })
    }

    pub(super) fn status(&self) -> ReplicaStatus {
        let state = lock(&self.state);
        ReplicaStatus {
            view: state.view.clone(),
            epoch: state.replica.hist(),
            failed: state.replica.failed().map(str::to_string),
        }
    }

    pub(super) fn adopt(&self, view: View) {
        let mut state = lock(&self.state);
        if view.generation <= state.replica.generation() {
            return;
        }
        state.replica.adopt(&view);
        state.view = view;
        if let Some(down) = state.down.take() {
            down.close();
        }
        // Predecessor and owner stay connected until they have been told that their generation is over.
        state.owners.clear();
    }

    pub(super) fn retire(&self, generation: Generation) {
        let mut state = lock(&self.state);
        if generation <= state.replica.generation()
            && let Some(up) = state.up.take()
        {
            // Still a member, but without a replica: the predecessor has to notice. After a newer decision it stays
            // connected instead, to be told of it.
            up.close();
        }
        let view = View {
            generation,
            chain: Vec::new(),
            ..state.view.clone()
        };
        state.replica.adopt(&view);
        state.replica.freeze();
        state.store = None;
        if let Some(down) = state.down.take() {
            down.close();
        }
    }

    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        let links = [state.up.take(), state.down.take()];
        for link in links.into_iter().flatten().chain(state.owners.drain(..)) {
            link.close();
        }
    }

    pub(super) fn freeze(&self) -> Result<Epoch, ServerError> {
        let mut state = lock(&self.state);
        if let Some(why) = state.replica.failed() {
            return Err(ServerError::Failed(why.into()));
        }
        if state.replica.hist().is_none() {
            return Err(StoreError::Empty.into());
        }
        Ok(state.replica.freeze().ok_or(StoreError::Empty)?)
    }

    pub(super) fn unfreeze(&self) {
        lock(&self.state).replica.unfreeze();
    }

    pub(super) fn hand_over(&self, view: &View) -> Result<Handover, ServerError> {
        let store = {
            let mut state = lock(&self.state);
            // From here on the old owner's frames are answered with a refusal.
            state.replica.adopt(view);
            state.replica.freeze();
            state.view = view.clone();
            if let Some(down) = state.down.take() {
                down.close();
            }
            state.store.take().ok_or(StoreError::Empty)?
        };
        Ok(store.hand_over(view.generation)?)
    }

    pub(super) fn greet(&self, frame: &Frame, hello: &Hello, link: &Arc<Link>) -> Greeting {
        let mut state = lock(&self.state);
        let mine = state.replica.generation();
        if frame.generation < mine {
            return Greeting::Refused(mine);
        }
        if frame.generation > mine {
            return Greeting::Later(format!(
                "has not been told of generation {} yet",
                frame.generation
            ));
        }
        if let Some(why) = state.replica.failed() {
            return Greeting::Later(format!("this replica has failed: {why}"));
        }
        match hello.role {
            Role::Update if state.replica.successor().is_some() && state.down.is_none() => {
                Greeting::Later("is not connected to the next replica yet".into())
            }
            Role::Update => {
                state.up = Some(link.clone());
                Greeting::Welcome
            }
            Role::Acks if !state.replica.is_tail() => Greeting::Later("is not the tail".into()),
            Role::Acks if hello.from != state.view.owner => Greeting::Later(format!(
                "{} is not the owner, {} is",
                hello.from, state.view.owner
            )),
            Role::Acks => {
                state.owners.push(link.clone());
                Greeting::Welcome
            }
        }
    }

    pub(super) fn disconnected(&self, link: &Arc<Link>, update: bool) {
        let mut state = lock(&self.state);
        if update {
            if state.up.as_ref().is_some_and(|up| Arc::ptr_eq(up, link)) {
                state.up = None;
            }
        } else {
            state.owners.retain(|l| !Arc::ptr_eq(l, link));
        }
    }

    /// Handles one frame from the predecessor.
    pub(super) fn frame(
        &self,
        shared: &Shared,
        frame: &Frame,
        payload: &[u8],
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        self.busy.store(true, Ordering::Release);
        let mut state = lock(&self.state);
        let result = state.frame(shared, self.vm, frame, payload, link);
        state.replica_heard(shared, frame);
        drop(state);
        self.busy.store(false, Ordering::Release);
        result
    }

    pub(super) fn tick(&self, shared: &Shared) {
        let beat = lock(&self.beat).clone();
        if let Some((down, frame)) = beat {
            // A failure shows on the thread that reads the successor's acks; that one reports it.
            let _ = down.send_if_idle(&frame);
        }
        let Ok(mut state) = self.state.try_lock() else {
            return;
        };
        if self.busy.load(Ordering::Acquire) {
            return;
        }
        let now = shared.started.elapsed().as_millis() as u64;
        if state.up.as_ref().is_some_and(|up| up.has_unread()) {
            // Not silence: this host is late with reading.
            state.replica.heard(now);
        }
        if let Some(Action::Suspect(silence_ms)) = state.replica.tick(now) {
            let _ = shared.events.send(ServerEvent::Suspect {
                vm: self.vm,
                silence_ms,
            });
        }
    }

    /// Connects to the successor in the background, patiently: it may still be creating its image.
    pub(super) fn connect_successor(self: &Arc<Self>, shared: &Arc<Shared>) {
        let (view, next) = {
            let state = lock(&self.state);
            (state.view.clone(), state.replica.successor())
        };
        let Some(member) = next.and_then(|i| view.chain.get(i).cloned()) else {
            return;
        };
        let (slot, host) = (self.clone(), shared.options.host.clone());
        let _ = super::spawn("chain-down", move || {
            let deadline = Instant::now() + SUCCESSOR_PATIENCE;
            while Instant::now() < deadline && slot.follows(view.generation) {
                match greet_peer(member.addr, &view, Role::Update, &host) {
                    Ok((link, stream)) => return slot.successor_up(&view, Arc::new(link), &stream),
                    Err(e) => tracing::debug!("successor {}: {e}", member.host),
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    }

    fn follows(&self, generation: Generation) -> bool {
        let state = lock(&self.state);
        state.replica.generation() == generation && state.store.is_some()
    }

    /// Reads the successor's acks until the connection ends.
    fn successor_up(&self, view: &View, link: Arc<Link>, mut stream: &TcpStream) {
        {
            let mut state = lock(&self.state);
            if state.replica.generation() != view.generation {
                return;
            }
            state.down = Some(link.clone());
            let frame = state.own_frame(Kind::Heartbeat, Epoch::ZERO);
            *lock(&self.beat) = Some((link.clone(), frame));
        }
        let mut payload = Vec::new();
        let why = loop {
            match wire::read(&mut stream, &mut payload) {
                Ok(frame) => {
                    let mut state = lock(&self.state);
                    match frame.kind {
                        Kind::Ack => {
                            let actions = state.replica.ack(frame.generation, frame.epoch);
                            state.carry_out(actions);
                        }
                        Kind::Broken => state.tell_up(Kind::Broken, frame.epoch, &payload),
                        Kind::Refused => {
                            let newer = Frame {
                                generation: frame.generation,
                                ..state.own_frame(Kind::Refused, Epoch::ZERO)
                            };
                            if let Some(up) = &state.up {
                                let _ = up.send(&newer, &[]);
                            }
                        }
                        _ => break format!("it sent an unexpected frame ({:?})", frame.kind),
                    }
                }
                Err(e) => break e.to_string(),
            }
        };
        let mut state = lock(&self.state);
        if state
            .down
            .as_ref()
            .is_some_and(|down| Arc::ptr_eq(down, &link))
        {
            state.lost_successor(&why);
        }
    }
}

/// Connects and greets; succeeds only if the peer is ready in this generation.
pub(crate) fn greet_peer(
    addr: std::net::SocketAddr,
    view: &View,
    role: Role,
    from: &HostId,
) -> Result<(Link, TcpStream), GreetError> {
    let (link, stream) = Link::connect(addr, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let hello = Hello {
        role,
        from: from.clone(),
    };
    let frame = Frame {
        kind: Kind::Hello,
        vm: view.vm,
        generation: view.generation,
        epoch: Epoch::ZERO,
        flags: 0,
    };
    let payload = codec::to_bytes(&hello, HELLO_LIMIT).map_err(io::Error::other)?;
    link.send(&frame, &payload)?;
    let mut answer = Vec::new();
    let frame = wire::read(&mut &stream, &mut answer)?;
    stream.set_read_timeout(None)?;
    match frame.kind {
        Kind::HelloOk => Ok((link, stream)),
        Kind::Refused => Err(GreetError::Refused(frame.generation)),
        Kind::NotReady => Err(GreetError::NotReady(
            String::from_utf8_lossy(&answer).into_owned(),
        )),
        other => Err(GreetError::Wire(WireError::Kind(other as u16))),
    }
}

/// Why a peer does not take a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GreetError {
    #[error("cannot connect: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("not ready: {0}")]
    NotReady(String),
    #[error("follows the newer generation {0}")]
    Refused(Generation),
}

impl State {
    fn own_frame(&self, kind: Kind, epoch: Epoch) -> Frame {
        Frame {
            kind,
            vm: self.view.vm,
            generation: self.replica.generation(),
            epoch,
            flags: 0,
        }
    }

    fn tell_up(&mut self, kind: Kind, epoch: Epoch, payload: &[u8]) {
        let frame = self.own_frame(kind, epoch);
        if let Some(up) = &self.up
            && up.send(&frame, payload).is_err()
        {
            self.up = None;
        }
    }

    fn lost_successor(&mut self, why: &str) {
        let Some(down) = self.down.take() else { return };
        down.close();
        let Some(host) = self
            .replica
            .successor()
            .and_then(|i| self.view.chain.get(i))
            .map(|m| m.host.clone())
        else {
            return;
        };
        tracing::warn!("{}: lost the next replica, {host}: {why}", self.view.name);
        if let Ok(payload) = codec::to_bytes(&(host, why.to_string()), HELLO_LIMIT) {
            self.tell_up(Kind::Broken, Epoch::ZERO, &payload);
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::AckOwner(epoch) => {
                    let frame = self.own_frame(Kind::Ack, epoch);
                    self.owners.retain(|owner| owner.send(&frame, &[]).is_ok());
                }
                Action::AckUp(epoch) => self.tell_up(Kind::Ack, epoch, &[]),
                // The ticker and `fail` report these themselves.
                Action::Suspect(_) | Action::Fail(_) => {}
            }
        }
    }

    fn replica_heard(&mut self, shared: &Shared, frame: &Frame) {
        if frame.generation == self.replica.generation() {
            self.replica
                .heard(shared.started.elapsed().as_millis() as u64);
        }
    }

    fn fail(&mut self, shared: &Shared, vm: VmId, why: &str) -> io::Error {
        self.replica.fail(why);
        tracing::error!("{}: this host's replica has failed: {why}", self.view.name);
        let _ = shared.events.send(ServerEvent::Failed {
            vm,
            why: why.into(),
        });
        if let Ok(payload) =
            codec::to_bytes(&(shared.options.host.clone(), why.to_string()), HELLO_LIMIT)
        {
            self.tell_up(Kind::Broken, Epoch::ZERO, &payload);
        }
        io::Error::other(why.to_string())
    }

    fn frame(
        &mut self,
        shared: &Shared,
        vm: VmId,
        frame: &Frame,
        payload: &[u8],
        link: &Arc<Link>,
    ) -> Result<(), WireError> {
        if frame.vm != vm {
            return Err(io::Error::other(format!(
                "a frame for VM {} on VM {vm}'s connection",
                frame.vm
            ))
            .into());
        }
        let full = frame.flags & FLAG_FULL != 0;
        let verdict = match frame.kind {
            Kind::Begin => self.replica.begin(frame.generation, frame.epoch, full),
            Kind::Pages | Kind::Disk | Kind::Machine | Kind::End => {
                self.replica.data(frame.generation, frame.epoch)
            }
            Kind::Heartbeat => self.replica.heartbeat(frame.generation),
            other => return Err(WireError::Kind(other as u16)),
        };
        match verdict {
            Verdict::Take if frame.kind == Kind::Heartbeat => Ok(()),
            Verdict::Take => {
                // Cut-through: the next replica gets the frame before this one works on it.
                if let Some(down) = self.down.clone()
                    && let Err(e) = down.send(frame, payload)
                {
                    self.lost_successor(&e.to_string());
                }
                match self.take(frame, payload, full) {
                    Ok(None) => Ok(()),
                    Ok(Some(epoch)) => {
                        let actions = self.replica.processed(epoch);
                        self.carry_out(actions);
                        Ok(())
                    }
                    Err(e) => Err(self.fail(shared, vm, &e.to_string()).into()),
                }
            }
            Verdict::Duplicate => {
                if frame.kind == Kind::End {
                    let actions = self.replica.duplicate_end();
                    self.carry_out(actions);
                }
                Ok(())
            }
            Verdict::Refuse(newer) => {
                let refusal = Frame {
                    generation: newer,
                    ..self.own_frame(Kind::Refused, Epoch::ZERO)
                };
                link.send(&refusal, &[])?;
                Ok(())
            }
            Verdict::Fail => {
                let why = self
                    .replica
                    .failed()
                    .unwrap_or("no reason recorded")
                    .to_string();
                Err(self.fail(shared, vm, &why).into())
            }
            Verdict::Drop => Ok(()),
        }
    }

    fn take(
        &mut self,
        frame: &Frame,
        payload: &[u8],
        full: bool,
    ) -> Result<Option<Epoch>, StoreError> {
        let store = self.store.as_mut().ok_or(StoreError::Empty)?;
        match frame.kind {
            Kind::Begin => store.begin(frame.generation, frame.epoch, full)?,
            Kind::Pages => store.pages(payload)?,
            Kind::Disk => store.disk(payload)?,
            Kind::Machine => store.machine(payload)?,
            _ => {
                let end: CheckpointEnd =
                    codec::from_bytes(payload, HELLO_LIMIT).map_err(StoreError::End)?;
                return store.process(frame.generation, &end).map(Some);
            }
        }
        Ok(None)
    }
}
