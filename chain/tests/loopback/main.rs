//! Chains over real sockets: what is acknowledged is held by every replica, whoever dies and whatever arrives.

mod bridge;
mod cluster;
mod faults;
mod files;
mod first;
mod flow;
mod hostile;
mod hung;
mod joining;
mod known;
mod links;
mod lost;
mod pressure;
mod probe;
mod proxy;
mod pulse;
mod repair;
mod slow;
mod takeover;
mod vm;
mod wire;
