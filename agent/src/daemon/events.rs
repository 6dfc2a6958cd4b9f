//! What has happened on this host, the newest thousands of it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use crate::child::monotonic_us;
use crate::control::{Event, EventKind};

const KEEP: usize = 10_000;

/// The log.
#[derive(Debug, Default)]
pub(super) struct EventLog(Mutex<(u64, VecDeque<Event>)>);

impl EventLog {
    /// Adds one, and says it in the program's log.
    pub fn add(&self, kind: EventKind, vm: &str, text: impl Into<String>) {
        let text = text.into();
        if kind == EventKind::Failed {
            tracing::error!("{vm}: {text}");
        } else {
            tracing::info!("{vm}: {text}");
        }
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.0 += 1;
        let event = Event {
            number: log.0,
            at_us: monotonic_us(),
            kind,
            vm: vm.into(),
            text,
        };
        log.1.push_back(event);
        if log.1.len() > KEEP {
            log.1.pop_front();
        }
    }

    /// Those after number `since`.
    pub fn since(&self, since: u64) -> Vec<Event> {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.1.iter().filter(|e| e.number > since).cloned().collect()
    }
}
