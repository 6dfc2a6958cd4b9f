//! The master's decisions as a deterministic state machine: the same commands in the same order give the same state
//! on every replica of the master.

use std::collections::BTreeMap;

use checkpoint::{Generation, HostId, VmId};
use serde::{Deserialize, Serialize};

use super::{Command, Snapshot};
use crate::mark::Mark;
use crate::view::{History, Member, View, VmRecord};

/// Most replicas in a chain.
pub const CHAIN_MAX: usize = 16;

/// Why a command changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Rejection {
    /// The name is taken.
    #[error(
        "a VM named {0:?} exists already (owner: {1}); choose another name, or stop that VM first"
    )]
    NameTaken(String, HostId),
    /// There is no such VM.
    #[error("the master knows no VM {0}")]
    Unknown(VmId),
    /// Decided on another generation.
    #[error("VM {vm} is in generation {actual} (owner: {owner}), not {expected}")]
    Generation {
        /// The VM.
        vm: VmId,
        /// As asked.
        expected: Generation,
        /// As it is.
        actual: Generation,
        /// Its owner.
        owner: HostId,
    },
    /// Only the owner may ask for this.
    #[error("{by} does not own VM {vm}, {owner} does")]
    NotOwner {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
        /// Its owner.
        owner: HostId,
    },
    /// Only a replica of the chain may take over.
    #[error("{by} is no member of VM {vm}'s chain")]
    NotMember {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
    },
    /// What the replica holds is no part of the VM's history any more.
    #[error("{by} holds checkpoint {at} of VM {vm}, which is not part of its history any more")]
    Outdated {
        /// The VM.
        vm: VmId,
        /// Who asked.
        by: HostId,
        /// What it holds.
        at: Mark,
    },
    /// A chain that cannot be.
    #[error("that chain cannot be: {0}")]
    Chain(String),
}

/// Everything the master knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterState {
    revision: u64,
    last_vm: u64,
    vms: BTreeMap<VmId, VmRecord>,
}

