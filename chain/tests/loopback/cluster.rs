//! Replicas in this process, over real sockets of the loopback interface. What they are configured to be is decided by the
//! master's own state machine: no test builds a configuration that cannot be.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use chain::master::{Command, MasterState};
use chain::{
    ChainClient, ClientError, ClientEvent, Connection, Handover, Mark, Member, ReplicaServer,
    ServerEvent, ServerOptions, View, VmShape,
};
use checkpoint::{Epoch, Generation, HostId, VmId};
use diskbuf::Durability;
use tempfile::TempDir;

pub use crate::vm::{DISK, Vm, shape};
use crate::wire::Wire;

pub const VM: VmId = VmId(1);
/// A bound on how long something that must happen may take, on however busy a machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Nobody suspects anybody.
const NEVER: u32 = 1_000_000;

pub fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

/// Waits for something that must happen.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub struct Host {
    pub server: Option<ReplicaServer>,
    pub events: Receiver<ServerEvent>,
    pub member: Member,
    pub wire: Wire,
    options: ServerOptions,
    dir: TempDir,
}

fn serve(options: &ServerOptions) -> (ReplicaServer, Receiver<ServerEvent>) {
    let (sender, events) = channel();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let server = ReplicaServer::bind(any, options.clone(), sender).unwrap();
    (server, events)
}

impl Host {
    fn new(name: &str, missed: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = ServerOptions {
            host: host(name),
            data_dir: dir.path().into(),
            heartbeat: Duration::from_millis(10),
            missed,
            files: Some(dir.path().join("files")),
        };
        let (server, events) = serve(&options);
        let wire = Wire::to(server.addr());
        Self {
            member: Member::new(options.host.clone(), wire.addr),
            server: Some(server),
            events,
            wire,
            options,
            dir,
        }
    }

    /// Where everything of it is.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub fn server(&self) -> &ReplicaServer {
        self.server.as_ref().expect("this host has been killed")
    }

    /// Ends the server and all its connections, as the process's end would.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// The process is started again: it holds nothing but what is on its disk.
    pub fn restart(&mut self) {
        self.kill();
        let (server, events) = serve(&self.options);
        self.wire.point_to(server.addr());
        (self.server, self.events) = (Some(server), events);
    }

    pub fn data_dir(&self) -> &std::path::Path {
        &self.options.data_dir
    }

    pub fn epoch(&self) -> Option<Epoch> {
        self.server().status(VM).unwrap().epoch
    }

    pub fn failed(&self) -> Option<String> {
        self.server().status(VM).unwrap().failed
    }

    pub fn could_resume(&self) -> bool {
        self.server().status(VM).unwrap().state.could_resume()
    }
}

pub struct Cluster {
    pub hosts: Vec<Host>,
    pub view: View,
    master: MasterState,
    shape: VmShape,
    durability: Durability,
}

impl Cluster {
    /// Hosts `r0`, `r1` ...: the chain of a VM that `owner` owns, in generation 2.
    pub fn new(count: usize) -> Self {
        Self::with_spares(count, 0)
    }

    /// The same, and hosts that are in no chain yet.
    pub fn with_spares(count: usize, spares: usize) -> Self {
        Self::of_shape(count, spares, shape(DISK), Durability::Disk)
    }

    /// The same, for another VM.
    pub fn of_shape(count: usize, spares: usize, shape: VmShape, durability: Durability) -> Self {
        let mut cluster = Self::servers(count + spares, NEVER, shape);
        cluster.durability = durability;
        cluster.decide_chain(&(0..count).collect::<Vec<_>>(), None, true);
        cluster.create(0..count);
        cluster
    }

    /// Servers without replicas, and a VM that is registered.
    fn servers(count: usize, missed: u32, shape: VmShape) -> Self {
        let mut master = MasterState::default();
        let register = Command::Register {
            vm: VM,
            name: "vm".into(),
            owner: host("owner"),
            shape: shape.clone(),
            life: chain::Life::On,
        };
        let view = master.apply(&register).unwrap().view;
        assert_eq!(view.vm, VM);
        Self {
            hosts: (0..count)
                .map(|i| Host::new(&format!("r{i}"), missed))
                .collect(),
            view,
            master,
            shape,
            durability: Durability::Disk,
        }
    }

    /// Servers without replicas, whose chain is decided.
    pub fn bare(count: usize, missed: u32) -> Self {
        let mut cluster = Self::servers(count, missed, shape(DISK));
        cluster.decide_chain(&(0..count).collect::<Vec<_>>(), None, true);
        cluster
    }

    fn decide_chain(&mut self, chain: &[usize], joining: Option<usize>, anew: bool) {
        let member = |i: usize| self.hosts[i].member.clone();
        let command = Command::Reconfigure {
            vm: VM,
            expect: self.view.generation,
            by: self.view.owner.clone(),
            chain: chain.iter().map(|i| member(*i)).collect(),
            joining: joining.map(member),
            anew,
        };
        self.view = self.master.apply(&command).unwrap().view;
    }

    pub fn create(&mut self, which: impl IntoIterator<Item = usize>) {
        for i in which {
            let host = self.hosts[i].server();
            host.create(self.view.clone(), self.shape.clone(), self.durability)
                .unwrap();
        }
    }

