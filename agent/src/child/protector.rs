//! Connects an owner to its chain, configuration after configuration: the client that keeps what is not acknowledged,
//! and the threads that ship, beat and receive acks.

mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use chain::{ChainClient, ClientError, ClientEvent, Connection, LossKind, Mark, View};
use checkpoint::{Epoch, Generation, HostId, VmId};

use super::protected::Reporter;
use super::proto::FromChild;
use crate::control::EventKind;
use crate::epoch::owner::{OnEvent, Owner, OwnerError, OwnerEvent};
use crate::epoch::queue::Blocks;
use crate::epoch::ship::{Link, ShipError, Shipper};
use crate::epoch::staging::{RamView, Shadow, StagingError};
use watch::{Seen, Watch};

/// How long a chain that begins anew may take to come up: its replicas create images, mirrors and standbys first.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);
/// How long one that goes on in place may: its replicas are there, and output is held meanwhile.
const GO_ON_PATIENCE: Duration = Duration::from_secs(5);
/// Between attempts.
const RETRY: Duration = Duration::from_millis(5);

/// How an owner is heard, and how patient it is in turn.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// Between two signs of life.
    pub heartbeat: Duration,
    /// Silence after which a host is suspected.
    pub silence: Duration,
}

/// Keeps an owner's connection to the chain of the newest configuration.
pub struct Protector {
    host: HostId,
    rhythm: Rhythm,
    lz4: bool,
    owner: Arc<Owner>,
    reporter: Reporter,
    /// The newest configuration; attempts to connect to an older one end.
    newest: Arc<AtomicU64>,
    /// What is being sent, while there is a chain.
    sending: Option<Sending>,
    /// The generation whose last backup was lost: the guest stands still from then on.
    frozen: Option<Generation>,
}

/// Checkpoints on their way to a chain, from its beginning on, through the configurations in which it goes on in place.
#[derive(Clone)]
struct Sending {
    client: Arc<ChainClient>,
    /// Of the queue.
    session: u64,
    /// The newest of these configurations.
    generation: Arc<AtomicU64>,
}