impl MasterState {
    /// The state as its clients see it.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            revision: self.revision,
            records: self.vms.values().cloned().collect(),
        }
    }

    /// For an engine that keeps each VM's record by itself: the state that these records are.
    #[cfg(feature = "etcd")]
    pub(super) fn of(last_vm: u64, records: Vec<VmRecord>) -> Self {
        Self {
            revision: 0,
            last_vm,
            vms: records.into_iter().map(|r| (r.view.vm, r)).collect(),
        }
    }

    /// The number of the newest VM.
    #[cfg(feature = "etcd")]
    pub(super) fn last_vm(&self) -> u64 {
        self.last_vm
    }

    /// Raised by every change.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Applies one command. A repeated command (its answer was lost) is answered as the first time.
    ///
    /// # Errors
    /// [`Rejection`]; nothing has changed then.
    pub fn apply(&mut self, command: &Command) -> Result<VmRecord, Rejection> {
        match command {
            Command::Register { name, owner, shape } => {
                if let Some(there) = self.vms.values().find(|r| r.view.name == *name) {
                    if there.view.owner == *owner
                        && there.shape == *shape
                        && there.view.generation == Generation(1)
                    {
                        return Ok(there.clone());
                    }
                    return Err(Rejection::NameTaken(name.clone(), there.view.owner.clone()));
                }
                self.last_vm += 1;
                let vm = VmId(self.last_vm);
                let view = View {
                    vm,
                    name: name.clone(),
                    generation: Generation(1),
                    owner: owner.clone(),
                    chain: Vec::new(),
                    joining: None,
                    history: History::new(Generation(1)),
                };
                let record = VmRecord {
                    view,
                    shape: shape.clone(),
                    hosts: vec![owner.clone()],
                };
                self.vms.insert(vm, record.clone());
                self.revision += 1;
                Ok(record)
            }
            Command::Reconfigure {
                vm,
                expect,
                by,
                chain,
                joining,
                anew,
            } => {
                let view = self.view(*vm)?;
                let repeated = view.generation == expect.next()
                    && view.owner == *by
                    && same(&view.chain, chain)
                    && same(view.joining.as_slice(), joining.as_slice())
                    && (!*anew || view.history.since == view.generation);
                if repeated {
                    return Ok(self.vms[vm].clone());
                }
                owned(view, *expect, by)?;
                check_chain(by, chain, joining.as_ref())?;
                if !*anew {
                    check_in_place(view, chain)?;
                } else if joining.is_some() {
                    let why = "a replica can join once the chain is filled, not before";
                    return Err(Rejection::Chain(why.into()));
                }
                let mut next = view.clone();
                next.generation = expect.next();
                if *anew || chain.is_empty() {
                    next.history = History::new(next.generation);
                }
                next.chain = entered(chain, view, *anew, next.generation);
                next.joining = joining.clone().map(|member| Member {
                    since: next.generation,
                    ..member
                });
                Ok(self.decide(next))
            }
            Command::TakeOver { vm, expect, by, at } => {
                let view = self.view(*vm)?;
                if view.generation == expect.next() && view.owner == *by {
                    return Ok(self.vms[vm].clone());
                }
                in_generation(view, *expect)?;
                let Some(position) = view.position(by) else {
                    return Err(Rejection::NotMember {
                        vm: *vm,
                        by: by.clone(),
                    });
                };
                if !view.history.contains(*at) {
                    return Err(Rejection::Outdated {
                        vm: *vm,
                        by: by.clone(),
                        at: *at,
                    });
                }
                let mut next = view.clone();
                next.generation = expect.next();
                next.owner = by.clone();
                next.joining = None;
                next.chain.drain(..=position);
                if next.chain.is_empty() {
                    next.history = History::new(next.generation);
                } else {
                    next.history.fork(*expect, at.epoch);
                }
                Ok(self.decide(next))
            }
            Command::Choose { vm, by, backups } => {
                let view = self.view(*vm)?;
                owned(view, view.generation, by)?;
                let mut hosts = vec![by.clone()];
                hosts.extend(backups.iter().filter(|host| *host != by).cloned());
                let record = self.vms.get_mut(vm).ok_or(Rejection::Unknown(*vm))?;
                if record.hosts != hosts {
                    record.hosts = hosts;
                    self.revision += 1;
                }
                Ok(record.clone())
            }
            Command::Restart { vm, expect, by } => {
                let view = self.view(*vm)?;
                let repeated = view.generation == expect.next()
                    && view.owner == *by
                    && view.chain.is_empty()
                    && view.history.since == view.generation;
                if repeated {
                    return Ok(self.vms[vm].clone());
                }
                in_generation(view, *expect)?;
                if view.owner != *by && view.position(by).is_none() {
                    return Err(Rejection::NotMember {
                        vm: *vm,
                        by: by.clone(),
                    });
                }
                let next = View {
                    generation: expect.next(),
                    owner: by.clone(),
                    chain: Vec::new(),
                    joining: None,
                    history: History::new(expect.next()),
                    ..view.clone()
                };
                Ok(self.decide(next))
            }
            Command::Remove { vm, expect, by } => {
                owned(self.view(*vm)?, *expect, by)?;
                self.revision += 1;
                self.vms.remove(vm).ok_or(Rejection::Unknown(*vm))
            }
        }
    }

    fn view(&self, vm: VmId) -> Result<&View, Rejection> {
        self.vms
            .get(&vm)
            .map(|r| &r.view)
            .ok_or(Rejection::Unknown(vm))
    }

    fn decide(&mut self, view: View) -> VmRecord {
        self.revision += 1;
        let record = self
            .vms
            .get_mut(&view.vm)
            .expect("the caller has looked it up");
        record.enter(view);
        record.clone()
    }
}

/// The same replicas at the same addresses; since when they are members is not the asker's to know.
fn same(a: &[Member], b: &[Member]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|(a, b)| a.host == b.host && a.addr == b.addr)
}

