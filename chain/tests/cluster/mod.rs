//! A whole cluster without sockets, clocks and threads: the production machines of replicas and master, and models of
//! what drives them (connections, stores, agents, an owner's client). What happens next is always one [`Step`], and a
//! step's outcome depends on nothing else: whoever picks the steps explores the protocol. The simulation picks them at
//! random from a seed, the model checker picks all of them.

#![allow(dead_code)] // Two explorers, neither uses all of it.

mod agent;
mod check;
mod faults;
mod frames;
mod kept;
mod links;
mod owner;
mod standby;
mod steps;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use chain::master::{Command, MasterState};
use chain::replica::Base;
use chain::{Mark, Member, View, VmRecord, VmShape};
use checkpoint::{Epoch, Generation, HostId, VmId};

pub use check::Op;
pub use owner::Owner;
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
    /// Write down what happens.
    pub story: bool,
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
    pub fenced: u64,
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
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        let Self {
            commits,
            takeovers,
            refused,
            resumed,
            fenced,
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
        } = *other;
        for (sum, more) in [
            (&mut self.commits, commits),
            (&mut self.takeovers, takeovers),
            (&mut self.refused, refused),
            (&mut self.resumed, resumed),
            (&mut self.fenced, fenced),
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
    /// The newest configuration heard of.
    pub seen: Generation,
    pub standby: Option<Standby>,
    pub owner: Option<Owner>,
    /// What outlived a crash.
    pub disk: Option<(Mark, Content)>,
}

/// Something on its way to the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub host: usize,
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
    pub asked: Vec<Asked>,
    pub answers: Vec<Answer>,
    /// What the outside has seen.
    pub visible: Content,
    /// What was sent under each name.
    pub truth: Arc<BTreeMap<(Generation, Epoch), Content>>,
    pub counts: Aside<Counts>,
    pub story: Aside<Vec<String>>,
    pub ops: Aside<Vec<Op>>,
}

pub fn name(i: usize) -> HostId {
    HostId::new(&format!("h{i}")).expect("a valid name")
}

pub fn index(host: &HostId) -> usize {
    host.as_str()[1..].parse().expect("h and a number")
}

pub fn member(i: usize) -> Member {
    Member::new(name(i), ([127, 0, 0, 1], i as u16 + 1).into())
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
            config_toml: String::new(),
        };
        let register = Command::Register {
            vm: checkpoint::VmId(1),
            name: "vm".into(),
            owner: name(0),
            shape,
            life: chain::Life::On,
        };
        let view = Arc::new(master.apply(&register).expect("the first VM").view);
        let mut hosts = vec![
            Host {
                up: true,
                ..Host::default()
            };
            rules.hosts
        ];
        hosts[0].seen = view.generation;
        hosts[0].owner = Some(Owner::new(view.clone(), Vec::new(), Epoch::ZERO, None));
        Self {
            rules,
            vm: view.vm,
            hosts,
            links: BTreeMap::new(),
            blocked: BTreeSet::new(),
            master: Master(Arc::new(master)),
            now: view.clone(),
            asked: Vec::new(),
            answers: Vec::new(),
            visible: Vec::new(),
            truth: Arc::default(),
            counts: Aside::default(),
            story: Aside::default(),
            ops: Aside::default(),
        }
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

    pub fn told(&self, record: VmRecord) -> Arc<View> {
        let mut view = record.view;
        if self.is(Mutant::ForkNotRecorded) {
            view.history.forks.clear();
        }
        Arc::new(view)
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
