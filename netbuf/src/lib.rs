//! Frames held per epoch and released on commit; the tap device; announcements.
//!
//! The layer's one promise is invariant I1, output commit: a frame the guest sent in epoch *e* leaves the host only
//! after checkpoint *e* is committed (Remus, NSDI 2008, section 3.4). [`EpochQueue`] is the rule as a plain state
//! machine, [`Gate`] the rule applied to a [`Tap`], [`announce`] the frames that move a guest's address to this host,
//! [`bridge`] a tap's place on a bridge, [`Watcher`] what keeps it there, [`netconf`] the few interface settings that all
//! this needs, made without external programs.

pub mod announce;
pub mod bridge;
pub mod cable;
pub mod gate;
pub mod hold;
#[doc(hidden)]
pub mod memory;
pub mod netconf;
pub mod port;
pub mod queue;
pub mod tap;
mod wake;
pub mod watch;

pub use bridge::bridge_warnings;
pub use cable::Cable;
pub use gate::{Gate, GateStats};
pub use hold::{EpochHold, HoldStats};
pub use port::{NET_HEADER, Port, SendOutcome};
pub use queue::{EpochQueue, Pushed, QueueError};
pub use tap::{Tap, TapError};
pub use watch::Watcher;