/// The members of `chain`, each with the generation since which it is one.
fn entered(chain: &[Member], view: &View, anew: bool, now: Generation) -> Vec<Member> {
    let since = |host: &HostId| match view.position(host) {
        Some(position) if !anew => view.chain[position].since,
        _ => now,
    };
    chain
        .iter()
        .map(|member| Member {
            since: since(&member.host),
            ..member.clone()
        })
        .collect()
}

/// In place, a chain is what is left of the old one, in its order: each replica then holds a prefix of what those before it
/// hold. Only the replica that the tail has been filling may come in addition, at the end.
fn check_in_place(view: &View, chain: &[Member]) -> Result<(), Rejection> {
    let mut last = None;
    for (i, member) in chain.iter().enumerate() {
        match view.position(&member.host) {
            Some(position) if last.is_none_or(|last| position > last) => last = Some(position),
            None if view.is_joining(&member.host) && i + 1 == chain.len() && i > 0 => {}
            _ => {
                return Err(Rejection::Chain(format!(
                    "{} cannot be there unless the chain begins anew",
                    member.host
                )));
            }
        }
    }
    Ok(())
}

fn in_generation(view: &View, expected: Generation) -> Result<(), Rejection> {
    if view.generation == expected {
        return Ok(());
    }
    Err(Rejection::Generation {
        vm: view.vm,
        expected,
        actual: view.generation,
        owner: view.owner.clone(),
    })
}

fn owned(view: &View, expected: Generation, by: &HostId) -> Result<(), Rejection> {
    in_generation(view, expected)?;
    if view.owner == *by {
        return Ok(());
    }
    Err(Rejection::NotOwner {
        vm: view.vm,
        by: by.clone(),
        owner: view.owner.clone(),
    })
}

