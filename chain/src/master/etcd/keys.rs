//! What is kept in etcd under which key, and what a decision reads, compares and writes. No I/O.
//!
//! ```text
//! <prefix>/changed          written by every decision: its mod_revision is the master's revision
//! <prefix>/cluster          the cluster's id
//! <prefix>/vm/<id>          a VM's record (JSON)
//! <prefix>/name/<name>      the id of the VM of that name
//! <prefix>/short/<digits>   the id of the VM with that short form
//! <prefix>/host/<name>      a host's record (JSON)
//! <prefix>/request/<id>     what became of a request (JSON); only so many of the newest are kept
//! ```

use std::collections::BTreeMap;

use checkpoint::{ClusterId, HostId, RequestId, VmId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::master::state::RECENT_MAX;
use crate::master::{
    Command, HostRecord, MasterError, MasterState, Order, Outcome, Rejection, Reply, Request,
    Snapshot,
};
use crate::view::VmRecord;

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
    /// Keys of requests, oldest first.
    requests: Vec<String>,
}

/// A transaction: done if none of the keys compared has been written since it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Write {
    /// Keys with their mod_revision; 0: there is none.
    pub compare: Vec<(String, i64)>,
    pub put: Vec<(String, Vec<u8>)>,
    pub delete: Vec<String>,
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_else(|e| unreachable!("names and numbers are JSON: {e}"))
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

    fn cluster(&self) -> String {
        format!("{}/cluster", self.prefix)
    }

    fn vm(&self, vm: VmId) -> String {
        format!("{}/vm/{vm}", self.prefix)
    }

    fn name(&self, name: &str) -> String {
        format!("{}/name/{name}", self.prefix)
    }

    fn short(&self, vm: VmId) -> String {
        format!("{}/short/{:08x}", self.prefix, vm.short())
    }

    fn host(&self, host: &HostId) -> String {
        format!("{}/host/{host}", self.prefix)
    }

    fn request(&self, request: RequestId) -> String {
        format!("{}/request/{request}", self.prefix)
    }

    /// Makes sense of what is there.
    pub fn read(&self, pairs: Vec<Pair>) -> Result<Read, MasterError> {
        let mut read = Read::default();
        let (mut cluster, mut records, mut hosts) = (ClusterId::NIL, Vec::new(), Vec::new());
        let mut requests: Vec<(i64, RequestId, Outcome)> = Vec::new();
        for pair in pairs {
            let (kind, rest) = self.split(&pair.key);
            let revision = u64::try_from(pair.mod_revision).unwrap_or_default();
            match kind {
                "changed" => read.revision = revision,
                "cluster" => cluster = parse(&pair)?,
                "vm" => {
                    let mut record: VmRecord = parse(&pair)?;
                    if self.vm(record.view.vm) != pair.key {
                        let why = format!("it is VM {}'s record", record.view.vm);
                        return Err(strange(&pair, &why));
                    }
                    record.revision = revision;
                    records.push(record);
                }
                "host" => {
                    let host: HostRecord = parse(&pair)?;
                    if self.host(&host.host) != pair.key {
                        return Err(strange(&pair, &format!("it is host {}'s", host.host)));
                    }
                    hosts.push(host);
                }
                "request" => {
                    let id = rest.parse::<RequestId>();
                    let id = id.map_err(|e| strange(&pair, &e.to_string()))?;
                    let outcome = match parse(&pair)? {
                        Outcome::Done { .. } => Outcome::Done { revision },
                        other => other,
                    };
                    requests.push((pair.mod_revision, id, outcome));
                }
                _ => {}
            }
            read.revisions.insert(pair.key, pair.mod_revision);
        }
        requests.sort_by_key(|(at, id, _)| (*at, *id));
        read.requests = requests
            .iter()
            .map(|(_, id, _)| self.request(*id))
            .collect();
        let requests = requests.into_iter().map(|(_, id, outcome)| (id, outcome));
        read.state = MasterState::of(cluster, read.revision, records, hosts, requests.collect());
        Ok(read)
    }

    /// The kind of a key and what is after it.
    fn split<'a>(&self, key: &'a str) -> (&'a str, &'a str) {
        let below = key.strip_prefix(&self.prefix).unwrap_or_default();
        let below = below.strip_prefix('/').unwrap_or_default();
        below.split_once('/').unwrap_or((below, ""))
    }

    /// What begins a cluster, where there is none.
    pub fn begin(&self, cluster: ClusterId) -> Write {
        let cluster = json(&cluster);
        Write {
            compare: vec![(self.cluster(), 0)],
            put: vec![(self.cluster(), cluster.clone()), (self.changed(), cluster)],
            delete: Vec::new(),
        }
    }

    /// Decides on `request` as if nothing had changed since. `None`: nothing is to be written.
    pub fn decide(
        &self,
        read: &Read,
        request: &Request,
    ) -> Result<(Reply, Option<Write>), Rejection> {
        let mut state = read.state.clone();
        let reply = state.answer(request)?;
        let id = match &request.order {
            Order::Settle { request } => *request,
            _ => request.id,
        };
        let key = self.request(id);
        if read.revisions.contains_key(&key) {
            return Ok((reply, None));
        }
        let mut write = Write::default();
        let outcome = match &reply {
            Reply::Outcome(outcome) => outcome.clone(),
            _ if state.revision() == read.state.revision() => return Ok((reply, None)),
            _ => {
                self.change(read, &request.order, &reply, &mut write);
                Outcome::Done { revision: 0 }
            }
        };
        // Whoever writes this key first has it: a request is carried out once, or never.
        write.compare.push((key.clone(), 0));
        write.put.push((key, json(&outcome)));
        let many = (read.requests.len() + 1).saturating_sub(RECENT_MAX);
        write
            .delete
            .extend(read.requests.iter().take(many).cloned());
        Ok((reply, Some(write)))
    }

    fn change(&self, read: &Read, order: &Order, reply: &Reply, write: &mut Write) {
        let compare = |write: &mut Write, key: String| {
            let revision = read.revisions.get(&key).copied().unwrap_or_default();
            write.compare.push((key, revision));
        };
        match (order, reply) {
            (Order::Vm(command), Reply::Vm(record)) => {
                let view = &record.view;
                let (key, name) = (self.vm(view.vm), self.name(&view.name));
                compare(write, key.clone());
                write.put.push((self.changed(), json(&view.vm)));
                match command {
                    Command::Remove { .. } => {
                        write.delete.extend([key, name, self.short(view.vm)]);
                    }
                    Command::Register { .. } => {
                        // Whoever registers a VM writes these keys: so two cannot get the same name or short form.
                        for other in [name, self.short(view.vm)] {
                            compare(write, other.clone());
                            write.put.push((other, json(&view.vm)));
                        }
                        write.put.push((key, json(record)));
                    }
                    _ => write.put.push((key, json(record))),
                }
            }
            (Order::Forget { .. }, Reply::Host(host)) => {
                let key = self.host(&host.host);
                compare(write, key.clone());
                write.put.push((self.changed(), json(&host.host)));
                write.delete.push(key);
            }
            (_, Reply::Host(host)) => {
                let key = self.host(&host.host);
                compare(write, key.clone());
                write.put.push((self.changed(), json(&host.host)));
                write.put.push((key, json(host)));
            }
            _ => {}
        }
    }
}

