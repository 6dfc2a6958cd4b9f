//! The chain server of one host: replicas of many VMs, driven by frames from their predecessors.

mod board;
mod connection;
mod env;
mod joiner;
mod pulses;
mod registry;
mod slot;
mod state;
mod successor;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use checkpoint::{Epoch, Generation, VmId};

use crate::mark::Mark;
use crate::store::{self, ReplicaStore, Rewound, StoreOptions};
use crate::view::{View, VmShape};
use env::{Env, spawn};
pub use env::{Handover, ReplicaStatus, ServerError, ServerEvent, ServerOptions};
use registry::{CONNECTIONS_MAX, Registry};
use slot::Slot;
use state::End;

const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The server. Dropping it stops accepting; the process's end closes what is open.
pub struct ReplicaServer {
    registry: Arc<Registry>,
    addr: SocketAddr,
}

/// Takes connections and serves each on a thread of its own.
fn accept(registry: &Arc<Registry>, listener: &TcpListener) {
    // Whoever asks whether this host is alive would take a late answer for none: each connection is greeted urgently.
    let _urgent = crate::urgent::urgent_section_with_threads();
    for stream in listener.incoming() {
        if registry.is_stopping() {
            return;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                // Out of descriptors, most likely: trying again at once would only burn the processor.
                tracing::warn!("chain server: accepting a connection: {e}");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if !registry.connected() {
            tracing::warn!(
                "chain server: {CONNECTIONS_MAX} connections are open; refused one more"
            );
            continue;
        }
        let serving = registry.clone();
        let served = spawn("chain-conn", move || {
            connection::serve(&serving, &stream);
            serving.hung_up();
        });
        if served.is_err() {
            registry.hung_up();
        }
    }
}

/// Lets the time of every replica pass.
fn tick(registry: &Registry) {
    crate::urgent::urgent_thread();
    while !registry.is_stopping() {
        std::thread::sleep(registry.env.options.heartbeat);
        for slot in registry.all() {
            slot.tick(&registry.env);
        }
    }
}

impl ReplicaServer {
    /// Listens on `addr` (port 0: any); what happens goes to `events`.
    ///
    /// # Errors
    /// [`ServerError::Bind`] naming the address.
    pub fn bind(
        addr: SocketAddr,
        options: ServerOptions,
        events: Sender<ServerEvent>,
    ) -> Result<Self, ServerError> {
        let (listener, datagrams) = pulses::bind(addr)?;
        let addr = listener
            .local_addr()
            .map_err(|source| ServerError::Bind { addr, source })?;
        let registry = Arc::new(Registry::new(Arc::new(Env::new(options, events))));
        let accepting = registry.clone();
        spawn("chain-accept", move || accept(&accepting, &listener))?;
        if let Some(socket) = datagrams {
            pulses::listen(registry.clone(), socket)?;
        }
        let ticking = registry.clone();
        spawn("chain-tick", move || tick(&ticking))?;
        Ok(Self { registry, addr })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Makes an empty replica for `view`, of which this host is a member; returns its RAM files for the standby.
    ///
    /// # Errors
    /// [`ServerError::Store`] when image or mirrors cannot be made, [`ServerError::Name`].
    pub fn create(
        &self,
        view: View,
        shape: VmShape,
        options: impl Into<StoreOptions>,
    ) -> Result<Vec<OwnedFd>, ServerError> {
        let dir = self.make_way(&view)?;
        let (store, fds) = store::create(&dir, view.vm, shape, options.into())?;
        self.create_with(view, store);
        Ok(fds)
    }

    /// As [`ReplicaServer::create`], for a member that was down: with what its disk still has, if that is a complete
    /// checkpoint of the VM's history; it is returned then.
    ///
    /// # Errors
    /// As [`ReplicaServer::create`]; [`StoreError`] also if what is there is damaged.
    pub fn reopen(
        &self,
        view: View,
        shape: VmShape,
        options: impl Into<StoreOptions>,
    ) -> Result<(Vec<OwnedFd>, Option<Mark>), ServerError> {
        let dir = self.make_way(&view)?;
        let (store, fds) = store::reopen(&dir, view.vm, shape, options.into())?;
        let holds = store.holds().filter(|mark| view.history.contains(*mark));
        self.create_with(view, store);
        Ok((fds, holds))
    }

    /// The directory for the VM's replica, free to be used.
    fn make_way(&self, view: &View) -> Result<PathBuf, ServerError> {
        let mut parts = Path::new(&view.name).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(ServerError::Name(view.name.clone()));
        }
        // A replica that is replaced gives up its lock on the directory first.
        if let Some(old) = self.registry.take(view.vm)
            && !old.end(End::Closed)
        {
            return Err(ServerError::Hangs(view.name.clone()));
        }
        Ok(self.registry.env.options.data_dir.join(&view.name))
    }

    /// As [`ReplicaServer::create`], with a store of the caller's.
    pub fn create_with(&self, view: View, store: Box<dyn ReplicaStore>) {
        let vm = view.vm;
        let slot = Slot::new(&self.registry.env.options, view, store);
        if let Some(old) = self.registry.insert(vm, slot.clone()) {
            old.end(End::Closed);
        }
        successor::connect(&slot, &self.registry.env);
    }

    /// Follows a newer configuration in which this host is still a member. Told again, it changes nothing.
    ///
    /// # Errors
    /// [`ServerError::Unknown`]; [`ServerError::Busy`] if its disk hangs.
    pub fn adopt(&self, view: View) -> Result<(), ServerError> {
        let slot = self.registry.slot(view.vm)?;
        if slot.adopt(view)? {
            successor::connect(&slot, &self.registry.env);
        }
        Ok(())
    }

    /// This host is no member any more: the replica goes, and whoever still speaks of it is refused.
    pub fn remove(&self, vm: VmId, generation: Generation) {
        self.registry.refuse(vm, generation);
        if let Some(slot) = self.registry.take(vm) {
            slot.end(End::Retired(generation));
        }
    }

    /// As [`ReplicaServer::remove`], but this host should have a replica: whoever asks for it in this generation is told at
    /// once that there will be none, and why.
    pub fn decline(&self, vm: VmId, generation: Generation, why: String) {
        self.registry.decline(vm, generation, why);
        self.remove(vm, generation);
    }

    /// Copies a checkpoint of the past out, its disks into `dir`. The replica goes on meanwhile.
    ///
    /// # Errors
    /// [`ServerError::Unknown`]; [`StoreError`] if that checkpoint is not kept, or cannot be copied.
    pub fn rewind(
        &self,
        vm: VmId,
        shape: &VmShape,
        epoch: Epoch,
        dir: &Path,
    ) -> Result<Rewound, ServerError> {
        self.registry.slot(vm)?.rewind(shape, epoch, dir)
    }

    /// Before asking the master for ownership: from here on nothing is accepted, forwarded or acknowledged, so that
    /// what the tail ever acks is contained in what this replica has (invariants I2 and I5).
    ///
    /// # Errors
    /// [`ServerError::Unknown`]; [`ServerError::Failed`], [`ServerError::Joining`], [`ServerError::Busy`] or [`StoreError::Empty`] if there is
    /// nothing to resume from.
    pub fn freeze(&self, vm: VmId) -> Result<Mark, ServerError> {
        self.registry.slot(vm)?.freeze()
    }

    /// The master refused and nothing has changed.
    ///
    /// # Errors
    /// [`ServerError::Unknown`]; [`ServerError::Busy`] if its disk hangs.
    pub fn unfreeze(&self, vm: VmId) -> Result<(), ServerError> {
        let slot = self.registry.slot(vm)?;
        slot.unfreeze(&self.registry.env)
    }

    /// The master gave this host the VM in `view`: takes the replica apart and hands its state over.
    ///
    /// # Errors
    /// [`ServerError`]; the replica is gone then too, as it cannot be trusted.
    pub fn hand_over(&self, view: &View) -> Result<Handover, ServerError> {
        let slot = self.registry.slot(view.vm)?;
        self.registry.refuse(view.vm, view.generation);
        drop(self.registry.take(view.vm));
        slot.hand_over(view)
    }

    /// The replica of `vm`, if there is one, as it has noted itself to be. Never waits, whatever the replica is doing.
    #[must_use]
    pub fn status(&self, vm: VmId) -> Option<ReplicaStatus> {
        let slot = self.registry.find(vm)?;
        Some(slot.board.status(self.registry.env.now_ms()))
    }
}

impl Drop for ReplicaServer {
    fn drop(&mut self) {
        self.registry.stop();
        // Wakes the accepting thread, so that the port is free again.
        let _ = std::net::TcpStream::connect_timeout(&self.addr, Duration::from_millis(200));
        if let Ok(socket) = std::net::UdpSocket::bind((self.addr.ip(), 0)) {
            let _ = socket.send_to(&[], self.addr);
        }
        for slot in self.registry.take_all() {
            slot.end(End::Closed);
        }
    }
}
