//! Chain servers of this process on the loopback interface, and the master that they follow.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use chain::master::{Command, MasterState};
use chain::{ChainClient, Connection, Member, ReplicaServer, ServerOptions, View, VmShape};
use checkpoint::{HostId, RamRange, VmId};
use diskbuf::Durability;

use super::Outcome;

/// RAM of the VM that does not run, in bytes.
pub const RAM: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// The hosts `r0`, `r1` ... and a VM of `owner`.
pub struct Hosts {
    servers: Vec<Option<ReplicaServer>>,
    members: Vec<Member>,
    master: MasterState,
    shape: VmShape,
    view: View,
    durability: Durability,
    dir: PathBuf,
}

fn host(name: &str) -> Outcome<HostId> {
    HostId::new(name).map_err(|e| e.to_string().into())
}

impl Hosts {
    /// `count` hosts, whose replicas keep the VM to that degree.
    ///
    /// # Errors
    /// What keeps a server from starting.
    pub fn new(count: usize, durability: Durability) -> Outcome<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir =
            std::env::temp_dir().join(format!("understudy-bench-{}-{number}", std::process::id()));
        let mut master = MasterState::default();
        let shape = VmShape {
            ram: vec![RamRange { start: 0, len: RAM }],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: String::new(),
        };
        let register = Command::Register {
            vm: VmId(1),
            name: "vm".into(),
            owner: host("owner")?,
            shape: shape.clone(),
            life: chain::Life::On,
        };
        let view = master.apply(&register)?.view;
        let mut hosts = Self {
            servers: Vec::new(),
            members: Vec::new(),
            master,
            shape,
            view,
            durability,
            dir,
        };
        for i in 0..count {
            let options = ServerOptions {
                host: host(&format!("r{i}"))?,
                data_dir: hosts.dir.join(format!("r{i}")),
                heartbeat: Duration::from_millis(10),
                // Nobody takes over here.
                missed: 1_000_000,
                files: None,
            };
            let name = options.host.clone();
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let (events, _) = channel();
            let server = ReplicaServer::bind(any, options, events)?;
            hosts.members.push(Member::new(name, server.addr()));
            hosts.servers.push(Some(server));
        }
        Ok(hosts)
    }

    /// The master decides on a chain of these hosts, which follow: anew, or in place.
    ///
    /// # Errors
    /// The master's or a server's.
    pub fn decide(&mut self, chain: &[usize], anew: bool) -> Outcome<&View> {
        let command = Command::Reconfigure {
            vm: self.view.vm,
            expect: self.view.generation,
            by: host("owner")?,
            chain: chain.iter().map(|i| self.members[*i].clone()).collect(),
            joining: None,
            anew,
        };
        self.view = self.master.apply(&command)?.view;
        for server in chain.iter().filter_map(|i| self.servers[*i].as_ref()) {
            if anew {
                server.create(self.view.clone(), self.shape.clone(), self.durability)?;
            } else {
                server.adopt(self.view.clone())?;
            }
        }
        Ok(&self.view)
    }

    /// A client that has sent nothing.
    ///
    /// # Errors
    /// None but a malformed name.
    pub fn client(&self) -> Outcome<ChainClient> {
        let generation = self.view.generation;
        Ok(ChainClient::new(
            self.view.vm,
            host("owner")?,
            generation,
            None,
            chain::KEPT_MAX,
        ))
    }

    /// Connects `client` to the chain decided on last.
    ///
    /// # Errors
    /// When the chain does not come up.
    pub fn connect(&self, client: &ChainClient) -> Outcome<Arc<Connection>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match client.connect(&self.view) {
                Ok(connection) => return Ok(connection),
                Err(e) if Instant::now() >= deadline => return Err(e.into()),
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Host number `i` and its connections end.
    pub fn kill(&mut self, i: usize) {
        self.servers[i] = None;
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.servers.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