fn parse<T: DeserializeOwned>(pair: &Pair) -> Result<T, MasterError> {
    serde_json::from_slice(&pair.value).map_err(|e| strange(pair, &e.to_string()))
}

fn strange(pair: &Pair, why: &str) -> MasterError {
    MasterError::Storage {
        path: pair.key.clone().into(),
        why: format!(
            "{why}; it was not written by this version of understudy: give the master a prefix of its own (`master.etcd_prefix`), or restore the key"
        ),
    }
}

impl Read {
    /// Whose decisions these are, if a cluster has been begun.
    pub fn cluster(&self) -> Option<ClusterId> {
        let cluster = self.state.cluster();
        (cluster != ClusterId::NIL).then_some(cluster)
    }

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
    use crate::view::{Life, Member, VmShape};
    use checkpoint::{Generation, HostId, RamRange};

    const CLUSTER: ClusterId = ClusterId(9);

    fn vm_of(name: &str) -> VmId {
        VmId(name.bytes().fold(1, |n, b| n * 31 + u128::from(b)))
    }

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn register(name: &str) -> Command {
        Command::Register {
            vm: vm_of(name),
            name: name.into(),
            owner: host("a"),
            life: Life::On,
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

    fn protect(vm: VmId) -> Command {
        Command::Reconfigure {
            vm,
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
        /// In which a cluster has been begun.
        fn begun(keys: &Keys) -> Self {
            let mut store = Self::default();
            assert!(store.txn(&keys.begin(CLUSTER)));
            assert!(!store.txn(&keys.begin(ClusterId(10))), "the first counts");
            assert_eq!(store.read(keys).cluster(), Some(CLUSTER));
            store
        }

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
            for key in &write.delete {
                self.pairs.remove(key);
            }
            true
        }

        fn keys_like(&self, part: &str) -> usize {
            self.pairs.keys().filter(|key| key.contains(part)).count()
        }
    }

    fn asked(command: Command) -> Request {
        Request::new(Order::Vm(command))
    }

    #[test]
    fn i4_of_two_that_decide_on_the_same_one_has_to_look_again() {
        let keys = Keys::new("/understudy/");
        let mut store = Store::begun(&keys);
        let web = vm_of("web");
        let elsewhere = Command::Register {
            vm: VmId(u128::from(web.short()) << 32),
            name: "other".into(),
            owner: host("a"),
            life: Life::Off,
            shape: match register("x") {
                Command::Register { shape, .. } => shape,
                _ => unreachable!(),
            },
        };
        for (pair, both) in [
            ([register("web"), register("web")], false),
            ([protect(web), protect(web)], false),
            // VMs do not get into each other's way.
            ([register("db"), register("mail")], true),
        ] {
            let read = store.read(&keys);
            let [first, second] = pair.map(|c| keys.decide(&read, &asked(c)).unwrap().1.unwrap());
            assert!(store.txn(&first));
            assert_eq!(store.txn(&second), both, "{second:?}");
        }
        let said = keys
            .decide(&store.read(&keys), &asked(elsewhere))
            .unwrap_err();
        assert!(matches!(said, Rejection::IdTaken(_)), "{said}");
        let read = store.read(&keys);
        let writes = ["web", "db", "mail"].map(|name| {
            let remove = Command::Remove {
                vm: vm_of(name),
                expect: Generation(if name == "web" { 2 } else { 1 }),
                by: host("a"),
            };
            keys.decide(&read, &asked(remove)).unwrap().1.unwrap()
        });
        assert!(writes.iter().all(|write| store.txn(write)));
        let read = store.read(&keys);
        assert!(read.snapshot().records.is_empty());
        assert_eq!(read.revision, 8, "a VM that is gone is a change too");
        assert_eq!(store.keys_like("/name/") + store.keys_like("/short/"), 0);
    }

    #[test]
    fn what_was_decided_before_is_answered_again_and_not_written_again() {
        let keys = Keys::new("/u");
        let mut store = Store::begun(&keys);
        for command in [register("web"), protect(vm_of("web"))] {
            let request = asked(command.clone());
            let (_, write) = keys.decide(&store.read(&keys), &request).unwrap();
            assert!(store.txn(&write.unwrap()));
            let read = store.read(&keys);
            let [record] = &read.snapshot().records[..] else {
                panic!("one VM")
            };
            assert_eq!(record.revision, read.revision, "as etcd counts");
            for again in [request, asked(command)] {
                let (reply, write) = keys.decide(&read, &again).unwrap();
                assert_eq!((reply, write), (Reply::Vm(Box::new(record.clone())), None));
            }
        }
    }

    #[test]
    fn l8_a_request_is_done_once_or_never() {
        let keys = Keys::new("/u");
        let mut store = Store::begun(&keys);
        let request = asked(register("web"));
        let settle = Request::new(Order::Settle {
            request: request.id,
        });
        // Two who have read the same: one would do it, the other wants to know.
        let read = store.read(&keys);
        let late = keys.decide(&read, &request).unwrap().1.unwrap();
        let (reply, write) = keys.decide(&read, &settle).unwrap();
        assert_eq!(reply, Reply::Outcome(Outcome::Never));
        assert!(store.txn(&write.unwrap()));
        assert!(!store.txn(&late), "never is never");
        let said = keys.decide(&store.read(&keys), &request).unwrap_err();
        assert_eq!(said, Rejection::Expired);
        // The other way round.
        let request = asked(register("db"));
        let settle = Request::new(Order::Settle {
            request: request.id,
        });
        let (_, write) = keys.decide(&store.read(&keys), &request).unwrap();
        assert!(store.txn(&write.unwrap()));
        let read = store.read(&keys);
        let (reply, write) = keys.decide(&read, &settle).unwrap();
        let revision = read.revision;
        assert_eq!(reply, Reply::Outcome(Outcome::Done { revision }));
        assert_eq!(write, None);
        // Later changes hide what was answered.
        let protect = asked(protect(vm_of("db")));
        let (_, write) = keys.decide(&read, &protect).unwrap();
        assert!(store.txn(&write.unwrap()));
        let read = store.read(&keys);
        let (reply, write) = keys.decide(&read, &request).unwrap();
        assert_eq!((reply, write), (Reply::Done { revision }, None));
    }

    #[test]
    fn only_so_many_requests_are_kept() {
        let keys = Keys::new("/u");
        let mut store = Store::begun(&keys);
        for n in 0..RECENT_MAX + 20 {
            let enroll = Request::new(Order::Enroll {
                host: host("a"),
                id: checkpoint::HostUuid(1),
                addr: ([10, 0, 0, 1], n as u16).into(),
            });
            let (_, write) = keys.decide(&store.read(&keys), &enroll).unwrap();
            assert!(store.txn(&write.unwrap()));
        }
        assert_eq!(store.keys_like("/request/"), RECENT_MAX);
        assert_eq!(store.read(&keys).snapshot().hosts.len(), 1);
    }

    #[test]
    fn what_is_not_ours_is_named() {
        let keys = Keys::new("/u");
        for (key, value) in [
            ("/u/cluster", "x"),
            ("/u/vm/0000000001", "{}"),
            ("/u/request/7", "1"),
        ] {
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