fn check_chain(
    owner: &HostId,
    chain: &[Member],
    joining: Option<&Member>,
) -> Result<(), Rejection> {
    if chain.len() > CHAIN_MAX {
        return Err(Rejection::Chain(format!(
            "{} replicas, at most {CHAIN_MAX} are possible",
            chain.len()
        )));
    }
    if joining.is_some() && chain.is_empty() {
        return Err(Rejection::Chain(
            "nobody is there to fill the joining replica".into(),
        ));
    }
    let all: Vec<&Member> = chain.iter().chain(joining).collect();
    for (i, member) in all.iter().enumerate() {
        if member.host == *owner {
            return Err(Rejection::Chain(format!(
                "{owner} is the owner; a backup has to be another host"
            )));
        }
        if all[..i].iter().any(|m| m.host == member.host) {
            return Err(Rejection::Chain(format!("{} is in it twice", member.host)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::VmShape;

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn member(name: &str) -> Member {
        Member::new(host(name), "127.0.0.1:1".parse().unwrap())
    }

    fn mark(generation: u64, epoch: u64) -> Mark {
        Mark {
            generation: Generation(generation),
            epoch: checkpoint::Epoch(epoch),
            digest: 0,
            held: true,
        }
    }

    fn reconfigure(vm: VmId, expect: u64, by: &str, chain: &[&str], anew: bool) -> Command {
        Command::Reconfigure {
            vm,
            expect: Generation(expect),
            by: host(by),
            chain: chain.iter().map(|name| member(name)).collect(),
            joining: None,
            anew,
        }
    }

    fn take(vm: VmId, expect: u64, by: &str, at: Mark) -> Command {
        Command::TakeOver {
            vm,
            expect: Generation(expect),
            by: host(by),
            at,
        }
    }

    fn hosts(record: &VmRecord) -> Vec<&str> {
        record.view.chain.iter().map(|m| m.host.as_str()).collect()
    }

    fn protected() -> (MasterState, VmId) {
        let mut state = MasterState::default();
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: String::new(),
        };
        let vm = state
            .apply(&Command::Register {
                name: "web".into(),
                owner: host("a"),
                shape,
            })
            .unwrap()
            .view
            .vm;
        state
            .apply(&reconfigure(vm, 1, "a", &["b", "c", "d"], true))
            .unwrap();
        (state, vm)
    }

    #[test]
    fn whoever_has_had_a_part_is_wanted_back_until_an_administrator_chooses() {
        let (mut state, vm) = protected();
        state.apply(&take(vm, 2, "b", mark(2, 7))).unwrap();
        let record = state.apply(&take(vm, 3, "c", mark(2, 7))).unwrap();
        assert_eq!(hosts(&record), ["d"], "the chain has forgotten them");
        let wanted = record.wanted_by(&host("c"));
        assert_eq!(wanted, ["a", "b", "d"].map(host));
        let choose = |by, backups: &[&str]| Command::Choose {
            vm,
            by: host(by),
            backups: backups.iter().map(|name| host(name)).collect(),
        };
        assert!(state.apply(&choose("b", &["d"])).is_err(), "not the owner");
        let record = state.apply(&choose("c", &["d"])).unwrap();
        assert_eq!(record.wanted_by(&host("c")), [host("d")]);
        assert_eq!(
            record.view.generation,
            Generation(4),
            "nothing else has changed"
        );
        let revision = state.revision();
        state.apply(&choose("c", &["d"])).unwrap();
        assert_eq!(state.revision(), revision);
    }

    #[test]
    fn i4_of_two_copies_that_claim_to_be_valid_only_one_is() {
        let restart = |vm, expect, by| Command::Restart {
            vm,
            expect: Generation(expect),
            by: host(by),
        };
        let copies = |vm| {
            [
                restart(vm, 2, "a"),
                restart(vm, 2, "b"),
                restart(vm, 2, "d"),
                take(vm, 2, "b", mark(2, 7)),
                take(vm, 2, "c", mark(2, 6)),
            ]
        };
        for first in 0..5 {
            let (mut state, vm) = protected();
            let copies = copies(vm);
            let granted = state.apply(&copies[first]).unwrap();
            assert_eq!(granted.view.generation, Generation(3));
            for (i, other) in copies.iter().enumerate() {
                let answer = state.apply(other);
                // Asked again, as if the answer had been lost, it is the same one; a takeover counts as asked again
                // whoever's disk it was to be.
                match answer {
                    Ok(again) => assert_eq!(again, granted, "{i} after {first}"),
                    Err(Rejection::Generation { .. }) => assert_ne!(i, first),
                    Err(e) => panic!("{e}"),
                }
            }
        }
        let (mut state, vm) = protected();
        let stranger = state.apply(&restart(vm, 2, "z"));
        assert!(matches!(stranger, Err(Rejection::NotMember { .. })));
        let record = state.apply(&restart(vm, 2, "a")).unwrap();
        assert!(record.view.chain.is_empty() && !record.view.history.contains(mark(2, 7)));
    }

    #[test]
    fn i4_of_two_takeovers_in_one_generation_only_one_is_granted() {
        let (mut state, vm) = protected();
        let record = state.apply(&take(vm, 2, "b", mark(2, 7))).unwrap();
        assert_eq!(
            (record.view.generation, record.view.owner.clone()),
            (Generation(3), host("b"))
        );
        assert_eq!(hosts(&record), ["c", "d"]);
        let late = state.apply(&take(vm, 2, "c", mark(2, 7)));
        assert!(matches!(late, Err(Rejection::Generation { .. })));
        // The old owner can decide nothing any more.
        let old = state.apply(&reconfigure(vm, 2, "a", &[], false));
        assert!(matches!(old, Err(Rejection::Generation { .. })));
        let old = state.apply(&reconfigure(vm, 3, "a", &[], false));
        assert!(matches!(old, Err(Rejection::NotOwner { .. })));
    }

    #[test]
    fn i5_a_takeover_leaves_replicas_before_it_out_and_cuts_what_they_had_more() {
        let (mut state, vm) = protected();
        let record = state.apply(&take(vm, 2, "c", mark(2, 7))).unwrap();
        assert_eq!(hosts(&record), ["d"]);
        assert!(record.view.in_place());
        assert!(record.view.history.contains(mark(2, 7)));
        assert!(!record.view.history.contains(mark(2, 8)));
        // What is no part of the history cannot be resumed.
        let outdated = state.apply(&take(vm, 3, "d", mark(2, 8)));
        assert!(matches!(outdated, Err(Rejection::Outdated { .. })));
        let record = state.apply(&take(vm, 3, "d", mark(2, 6))).unwrap();
        // The last one: nothing is left that an owner could go on with.
        assert!(record.view.chain.is_empty());
        assert!(!record.view.history.contains(mark(2, 6)));
    }

    #[test]
    fn a_repeated_command_is_answered_as_the_first_time() {
        let (mut state, vm) = protected();
        let joining = Command::Reconfigure {
            vm,
            expect: Generation(2),
            by: host("a"),
            chain: vec![member("b"), member("c")],
            joining: Some(member("e")),
            anew: false,
        };
        for command in [joining, take(vm, 3, "b", mark(2, 7))] {
            let first = state.apply(&command).unwrap();
            let revision = state.revision();
            assert_eq!(state.apply(&command).unwrap(), first);
            assert_eq!(state.revision(), revision);
        }
    }

    #[test]
    fn only_a_member_may_take_over_and_only_a_possible_chain_is_taken() {
        let (mut state, vm) = protected();
        let stranger = state.apply(&take(vm, 2, "x", mark(2, 7)));
        assert!(matches!(stranger, Err(Rejection::NotMember { .. })));
        for chain in [&["a"][..], &["b", "b"]] {
            let result = state.apply(&reconfigure(vm, 2, "a", chain, true));
            assert!(matches!(result, Err(Rejection::Chain(_))), "{chain:?}");
        }
        // In place: no other order, nobody new, and nothing to go on from without a chain.
        for chain in [&["c", "b"][..], &["b", "e"], &["e"]] {
            let result = state.apply(&reconfigure(vm, 2, "a", chain, false));
            assert!(matches!(result, Err(Rejection::Chain(_))), "{chain:?}");
        }
        let record = state.apply(&reconfigure(vm, 2, "a", &["b", "d"], false));
        assert_eq!(hosts(&record.unwrap()), ["b", "d"]);
        let record = state.apply(&reconfigure(vm, 3, "a", &[], false)).unwrap();
        assert!(!record.view.history.contains(mark(2, 1)), "output flows");
        let result = state.apply(&reconfigure(vm, 4, "a", &["b"], false));
        assert!(matches!(result, Err(Rejection::Chain(_))));
    }

    #[test]
    fn a_joining_replica_becomes_the_tail_and_is_a_member_from_then_on_only() {
        let (mut state, vm) = protected();
        let join = |expect, chain: &[&str], joining: Option<&str>| Command::Reconfigure {
            vm,
            expect: Generation(expect),
            by: host("a"),
            chain: chain.iter().map(|name| member(name)).collect(),
            joining: joining.map(member),
            anew: false,
        };
        let member_twice = state.apply(&join(2, &["b", "c"], Some("c")));
        assert!(matches!(member_twice, Err(Rejection::Chain(_))));
        let alone = state.apply(&join(2, &[], Some("e")));
        assert!(matches!(alone, Err(Rejection::Chain(_))));
        let record = state.apply(&join(2, &["b", "c"], Some("d"))).unwrap();
        assert_eq!(hosts(&record), ["b", "c"]);
        let record = state.apply(&join(3, &["b", "c", "d"], None)).unwrap();
        let since: Vec<u64> = record.view.chain.iter().map(|m| m.since.0).collect();
        assert_eq!(since, [2, 2, 4], "d was out for a generation");
        assert!(record.view.history.contains(mark(2, 7)));
    }
}