impl Protector {
    /// A protector without a chain yet.
    #[must_use]
    pub fn new(
        host: HostId,
        rhythm: Rhythm,
        lz4: bool,
        owner: Arc<Owner>,
        reporter: Reporter,
    ) -> Self {
        Self {
            host,
            rhythm,
            lz4,
            owner,
            reporter,
            frozen: None,
            newest: Arc::default(),
            sending: None,
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
        let keeps = self.keeps();
        let client = ChainClient::new(vm, self.host.clone(), generation, Some(base), keeps);
        let shadow = Shadow::unknown(&RamView::new(self.owner.guest().memory())).map_err(text)?;
        let sending = self.sending(client, generation);
        self.owner.hold(sending.session);
        let shipper = shipper(&self.owner, &sending, shadow, self.lz4, false);
        ship(shipper, &sending, None, &self.owner, &self.reporter)?;
        self.sending = Some(sending);
        Ok(())
    }

    fn sending(&self, client: ChainClient, generation: Generation) -> Sending {
        Sending {
            client: Arc::new(client),
            session: self.owner.queue().new_session(),
            generation: Arc::new(AtomicU64::new(generation.0)),
        }
    }

    /// Bytes that may wait for acknowledgements.
    fn keeps(&self) -> usize {
        let ram = RamView::new(self.owner.guest().memory());
        chain::owner_keeps(ram.bytes() as u64)
    }

    /// Follows `view`: with an empty chain, output flows. A chain that goes on in place is connected to and sent what it
    /// lacks, while output stays held. One that begins anew is synchronised from the beginning.
    pub fn protect(&mut self, view: View) {
        if view.generation.0 <= self.newest.load(Ordering::Acquire) {
            return;
        }
        self.newest.store(view.generation.0, Ordering::Release);
        if view.chain.is_empty() {
            self.frozen = None;
            // First, so that the shipper's end is no failure.
            self.owner.queue().new_session();
            if let Some(old) = self.sending.take() {
                old.client.close();
            }
            self.owner.unprotect(view.generation);
            return;
        }
        let generation = view.generation;
        let (sending, anew) = match &self.sending {
            Some(sending) if view.in_place() => {
                sending.generation.store(generation.0, Ordering::Release);
                self.owner.go_on(generation);
                let filled = self.reporter.protected() >= Some(view.history.since);
                if filled && self.frozen.take().is_some() {
                    self.owner.thaw();
                }
                (sending.clone(), false)
            }
            _ => {
                let (host, keeps) = (self.host.clone(), self.keeps());
                let client = ChainClient::new(view.vm, host, generation, None, keeps);
                let sending = self.sending(client, generation);
                // What waits for acknowledgements of the chain before has nothing to wait for any more.
                if let Some(old) = &self.sending {
                    old.client.close();
                }
                (sending, true)
            }
        };
        self.sending = Some(sending.clone());
        let attempt = Attempt {
            rhythm: self.rhythm,
            lz4: self.lz4,
            owner: self.owner.clone(),
            reporter: self.reporter.clone(),
            newest: self.newest.clone(),
            sending,
            view,
            anew,
        };
        // Connecting waits for the replicas; the agent's orders must be heard meanwhile.
        let (owner, reporter) = (self.owner.clone(), self.reporter.clone());
        if let Err(why) = spawn("protect", move || attempt.run()) {
            cannot(&owner, &reporter, generation, why, anew);
        }
    }

    /// The last backup is lost: the guest stands still until another chain has it, or until it is to run alone.
    pub fn freeze(&mut self) {
        self.frozen = Some(self.generation());
        self.owner.freeze();
    }

    /// The generation whose last backup is lost, if the guest stands still since then.
    #[must_use]
    pub fn frozen(&self) -> Option<Generation> {
        let protected = self.reporter.protected();
        self.frozen
            .filter(|frozen| protected.is_none_or(|of| of <= *frozen))
    }

    /// The newest configuration that this process was told.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(self.newest.load(Ordering::Acquire))
    }

    /// Whether there is a chain, of which a replica may take over.
    #[must_use]
    pub fn has_chain(&self) -> bool {
        self.sending.is_some()
    }

    /// Stops the guest at the end of an epoch; once that is committed, the head is asked to take over.
    ///
    /// # Errors
    /// When there is no thread to wait.
    pub fn hand_over(&self) -> std::io::Result<()> {
        let (sender, stopped) = channel();
        self.owner.quiesce(sender);
        let (sending, reporter) = (self.sending.clone(), self.reporter.clone());
        std::thread::Builder::new()
            .name("hand-over".into())
            .spawn(move || {
                let Ok(epoch) = stopped.recv() else { return };
                match sending.map(|sending| sending.client.yield_at(epoch)) {
                    Some(Ok(())) => reporter.send(&FromChild::HandedOver { epoch }),
                    Some(Err(e)) => tracing::warn!("handing over: {e}"),
                    None => {}
                }
            })
            .map(drop)
    }
}

/// Turns what an owner says into reports to the agent.
pub fn report(reporter: Reporter) -> OnEvent {
    Box::new(move |event| match event {
        OwnerEvent::Protected {
            generation,
            epoch,
            took,
            sync,
        } => reporter.send(&FromChild::Protected {
            generation,
            epoch,
            sync_ms: took.as_millis() as u64,
            sync: Some(sync),
        }),
        OwnerEvent::AttemptFailed { generation, error } => {
            let why = error.to_string();
            if matches!(error, OwnerError::Disk { .. }) {
                reporter.send(&FromChild::Said {
                    kind: EventKind::DiskTrouble,
                    text: format!("not protected: {why}"),
                });
            }
            reporter.send(&FromChild::AttemptFailed { generation, why });
        }
        OwnerEvent::GaveUp { why } => reporter.send(&FromChild::GiveUp { why }),
    })
}

