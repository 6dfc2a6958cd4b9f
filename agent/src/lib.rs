//! The program understudy: daemon, command line, the owner's epoch loop, the standby's activation, benches, demo.

pub mod bench;
mod busy;
pub mod child;
pub mod cli;
mod commands;
pub mod config;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod engine;
pub mod epoch;
#[doc(hidden)]
pub mod fault;
pub mod host;
pub mod identity;
pub mod ipc;
pub mod lab;
pub mod probe;
pub mod rank;

pub use commands::main;
