//! The VMs of this host, each with a mailbox and a thread.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chain::VmRecord;
use checkpoint::VmId;

use super::env::{Env, lock, vital};
use super::run::{Mail, Runner, Shown};
use crate::host::{Answered, Effect, Input, Machine, Order, Summary};

#[derive(Clone)]
struct Entry {
    name: String,
    mail: Sender<Mail>,
    shown: Arc<Shown>,
}

/// All of them.
pub(super) struct Table {
    env: Arc<Env>,
    vms: Mutex<BTreeMap<VmId, Entry>>,
    /// Held while a VM is registered: its record, which the watch may see first, finds its thread.
    starting: Mutex<()>,
}

impl Table {
    pub fn new(env: Arc<Env>) -> Arc<Self> {
        Arc::new(Self {
            env,
            vms: Mutex::default(),
            starting: Mutex::default(),
        })
    }

    /// Something for one VM; nothing happens if it has no thread.
    pub fn post(&self, vm: VmId, input: Input) {
        if let Some(entry) = lock(&self.vms).get(&vm) {
            let _ = entry.mail.send(Mail::Input(Box::new(input)));
        }
    }

    /// A decision of the master's. A VM that this host has a part in gets a thread.
    pub fn decided(self: &Arc<Self>, record: VmRecord) {
        let vm = record.view.vm;
        let host = &self.env.host;
        let known = || lock(&self.vms).contains_key(&vm);
        if !known() {
            let mine = record.view.owner == *host;
            if !mine && !record.view.holds(host) {
                return;
            }
            let _starting = lock(&self.starting);
            if !known() {
                let machine = Machine::new(host.clone(), self.env.peers.clone(), &record);
                self.insert(machine, |_| Vec::new());
            }
        }
        self.post(vm, Input::Decided(record));
    }

    /// Boots a VM that `register` enters at the master as this host's.
    ///
    /// # Errors
    /// In words.
    pub fn start(
        self: &Arc<Self>,
        register: impl FnOnce() -> Result<VmRecord, String>,
        patience: Duration,
    ) -> Result<(), String> {
        let (sender, outcome) = channel();
        let name = {
            let _starting = lock(&self.starting);
            let record = register()?;
            let mut effects = Vec::new();
            let (host, peers) = (self.env.host.clone(), self.env.peers.clone());
            // The first ticket that a runner gives out.
            let machine = Machine::starting(host, peers, &record, 1, &mut effects);
            let name = machine.name().to_string();
            self.insert(machine, |runner| {
                runner.expect_answer(sender);
                effects
            });
            name
        };
        match outcome.recv_timeout(patience) {
            Ok(result) => result.map(drop),
            Err(_) => Err(format!(
                "{name} has not booted within {} s; `understudy status` says how it is",
                patience.as_secs()
            )),
        }
    }

    fn insert(self: &Arc<Self>, machine: Machine, begin: impl FnOnce(&mut Runner) -> Vec<Effect>) {
        let (mail, mailbox) = channel();
        let shown = Shown::new(&machine);
        let (vm, name) = (machine.vm(), machine.name().to_string());
        let mut runner = Runner::new(self.env.clone(), machine, shown.clone(), mail.clone());
        let begun = begin(&mut runner);
        let entry = Entry { name, mail, shown };
        lock(&self.vms).insert(vm, entry);
        let table = self.clone();
        let spawned = vital("vm", move || {
            runner.run(begun, &mailbox);
            lock(&table.vms).remove(&vm);
        });
        if let Err(e) = spawned {
            // It is tried again with the next decision.
            tracing::error!("starting a VM's thread: {e}");
            lock(&self.vms).remove(&vm);
        }
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let vms = lock(&self.vms);
        vms.values().find(|entry| entry.name == name).cloned()
    }

    /// What others may see of a VM.
    pub fn shown(&self, name: &str) -> Option<Arc<Shown>> {
        self.entry(name).map(|entry| entry.shown)
    }

    /// What the VM's machine shows of itself.
    pub fn summary(&self, name: &str) -> Option<Summary> {
        Some(lock(&self.shown(name)?.summary).clone())
    }

    /// Everything, in the order of the VMs' numbers.
    pub fn all(&self) -> Vec<Arc<Shown>> {
        let vms = lock(&self.vms);
        vms.values().map(|entry| entry.shown.clone()).collect()
    }

    /// Gives an order and waits for its outcome.
    ///
    /// # Errors
    /// In words, also that there is no outcome yet.
    pub fn order(&self, name: &str, order: Order, patience: Duration) -> Result<Answered, String> {
        let entry = self.entry(name).ok_or_else(|| {
            format!("this host has no part in a VM named {name:?} (`understudy status` lists those it has)")
        })?;
        let (sender, outcome) = channel();
        entry
            .mail
            .send(Mail::Order(order, sender))
            .map_err(|_| format!("{name} has just ended"))?;
        outcome.recv_timeout(patience).unwrap_or_else(|e| {
            if e == RecvTimeoutError::Disconnected {
                return Err(format!("{name} has just ended"));
            }
            Err(format!(
                "no outcome within {} s: `understudy status` and `events` show what became of it",
                patience.as_secs()
            ))
        })
    }
}