/// Something of this host's own keeps it from following a configuration: a thread cannot be started, say.
fn cannot(owner: &Owner, reporter: &Reporter, generation: Generation, why: String, anew: bool) {
    match anew {
        true => reporter.send(&FromChild::AttemptFailed { generation, why }),
        // Its output is held, and nobody would ever let it out.
        false => owner.give_up(why),
    }
}

fn text(e: StagingError) -> String {
    e.to_string()
}

fn shipper(
    owner: &Arc<Owner>,
    sending: &Sending,
    shadow: Shadow,
    lz4: bool,
    first: bool,
) -> Shipper {
    let link = Arc::new(ClientLink {
        client: sending.client.clone(),
    });
    Shipper::new(owner.queue(), link, shadow, lz4, first, owner.measures())
}

/// Ships until the session is over. `head` is blamed if a chain that begins cannot be sent to.
fn ship(
    mut shipper: Shipper,
    sending: &Sending,
    head: Option<HostId>,
    owner: &Arc<Owner>,
    reporter: &Reporter,
) -> Result<(), String> {
    let (session, newest) = (sending.session, sending.generation.clone());
    let (owner, reporter) = (owner.clone(), reporter.clone());
    spawn("ship", move || {
        let Err(error) = shipper.run(session) else {
            return;
        };
        if !owner.queue().is_current(session) {
            return;
        }
        // Of its own chain: a newer one that begins has another.
        let generation = Generation(newest.load(Ordering::Acquire));
        shipping_failed(&owner, &reporter, generation, head, &error);
        owner.queue().end_session(session);
    })
}

/// A chain that is slow makes the shipper wait; this is a chain that cannot be sent to, or a mistake of this host's.
fn shipping_failed(
    owner: &Owner,
    reporter: &Reporter,
    generation: Generation,
    head: Option<HostId>,
    error: &ShipError,
) {
    let why = error.to_string();
    if let ShipError::Unnoticed(_) = error {
        tracing::error!("{why}");
        let trouble = Trouble {
            unfit: true,
            host: None,
            why,
        };
        return lost(reporter, generation, trouble);
    }
    if owner.is_current(generation) && owner.is_protected() {
        return owner.give_up(why);
    }
    owner.abandon(generation);
    match error {
        ShipError::Link(_) => lost(
            reporter,
            generation,
            Trouble {
                unfit: head.is_none(),
                host: head,
                why,
            },
        ),
        ShipError::Staging(_) | ShipError::Machine(_) | ShipError::Unnoticed(_) => {
            reporter.send(&FromChild::AttemptFailed { generation, why });
        }
    }
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
    rhythm: Rhythm,
    lz4: bool,
    owner: Arc<Owner>,
    reporter: Reporter,
    newest: Arc<AtomicU64>,
    sending: Sending,
    view: View,
    /// The chain begins anew.
    anew: bool,
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

/// Why a configuration could not be followed.
enum Failure {
    /// The chain.
    Chain(Trouble),
    /// This host.
    Own(String),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Chain(trouble)
    }
}

impl Attempt {
    fn run(self) {
        let generation = self.view.generation;
        match self.connect() {
            Ok(()) => {}
            Err(Failure::Chain(trouble)) => lost(&self.reporter, generation, trouble),
            Err(Failure::Own(why)) => {
                cannot(&self.owner, &self.reporter, generation, why, self.anew);
            }
        }
    }

    fn connect(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        let Some(connection) = self.reach(begun)? else {
            return Ok(());
        };
        self.listen(&connection).map_err(Failure::Own)?;
        if self.anew {
            self.begin().map_err(Failure::Own)?;
        } else if !self.owner.begins() {
            // One that begins is protected with its first checkpoint that counts; a resumed one, whose loop may not have
            // begun yet, is held from its first instruction on.
            self.reporter.send(&FromChild::Protected {
                generation: self.view.generation,
                epoch: self.owner.committed(),
                sync_ms: begun.elapsed().as_millis() as u64,
                sync: None,
            });
        }
        Ok(())
    }

