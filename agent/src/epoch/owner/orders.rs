//! What other threads of the VM's process want of the epoch loop, in the order they said it.

use std::sync::mpsc::Sender;
use std::time::Duration;

use checkpoint::{Epoch, Generation};

use super::EpochOptions;

/// One wish.
#[derive(Debug)]
pub(super) enum Order {
    /// Synchronise a chain that begins anew; its shipper reads the queue in this session.
    Begin(Generation, u64),
    /// The VM was resumed from a checkpoint that its chain goes on from.
    BeginHeld,
    /// Let output flow: the master has decided that there is no chain.
    Unprotect(Generation),
    /// The chain that begins in this generation cannot be sent to any more.
    Abandon(Generation),
    /// Harvest the dirty log with this period without copying; zero: stop.
    HarvestOnly(Duration),
    /// Other lengths.
    Options(EpochOptions),
    /// Stop the guest at the end of an epoch; say which, once it is committed.
    Quiesce(Sender<Epoch>),
    /// A frozen guest runs on.
    Thaw,
    /// A stopped guest runs on.
    RunOn,
    /// The guest stands still until there is another chain.
    Freeze,
    /// The guest stands still, since this owner cannot go on.
    GiveUp,
    /// The loop ends.
    Stop,
}

impl Order {
    /// Whether a checkpoint or synchronisation under way has become pointless; `syncing` is the generation of a chain that
    /// begins, if one does. Anything else waits until it is done.
    pub(super) fn ends_attempt(&self, syncing: Option<Generation>) -> bool {
        match self {
            Order::Begin(..)
            | Order::Unprotect(_)
            | Order::Freeze
            | Order::GiveUp
            | Order::Stop => true,
            Order::Abandon(generation) => syncing == Some(*generation),
            Order::BeginHeld
            | Order::HarvestOnly(_)
            | Order::Options(_)
            | Order::Quiesce(_)
            | Order::Thaw
            | Order::RunOn => false,
        }
    }
}
