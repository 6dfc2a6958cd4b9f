//! The program understudy: daemon, command line, the owner's epoch loop, the standby's activation, benches, demo.

pub mod probe;
