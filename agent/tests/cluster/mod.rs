//! A whole cluster without sockets, clocks and threads: the shipped machines of hosts (`agent::host`), replicas, master,
//! senders and epoch pipelines, and models of what drives them (connections, stores, processes). What happens next is always
//! one [`Step`], and a step's outcome depends on nothing else: whoever picks the steps explores the protocol. The simulation
//! picks them at random from a seed, the model checker picks all of them; in its worlds agents are free ([`Agents::Free`]).

#![allow(dead_code)] // Two explorers, neither uses all of it.

mod agent;
mod check;
mod effects;
mod errands;
mod faults;
mod frames;
mod free;
mod greeting;
mod kept;
mod links;
mod master;
mod output;
mod owner;
mod protect;
mod said;
mod standby;
mod steps;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

use chain::master::{Command, MasterState};
use chain::replica::Base;
use chain::{Mark, Member, View, VmRecord, VmShape};
use checkpoint::{Epoch, Generation, HostId, VmId};

pub use self::agent::Agent;
pub use check::Op;
pub use owner::Owner;
pub use protect::Bridge;
pub use standby::Standby;
pub use steps::{Plan, Step};

/// What the VM did in one epoch: an owner, a generation and an epoch have one, which nobody else has.
pub type Item = u64;

/// Everything the VM has done, or everything a replica holds of it; epoch `e` is item `e - 1`.
pub type Content = Vec<Item>;

/// A mechanism switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// The master grants a takeover whatever it was based on: generation and checkpoint.
    NoCompare,
    /// The replica notes what it has, asks, and goes on until it is answered.
    AskWithoutFreezing,
    /// A replica resumes what it holds from before output was let out unprotected.
    ResumeOutdated,
    /// The master does not record where a takeover went on from.
    ForkNotRecorded,
    /// A replica does not look at where takeovers went on from.
    ForkIgnored,
    /// A new member may take over before its predecessor has said that it has everything.
    ResumeIncomplete,
    /// A tail that is not sure to have everything acknowledges what it has.
    AckIncomplete,
    /// A new successor is not sent what it lacks.
    SentNotResent,
    /// A new successor is sent what is kept, whatever it holds.
    ResendAnyway,
    /// The joining replica becomes a member before it is ready.
    PromoteEarly,
    /// A replica takes every member for an old one.
    SinceIgnored,
    /// An owner begins anew, and replicas accept it, without the master's decision.
    FullUndecided,
    /// Acks are passed on without having processed what they are about.
    AckUnprocessed,
    /// A replica does not own up to a store that failed.
    FailureHidden,
    /// Queries are answered by whoever was the tail once.
    QueryStaleTail,
    /// Queries are answered by a tail that is not sure to have everything.
    QueryIncompleteTail,
    /// What tells the owner that the joining replica is ready is sent only once.
    ReadyOnce,
    /// What the next replica said while its predecessor was frozen is not asked for again.
    NextNotAsked,
    /// It is only if its connection was made meanwhile: an acknowledgement over an older one is missed.
    AcksNotAsked,
    /// What a predecessor sent while its successor was frozen is not asked for again.
    PreviousNotAsked,
    /// A failed replica says so only once.
    FailedOnce,
    /// A next replica that does not come is not named to the owner.
    TroubleOnce,
    /// A full checkpoint can be resumed from at once, while output flows.
    FullHeld,
    /// A VM's process is not ended when the master has decided that the VM is off.
    StopOnlyDecided,
    /// What a process has told one agent it does not tell the next.
    ReportedOnce,
    /// A host that finds the VM's process running boots the VM all the same.
    AdoptNothing,
    /// A snapshot of the master's that is older than one before is believed.
    StaleTaken,
}

/// What happens in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grain {
    /// One frame arrives, a few items are copied to a joining replica.
    Frame,
    /// A checkpoint's beginning and content arrive together; a joining replica is sent everything at once.
    Half,
    /// A whole checkpoint arrives.
    Checkpoint,
}

/// What a world is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    pub hosts: usize,
    /// Checkpoints not acknowledged at most.
    pub in_flight: usize,
    /// Replicas wanted.
    pub wanted: usize,
    /// Preparing a checkpoint takes until somebody says that it is done.
    pub slow_disks: bool,
    /// What happens in one step.
    pub grain: Grain,
    pub mutant: Mutant,
    pub agents: Agents,
    /// Without a backup the VM stands still.
    pub freezes: bool,
    /// Write down what happens.
    pub story: bool,
}

