//! The whole system: agents, VM processes, wires; what they promise when hosts die, stand still or are cut off.
//!
//! Each test of an invariant says how its mechanism is switched off, and a second test sees its check fail then.

mod adopted;
mod apply;
mod bad_input;
mod boot_files;
mod button;
mod demo;
mod disk;
mod disk_faults;
#[cfg(feature = "etcd")]
mod etcd;
mod first;
mod inspect;
mod kill;
mod life;
mod loss;
mod members;
mod output_commit;
mod partition;
mod points;
mod processor;
mod reboot;
mod rejoin;
mod report;
mod rewind;
mod several;
mod soak;
mod superseded;
mod switch;
mod total;
mod unprotected;

/// The program, able to have a mechanism switched off.
const PROGRAM: &str = env!("CARGO_BIN_EXE_understudy-under-test");
