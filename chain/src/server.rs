//! The chain server of one host: replicas of many VMs, driven by frames from their predecessors.

mod connection;
mod joiner;
mod slot;
mod state;
mod successor;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::{Epoch, Generation, HostId, VmId};

use crate::mark::Mark;
use crate::replica::State;
use crate::store::{self, Filled, Handover, ReplicaStore, Rewound, StoreError, StoreOptions};
use crate::view::{View, VmShape};
use slot::Slot;
pub(crate) use successor::{GreetError, Greeted, greet};

/// Settings of a chain server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// This host.
    pub host: HostId,
    /// Mirrors, activation records and logs go below this directory.
    pub data_dir: PathBuf,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Heartbeats' time of silence before a predecessor is suspected.
    pub missed: u32,
}

/// What the server tells its agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEvent {
    /// Silence on a VM's checkpoint stream.
    Suspect {
        /// The VM.
        vm: VmId,
        /// How long, in milliseconds; 0: the owner has stopped the VM and yields it.
        silence_ms: u64,
    },
    /// A replica has declared itself failed.
    Failed {
        /// The VM.
        vm: VmId,
        /// Why.
        why: String,
    },
}

/// Why the server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address is taken or not ours.
    #[error(
        "chain server: cannot listen on {addr}: {source} (is another agent running, or is `listen` in host.toml not an address of this host?)"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("chain server: starting a thread: {0}")]
    Thread(io::Error),
    /// No replica of that VM is here.
    #[error("this host holds no replica of VM {0}")]
    Unknown(VmId),
    /// The replica has declared itself failed.
    #[error("this host's replica has failed: {0}")]
    Failed(String),
    /// The replica is still joining.
    #[error("{0}")]
    Joining(String),
    /// A name that cannot be a directory's.
    #[error("a VM cannot be named {0:?}: its disks' directory bears that name")]
    Name(String),
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One replica, for `status`.
#[derive(Clone, Debug)]
pub struct ReplicaStatus {
    /// The configuration followed.
    pub view: View,
    /// Where it stands.
    pub state: State,
    /// Newest processed checkpoint; none while synchronising.
    pub epoch: Option<Epoch>,
    /// Newest checkpoint that the tail is known to have.
    pub acked: Option<Epoch>,
    /// Why it failed, if it has.
    pub failed: Option<String>,
    /// How far it has filled a joining replica, while it does.
    pub filling: Option<Filled>,
    /// How the last one went that it has filled.
    pub filled: Option<Filled>,
}

struct Shared {
    options: ServerOptions,
    slots: Mutex<HashMap<VmId, Arc<Slot>>>,
    /// VMs once held here: their old owners are refused, not put off.
    gone: Mutex<HashMap<VmId, Generation>>,
    /// Why this host cannot hold a replica that it should.
    declined: Mutex<HashMap<VmId, String>>,
    events: Sender<ServerEvent>,
    started: Instant,
    connections: AtomicUsize,
    stop: AtomicBool,
}

/// Connections served at a time, each with a thread and a frame's buffer.
const CONNECTIONS_MAX: usize = 512;
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The server. Dropping it stops accepting; the process's end closes what is open.
pub struct ReplicaServer {
    shared: Arc<Shared>,
    addr: SocketAddr,
}

