//! The owner of a VM as position -1 of its chain: what it does for those after it, without I/O.

mod sender;

pub use sender::{BeginError, Begun, Ended, Joined, Pass, Sender};
