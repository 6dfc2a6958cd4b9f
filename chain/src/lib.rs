//! The chain-replicated checkpoint store (protocol core without I/O, store, transport) and the master.
//!
//! Chain replication (van Renesse & Schneider, OSDI 2004): updates (checkpoints) enter at the head, every replica
//! forwards what it receives and processes a checkpoint once it is whole, the tail acknowledges. [`replica`] is the
//! protocol as a plain state machine, [`owner`] what the owner does for the head, [`store`] what a replica keeps, [`server`] and [`client`] the transport,
//! [`master`] the configuration service.

pub mod blocks;
pub mod client;
pub mod files;
pub mod greet;
pub mod image;
pub(crate) mod kept;
pub(crate) mod link;
pub mod look;
pub mod loss;
pub mod mark;
pub mod master;
pub mod owner;
pub mod probe;
pub mod pulse;
pub mod query;
mod queue;
pub mod replica;
pub mod sent;
pub mod server;
pub mod store;
mod urgent;
pub mod view;
pub mod wire;

pub use client::{ChainClient, ClientError, ClientEvent, Connection, bridge};
pub use files::{DigestError, FetchError, FileDigest, fetch};
pub use greet::Stranger;
pub use kept::{KEPT_MAX, Kept, owner_keeps};
pub use look::{Held, look, newer_generation, yield_to};
pub use loss::{Loss, LossKind};
pub use mark::Mark;
pub use probe::{Alive, ProbeError, Progress, probe};
pub use query::{Query, QueryError, query};
pub use server::{Handover, ReplicaServer, ReplicaStatus, ServerError, ServerEvent, ServerOptions};
pub use store::{
    DurableStore, Filled, LogError, MemoryStore, ReplicaStore, Retention, Rewound, StoreError,
    StoreOptions, Taken, VmStore,
};
pub use urgent::{UrgentSection, urgent_section, urgent_thread};
pub use view::{DiskPlace, Fork, History, Life, Member, View, VmRecord, VmShape};
