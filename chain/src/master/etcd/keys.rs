//! What is kept in etcd under which key, and what a decision reads, compares and writes. No I/O.
//!
//! ```text
//! <prefix>/changed        written by every decision: its mod_revision is the master's revision
//! <prefix>/last           number of the newest VM, in decimal
//! <prefix>/vm/<number>    a VM's record (JSON)
//! ```

use std::collections::BTreeMap;

use crate::master::{Command, MasterError, MasterState, Rejection, Snapshot};
use crate::view::VmRecord;
use checkpoint::VmId;

/// The keys below one prefix.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

/// One key as it was read.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub key: String,
    pub value: Vec<u8>,
    /// The revision of etcd's store in which it was written last.
    pub mod_revision: i64,
}

/// Everything below the prefix, at one revision of etcd's store.
#[derive(Clone, Debug, Default)]
pub(super) struct Read {
    /// The master's revision.
    pub revision: u64,
    state: MasterState,
    revisions: BTreeMap<String, i64>,
}

/// A transaction: done if none of the keys compared has been written since it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Write {
    /// Keys with their mod_revision; 0: there is none.
    pub compare: Vec<(String, i64)>,
    pub put: Vec<(String, Vec<u8>)>,
    pub delete: Option<String>,
}

impl Keys {
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.trim_end_matches('/').into(),
        }
    }

    /// What all keys begin with.
    pub fn all(&self) -> String {
        format!("{}/", self.prefix)
    }

    pub fn changed(&self) -> String {
        format!("{}/changed", self.prefix)
    }

    fn last(&self) -> String {
        format!("{}/last", self.prefix)
    }

    fn vm(&self, vm: VmId) -> String {
        // In the order of the numbers, for whoever looks with etcdctl.
        format!("{}/vm/{:010}", self.prefix, vm.0)
    }

    /// Makes sense of what is there.
    pub fn read(&self, pairs: Vec<Pair>) -> Result<Read, MasterError> {
        let mut read = Read::default();
        let (mut last, mut records) = (0, Vec::new());
        let records_below = format!("{}/vm/", self.prefix);
        for pair in pairs {
            let strange = |why: String| MasterError::Storage {
                path: pair.key.clone().into(),
                why: format!(
                    "{why}; it was not written by this program: give the master a prefix of its own (`master.etcd_prefix`), or restore the key"
                ),
            };
            if pair.key == self.changed() {
                read.revision = u64::try_from(pair.mod_revision).unwrap_or_default();
            } else if pair.key == self.last() {
                let text = String::from_utf8_lossy(&pair.value);
                last = text
                    .parse()
                    .map_err(|_| strange(format!("{text:?} is no number")))?;
            } else if pair.key.starts_with(&records_below) {
                let record: VmRecord =
                    serde_json::from_slice(&pair.value).map_err(|e| strange(e.to_string()))?;
                if self.vm(record.view.vm) != pair.key {
                    return Err(strange(format!("it is VM {}'s record", record.view.vm)));
                }
                records.push(record);
            }
            read.revisions.insert(pair.key, pair.mod_revision);
        }
        read.state = MasterState::of(last, records);
        Ok(read)
    }

    /// Decides on `command` as if nothing had changed since. `None`: it was decided before, nothing is to be written.
    pub fn decide(
        &self,
        read: &Read,
        command: &Command,
    ) -> Result<(VmRecord, Option<Write>), Rejection> {
        let mut state = read.state.clone();
        let record = state.apply(command)?;
        if state.revision() == read.state.revision() {
            return Ok((record, None));
        }
        let key = self.vm(record.view.vm);
        let unchanged = |key: String| {
            let revision = read.revisions.get(&key).copied().unwrap_or_default();
            (key, revision)
        };
        let mut write = Write {
            compare: vec![unchanged(key.clone())],
            put: vec![(self.changed(), record.view.vm.to_string().into_bytes())],
            delete: None,
        };
        match command {
            Command::Remove { .. } => write.delete = Some(key),
            _ => {
                let value = serde_json::to_vec(&record)
                    .unwrap_or_else(|e| unreachable!("a record of names and numbers is JSON: {e}"));
                write.put.push((key, value));
            }
        }
        if let Command::Register { .. } = command {
            // Whoever registers a VM writes this key: so two cannot get the same number, or the same name.
            write.compare.push(unchanged(self.last()));
            let last = state.last_vm().to_string();
            write.put.push((self.last(), last.into_bytes()));
        }
        Ok((record, Some(write)))
    }
}

