//! Connects an owner to its chain, configuration after configuration: the client that keeps what is not acknowledged,
//! and the threads that ship, beat and receive acks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use chain::{ChainClient, ClientError, ClientEvent, Connection, LossKind, Mark, View};
use checkpoint::{Epoch, Generation, HostId, VmId};
use vmm::Vm;

use super::protected::Reporter;
use super::proto::FromChild;
use crate::epoch::owner::{Begin, Owner};
use crate::epoch::queue::Blocks;
use crate::epoch::ship::{Link, Shipper};
use crate::epoch::staging::{RamView, Shadow, StagingError};

/// How long a chain that begins anew may take to come up: its replicas create images, mirrors and standbys first.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);
/// How long one that goes on in place may: its replicas are there, and output is held meanwhile.
const GO_ON_PATIENCE: Duration = Duration::from_secs(5);
/// Between attempts.
const RETRY: Duration = Duration::from_millis(5);
/// A commit that takes longer makes the agent look whether all replicas still answer.
const COMMIT_PATIENCE: Duration = Duration::from_millis(150);

/// Keeps an owner's connection to the chain of the newest configuration.
pub struct Protector {
    host: HostId,
    heartbeat: Duration,
    lz4: bool,
    owner: Arc<Owner>,
    vm: Arc<Vm>,
    reporter: Reporter,
    /// The newest configuration; attempts to connect to an older one end.
    newest: Arc<AtomicU64>,
    /// What is being sent, while there is a chain.
    client: Option<Arc<ChainClient>>,
}

impl Protector {
    /// A protector without a chain yet.
    #[must_use]
    pub fn new(
        host: HostId,
        heartbeat: Duration,
        lz4: bool,
        owner: Arc<Owner>,
        vm: Arc<Vm>,
        reporter: Reporter,
    ) -> Self {
        Self {
            host,
            heartbeat,
            lz4,
            owner,
            vm,
            reporter,
            newest: Arc::default(),
            client: None,
        }
    }

    /// The VM resumes from checkpoint `base`, in a configuration whose chain goes on from it: from its first instruction
    /// on everything is held and kept, whether or not the chain is connected yet.
    ///
    /// # Errors
    /// When there is no memory for the shipper, or no thread.
    pub fn resume_from(
        &mut self,
        vm: VmId,
        generation: Generation,
        base: Mark,
    ) -> Result<(), String> {
        let client = Arc::new(ChainClient::new(
            vm,
            self.host.clone(),
            generation,
            Some(base),
            self.keeps(),
        ));
        let shadow = Shadow::unknown(&RamView::new(self.vm.memory())).map_err(text)?;
        let session = self.owner.queue().new_session();
        self.owner.hold();
        self.ship(&client, shadow, session, false)?;
        self.client = Some(client);
        Ok(())
    }

    /// Bytes that may wait for acknowledgements.
    fn keeps(&self) -> usize {
        chain::owner_keeps(RamView::new(self.vm.memory()).bytes() as u64)
    }

    /// Follows `view`: with an empty chain, output flows. A chain that goes on in place is connected to and sent what it
    /// lacks, while output stays held. One that begins anew is synchronised from the beginning.
    pub fn protect(&mut self, view: View) {
        if view.generation.0 <= self.newest.load(Ordering::Acquire) {
            return;
        }
        self.newest.store(view.generation.0, Ordering::Release);
        if view.chain.is_empty() {
            if let Some(client) = self.client.take() {
                client.close();
            }
            self.owner.queue().new_session();
            self.owner.unprotect(view.generation);
            return;
        }
        let attempt = match (&self.client, view.in_place()) {
            (Some(client), true) => {
                self.owner.go_on(view.generation);
                self.attempt(client.clone(), view, None)
            }
            _ => {
                let session = self.owner.queue().new_session();
                let (host, keeps) = (self.host.clone(), self.keeps());
                let client = ChainClient::new(view.vm, host, view.generation, None, keeps);
                let client = Arc::new(client);
                // What waits for acknowledgements of the chain before has nothing to wait for any more.
                if let Some(old) = self.client.replace(client.clone()) {
                    old.close();
                }
                self.attempt(client, view, Some(session))
            }
        };
        // Connecting waits for the replicas; the agent's orders must be heard meanwhile.
        let spawned = std::thread::Builder::new()
            .name("protect".into())
            .spawn(move || attempt.run());
        if let Err(e) = spawned {
            self.reporter
                .send(&FromChild::Fatal(format!("starting a thread: {e}")));
        }
    }

