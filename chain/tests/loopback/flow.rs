//! A guest that never stops: a checkpoint follows the other, whatever happens to the chain meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use chain::{ChainClient, ClientEvent, Connection, Mark, View};
use checkpoint::{Epoch, HostId};

use crate::cluster::{PATIENCE, VM, Vm, connect, until};

/// Checkpoints under way before the guest waits: what an owner's back-pressure does.
pub const IN_FLIGHT: usize = 3;

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    acked: AtomicU64,
    stop: AtomicBool,
}

pub struct Flow {
    client: Arc<ChainClient>,
    connection: Arc<Connection>,
    counts: Arc<Counts>,
    said: (Sender<ClientEvent>, Mutex<Receiver<ClientEvent>>),
    running: JoinHandle<Vm>,
}

impl Flow {
    /// A VM's owner: from its first checkpoint on, or resumed from `base`.
    pub fn start(view: &View, mut vm: Vm, base: Option<Mark>) -> Self {
        let client = ChainClient::new(
            VM,
            view.owner.clone(),
            view.generation,
            base,
            chain::KEPT_MAX,
        );
        let client = Arc::new(client);
        let connection = connect(&client, view);
        let counts = Arc::<Counts>::default();
        counts.sent.store(vm.epoch.0, Ordering::SeqCst);
        counts.acked.store(vm.epoch.0, Ordering::SeqCst);
        let (thread, counted) = (client.clone(), counts.clone());
        let running = std::thread::spawn(move || {
            let mut full = base.is_none();
            while !counted.stop.load(Ordering::SeqCst) {
                if thread.unacknowledged() >= IN_FLIGHT {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                vm.live();
                counted.sent.store(vm.epoch.next().0, Ordering::SeqCst);
                vm.try_checkpoint(&thread, full).unwrap();
                full = false;
            }
            vm
        });
        let (sender, receiver) = channel();
        let mut flow = Self {
            client,
            connection: connection.clone(),
            counts,
            said: (sender, Mutex::new(receiver)),
            running,
        };
        flow.attach(connection);
        if base.is_none() {
            // A full checkpoint is not sent again.
            flow.progress(1);
        }
        flow
    }

    fn attach(&mut self, connection: Arc<Connection>) {
        let (counts, said) = (self.counts.clone(), self.said.0.clone());
        self.connection = connection.clone();
        std::thread::spawn(move || {
            while let Some(event) = connection.next_event() {
                if let ClientEvent::Ack { epoch, generation } = event {
                    assert_eq!(generation, connection.generation());
                    let sent = counts.sent.load(Ordering::SeqCst);
                    assert!(epoch.0 <= sent, "{epoch} was acknowledged, {sent} sent");
                    counts.acked.fetch_max(epoch.0, Ordering::SeqCst);
                } else {
                    let _ = said.send(event);
                }
            }
        });
    }

    /// Follows a new configuration, or the same over new connections.
    pub fn reconnect(&mut self, view: &View) {
        while self.said.1.lock().unwrap().try_recv().is_ok() {}
        let connection = connect(&self.client, view);
        self.attach(connection);
    }

    pub fn acked(&self) -> Epoch {
        Epoch(self.counts.acked.load(Ordering::SeqCst))
    }

    /// Waits for that many acks more.
    pub fn progress(&self, more: u64) {
        let goal = self.acked().0 + more;
        until("acks go on", || self.acked().0 >= goal);
    }

    /// Waits until the chain has said that the joining replica can become the tail.
    pub fn joiner_ready(&self) {
        self.hear("the joining replica is ready", |event| {
            matches!(event, ClientEvent::JoinerReady { .. })
        });
    }

    /// Waits until the chain has said that this replica is lost; why.
    pub fn lost(&self, who: &HostId) -> String {
        let said = self.hear(
            "it is lost",
            |event| matches!(event, ClientEvent::Lost(loss) if loss.host.as_ref() == Some(who)),
        );
        match said {
            ClientEvent::Lost(loss) => loss.why,
            other => unreachable!("{other:?}"),
        }
    }

    fn hear(&self, what: &str, is: impl Fn(&ClientEvent) -> bool) -> ClientEvent {
        let said = self.said.1.lock().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut others = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match said.recv_timeout(left) {
                Ok(event) if is(&event) => return event,
                Ok(event) => others.push(event),
                Err(_) => panic!("still not: {what}; instead: {others:?}"),
            }
        }
    }

    /// What the chain has said, acks apart, since the last connection was made.
    pub fn said(&self) -> Vec<ClientEvent> {
        self.said.1.lock().unwrap().try_iter().collect()
    }

    /// The owner dies, at whatever it is. The VM as it was then, and what it has heard to be acknowledged.
    pub fn die(self) -> (Vm, Epoch) {
        self.counts.stop.store(true, Ordering::SeqCst);
        let vm = self.running.join().unwrap();
        self.connection.close();
        let acked = self.counts.acked.load(Ordering::SeqCst);
        (vm, Epoch(acked))
    }
}
