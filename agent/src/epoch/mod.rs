//! The owner's side of protection: epochs of a running VM are captured, shipped to the chain and, once committed, their
//! output is let out.
//!
//! [`pipeline`] decides (a plain state machine), [`rhythm`] when an epoch ends; [`owner`] runs the epoch loop over a [`guest`]; [`queue`] carries staged epochs and
//! disk writes to the shipping thread ([`ship`]); [`staging`] copies dirty pages while the guest is paused and keeps
//! the shadow that deltas are computed against.

pub mod figures;
pub mod guest;
pub mod hot;
mod meter;
pub mod owner;
pub mod pipeline;
pub mod queue;
pub mod rhythm;
pub mod ship;
pub mod staging;
mod stats;

pub use stats::{EpochStats, Measures, Percentiles, Recorder, Series};
