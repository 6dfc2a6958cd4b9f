//! The probe guest's client: what the demo and the benches measure with.
//!
//! [`ProbeClient`] keeps numbered requests outstanding on one TCP connection and books every answer in a [`Ledger`],
//! which says whether an acknowledged request was ever lost. [`ProbeConn`] asks one question at a time. [`Pinger`]
//! measures an outage by UDP echo, free of TCP's retransmission timers.

pub mod client;
pub mod conn;
pub mod ledger;
pub mod ping;
pub mod timeline;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use client::{ProbeClient, ProbeConfig, ProbeReport, Progress};
pub use conn::{ProbeConn, ProbeError};
pub use ledger::{Ledger, LedgerError};
pub use ping::{PingReport, Pinger};
pub use timeline::{Gap, Latency, Sample, Timeline};
