//! What a host is to one VM, decided by a plain state machine: an [`Input`] in, [`Effect`]s out.
//!
//! No I/O, clocks, locks or threads here. The daemon gives each VM a mailbox and a machine of its own and carries the effects
//! out; slow ones (a question to the master, to other hosts, a new process) post their outcome back as an input. VMs share
//! nothing, so that what holds one up holds up no other. The simulation drives the same machine.
//!
//! ```text
//!               Decided (member)                Suspected, Ordered(Failover)
//!   Nothing ---------------------> Standby ------------------------------------> Owner
//!      |  ^                           ^   freeze, ask the master, hand over,       |
//!      |  |  Decided (no member)      |   activate                                 | its process is gone, or gives up
//!      |  +---------------------------+                                            v
//!      +--------------------------------------------------------------------->  Orphan
//!                     Decided (owner), and no process of it here
//!
//!   Owner -- Ordered(Stop), or the guest has powered itself off --> Off -- Ordered(Start) --> Owner
//! ```

mod chain_care;
mod changes;
mod effect;
mod input;
mod machine;
mod off;
mod orders;
mod orphan;
mod owner;
mod policy;
mod standby;
mod summary;
mod survivor;
#[cfg(test)]
mod tests;

pub use effect::{Answered, Disks, Effect, Tell};
pub use input::{Health, Input, Loss, Order, Refusal, Report, Ticket};
pub use machine::Machine;
pub use policy::Policy;
pub use summary::{Role, Summary};
pub use survivor::Fate;

/// Microseconds of a clock that only grows; the driver says with each input what it shows.
pub type Micros = u64;

/// Microseconds in a millisecond.
const MS: Micros = 1000;
/// Microseconds in a second.
const SECOND: Micros = 1_000_000;