impl Read {
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            revision: self.revision,
            ..self.state.snapshot()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Member, VmShape};
    use checkpoint::{Generation, HostId, RamRange};

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn register(name: &str) -> Command {
        Command::Register {
            name: name.into(),
            owner: host("a"),
            shape: VmShape {
                ram: vec![RamRange {
                    start: 0,
                    len: 4096,
                }],
                vcpus: 1,
                cpu: Default::default(),
                disks: vec![512],
                config_toml: "name = \"x\"\n".into(),
            },
        }
    }

    fn protect(vm: u64) -> Command {
        Command::Reconfigure {
            vm: VmId(vm),
            expect: Generation(1),
            by: host("a"),
            chain: vec![Member::new(host("b"), "127.0.0.1:1".parse().unwrap())],
            joining: None,
            anew: true,
        }
    }

    /// Stands for etcd: the keys with their revisions.
    #[derive(Default)]
    struct Store {
        pairs: BTreeMap<String, Pair>,
        revision: i64,
    }

    impl Store {
        fn read(&self, keys: &Keys) -> Read {
            keys.read(self.pairs.values().cloned().collect()).unwrap()
        }

        fn txn(&mut self, write: &Write) -> bool {
            let of = |key: &String| self.pairs.get(key).map_or(0, |p| p.mod_revision);
            if write.compare.iter().any(|(key, then)| of(key) != *then) {
                return false;
            }
            self.revision += 1;
            for (key, value) in &write.put {
                let pair = Pair {
                    key: key.clone(),
                    value: value.clone(),
                    mod_revision: self.revision,
                };
                self.pairs.insert(key.clone(), pair);
            }
            if let Some(key) = &write.delete {
                self.pairs.remove(key);
            }
            true
        }
    }

    #[test]
    fn i4_of_two_that_decide_on_the_same_one_has_to_look_again() {
        let keys = Keys::new("/understudy/");
        let mut store = Store::default();
        for pair in [
            [register("web"), register("web")],
            [register("db"), register("mail")],
            [protect(1), protect(1)],
        ] {
            let read = store.read(&keys);
            let [first, second] = pair.map(|c| keys.decide(&read, &c).unwrap().1.unwrap());
            assert!(store.txn(&first));
            assert!(!store.txn(&second), "{second:?}");
        }
        // VMs do not get into each other's way.
        let read = store.read(&keys);
        let [one, other] = [1, 2].map(|vm| {
            let remove = Command::Remove {
                vm: VmId(vm),
                expect: Generation(if vm == 1 { 2 } else { 1 }),
                by: host("a"),
            };
            keys.decide(&read, &remove).unwrap().1.unwrap()
        });
        assert!(store.txn(&one) && store.txn(&other));
        let read = store.read(&keys);
        assert!(read.snapshot().records.is_empty());
        assert_eq!(read.revision, 5, "a VM that is gone is a change too");
    }

    #[test]
    fn what_was_decided_before_is_answered_again_and_not_written_again() {
        let keys = Keys::new("/u");
        let mut store = Store::default();
        for command in [register("web"), protect(1)] {
            let read = store.read(&keys);
            let (record, write) = keys.decide(&read, &command).unwrap();
            assert!(store.txn(&write.unwrap()));
            let read = store.read(&keys);
            assert_eq!(
                keys.decide(&read, &command).unwrap(),
                (record.clone(), None)
            );
            assert_eq!(read.snapshot().records, [record]);
        }
    }

    #[test]
    fn what_is_not_ours_is_named() {
        let keys = Keys::new("/u");
        for (key, value) in [("/u/last", "x"), ("/u/vm/0000000001", "{}")] {
            let pair = Pair {
                key: key.into(),
                value: value.into(),
                mod_revision: 1,
            };
            let said = keys.read(vec![pair]).unwrap_err().to_string();
            assert!(said.contains(key) && said.contains("etcd_prefix"), "{said}");
        }
    }
}
