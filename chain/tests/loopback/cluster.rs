//! Replicas in this process, over real sockets of the loopback interface, and an owner whose VM is a few pages.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use chain::{
    ChainClient, ClientError, ClientEvent, Handover, Member, ReplicaServer, ServerEvent,
    ServerOptions, View, VmShape,
};
use checkpoint::{
    DiskOp, DiskRecord, EncoderOptions, Epoch, Generation, HostId, MachineState, PageEncoder,
    RamRange, VmId,
};
use diskbuf::Durability;
use tempfile::TempDir;

pub const VM: VmId = VmId(7);
pub const PAGES: usize = 64;
pub const DISK: u64 = 1 << 20;
/// A bound on how long something that must happen may take, on however busy a machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

pub fn shape() -> VmShape {
    VmShape {
        ram: vec![
            RamRange {
                start: 0,
                len: (PAGES as u64 / 2) * 4096,
            },
            RamRange {
                start: 1 << 32,
                len: (PAGES as u64 / 2) * 4096,
            },
        ],
        vcpus: 1,
        disks: vec![DISK],
        config_toml: String::new(),
    }
}

/// Frame number of the n-th page of RAM.
pub fn gfn(n: usize) -> u64 {
    if n < PAGES / 2 {
        n as u64
    } else {
        (1 << 20) + (n - PAGES / 2) as u64
    }
}

pub struct Host {
    pub server: Option<ReplicaServer>,
    pub events: Receiver<ServerEvent>,
    pub member: Member,
    _dir: TempDir,
}

impl Host {
    pub fn server(&self) -> &ReplicaServer {
        self.server.as_ref().expect("this host has been killed")
    }

    /// Ends the server and all its connections, as the process's end would.
    pub fn kill(&mut self) {
        self.server = None;
    }

    pub fn epoch(&self) -> Option<Epoch> {
        self.server().status(VM).unwrap().epoch
    }

    pub fn failed(&self) -> Option<String> {
        self.server().status(VM).unwrap().failed
    }
}

pub struct Cluster {
    pub hosts: Vec<Host>,
    pub view: View,
}

impl Cluster {
    /// Hosts `r0`, `r1` ...: the chain of a VM that `owner` owns, in generation 2. Nobody suspects anybody.
    pub fn new(count: usize) -> Self {
        let mut cluster = Self::bare(count, 1_000_000);
        cluster.create(0..count);
        cluster
    }

    /// Servers without replicas.
    pub fn bare(count: usize, missed: u32) -> Self {
        let hosts: Vec<Host> = (0..count)
            .map(|i| {
                let dir = tempfile::tempdir().unwrap();
                let options = ServerOptions {
                    host: host(&format!("r{i}")),
                    data_dir: dir.path().into(),
                    heartbeat: Duration::from_millis(10),
                    missed,
                };
                let (sender, events) = channel();
                let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
                let server = ReplicaServer::bind(any, options.clone(), sender).unwrap();
                let member = Member {
                    host: options.host,
                    addr: server.addr(),
                };
                Host {
                    server: Some(server),
                    events,
                    member,
                    _dir: dir,
                }
            })
            .collect();
        let view = View {
            vm: VM,
            name: "vm".into(),
            generation: Generation(2),
            owner: host("owner"),
            chain: hosts.iter().map(|h| h.member.clone()).collect(),
        };
        Self { hosts, view }
    }

    pub fn create(&mut self, which: impl IntoIterator<Item = usize>) {
        for i in which {
            let host = self.hosts[i].server();
            host.create(self.view.clone(), shape(), Durability::Disk)
                .unwrap();
        }
    }

    /// The next configuration: these hosts, which adopt it in place.
    pub fn reconfigure(&mut self, owner: &str, chain: &[usize]) {
        self.view.generation = self.view.generation.next();
        self.view.owner = host(owner);
        self.view.chain = chain
            .iter()
            .map(|i| self.hosts[*i].member.clone())
            .collect();
        for i in chain {
            self.hosts[*i].server().adopt(self.view.clone()).unwrap();
        }
    }

    pub fn connect(&self) -> ChainClient {
        connect(&self.view)
    }
}