impl Rules {
    /// The VM's configuration.
    fn config(self) -> &'static str {
        match (self.agents, self.freezes) {
            (Agents::Free, _) => "",
            (Agents::Shipped, false) => {
                "name = \"vm\"\nmemory_mib = 32\nkernel = \"builtin:probe\"\n[protect]\nreturn_wait_s = 5\n"
            }
            (Agents::Shipped, true) => {
                "name = \"vm\"\nmemory_mib = 32\nkernel = \"builtin:probe\"\n[protect]\nreturn_wait_s = 5\nalone = \"freeze\"\n"
            }
        }
    }
}

/// Who decides what a host is to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Agents {
    /// Agents that ask for anything at any time: their every wish is a step. What a shipped agent may do is among it.
    Free,
    /// The shipped machine, `agent::host::Machine`.
    Shipped,
}

/// Something that is no part of the state: two worlds that differ in it only are the same.
#[derive(Clone, Debug, Default)]
pub struct Aside<T>(pub T);

impl<T> PartialEq for Aside<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Aside<T> {}

impl<T> Hash for Aside<T> {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// What happened, to see that something did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub commits: u64,
    pub takeovers: u64,
    pub refused: u64,
    pub resumed: u64,
    pub superseded: u64,
    pub crashes: u64,
    pub recoveries: u64,
    pub cuts: u64,
    pub partitions: u64,
    pub reconfigurations: u64,
    pub in_place: u64,
    pub anew: u64,
    pub bridged: u64,
    pub resent: u64,
    pub unfit: u64,
    pub feeds: u64,
    pub joins: u64,
    pub failures: u64,
    pub holes: u64,
    pub late_grants: u64,
    pub lost: u64,
    pub stranded: u64,
    pub queries: u64,
    pub orders: u64,
    pub stopped: u64,
    pub started: u64,
    pub deleted: u64,
    pub handed_over: u64,
    pub switches: u64,
    pub powered_off: u64,
    pub given_up: u64,
    pub rebooted: u64,
    pub booted: u64,
    pub adopted: u64,
    pub agents_died: u64,
    pub unprotected: u64,
    pub applied: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        let Self {
            commits,
            takeovers,
            refused,
            resumed,
            superseded,
            crashes,
            recoveries,
            cuts,
            partitions,
            reconfigurations,
            in_place,
            anew,
            bridged,
            resent,
            unfit,
            feeds,
            joins,
            failures,
            holes,
            late_grants,
            lost,
            stranded,
            queries,
            orders,
            stopped,
            started,
            deleted,
            handed_over,
            switches,
            powered_off,
            given_up,
            rebooted,
            booted,
            adopted,
            agents_died,
            unprotected,
            applied,
        } = *other;
        for (sum, more) in [
            (&mut self.commits, commits),
            (&mut self.takeovers, takeovers),
            (&mut self.refused, refused),
            (&mut self.resumed, resumed),
            (&mut self.superseded, superseded),
            (&mut self.crashes, crashes),
            (&mut self.recoveries, recoveries),
            (&mut self.cuts, cuts),
            (&mut self.partitions, partitions),
            (&mut self.reconfigurations, reconfigurations),
            (&mut self.in_place, in_place),
            (&mut self.anew, anew),
            (&mut self.bridged, bridged),
            (&mut self.resent, resent),
            (&mut self.unfit, unfit),
            (&mut self.feeds, feeds),
            (&mut self.joins, joins),
            (&mut self.failures, failures),
            (&mut self.holes, holes),
            (&mut self.late_grants, late_grants),
            (&mut self.lost, lost),
            (&mut self.stranded, stranded),
            (&mut self.queries, queries),
            (&mut self.orders, orders),
            (&mut self.stopped, stopped),
            (&mut self.started, started),
            (&mut self.deleted, deleted),
            (&mut self.handed_over, handed_over),
            (&mut self.switches, switches),
            (&mut self.powered_off, powered_off),
            (&mut self.given_up, given_up),
            (&mut self.rebooted, rebooted),
            (&mut self.booted, booted),
            (&mut self.adopted, adopted),
            (&mut self.agents_died, agents_died),
            (&mut self.unprotected, unprotected),
            (&mut self.applied, applied),
        ] {
            *sum += more;
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    Begin {
        epoch: Epoch,
        base: Base,
        held: bool,
    },
    Data {
        epoch: Epoch,
        items: Content,
    },
    End {
        epoch: Epoch,
        install: Option<Mark>,
        digest: u32,
    },
    Complete(Epoch),
    Heartbeat,
    /// The rest go up. Generation and newest epoch.
    Ack(Generation, Epoch),
    Refused(Generation),
    JoinerReady,
    /// Somebody further down is lost.
    Broken(usize),
    /// Down again: the owner has stopped the VM at this epoch.
    Yield(Epoch),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Update,
    /// Owner to tail: only acks come over it.
    Acks,
}

/// A connection: who made it, to whom, and in which generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId {
    pub from: usize,
    pub to: usize,
    pub generation: Generation,
    pub role: Role,
}

