//! The master's decisions as a deterministic state machine: the same commands in the same order give the same state
//! on every replica of the master.

use std::collections::BTreeMap;

use checkpoint::{Generation, HostId, VmId};
use serde::{Deserialize, Serialize};

use super::{Command, Snapshot};
use crate::view::{Member, View, VmRecord};

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
                };
                let record = VmRecord {
                    view,
                    shape: shape.clone(),
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
            } => {
                let view = self.view(*vm)?;
                if view.generation == expect.next() && view.owner == *by && view.chain == *chain {
                    return Ok(self.vms[vm].clone());
                }
                owned(view, *expect, by)?;
                check_chain(by, chain)?;
                Ok(self.decide(*vm, by.clone(), chain.clone()))
            }
            Command::TakeOver { vm, expect, by } => {
                let view = self.view(*vm)?;
                if view.generation == expect.next() && view.owner == *by {
                    return Ok(self.vms[vm].clone());
                }
                in_generation(view, *expect)?;
                if view.position(by).is_none() {
                    return Err(Rejection::NotMember {
                        vm: *vm,
                        by: by.clone(),
                    });
                }
                let chain = view
                    .chain
                    .iter()
                    .filter(|m| m.host != *by)
                    .cloned()
                    .collect();
                Ok(self.decide(*vm, by.clone(), chain))
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

    fn decide(&mut self, vm: VmId, owner: HostId, chain: Vec<Member>) -> VmRecord {
        self.revision += 1;
        let record = self.vms.get_mut(&vm).expect("the caller has looked it up");
        record.view.generation = record.view.generation.next();
        record.view.owner = owner;
        record.view.chain = chain;
        record.clone()
    }
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

fn check_chain(owner: &HostId, chain: &[Member]) -> Result<(), Rejection> {
    if chain.len() > CHAIN_MAX {
        return Err(Rejection::Chain(format!(
            "{} replicas, at most {CHAIN_MAX} are possible",
            chain.len()
        )));
    }
    for (i, member) in chain.iter().enumerate() {
        if member.host == *owner {
            return Err(Rejection::Chain(format!(
                "{owner} is the owner; a backup has to be another host"
            )));
        }
        if chain[..i].iter().any(|m| m.host == member.host) {
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
        Member {
            host: host(name),
            addr: "127.0.0.1:1".parse().unwrap(),
        }
    }

    fn protected() -> (MasterState, VmId) {
        let mut state = MasterState::default();
        let shape = VmShape {
            ram: vec![],
            vcpus: 1,
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
        let chain = vec![member("b"), member("c")];
        state
            .apply(&Command::Reconfigure {
                vm,
                expect: Generation(1),
                by: host("a"),
                chain,
            })
            .unwrap();
        (state, vm)
    }

    #[test]
    fn i4_of_two_takeovers_in_one_generation_only_one_is_granted() {
        let (mut state, vm) = protected();
        let take = |by: &str| Command::TakeOver {
            vm,
            expect: Generation(2),
            by: host(by),
        };
        let record = state.apply(&take("b")).unwrap();
        assert_eq!(
            (record.view.generation, record.view.owner),
            (Generation(3), host("b"))
        );
        assert_eq!(record.view.chain, [member("c")]);
        assert!(matches!(
            state.apply(&take("c")),
            Err(Rejection::Generation { .. })
        ));
        // The old owner can decide nothing any more.
        let old = Command::Reconfigure {
            vm,
            expect: Generation(2),
            by: host("a"),
            chain: vec![],
        };
        assert!(matches!(
            state.apply(&old),
            Err(Rejection::Generation { .. })
        ));
        let old = Command::Reconfigure {
            vm,
            expect: Generation(3),
            by: host("a"),
            chain: vec![],
        };
        assert!(matches!(state.apply(&old), Err(Rejection::NotOwner { .. })));
    }

    #[test]
    fn a_repeated_command_is_answered_as_the_first_time() {
        let (mut state, vm) = protected();
        let take = Command::TakeOver {
            vm,
            expect: Generation(2),
            by: host("b"),
        };
        let first = state.apply(&take).unwrap();
        let revision = state.revision();
        assert_eq!(state.apply(&take).unwrap(), first);
        assert_eq!(state.revision(), revision);
    }

    #[test]
    fn only_a_member_may_take_over_and_only_a_possible_chain_is_taken() {
        let (mut state, vm) = protected();
        let stranger = Command::TakeOver {
            vm,
            expect: Generation(2),
            by: host("x"),
        };
        assert!(matches!(
            state.apply(&stranger),
            Err(Rejection::NotMember { .. })
        ));
        for chain in [vec![member("a")], vec![member("b"), member("b")]] {
            let command = Command::Reconfigure {
                vm,
                expect: Generation(2),
                by: host("a"),
                chain,
            };
            assert!(matches!(state.apply(&command), Err(Rejection::Chain(_))));
        }
    }
}