    /// The newest configuration that this process was told.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(self.newest.load(Ordering::Acquire))
    }

    /// Whether there is a chain, of which a replica may take over.
    #[must_use]
    pub fn has_chain(&self) -> bool {
        self.client.is_some()
    }

    /// Stops the guest at the end of an epoch; once that is committed, the head is asked to take over.
    ///
    /// # Errors
    /// When there is no thread to wait.
    pub fn hand_over(&self) -> std::io::Result<()> {
        let (sender, stopped) = channel();
        self.owner.quiesce(sender);
        let (client, reporter) = (self.client.clone(), self.reporter.clone());
        std::thread::Builder::new()
            .name("hand-over".into())
            .spawn(move || {
                let Ok(epoch) = stopped.recv() else { return };
                match client.map(|client| client.yield_at(epoch)) {
                    Some(Ok(())) => reporter.send(&FromChild::HandedOver { epoch }),
                    Some(Err(e)) => tracing::warn!("handing over: {e}"),
                    None => {}
                }
            })
            .map(drop)
    }

    fn attempt(&self, client: Arc<ChainClient>, view: View, anew: Option<u64>) -> Attempt {
        Attempt {
            heartbeat: self.heartbeat,
            lz4: self.lz4,
            owner: self.owner.clone(),
            vm: self.vm.clone(),
            reporter: self.reporter.clone(),
            newest: self.newest.clone(),
            client,
            view,
            anew,
        }
    }

    fn ship(
        &self,
        client: &Arc<ChainClient>,
        shadow: Shadow,
        session: u64,
        first: bool,
    ) -> Result<(), String> {
        let shipper = shipper(&self.owner, client, shadow, self.lz4, first);
        ship(shipper, session, &self.reporter, self.newest.clone())
    }
}

fn text(e: StagingError) -> String {
    e.to_string()
}

fn shipper(
    owner: &Arc<Owner>,
    client: &Arc<ChainClient>,
    shadow: Shadow,
    lz4: bool,
    first: bool,
) -> Shipper {
    let link = Arc::new(ClientLink {
        client: client.clone(),
    });
    Shipper::new(owner.queue(), link, shadow, lz4, first, owner.recorder())
}

