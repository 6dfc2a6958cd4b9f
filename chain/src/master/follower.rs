//! What one host knows of the master's decisions, in their order: answers to its own proposals and snapshots arrive in any
//! order, and nothing older undoes what is newer. A state machine without I/O.

use std::collections::BTreeMap;

use checkpoint::{ClusterId, VmId};

use super::{Command, Snapshot};
use crate::view::VmRecord;

/// What is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Followed {
    /// Which cluster this host follows from now on; said once, first of all.
    Joined(ClusterId),
    /// A decision on a VM, newer than all before on the same VM.
    Decided(Box<VmRecord>),
    /// The master knows the VM no more; nothing will be said of it again.
    Removed(VmId),
    /// A snapshot is older than one before: the master has lost decisions. It was ignored. Said once until a newer one comes.
    Stale {
        /// In words, with the remedy.
        why: String,
    },
    /// A snapshot is another cluster's. It was ignored. Said once for each such cluster.
    Foreign {
        /// In words, with the remedy.
        why: String,
    },
}

/// The machine.
#[derive(Clone, Debug, Default)]
pub struct Follower {
    cluster: Option<ClusterId>,
    /// The newest snapshot's revision.
    revision: u64,
    known: BTreeMap<VmId, VmRecord>,
    /// VMs whose removal was answered, with its revision, until a snapshot includes that.
    removed: BTreeMap<VmId, u64>,
    said_stale: bool,
    said_foreign: Option<ClusterId>,
}

impl Follower {
    /// Of a host that belongs to that cluster; without one it joins the first that it hears of.
    #[must_use]
    pub fn new(cluster: Option<ClusterId>) -> Self {
        Self {
            cluster,
            ..Self::default()
        }
    }

    /// The newest revision of which everything is known: what a watch is to wait beyond.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The cluster, once it is known.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// What is known of a VM.
    #[must_use]
    pub fn record(&self, vm: VmId) -> Option<&VmRecord> {
        self.known.get(&vm)
    }

    /// All VMs known.
    pub fn records(&self) -> impl Iterator<Item = &VmRecord> {
        self.known.values()
    }

    /// The master's answer to a command of this host.
    pub fn answered(&mut self, command: &Command, record: &VmRecord) -> Vec<Followed> {
        let vm = record.view.vm;
        // A snapshot that is newer has it, or has what came after it.
        if record.revision <= self.revision {
            return Vec::new();
        }
        if let Command::Remove { .. } = command {
            let before = self.removed.insert(vm, record.revision);
            self.known.remove(&vm);
            return match before {
                Some(_) => Vec::new(),
                None => vec![Followed::Removed(vm)],
            };
        }
        if self.removed.contains_key(&vm) {
            return Vec::new();
        }
        self.decided(record).into_iter().collect()
    }

    /// Everything that the master had decided at one moment.
    pub fn snapshot(&mut self, snapshot: &Snapshot) -> Vec<Followed> {
        let mut news = Vec::new();
        match self.cluster {
            Some(cluster) if cluster != snapshot.cluster => {
                return self.foreign(cluster, snapshot).into_iter().collect();
            }
            Some(_) => {}
            None => {
                self.cluster = Some(snapshot.cluster);
                news.push(Followed::Joined(snapshot.cluster));
            }
        }
        if snapshot.revision < self.revision {
            news.extend(self.stale(snapshot));
            return news;
        }
        self.said_stale = false;
        self.revision = snapshot.revision;
        // First what is gone: its name may be another's by now.
        let here = |vm: &VmId| snapshot.records.iter().any(|r| r.view.vm == *vm);
        let gone: Vec<VmId> = self
            .known
            .values()
            .filter(|known| snapshot.revision > known.revision && !here(&known.view.vm))
            .map(|known| known.view.vm)
            .collect();
        for vm in gone {
            self.known.remove(&vm);
            news.push(Followed::Removed(vm));
        }
        let mut records: Vec<&VmRecord> = snapshot.records.iter().collect();
        records.sort_by_key(|record| record.revision);
        for record in records {
            if !self.removed.contains_key(&record.view.vm) {
                news.extend(self.decided(record));
            }
        }
        self.removed
            .retain(|_, revision| *revision > snapshot.revision);
        news
    }

