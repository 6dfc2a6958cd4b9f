//! Which replicas this host has, had, and will not have. Nothing is waited for under these locks: they are everybody's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use checkpoint::{Generation, VmId};

use super::env::{Env, ServerError, lock};
use super::slot::Slot;
use crate::probe::{Alive, Progress};

/// Connections served at a time, each with a thread and a frame's buffer.
pub(super) const CONNECTIONS_MAX: usize = 512;

pub(super) struct Registry {
    pub(super) env: Arc<Env>,
    slots: Mutex<HashMap<VmId, Arc<Slot>>>,
    /// VMs once held here: their old owners are refused, not put off.
    gone: Mutex<HashMap<VmId, Generation>>,
    /// Why this host cannot hold a replica that it should, and in which generation that was found.
    declined: Mutex<HashMap<VmId, (Generation, String)>>,
    connections: AtomicUsize,
    stop: AtomicBool,
}

impl Registry {
    pub(super) fn new(env: Arc<Env>) -> Self {
        Self {
            env,
            slots: Mutex::default(),
            gone: Mutex::default(),
            declined: Mutex::default(),
            connections: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        }
    }

    pub(super) fn find(&self, vm: VmId) -> Option<Arc<Slot>> {
        lock(&self.slots).get(&vm).cloned()
    }

    pub(super) fn slot(&self, vm: VmId) -> Result<Arc<Slot>, ServerError> {
        self.find(vm).ok_or(ServerError::Unknown(vm))
    }

    pub(super) fn all(&self) -> Vec<Arc<Slot>> {
        lock(&self.slots).values().cloned().collect()
    }

    /// Puts a replica in, which is what this host has been able to do then; returns the one in whose place it is.
    pub(super) fn insert(&self, vm: VmId, slot: Arc<Slot>) -> Option<Arc<Slot>> {
        lock(&self.declined).remove(&vm);
        lock(&self.slots).insert(vm, slot)
    }

    /// Takes a replica out. What is to be done with it is done by the caller, without this lock.
    pub(super) fn take(&self, vm: VmId) -> Option<Arc<Slot>> {
        lock(&self.slots).remove(&vm)
    }

    pub(super) fn take_all(&self) -> Vec<Arc<Slot>> {
        lock(&self.slots).drain().map(|(_, slot)| slot).collect()
    }

    /// Whoever speaks in an older generation of that VM is refused from here on.
    pub(super) fn refuse(&self, vm: VmId, generation: Generation) {
        lock(&self.gone).insert(vm, generation);
    }

    pub(super) fn decline(&self, vm: VmId, generation: Generation, why: String) {
        lock(&self.declined).insert(vm, (generation, why));
    }

    /// The generation that ended what was held of that VM.
    pub(super) fn gone(&self, vm: VmId) -> Option<Generation> {
        lock(&self.gone).get(&vm).copied()
    }

    /// Why there is no replica of that VM, and since which generation.
    pub(super) fn declined(&self, vm: VmId) -> Option<(Generation, String)> {
        lock(&self.declined).get(&vm).cloned()
    }

    /// What a probe is answered.
    pub(super) fn alive(&self, vm: VmId) -> Alive {
        let declined = self.declined(vm);
        let slot = self.find(vm);
        let held = slot.map(|slot| slot.board.progress(self.env.now_ms()));
        let replica = match (held, declined) {
            (Some(progress), declined) => Some(Progress {
                declined: declined.map(|(_, why)| why),
                ..progress
            }),
            (None, Some((generation, why))) => Some(Progress {
                generation,
                declined: Some(why),
                ..Progress::default()
            }),
            (None, None) => None,
        };
        Alive {
            host: self.env.options.host.clone(),
            replica,
        }
    }

    /// Room for one connection more; to be given back by [`Registry::hung_up`].
    pub(super) fn connected(&self) -> bool {
        let open = self.connections.fetch_add(1, Ordering::Relaxed);
        if open >= CONNECTIONS_MAX {
            self.hung_up();
        }
        open < CONNECTIONS_MAX
    }

    pub(super) fn hung_up(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