/// What is under way on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    pub down: VecDeque<Message>,
    pub up: VecDeque<Message>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Host {
    pub up: bool,
    /// Agents that it has had.
    pub lives: u32,
    /// Its agent has died: there is no chain server, and nobody looks after the VM's process.
    pub agent_gone: bool,
    /// The newest configuration heard of by a free agent; else the one that ended what was held here.
    pub seen: Generation,
    /// There should be a replica, and was none in this generation.
    pub declined: Option<Generation>,
    pub standby: Option<Standby>,
    pub owner: Option<Owner>,
    /// What the replicas that are left may lack after a takeover.
    pub bridge: Option<Bridge>,
    /// What of a replica outlived a crash.
    pub disk: Option<(Mark, Content)>,
    /// The VM's disks here include what it did up to then: since which boot, and what.
    pub disks: Option<(u32, Content)>,
    pub agent: Aside<Option<Box<Agent>>>,
    /// The revision of the record that its process was started by last.
    pub registered: Aside<u64>,
    /// What the VM's process has said to nobody.
    pub unheard: Aside<Vec<::agent::host::Report>>,
}

/// Why a VM boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Begun {
    /// It was off, and begins with its newest disks.
    Started,
    /// Nobody could resume it: from its owner's disks, which include everything, or from older ones by somebody's order.
    Restarted { newest: bool },
}

/// Something on its way to the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub host: usize,
    /// Of a shipped agent: which life of it asks, and which question it is.
    pub by: (u32, u64),
    pub command: Command,
}

impl Hash for Asked {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.host.hash(state);
        match &self.command {
            Command::TakeOver { expect, at, .. } => (expect, at).hash(state),
            Command::Reconfigure {
                expect,
                chain,
                joining,
                anew,
                ..
            } => (expect, chain, joining, anew).hash(state),
            Command::Register { .. }
            | Command::Start { .. }
            | Command::PowerOff { .. }
            | Command::Update { .. }
            | Command::Remove { .. }
            | Command::Restart { .. }
            | Command::Choose { .. } => {}
        }
    }
}

/// An answer on its way back to who asked for the VM in that generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    pub host: usize,
    pub expect: Generation,
    pub granted: Option<Arc<View>>,
    /// To a shipped agent.
    pub reply: Aside<Option<Reply>>,
}

/// What a shipped agent is answered.
#[derive(Clone, Debug)]
pub struct Reply {
    pub by: (u32, u64),
    pub result: Result<Arc<VmRecord>, ::agent::host::Refusal>,
}

/// The production state machine of the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master(pub Arc<MasterState>);

impl Hash for Master {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Each change raises it; what was decided is in the configuration in force.
        self.0.revision().hash(state);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub rules: Rules,
    pub vm: VmId,
    pub hosts: Vec<Host>,
    pub links: BTreeMap<LinkId, Link>,
    /// Pairs of hosts that cannot reach each other; the master is `hosts.len()`.
    pub blocked: BTreeSet<(usize, usize)>,
    pub master: Master,
    /// The configuration in force, as the master tells it.
    pub now: Arc<View>,
    /// Everything that the master has ever decided, for those who hear of it late: its revision then, and the VM's record, if
    /// there was one.
    pub past: Aside<Vec<(u64, Option<Arc<VmRecord>>)>>,
    /// What the VM's next boot is, if one has been decided.
    pub begun: Option<Begun>,
    pub asked: Vec<Asked>,
    pub answers: Vec<Answer>,
    /// The generations in which the VM has been booted after the first time.
    pub boots: Aside<Vec<Generation>>,
    /// How often the VM has been booted after the first time.
    pub boot: u32,
    /// What the VM had done in each of its lives before, as far as its last owner knew. An ack that was on its way when that life
    /// ended still lets out what belongs to it.
    pub lives: Aside<Vec<Content>>,
    /// What the outside has seen since.
    pub visible: Content,
    /// What was sent under each name.
    pub truth: Arc<BTreeMap<(Generation, Epoch), Content>>,
    /// Microseconds.
    pub clock: Aside<u64>,
    pub counts: Aside<Counts>,
    pub story: Aside<Vec<String>>,
    pub ops: Aside<Vec<Op>>,
}

