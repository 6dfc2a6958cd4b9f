//! Hosts, links and a master, driven by a seed.

use std::collections::{BTreeMap, HashMap, VecDeque};

use chain::master::{Command, MasterState};
use chain::replica::Replica;
use chain::{Mark, Member, View, VmRecord, VmShape};
use checkpoint::{Epoch, Generation, HostId, VmId};

use crate::owner::{History, Item, Owner};

pub const HOSTS: usize = 4;
pub const IN_FLIGHT: usize = 3;

/// A mechanism switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// The tail acknowledges a checkpoint when it begins.
    AckBeforeProcessed,
    /// The end is forwarded when it arrives.
    ForwardEndEarly,
    /// Checkpoints are told apart by their numbers only.
    AnyBase,
    /// Frames and acks of all generations are taken.
    AnyGeneration,
    /// The master grants a takeover whatever generation it was based on.
    NoCompare,
    /// The replica notes what it has, asks, and goes on until it is answered.
    AskWithoutFreezing,
    /// A replica resumes what it holds of an earlier configuration.
    ResumeOutdated,
}

/// What happened, to see that something did.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub commits: u64,
    pub takeovers: u64,
    pub refused: u64,
    pub crashes: u64,
    pub reconfigurations: u64,
    pub continued: u64,
    pub failures: u64,
    pub resumed: u64,
    pub fenced: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.commits += other.commits;
        self.takeovers += other.takeovers;
        self.refused += other.refused;
        self.crashes += other.crashes;
        self.reconfigurations += other.reconfigurations;
        self.continued += other.continued;
        self.failures += other.failures;
        self.resumed += other.resumed;
        self.fenced += other.fenced;
    }
}

#[derive(Clone, Debug)]
pub enum Message {
    Begin {
        epoch: Epoch,
        base: Option<Mark>,
    },
    /// The whole history for a full checkpoint, else one item.
    Data {
        epoch: Epoch,
        items: Vec<Item>,
    },
    End {
        epoch: Epoch,
        digest: u32,
    },
    Heartbeat,
    Ack(Epoch),
    Refused(Generation),
}

/// Which way a link leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Down,
    Up,
    /// Tail to owner.
    Acks,
}

/// From, to, the generation it was made in, and its way.
pub type LinkId = (usize, usize, Generation, Way);

pub struct Standby {
    pub machine: Replica,
    pub store: History,
    pub staged: Option<(bool, Vec<Item>)>,
    /// What it had when it asked for the VM, and in which generation it asked.
    pub asking: Option<(Generation, usize)>,
}

#[derive(Default)]
pub struct Host {
    pub up: bool,
    pub seen: Generation,
    pub standby: Option<Standby>,
    pub owner: Option<Owner>,
}

pub struct Asked {
    pub host: usize,
    pub command: Command,
}

pub struct World {
    pub random: u64,
    pub mutant: Mutant,
    pub vm: VmId,
    pub hosts: Vec<Host>,
    pub links: BTreeMap<LinkId, VecDeque<Message>>,
    pub master: MasterState,
    pub asked: Vec<Asked>,
    pub answers: Vec<(usize, Generation, Option<VmRecord>)>,
    /// What the outside has seen.
    pub visible: History,
    /// What was sent under each name.
    pub truth: HashMap<(Generation, Epoch), History>,
    pub counts: Counts,
    pub story: Vec<String>,
}

pub fn name(i: usize) -> HostId {
    HostId::new(&format!("h{i}")).expect("a valid name")
}

pub fn index(host: &HostId) -> usize {
    host.as_str()[1..].parse().expect("h and a number")
}

pub fn member(i: usize) -> Member {
    Member {
        host: name(i),
        addr: ([127, 0, 0, 1], i as u16 + 1).into(),
    }
}

impl World {
    pub fn new(seed: u64, mutant: Mutant) -> Self {
        let mut master = MasterState::default();
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            disks: vec![],
            config_toml: String::new(),
        };
        let register = Command::Register {
            name: "vm".into(),
            owner: name(0),
            shape,
        };
        let record = master.apply(&register).expect("the first VM");
        let mut hosts: Vec<Host> = (0..HOSTS)
            .map(|_| Host {
                up: true,
                ..Host::default()
            })
            .collect();
        hosts[0].owner = Some(Owner::new(record.view.generation, Vec::new()));
        hosts[0].seen = record.view.generation;
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1,
            mutant,
            vm: record.view.vm,
            hosts,
            links: BTreeMap::new(),
            master,
            asked: Vec::new(),
            answers: Vec::new(),
            visible: Vec::new(),
            truth: HashMap::new(),
            counts: Counts::default(),
            story: Vec::new(),
        }
    }

    pub fn below(&mut self, n: usize) -> usize {
        // splitmix64
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    pub fn say(&mut self, what: impl Into<String>) {
        self.story.push(what.into());
    }

    pub fn view(&self) -> View {
        self.master.snapshot().records[0].view.clone()
    }

    /// Something happens somewhere.
    pub fn step(&mut self) -> Result<(), String> {
        match self.below(1000) {
            0..450 => {
                for _ in 0..1 + self.below(5) {
                    self.deliver()?;
                }
            }
            450..640 => self.run_owner()?,
            640..760 => self.look_at_the_master()?,
            760..830 => self.connect()?,
            830..900 => self.decide()?,
            900..960 => self.hear_the_answer()?,
            960..968 => self.suspect(),
            968..978 => self.repair(),
            978..980 => self.crash(),
            980..988 => self.come_back(),
            988..992 => self.cut(),
            992..995 => self.give_up_asking(),
            _ => self.heartbeat(),
        }
        Ok(())
    }

    pub fn pick(&mut self, of: &[usize]) -> Option<usize> {
        (!of.is_empty()).then(|| of[self.below(of.len())])
    }

    pub fn hosts_where(&self, wanted: impl Fn(&Host) -> bool) -> Vec<usize> {
        (0..HOSTS)
            .filter(|i| self.hosts[*i].up && wanted(&self.hosts[*i]))
            .collect()
    }

    pub fn check(&self) -> Result<(), String> {
        // I2: within a generation, a replica has nothing that one before it has not.
        let view = self.view();
        let replicas: Vec<(usize, &Standby, Mark)> = view
            .chain
            .iter()
            .filter_map(|m| {
                let i = index(&m.host);
                let standby = self.hosts[i].standby.as_ref()?;
                let mark = standby.machine.current()?;
                (mark.generation == view.generation).then_some((i, standby, mark))
            })
            .collect();
        for pair in replicas.windows(2) {
            let ((i, before, _), (j, after, mark)) = (&pair[0], &pair[1]);
            if !before.store.starts_with(&after.store) {
                return Err(format!("I2: h{j} has {mark}, h{i} before it has not"));
            }
        }
        // I4, I5: what the outside has seen is what the newest owner has done.
        let newest = self.hosts.iter().filter_map(|h| h.owner.as_ref());
        if let Some(owner) = newest.max_by_key(|o| o.generation)
            && owner.generation == view.generation
            && !owner.history.starts_with(&self.visible)
        {
            return Err("I4: somebody else than the owner spoke".into());
        }
        Ok(())
    }
}