    /// Every host that lives hears of what has been decided.
    pub fn tell(&mut self) {
        for host in &self.hosts {
            let Some(server) = &host.server else { continue };
            let (there, wanted) = (
                server.status(VM).is_some(),
                self.view.holds(&host.member.host),
            );
            match (there, wanted) {
                (true, true) => server.adopt(self.view.clone()).unwrap(),
                (true, false) => server.remove(VM, self.view.generation),
                (false, true) => server
                    .create(self.view.clone(), self.shape.clone(), self.durability)
                    .map(drop)
                    .unwrap(),
                (false, false) => {}
            }
        }
    }

    /// The owner goes on in place, with these.
    pub fn reconfigure(&mut self, chain: &[usize], joining: Option<usize>) {
        self.decide_chain(chain, joining, false);
        self.tell();
    }

    /// The owner begins anew, with these.
    pub fn anew(&mut self, chain: &[usize]) {
        self.decide_chain(chain, None, true);
        self.tell();
    }

    /// The master decides, and nobody is told yet.
    pub fn reconfigure_silently(&mut self, chain: &[usize], joining: Option<usize>) {
        self.decide_chain(chain, joining, false);
    }

    /// As [`Cluster::anew`], and nobody is told yet.
    pub fn anew_silently(&mut self, chain: &[usize]) {
        self.decide_chain(chain, None, true);
    }

    /// These, which have replicas, are told what has been decided.
    pub fn tell_only(&self, which: &[usize]) {
        for i in which {
            let server = self.hosts[*i].server();
            server.adopt(self.view.clone()).unwrap();
        }
    }

    /// This host takes over. The others are not told yet.
    pub fn take_over_silently(&mut self, taker: usize) -> Handover {
        let server = self.hosts[taker].server();
        let at = server.freeze(VM).unwrap();
        let command = Command::TakeOver {
            vm: VM,
            expect: self.view.generation,
            by: self.hosts[taker].member.host.clone(),
            at,
        };
        self.view = self.master.apply(&command).unwrap().view;
        let handover = server.hand_over(&self.view).unwrap();
        assert_eq!(handover.mark, at, "nothing moves in a frozen replica");
        handover
    }

    /// This host takes over.
    pub fn take_over(&mut self, taker: usize) -> Handover {
        let handover = self.take_over_silently(taker);
        self.tell();
        handover
    }

    /// Waits until the head, whose successor is sent nothing, has all that an owner sends without being acknowledged.
    pub fn wait_ahead(&self) {
        let epoch = |i: usize| self.hosts[i].epoch().map_or(0, |epoch| epoch.0);
        until("the head is ahead", || {
            epoch(0) == epoch(1) + crate::flow::IN_FLIGHT as u64
        });
    }

    pub fn connect(&self) -> Owner {
        Owner::new(&self.view, None)
    }

    /// Full checkpoints that have been sent to any host.
    pub fn fulls(&self) -> usize {
        self.hosts.iter().map(|h| h.wire.full()).sum()
    }
}

/// Connects as the owner, once the chain is up.
pub fn connect(client: &ChainClient, view: &View) -> Arc<Connection> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match client.connect(view) {
            Ok(connection) => return connection,
            Err(e @ (ClientError::Unfit { .. } | ClientError::Refused { .. })) => panic!("{e}"),
            Err(e) => assert!(Instant::now() < deadline, "the chain does not come up: {e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An owner whose chain is up.
pub struct Owner {
    pub client: ChainClient,
    pub connection: Arc<Connection>,
    said: Receiver<ClientEvent>,
}

impl Owner {
    pub fn new(view: &View, base: Option<Mark>) -> Self {
        let client = ChainClient::new(
            VM,
            view.owner.clone(),
            view.generation,
            base,
            chain::KEPT_MAX,
        );
        let connection = connect(&client, view);
        let said = hear(&connection);
        Self {
            client,
            connection,
            said,
        }
    }

    /// Connects again, perhaps to another chain.
    pub fn reconnect(&mut self, view: &View) {
        self.connection = connect(&self.client, view);
        self.said = hear(&self.connection);
    }

    /// The next thing the chain says; `None` once the connections are over.
    pub fn next_event(&self) -> Option<ClientEvent> {
        match self.said.recv_timeout(PATIENCE) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the chain says nothing"),
        }
    }
}

fn hear(connection: &Arc<Connection>) -> Receiver<ClientEvent> {
    let (sender, said) = channel();
    let connection = connection.clone();
    std::thread::spawn(move || {
        while let Some(event) = connection.next_event() {
            let _ = sender.send(event);
        }
    });
    said
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.connection.close();
    }
}

impl Deref for Owner {
    type Target = ChainClient;

    fn deref(&self) -> &ChainClient {
        &self.client
    }
}

/// Waits for the ack of `epoch`; nothing beyond it may be acknowledged, and nothing else may happen.
pub fn committed(owner: &Owner, epoch: Epoch, generation: Generation) {
    loop {
        match owner.next_event() {
            Some(ClientEvent::Ack {
                epoch: acked,
                generation: of,
            }) => {
                assert_eq!(of, generation);
                assert!(acked <= epoch, "{acked} was acknowledged, sent was {epoch}");
                if acked == epoch {
                    return;
                }
            }
            other => panic!("instead of the ack of {epoch}: {other:?}"),
        }
    }
}

/// The first thing that the chain says apart from acks, of which none may go beyond `limit`.
pub fn trouble(owner: &Owner, limit: Epoch) -> ClientEvent {
    loop {
        match owner.next_event() {
            Some(ClientEvent::Ack { epoch, .. }) => {
                assert!(
                    epoch <= limit,
                    "{epoch} was acknowledged, not beyond {limit}"
                );
            }
            Some(other) => return other,
            None => panic!("the connections ended without a word"),
        }
    }
}
