//! The control socket: what the command line (and the demo and the benches) ask of an agent.

mod client;
mod proto;
mod status;
mod words;

pub use client::{ControlClient, ControlError};
pub use proto::{
    Applied, Asked, Event, EventKind, FailoverReport, Point, Reply, Request, Switched,
};
pub use status::{Health, MemberStatus, ReplicaHealth, Role, VmStatus, Warning};