/// Ships until the session is over.
fn ship(
    mut shipper: Shipper,
    session: u64,
    reporter: &Reporter,
    newest: Arc<AtomicU64>,
) -> Result<(), String> {
    let reporter = reporter.clone();
    spawn("ship", move || {
        if let Err(e) = shipper.run(session) {
            reporter.send(&FromChild::ChainLost {
                generation: Generation(newest.load(Ordering::Acquire)),
                host: None,
                why: e.to_string(),
                unfit: true,
            });
        }
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
        .map_err(|e| format!("starting a thread: {e}"))
}

/// Connecting to one configuration's chain.
struct Attempt {
    heartbeat: Duration,
    lz4: bool,
    owner: Arc<Owner>,
    vm: Arc<Vm>,
    reporter: Reporter,
    newest: Arc<AtomicU64>,
    client: Arc<ChainClient>,
    view: View,
    /// The chain begins anew, in this session of the queue.
    anew: Option<u64>,
}

/// Why a chain could not be used.
struct Trouble {
    host: Option<HostId>,
    why: String,
    /// It cannot go on from what it holds.
    unfit: bool,
}

impl From<String> for Trouble {
    fn from(why: String) -> Self {
        Self {
            host: None,
            why,
            unfit: false,
        }
    }
}

impl Attempt {
    fn run(self) {
        if let Err(trouble) = self.connect() {
            self.lost(trouble);
        }
    }

    fn lost(&self, trouble: Trouble) {
        lost(&self.reporter, self.view.generation, trouble);
    }

    fn connect(&self) -> Result<(), Trouble> {
        let begun = Instant::now();
        let patience = match self.anew {
            Some(_) => CONNECT_PATIENCE,
            None => GO_ON_PATIENCE,
        };
        let deadline = begun + patience;
        let connection = loop {
            if self.newest.load(Ordering::Acquire) != self.view.generation.0 {
                return Ok(());
            }
            match self.client.connect(&self.view) {
                Ok(connection) => break connection,
                Err(e @ ClientError::Refused { generation, .. }) => {
                    tracing::debug!("{e}");
                    self.reporter.send(&FromChild::Refused { generation });
                    return Ok(());
                }
                Err(ClientError::Unfit { ref host, .. }) if Instant::now() >= deadline => {
                    return Err(Trouble {
                        host: Some(host.clone()),
                        why: "it cannot go on from what it holds".into(),
                        unfit: true,
                    });
                }
                Err(ClientError::Peer {
                    host, addr, why, ..
                }) if Instant::now() >= deadline => {
                    return Err(Trouble {
                        host: Some(host),
                        why: format!("{addr}: {why}"),
                        unfit: false,
                    });
                }
                Err(e) if Instant::now() >= deadline => return Err(e.to_string().into()),
                Err(e) => {
                    tracing::debug!("chain not ready: {e}");
                    std::thread::sleep(RETRY);
                }
            }
        };
        self.listen(&connection)?;
        match self.anew {
            Some(session) => {
                let shadow = Shadow::new(&RamView::new(self.vm.memory())).map_err(text)?;
                let shipper = shipper(&self.owner, &self.client, shadow, self.lz4, true);
                ship(shipper, session, &self.reporter, self.newest.clone())?;
                self.owner.begin(Begin {
                    generation: self.view.generation,
                });
            }
            None => self.reporter.send(&FromChild::Protected {
                generation: self.view.generation,
                epoch: self.owner.committed(),
                sync_ms: begun.elapsed().as_millis() as u64,
                sync: None,
            }),
        }
        Ok(())
    }

    /// Starts the threads that beat and that hear what the chain says.
    fn listen(&self, connection: &Arc<Connection>) -> Result<(), Trouble> {
        spawn("heartbeat", {
            let (connection, owner) = (connection.clone(), self.owner.clone());
            let (reporter, heartbeat) = (self.reporter.clone(), self.heartbeat);
            move || beat(&connection, &owner, &reporter, heartbeat)
        })?;
        spawn("acks", {
            let (connection, owner) = (connection.clone(), self.owner.clone());
            let reporter = self.reporter.clone();
            move || {
                while let Some(event) = connection.next_event() {
                    if !hear(event, &owner, &reporter) {
                        return;
                    }
                }
            }
        })?;
        Ok(())
    }
}

fn lost(reporter: &Reporter, generation: Generation, trouble: Trouble) {
    reporter.send(&FromChild::ChainLost {
        generation,
        host: trouble.host,
        why: trouble.why,
        unfit: trouble.unfit,
    });
}

fn beat(connection: &Connection, owner: &Owner, reporter: &Reporter, heartbeat: Duration) {
    chain::urgent_thread();
    let mut reported = Instant::now();
    while connection.heartbeat().is_ok() {
        std::thread::sleep(heartbeat);
        // A backup that lost power closes no connection: only the missing commits show it.
        if let Some(waited) = owner.waiting_for_commit().filter(|w| *w > COMMIT_PATIENCE)
            && reported.elapsed() > COMMIT_PATIENCE
        {
            reported = Instant::now();
            let why = format!("no commit for {} ms", waited.as_millis());
            lost(reporter, connection.generation(), why.into());
        }
    }
}

/// Acts on what the chain says; false once there is nothing more to hear.
fn hear(event: ClientEvent, owner: &Owner, reporter: &Reporter) -> bool {
    match event {
        ClientEvent::Ack { epoch, generation } => {
            if let Err(e) = owner.ack(generation, epoch) {
                reporter.send(&FromChild::Fatal(e.to_string()));
                owner.fence();
            }
        }
        ClientEvent::Compared {
            generation,
            epoch,
            answer,
        } => owner.compared(generation, epoch, answer),
        ClientEvent::Refused { generation } => reporter.send(&FromChild::Refused { generation }),
        ClientEvent::JoinerReady { generation } => {
            reporter.send(&FromChild::JoinerReady { generation });
        }
        ClientEvent::Lost(loss) => {
            let trouble = Trouble {
                host: loss.host,
                why: loss.why,
                unfit: loss.kind == LossKind::Unfit,
            };
            lost(reporter, loss.generation, trouble);
            return false;
        }
    }
    true
}

/// The chain's client as the shipper's link.
struct ClientLink {
    client: Arc<ChainClient>,
}

impl Link for ClientLink {
    fn begin(&self, epoch: Epoch, full: bool, held: bool) -> Result<(), String> {
        let begun = match full {
            true => self.client.begin_over(epoch),
            false => self.client.begin(epoch, false, held),
        };
        begun.map_err(|e| e.to_string())
    }
    fn compare(&self, _: Epoch, blocks: &Blocks) -> Result<(), String> {
        let Blocks {
            disk,
            first,
            digests,
        } = blocks;
        self.client
            .compare(*disk, *first, digests)
            .map_err(|e| e.to_string())
    }
    fn pages(&self, _: Epoch, records: &[u8]) -> Result<(), String> {
        self.client.pages(records).map_err(|e| e.to_string())
    }
    fn disk(&self, _: Epoch, records: &[u8]) -> Result<(), String> {
        self.client.disk(records).map_err(|e| e.to_string())
    }
    fn machine(&self, _: Epoch, state: &[u8]) -> Result<(), String> {
        self.client.machine(state).map_err(|e| e.to_string())
    }
    fn end(&self, _: Epoch) -> Result<(), String> {
        self.client.end().map_err(|e| e.to_string())
    }
}
