//! Chains over real sockets: what is acknowledged is held by every replica, whoever dies and whatever arrives.

mod cluster;
mod faults;
mod proxy;
mod repair;
mod takeover;