impl Shared {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let listener =
            TcpListener::bind(addr).map_err(|source| ServerError::Bind { addr, source })?;
        let addr = listener
            .local_addr()
            .map_err(|source| ServerError::Bind { addr, source })?;
        let shared = Arc::new(Shared {
            options,
            slots: Mutex::default(),
            gone: Mutex::default(),
            declined: Mutex::default(),
            events,
            started: Instant::now(),
            connections: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        spawn("chain-accept", move || {
            for stream in listener.incoming() {
                if accepting.stop.load(Ordering::Relaxed) {
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
                if accepting.connections.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
                    tracing::warn!(
                        "chain server: {CONNECTIONS_MAX} connections are open; refused one more"
                    );
                    continue;
                }
                accepting.connections.fetch_add(1, Ordering::Relaxed);
                let shared = accepting.clone();
                let served = spawn("chain-conn", move || {
                    connection::serve(&shared, &stream);
                    shared.connections.fetch_sub(1, Ordering::Relaxed);
                });
                if served.is_err() {
                    accepting.connections.fetch_sub(1, Ordering::Relaxed);
                }
            }
        })?;
        let ticking = shared.clone();
        spawn("chain-tick", move || {
            crate::urgent::urgent_thread();
            while !ticking.stop.load(Ordering::Relaxed) {
                std::thread::sleep(ticking.options.heartbeat);
                let slots: Vec<Arc<Slot>> = lock(&ticking.slots).values().cloned().collect();
                for slot in slots {
                    slot.tick(&ticking);
                }
            }
        })?;
        Ok(Self { shared, addr })
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
        let old = lock(&self.shared.slots).remove(&view.vm);
        if let Some(old) = old {
            old.close();
        }
        Ok(self.shared.options.data_dir.join(&view.name))
    }

    /// As [`ReplicaServer::create`], with a store of the caller's.
    pub fn create_with(&self, view: View, store: Box<dyn ReplicaStore>) {
        let vm = view.vm;
        let slot = Slot::new(&self.shared.options, view, store);
        lock(&self.shared.declined).remove(&vm);
        let old = lock(&self.shared.slots).insert(vm, slot.clone());
        if let Some(old) = old {
            old.close();
        }
        successor::connect(&slot, &self.shared);
    }

    fn slot(&self, vm: VmId) -> Result<Arc<Slot>, ServerError> {
        lock(&self.shared.slots)
            .get(&vm)
            .cloned()
            .ok_or(ServerError::Unknown(vm))
    }

    /// Follows a newer configuration in which this host is still a member. Told again, it changes nothing.
    ///
    /// # Errors
    /// [`ServerError::Unknown`].
    pub fn adopt(&self, view: View) -> Result<(), ServerError> {
        let slot = self.slot(view.vm)?;
        if slot.adopt(view) {
            successor::connect(&slot, &self.shared);
        }
        Ok(())
    }

    /// This host is no member any more: the replica goes, and whoever still speaks of it is refused.
    pub fn remove(&self, vm: VmId, generation: Generation) {
        if let Some(slot) = lock(&self.shared.slots).remove(&vm) {
            slot.retire(generation);
        }
        lock(&self.shared.gone).insert(vm, generation);
    }

    /// As [`ReplicaServer::remove`], but this host should have a replica: whoever asks for it is told why there is none.
    pub fn decline(&self, vm: VmId, generation: Generation, why: String) {
        self.remove(vm, generation);
        lock(&self.shared.declined).insert(vm, why);
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
        self.slot(vm)?.rewind(shape, epoch, dir)
    }

    /// Before asking the master for ownership: from here on nothing is accepted, forwarded or acknowledged, so that
    /// what the tail ever acks is contained in what this replica has (invariants I2 and I5).
    ///
    /// # Errors
    /// [`ServerError::Unknown`]; [`ServerError::Failed`], [`ServerError::Joining`] or [`StoreError::Empty`] if there is
    /// nothing to resume from.
    pub fn freeze(&self, vm: VmId) -> Result<Mark, ServerError> {
        self.slot(vm)?.freeze()
    }

    /// The master refused and nothing has changed.
    ///
    /// # Errors
    /// [`ServerError::Unknown`].
    pub fn unfreeze(&self, vm: VmId) -> Result<(), ServerError> {
        self.slot(vm)?.unfreeze(&self.shared);
        Ok(())
    }

    /// The master gave this host the VM in `view`: takes the replica apart and hands its state over.
    ///
    /// # Errors
    /// [`ServerError`]; the replica is gone then too, as it cannot be trusted.
    pub fn hand_over(&self, view: &View) -> Result<Handover, ServerError> {
        let slot = self.slot(view.vm)?;
        lock(&self.shared.gone).insert(view.vm, view.generation);
        lock(&self.shared.slots).remove(&view.vm);
        slot.hand_over(view)
    }

    /// The replica of `vm`, if there is one.
    #[must_use]
    pub fn status(&self, vm: VmId) -> Option<ReplicaStatus> {
        self.slot(vm).ok().map(|slot| slot.status())
    }
}

impl Drop for ReplicaServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, so that the port is free again.
        let _ = std::net::TcpStream::connect_timeout(&self.addr, Duration::from_millis(200));
        for (_, slot) in lock(&self.shared.slots).drain() {
            slot.close();
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), ServerError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
        .map_err(ServerError::Thread)
}
