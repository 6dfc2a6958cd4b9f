//! The filling of a joining replica, as far as the replica's lock protects it. Copying itself needs no lock, and is done by a
//! thread ([`super::super::joiner`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use checkpoint::PageBitmap;

use super::State;
use crate::link::Link;
use crate::replica::Event;
use crate::server::env::Env;
use crate::store::{Cut, StoreError, VmStore};

/// How far it is.
pub(in crate::server) enum Feeding {
    /// The replica asks for it.
    Wanted,
    /// A thread is copying.
    Copying(Copier),
    /// Everything but the rest has been sent: that is cut off once no checkpoint is half received, with an empty set of
    /// pages to note in which of them are done.
    Rest(Copier, PageBitmap),
    /// It has been, and the joining replica is sent from here on what a successor would be, after the rest.
    Cut(Copier, Cut),
    /// The thread is sending the rest.
    Finishing(Copier),
}

/// The thread that copies.
#[derive(Clone)]
pub(in crate::server) struct Copier {
    /// The way to the joining replica.
    pub(in crate::server) link: Arc<Link>,
    /// What that one says of its disks.
    pub(in crate::server) digests: SyncSender<Vec<u8>>,
    alive: Arc<AtomicBool>,
}

impl Copier {
    pub(in crate::server) fn new(link: Arc<Link>, digests: SyncSender<Vec<u8>>) -> Self {
        Self {
            link,
            digests,
            alive: Arc::new(AtomicBool::new(true)),
        }
    }

    /// False once nobody needs the copy any more.
    pub(in crate::server) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }
}

impl Feeding {
    fn copier(&self) -> Option<&Copier> {
        match self {
            Self::Wanted => None,
            Self::Copying(copier)
            | Self::Rest(copier, _)
            | Self::Cut(copier, _)
            | Self::Finishing(copier) => Some(copier),
        }
    }
}

impl State {
    /// What the copy is of.
    pub(in crate::server) fn base(&mut self) -> Result<&mut VmStore, StoreError> {
        let store = self.store.as_mut().ok_or(StoreError::Empty)?;
        store.base_mut().ok_or(StoreError::Empty)
    }

    /// The thread that copies, if there is one.
    pub(in crate::server) fn copier(&self) -> Option<&Copier> {
        self.feeding.as_ref()?.copier()
    }

    /// Nobody is filled any more.
    pub(super) fn stop_filling(&mut self) {
        let Some(feeding) = self.feeding.take() else {
            return;
        };
        if let Some(copier) = feeding.copier() {
            copier.alive.store(false, Ordering::Release);
        }
        self.end_filling();
    }

    /// The copy is over, complete or not.
    pub(in crate::server) fn end_filling(&mut self) {
        self.feeding = None;
        if let Some(store) = &mut self.store {
            store.copy_end();
        }
        self.board.note_filling(None);
    }

    /// Between two checkpoints: cuts off what the joining replica is still to be sent, to be at exactly what this one holds.
    pub(in crate::server) fn cut_if_due(&mut self, env: &Env) {
        if !matches!(self.feeding, Some(Feeding::Rest(..)))
            || !self.replica.is_between_checkpoints()
        {
            return;
        }
        let Some(Feeding::Rest(copier, spare)) = self.feeding.take() else {
            return;
        };
        // What is forwarded from here on has to wait for the rest.
        copier.link.hold();
        let cut = self.base().and_then(|base| base.copy_cut(spare));
        let generation = self.replica.generation();
        let cut = cut.map(|cut| self.feeding = Some(Feeding::Cut(copier, cut)));
        if let Err(e) = cut {
            return self.lost_next(&e.to_string());
        }
        if let Err(e) = self.run(env, Event::JoinerFed { generation }, None) {
            self.lost_next(&e.to_string());
        }
    }
}