pub fn name(i: usize) -> HostId {
    static NAMES: LazyLock<Vec<HostId>> = LazyLock::new(|| {
        let name = |i| HostId::new(&format!("h{i}")).expect("a valid name");
        (0..8).map(name).collect()
    });
    NAMES[i].clone()
}

pub fn index(host: &HostId) -> usize {
    usize::from(host.as_str().as_bytes()[1] - b'0')
}

pub fn member(i: usize) -> Member {
    Member::new(name(i), ([127, 0, 0, 1], i as u16 + 1).into())
}

/// How much of `content` was done by the end of that epoch.
pub fn upto(content: &[Item], epoch: Epoch) -> usize {
    content.partition_point(|item| (item >> 8 & 0xff_ffff) <= epoch.0)
}

pub fn digest(items: &[Item]) -> u32 {
    let bytes: Vec<u8> = items.iter().flat_map(|i| i.to_le_bytes()).collect();
    crc32c::crc32c(&bytes)
}

impl World {
    /// All hosts up, the first owns a VM that is not protected yet.
    pub fn new(rules: Rules) -> Self {
        let mut master = MasterState::default();
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: rules.config().into(),
        };
        let register = Command::Register {
            vm: checkpoint::VmId(1),
            name: "vm".into(),
            owner: name(0),
            shape,
            life: chain::Life::On,
        };
        let record = master.apply(&register).expect("the first VM");
        let view = Arc::new(record.view.clone());
        let mut hosts = vec![
            Host {
                up: true,
                ..Host::default()
            };
            rules.hosts
        ];
        hosts[0].owner = Some(Owner::booted(view.clone(), rules.in_flight, 0));
        hosts[0].disks = Some((0, Vec::new()));
        let mut world = Self {
            rules,
            vm: view.vm,
            hosts,
            links: BTreeMap::new(),
            blocked: BTreeSet::new(),
            master: Master(Arc::new(master)),
            now: view,
            past: Aside(vec![(0, None), (record.revision, Some(Arc::new(record)))]),
            begun: None,
            asked: Vec::new(),
            answers: Vec::new(),
            boots: Aside::default(),
            boot: 0,
            lives: Aside::default(),
            visible: Vec::new(),
            truth: Arc::default(),
            clock: Aside::default(),
            counts: Aside::default(),
            story: Aside::default(),
            ops: Aside::default(),
        };
        match rules.agents {
            Agents::Free => world.hosts[0].seen = world.now.generation,
            Agents::Shipped => world.begin_agents(),
        }
        world
    }

    pub fn is_free(&self) -> bool {
        self.rules.agents == Agents::Free
    }

    pub fn is(&self, mutant: Mutant) -> bool {
        self.rules.mutant == mutant
    }

    pub fn say(&mut self, what: impl FnOnce() -> String) {
        if self.rules.story {
            self.story.0.push(what());
        }
    }

    /// What the master tells whoever asks.
    pub fn view(&self) -> Arc<View> {
        self.now.clone()
    }

    pub fn reaches(&self, a: usize, b: usize) -> bool {
        !self.blocked.contains(&(a.min(b), a.max(b)))
    }

    pub fn reaches_master(&self, i: usize) -> bool {
        self.reaches(i, self.rules.hosts)
    }

    pub fn hosts_where(&self, wanted: impl Fn(&Host) -> bool) -> Vec<usize> {
        (0..self.hosts.len())
            .filter(|i| self.hosts[*i].up && wanted(&self.hosts[*i]))
            .collect()
    }
}