    fn decided(&mut self, record: &VmRecord) -> Option<Followed> {
        let known = self.known.get(&record.view.vm);
        if known.is_some_and(|known| known.revision >= record.revision) {
            return None;
        }
        self.known.insert(record.view.vm, record.clone());
        Some(Followed::Decided(Box::new(record.clone())))
    }

    fn stale(&mut self, snapshot: &Snapshot) -> Option<Followed> {
        if std::mem::replace(&mut self.said_stale, true) {
            return None;
        }
        Some(Followed::Stale {
            why: format!(
                "the master is at revision {}, but has been at {} before: an old record was put back, and what was decided since is lost; VMs run on as they were, and no failover is certain until the newest record is restored",
                snapshot.revision, self.revision
            ),
        })
    }

    fn foreign(&mut self, ours: ClusterId, snapshot: &Snapshot) -> Option<Followed> {
        if self.said_foreign.replace(snapshot.cluster) == Some(snapshot.cluster) {
            return None;
        }
        Some(Followed::Foreign {
            why: format!(
                "the master that answers is of cluster {}, but this host belongs to cluster {ours}: its decisions count for nothing here (is `[master]` in host.toml right, or was the master's record begun anew?)",
                snapshot.cluster
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::master::{DisksFrom, MasterState};
    use crate::view::{Life, Member, VmShape};
    use checkpoint::{Generation, HostId};
    use proptest::prelude::*;

    const CLUSTER: ClusterId = ClusterId(1);

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn register(vm: VmId, name: &str) -> Command {
        Command::Register {
            vm,
            name: name.into(),
            owner: host("a"),
            life: Life::On,
            shape: VmShape {
                ram: vec![],
                vcpus: 1,
                cpu: Default::default(),
                disks: vec![],
                config_toml: String::new(),
            },
        }
    }

    fn decided(news: &[Followed]) -> Vec<VmId> {
        let vm = |news: &Followed| match news {
            Followed::Decided(record) => Some(record.view.vm),
            _ => None,
        };
        news.iter().filter_map(vm).collect()
    }

    #[test]
    fn l7_a_snapshot_older_than_a_registration_does_not_undo_it() {
        let mut state = MasterState::new(CLUSTER);
        let mut follower = Follower::new(Some(CLUSTER));
        let old = state.snapshot();
        let commands: Vec<Command> = (1..=6)
            .map(|n| register(VmId(n), &format!("vm{n}")))
            .collect();
        let records: Vec<VmRecord> = commands.iter().map(|c| state.apply(c).unwrap()).collect();
        for (command, record) in commands.iter().zip(&records) {
            assert_eq!(follower.answered(command, record).len(), 1);
        }
        assert_eq!(follower.snapshot(&old), []);
        assert_eq!(follower.snapshot(&state.snapshot()), []);
        assert_eq!(follower.records().count(), 6);
    }

    #[test]
    fn h17_neither_an_empty_nor_an_old_record_removes_a_vm_and_each_is_said_once() {
        let mut state = MasterState::new(CLUSTER);
        let mut follower = Follower::new(None);
        state.apply(&register(VmId(1), "one")).unwrap();
        let older = state.snapshot();
        state.apply(&register(VmId(2), "two")).unwrap();
        let news = follower.snapshot(&state.snapshot());
        assert_eq!(news[0], Followed::Joined(CLUSTER));
        assert_eq!(decided(&news), [VmId(1), VmId(2)]);
        // Begun anew, in a directory that was not mounted: it may even have a higher revision.
        let mut other = MasterState::new(ClusterId(2));
        for n in 1..9 {
            other.apply(&register(VmId(n), &format!("vm{n}"))).unwrap();
        }
        let news = follower.snapshot(&other.snapshot());
        assert!(matches!(&news[..], [Followed::Foreign { .. }]), "{news:?}");
        assert_eq!(follower.snapshot(&other.snapshot()), []);
        // An old record put back.
        let news = follower.snapshot(&older);
        assert!(matches!(&news[..], [Followed::Stale { .. }]), "{news:?}");
        assert_eq!(follower.snapshot(&older), []);
        assert_eq!(follower.records().count(), 2);
        // The newest again, and lost again.
        assert_eq!(follower.snapshot(&state.snapshot()), []);
        let news = follower.snapshot(&older);
        assert!(matches!(&news[..], [Followed::Stale { .. }]), "{news:?}");
    }

    #[test]
    fn a_name_that_is_given_again_is_first_free() {
        let mut state = MasterState::new(CLUSTER);
        let mut follower = Follower::new(Some(CLUSTER));
        state.apply(&register(VmId(9), "web")).unwrap();
        follower.snapshot(&state.snapshot());
        let remove = Command::Remove {
            vm: VmId(9),
            expect: Generation(1),
            by: host("a"),
        };
        state.apply(&remove).unwrap();
        state.apply(&register(VmId(3), "web")).unwrap();
        let news = follower.snapshot(&state.snapshot());
        assert_eq!(news[0], Followed::Removed(VmId(9)));
        assert_eq!(decided(&news), [VmId(3)]);
    }

    /// A change that fits what is, picked by a number.
    fn change(state: &MasterState, pick: u8, next: &mut u128) -> Command {
        let records = state.snapshot().records;
        let (which, what) = (usize::from(pick / 8), pick % 8);
        let Some(record) = records.get(which % (records.len() + 1)) else {
            *next += 1;
            return register(VmId(*next), &format!("vm{}", *next % 3));
        };
        let (vm, expect) = (record.view.vm, record.view.generation);
        let by = record.view.owner.clone();
        let member = Member::new(host("b"), ([127, 0, 0, 1], 1).into());
        match (what, record.life) {
            (0 | 1, _) => Command::Remove { vm, expect, by },
            (_, Life::Off) => Command::Start {
                vm,
                expect,
                by,
                from: DisksFrom::Newest,
            },
            (2, _) => Command::PowerOff {
                vm,
                expect,
                by,
                at: None,
            },
            (3, _) => Command::Choose {
                vm,
                by,
                backups: vec![host("c")],
            },
            _ => Command::Reconfigure {
                vm,
                expect,
                by,
                chain: vec![member],
                joining: None,
                anew: true,
            },
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Whatever arrives when: nothing is undone, and in the end all is known.
        #[test]
        fn l7_any_order_of_answers_and_snapshots_gives_what_was_decided(
            picks in proptest::collection::vec(any::<u8>(), 1..40),
            order in proptest::collection::vec(any::<u16>(), 0..120),
        ) {
            let mut state = MasterState::new(CLUSTER);
            let mut next = 0;
            let (mut snapshots, mut answers) = (vec![state.snapshot()], Vec::new());
            for pick in picks {
                let command = change(&state, pick, &mut next);
                // A name that is taken is a refusal, which says nothing.
                if let Ok(record) = state.apply(&command) {
                    answers.push((command, record));
                    snapshots.push(state.snapshot());
                }
            }
            let last = state.snapshot();
            let mut follower = Follower::new(None);
            let mut newest: BTreeMap<VmId, u64> = BTreeMap::new();
            let mut gone: Vec<VmId> = Vec::new();
            let mut check = |news: Vec<Followed>| {
                for news in news {
                    match news {
                        Followed::Decided(record) => {
                            let vm = record.view.vm;
                            prop_assert!(!gone.contains(&vm), "{vm} came back");
                            let before = newest.insert(vm, record.revision);
                            prop_assert!(before.is_none_or(|before| before < record.revision));
                        }
                        Followed::Removed(vm) => {
                            prop_assert!(last.records.iter().all(|r| r.view.vm != vm));
                            prop_assert!(!gone.contains(&vm), "{vm} twice");
                            gone.push(vm);
                        }
                        Followed::Foreign { why } => prop_assert!(false, "{why}"),
                        Followed::Joined(_) | Followed::Stale { .. } => {}
                    }
                }
                Ok(())
            };
            for n in order {
                let n = usize::from(n);
                match (n % 2, answers.get(n / 2 % (answers.len() + 1))) {
                    (0, Some((command, record))) => check(follower.answered(command, record))?,
                    _ => check(follower.snapshot(&snapshots[n / 2 % snapshots.len()]))?,
                }
            }
            check(follower.snapshot(&last))?;
            let known: Vec<VmRecord> = follower.records().cloned().collect();
            prop_assert_eq!(known, last.records);
        }
    }
}