/// Connects as the owner, once the chain is up.
pub fn connect(view: &View) -> ChainClient {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ChainClient::connect(&view.owner, view) {
            Ok(client) => return client,
            Err(e) => assert!(Instant::now() < deadline, "the chain does not come up: {e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A VM that does not run: its memory, its disk and what a replica should make of them.
#[derive(Clone)]
pub struct Vm {
    pub ram: Vec<[u8; 4096]>,
    shadow: Vec<[u8; 4096]>,
    pub disk: Vec<u8>,
    pub epoch: Epoch,
    written: Vec<(u64, u8)>,
}

impl Vm {
    pub fn new() -> Self {
        Self {
            ram: vec![[0; 4096]; PAGES],
            shadow: vec![[0; 4096]; PAGES],
            disk: vec![0; DISK as usize],
            epoch: Epoch::ZERO,
            written: Vec::new(),
        }
    }

    /// Something happens: some pages and disk blocks change.
    pub fn run(&mut self, seed: u64) {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for _ in 0..10 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let page = &mut self.ram[x as usize % PAGES];
            match x >> 60 {
                0..4 => page.fill((x >> 8) as u8),
                _ => page[(x >> 20) as usize % 4096] ^= 0x5a,
            }
            let block = (x >> 32) % (DISK / 512);
            let value = (x >> 40) as u8;
            self.disk[block as usize * 512..][..512].fill(value);
            self.written.push((block * 512, value));
        }
    }

    pub fn machine(&self) -> Vec<u8> {
        let state = MachineState {
            vm: self.epoch.0.to_le_bytes().to_vec(),
            ..MachineState::default()
        };
        state.encode().unwrap()
    }

    /// Page and disk records of the next checkpoint.
    fn records(&mut self, full: bool) -> (Vec<u8>, Vec<u8>) {
        let mut encoder = PageEncoder::new(EncoderOptions { lz4: true });
        let mut pages = Vec::new();
        if full {
            self.shadow.fill([0; 4096]);
        }
        for (n, page) in self.ram.iter().enumerate() {
            encoder.encode(gfn(n), page, Some(&self.shadow[n]), &mut pages);
        }
        self.shadow.clone_from(&self.ram);
        let mut disk = Vec::new();
        let mut write = |offset: u64, data: &[u8]| {
            DiskRecord {
                disk: 0,
                op: DiskOp::Write,
                offset,
                len: data.len() as u32,
                data,
            }
            .encode(&mut disk);
        };
        if full {
            for offset in (0..DISK).step_by(64 << 10) {
                write(offset, &self.disk[offset as usize..][..64 << 10]);
            }
        } else {
            for (offset, value) in &self.written {
                write(*offset, &[*value; 512]);
            }
        }
        self.written.clear();
        (pages, disk)
    }

    /// Sends everything of the next checkpoint but its end.
    pub fn send_body(&mut self, client: &ChainClient, full: bool) -> Result<(), ClientError> {
        self.epoch = self.epoch.next();
        let (pages, disk) = self.records(full);
        client.begin(self.epoch, full)?;
        if full {
            for block in disk.chunks(24 + (64 << 10)) {
                client.disk(self.epoch, block)?;
            }
        } else {
            for blocks in disk.chunks(4 * (24 + 512)) {
                client.disk(self.epoch, blocks)?;
            }
        }
        client.pages(self.epoch, &pages)?;
        client.machine(self.epoch, &self.machine())
    }

    pub fn try_checkpoint(&mut self, client: &ChainClient, full: bool) -> Result<(), ClientError> {
        self.send_body(client, full)?;
        client.end(self.epoch)
    }

    pub fn checkpoint(&mut self, client: &ChainClient, full: bool) {
        self.try_checkpoint(client, full).unwrap();
    }

    /// Checks that what a replica hands over is this VM.
    pub fn check(&self, handover: &Handover) {
        assert_eq!(handover.epoch, self.epoch);
        assert_eq!(handover.mark.epoch, self.epoch);
        assert_eq!(handover.machine, self.machine());
        let half = PAGES / 2;
        for (fd, pages) in handover
            .ram
            .iter()
            .zip([&self.ram[..half], &self.ram[half..]])
        {
            let mut file = File::from(fd.try_clone().unwrap());
            file.seek(SeekFrom::Start(0)).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert!(bytes == pages.concat(), "memory differs");
        }
        let disk = std::fs::read(&handover.disks[0]).unwrap();
        assert!(disk == self.disk, "disk differs");
    }
}

/// Waits for the ack of `epoch`; nothing beyond it may be acknowledged, and nothing else may happen.
pub fn committed(client: &ChainClient, epoch: Epoch, generation: Generation) {
    loop {
        match client.next_event() {
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
pub fn trouble(client: &ChainClient, limit: Epoch) -> ClientEvent {
    loop {
        match client.next_event() {
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