    /// Connects to the chain, trying again while its replicas are not ready. `None`: a newer configuration is in force.
    fn reach(&self, begun: Instant) -> Result<Option<Arc<Connection>>, Trouble> {
        let patience = match self.anew {
            true => CONNECT_PATIENCE,
            false => GO_ON_PATIENCE,
        };
        let deadline = begun + patience;
        loop {
            if self.newest.load(Ordering::Acquire) != self.view.generation.0 {
                return Ok(None);
            }
            match self.sending.client.connect(&self.view) {
                Ok(connection) => return Ok(Some(connection)),
                Err(e @ ClientError::Refused { generation, .. }) => {
                    tracing::debug!("{e}");
                    self.reporter.send(&FromChild::Refused { generation });
                    return Ok(None);
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
        }
    }

    fn head(&self) -> Option<HostId> {
        self.view.chain.first().map(|member| member.host.clone())
    }

    fn begin(&self) -> Result<(), String> {
        let view = RamView::new(self.owner.guest().memory());
        let shadow = Shadow::new(&view).map_err(text)?;
        let shipper = shipper(&self.owner, &self.sending, shadow, self.lz4, true);
        ship(
            shipper,
            &self.sending,
            self.head(),
            &self.owner,
            &self.reporter,
        )?;
        self.owner.begin(self.view.generation, self.sending.session);
        Ok(())
    }

    /// Starts the threads that beat, that watch the chain, and that hear what it says.
    fn listen(&self, connection: &Arc<Connection>) -> Result<(), String> {
        let Rhythm { heartbeat, silence } = self.rhythm;
        let over = Arc::new(AtomicBool::new(false));
        spawn("heartbeat", {
            let (connection, owner, over) = (connection.clone(), self.owner.clone(), over.clone());
            move || {
                beat(&connection, &owner, heartbeat);
                over.store(true, Ordering::Release);
            }
        })?;
        spawn("chain-watch", {
            let (connection, owner) = (connection.clone(), self.owner.clone());
            let reporter = self.reporter.clone();
            let watch = Watch::new(self.head(), self.view.chain.len(), silence);
            let over = move || over.load(Ordering::Acquire);
            move || look_on(&connection, &owner, &reporter, (heartbeat, over), watch)
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
        })
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

/// Tells the chain that the owner lives, until it does not. Takes no lock: a thread without this one's priority may hold it for
/// as long as a busy host lets it wait.
fn beat(connection: &Connection, owner: &Owner, heartbeat: Duration) {
    chain::urgent_thread();
    while !owner.gave_up() && connection.heartbeat().is_ok() {
        std::thread::sleep(heartbeat);
    }
}

/// Watches whether the chain moves, until the connection to it is `over`; looks once in `period`.
fn look_on(
    connection: &Connection,
    owner: &Owner,
    reporter: &Reporter,
    (period, over): (Duration, impl Fn() -> bool),
    mut watch: Watch,
) {
    let began = Instant::now();
    while !over() {
        std::thread::sleep(period);
        // The watch belongs to this configuration only.
        if !owner.is_current(connection.generation()) {
            continue;
        }
        let seen = Seen {
            begins: owner.begins(),
            waiting: owner.waiting_for_commit(),
            stuck: owner.stuck_for(),
        };
        if let Some(trouble) = watch.look(began.elapsed(), &seen) {
            lost(reporter, connection.generation(), trouble);
        }
    }
}

/// Acts on what the chain says; false once there is nothing more to hear.
fn hear(event: ClientEvent, owner: &Owner, reporter: &Reporter) -> bool {
    match event {
        ClientEvent::Ack { epoch, generation } => {
            if let Err(e) = owner.ack(generation, epoch) {
                owner.give_up(e.to_string());
                return false;
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
