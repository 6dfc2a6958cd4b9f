//! The control socket: what the command line (and the demo and the benches) ask of an agent.

mod client;
mod proto;

pub use client::{ControlClient, ControlError};
pub use proto::{
    Applied, Asked, Event, EventKind, FailoverReport, MemberStatus, Point, Reply, Request,
    Switched, VmStatus,
};
