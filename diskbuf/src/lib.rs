//! Disk writes held per epoch; mirror images; the activation record.
//!
//! * [`HeldWrites`]: writes a replica has received and not yet processed. A plain state machine.
//! * [`Mirror`]: one raw image file.
//! * [`OwnerDisk`]: what the running VM writes to: its mirror, and a [`DiskSink`] that streams to the chain.
//! * [`ReplicaDisks`]: all mirrors of one VM at one replica, with the journal that makes an epoch's writes atomic over
//!   all of them, and the [`ActivationRecord`] that says what the mirrors are.
//!
//! Byte layouts and the reasons of the order of writes: `docs/disk-format.md`.

mod batch;
mod error;
pub mod held;
mod journal;
pub mod layer;
pub mod mirror;
mod open;
pub mod owner;
mod preimage;
pub mod record;
pub mod replica;

#[cfg(test)]
mod crash;
#[cfg(test)]
mod failed_sync;
#[cfg(any(test, feature = "faulty"))]
pub mod faulty;
#[cfg(test)]
mod refill;

pub use error::DiskbufError;
pub use held::{HeldError, HeldWrites};
pub use mirror::{Mirror, MirrorError};
pub use owner::{DiskSink, OwnerDisk};
pub use record::{ActivationRecord, RecordError, Role};
pub use replica::{Durability, ReplicaDisks};
