//! Watches that a VM's taps stay on their bridges, and puts them back: one thread for all of a VM's.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use crate::bridge;
use crate::cable::{Cable, Repair};
use crate::netconf::{self, Change, LinkMonitor, LinkState, NetconfError};
use crate::wake::Wake;

/// Between two looks, so that whoever makes many changes is looked at once.
const PAUSE: Duration = Duration::from_millis(10);
/// After the interfaces could not be read.
const RETRY: Duration = Duration::from_secs(1);

/// Told what has happened to a tap, in words.
pub type Say = Box<dyn Fn(String) + Send>;

struct Shared {
    stop: AtomicBool,
    wake: Wake,
}

/// Watches until it is dropped.
pub struct Watcher {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").finish_non_exhaustive()
    }
}

impl Watcher {
    /// Watches `cables` in the calling thread's network namespace.
    ///
    /// # Errors
    /// No socket, no descriptor or no thread.
    pub fn start(cables: Vec<Cable>, say: Say) -> io::Result<Watcher> {
        let monitor = LinkMonitor::new()?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            wake: Wake::new()?,
        });
        let watch = Watch {
            monitor,
            cables,
            known: HashSet::new(),
            began: Instant::now(),
            say,
        };
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name("tap-watch".into())
            .spawn(move || watch.run(&of_thread))?;
        Ok(Watcher {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Watch {
    monitor: LinkMonitor,
    cables: Vec<Cable>,
    /// Numbers of the taps and of the bridges.
    known: HashSet<u32>,
    began: Instant,
    say: Say,
}

impl Watch {
    fn run(mut self, shared: &Shared) {
        let mut wait = self.look();
        while !shared.stop.load(Ordering::Acquire) {
            match self.monitor.next(shared.wake.fd(), wait) {
                Ok(Some(change)) if !self.concerns(&change) => continue,
                Ok(Some(_)) => std::thread::sleep(PAUSE),
                Ok(None) => {}
                Err(e) => {
                    warn!("changes of network interfaces: {e}");
                    std::thread::sleep(RETRY);
                }
            }
            if !shared.stop.load(Ordering::Acquire) {
                wait = self.look();
            }
        }
    }

    /// Whether a change is about a tap, a bridge or a port of a bridge of ours.
    fn concerns(&self, change: &Change) -> bool {
        let Change::Links(links) = change else {
            return true;
        };
        links.iter().any(|link| {
            self.known.contains(&link.index)
                || link
                    .master
                    .is_some_and(|master| self.known.contains(&master))
                || self
                    .cables
                    .iter()
                    .any(|c| [c.tap(), c.bridge()].contains(&link.name.as_str()))
        })
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Looks at everything and mends it; returns how long nothing needs to be looked at, if nothing changes.
    fn look(&mut self) -> Option<Duration> {
        let links = match netconf::links() {
            Ok(links) => links,
            Err(e) => {
                warn!("{e}");
                return Some(RETRY);
            }
        };
        self.known = known(&self.cables, &links);
        let (now, mut said) = (self.now_ms(), Vec::new());
        for cable in &mut self.cables {
            let Some(repair) = cable.look(now, &links, &mut said) else {
                continue;
            };
            match mend(cable, repair) {
                Ok(()) => cable.repaired(now, &mut said),
                Err(e) => cable.failed(now, &e.to_string(), &mut said),
            }
        }
        for words in said {
            (self.say)(words);
        }
        let due = self.cables.iter().filter_map(Cable::due_ms).min()?;
        Some(Duration::from_millis(due.saturating_sub(self.now_ms())))
    }
}

fn known(cables: &[Cable], links: &[LinkState]) -> HashSet<u32> {
    let ours = |link: &&LinkState| {
        cables
            .iter()
            .any(|c| [c.tap(), c.bridge()].contains(&link.name.as_str()))
    };
    links.iter().filter(ours).map(|link| link.index).collect()
}

fn mend(cable: &Cable, repair: Repair) -> Result<(), NetconfError> {
    match repair {
        Repair::Join => bridge::join(cable.bridge(), cable.tap()),
        Repair::Up => netconf::set_link(cable.tap(), true),
        Repair::Mtu(mtu) => netconf::set_mtu(cable.tap(), mtu),
    }
}
