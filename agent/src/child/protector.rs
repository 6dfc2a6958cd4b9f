//! Connects an owner to its chain: the link, and the threads that ship, beat and receive acks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::{ChainClient, ClientError, ClientEvent, View};
use checkpoint::{Epoch, HostId};
use vmm::Vm;

use super::protected::Reporter;
use super::proto::FromChild;
use crate::epoch::owner::{Begin, Owner};
use crate::epoch::ship::{Link, Shipper};
use crate::epoch::staging::{RamView, Shadow};

/// How long a chain may take to come up: its replicas create images, mirrors and standbys first.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);
/// A commit that takes longer makes the agent look whether all replicas still answer.
const COMMIT_PATIENCE: Duration = Duration::from_millis(250);

/// Keeps an owner's connection to the chain of the newest configuration.
pub struct Protector {
    host: HostId,
    heartbeat: Duration,
    lz4: bool,
    owner: Arc<Owner>,
    vm: Arc<Vm>,
    reporter: Reporter,
    generation: Option<checkpoint::Generation>,
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
            generation: None,
        }
    }

    /// Follows `view`: connects to its chain and begins the first synchronisation; with an empty chain, output flows.
    pub fn protect(&mut self, view: View) {
        if self.generation.is_some_and(|g| view.generation <= g) {
            return;
        }
        self.generation = Some(view.generation);
        if view.chain.is_empty() {
            self.owner.queue().new_session();
            self.owner.unprotect(view.generation);
            return;
        }
        let session = self.owner.queue().new_session();
        let (host, heartbeat, lz4) = (self.host.clone(), self.heartbeat, self.lz4);
        let (owner, vm, reporter) = (self.owner.clone(), self.vm.clone(), self.reporter.clone());
        // Connecting waits for the replicas; the agent's orders must be heard meanwhile.
        let spawned = std::thread::Builder::new()
            .name("protect".into())
            .spawn(move || {
                if let Err((host, why)) = connect(
                    &host, heartbeat, lz4, &owner, &vm, &reporter, &view, session,
                ) {
                    reporter.send(&FromChild::ChainLost {
                        generation: view.generation,
                        host,
                        why,
                    });
                }
            });
        if let Err(e) = spawned {
            self.reporter
                .send(&FromChild::Fatal(format!("starting a thread: {e}")));
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn connect(
    host: &HostId,
    heartbeat: Duration,
    lz4: bool,
    owner: &Arc<Owner>,
    vm: &Arc<Vm>,
    reporter: &Reporter,
    view: &View,
    session: u64,
) -> Result<(), (Option<HostId>, String)> {
    let unnamed = |why: String| (None, why);
    let deadline = Instant::now() + CONNECT_PATIENCE;
    let client = loop {
        match ChainClient::connect(host, view) {
            Ok(client) => break Arc::new(client),
            Err(e @ ClientError::Refused { generation, .. }) => {
                if owner.refused(generation) {
                    reporter.send(&FromChild::Superseded { generation });
                }
                return Err(unnamed(e.to_string()));
            }
            Err(ClientError::Peer { host, addr, why }) if Instant::now() >= deadline => {
                return Err((Some(host), format!("{addr}: {why}")));
            }
            Err(e) if Instant::now() >= deadline => return Err(unnamed(e.to_string())),
            Err(e) => {
                tracing::debug!("chain not ready: {e}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    };
    let shadow = Shadow::new(&RamView::new(vm.memory())).map_err(|e| unnamed(e.to_string()))?;
    let link = Arc::new(ClientLink {
        client: client.clone(),
    });
    let mut shipper = Shipper::new(owner.queue(), link, shadow, lz4, owner.recorder());
    let lost = {
        let (reporter, generation) = (reporter.clone(), view.generation);
        move |host: Option<HostId>, why: String| {
            reporter.send(&FromChild::ChainLost {
                generation,
                host,
                why,
            })
        }
    };
    let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(run)
            .map_err(|e| (None, format!("starting a thread: {e}")))
    };
    spawn("ship", {
        let (client, lost) = (client.clone(), lost.clone());
        Box::new(move || {
            if let Err(e) = shipper.run(session) {
                lost(None, e.to_string());
            }
            client.close();
        })
    })?;
    spawn("heartbeat", {
        let (client, owner, lost) = (client.clone(), owner.clone(), lost.clone());
        Box::new(move || {
            chain::urgent_thread();
            let mut reported = Instant::now();
            while client.heartbeat().is_ok() {
                std::thread::sleep(heartbeat);
                // A backup that lost power closes no connection: only the missing commits show it.
                if let Some(waited) = owner.waiting_for_commit().filter(|w| *w > COMMIT_PATIENCE)
                    && reported.elapsed() > COMMIT_PATIENCE
                {
                    reported = Instant::now();
                    lost(None, format!("no commit for {} ms", waited.as_millis()));
                }
            }
        })
    })?;
    spawn("acks", {
        let (owner, reporter) = (owner.clone(), reporter.clone());
        Box::new(move || {
            while let Some(event) = client.next_event() {
                match event {
                    ClientEvent::Ack { epoch, generation } => {
                        if let Err(e) = owner.ack(generation, epoch) {
                            reporter.send(&FromChild::Fatal(e.to_string()));
                            owner.fence();
                        }
                    }
                    ClientEvent::Refused { generation } => {
                        if owner.refused(generation) {
                            reporter.send(&FromChild::Superseded { generation });
                        }
                    }
                    ClientEvent::Lost { host, why } => {
                        lost(host, why);
                        return;
                    }
                }
            }
        })
    })?;
    owner.begin(Begin {
        generation: view.generation,
    });
    Ok(())
}

/// The chain's client as the shipper's link.
struct ClientLink {
    client: Arc<ChainClient>,
}

impl Link for ClientLink {
    fn begin(&self, epoch: Epoch, full: bool) -> Result<(), String> {
        self.client.begin(epoch, full).map_err(|e| e.to_string())
    }
    fn pages(&self, epoch: Epoch, records: &[u8]) -> Result<(), String> {
        self.client.pages(epoch, records).map_err(|e| e.to_string())
    }
    fn disk(&self, epoch: Epoch, records: &[u8]) -> Result<(), String> {
        self.client.disk(epoch, records).map_err(|e| e.to_string())
    }
    fn machine(&self, epoch: Epoch, state: &[u8]) -> Result<(), String> {
        self.client.machine(epoch, state).map_err(|e| e.to_string())
    }
    fn end(&self, epoch: Epoch) -> Result<(), String> {
        self.client.end(epoch).map_err(|e| e.to_string())
    }
}
