//! Where the serial console's output goes: a bounded backlog that a thread of its own writes out.
//!
//! A vCPU prints one byte at a time and must never wait for a file, pipe or terminal. What does not fit is dropped,
//! oldest first, and counted.

mod backlog;
mod target;

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backlog::Backlog;
use target::Target;

/// Bytes of output that wait for a slow reader.
pub const BACKLOG: usize = 1 << 20;
/// Bytes after which a console's file is put aside as `FILE.1`.
pub const ROTATE_AT: u64 = 16 << 20;
/// Longest time that the end of a machine waits for its last output.
const LAST_WORDS: Duration = Duration::from_secs(1);

struct State {
    backlog: Backlog,
    /// The thread has taken bytes that it has not written yet.
    writing: bool,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The console's far end. Dropping it waits a bounded time until everything is written.
pub struct ConsoleOut(Arc<Shared>);

/// The writing end, for [`crate::VmSpec::serial_out`]: never blocks, never fails.
pub struct ConsoleWriter(Arc<Shared>);

impl ConsoleOut {
    /// Appends to `path`, created with mode 0600. A regular file is rotated at [`ROTATE_AT`] bytes and opened again when
    /// somebody else has renamed or removed it. A FIFO needs no reader.
    ///
    /// # Errors
    /// The system's, if `path` cannot be opened or the thread not started.
    pub fn file(path: &Path) -> io::Result<ConsoleOut> {
        ConsoleOut::spawn(Target::file(path, ROTATE_AT)?, BACKLOG)
    }

    /// Prints to this process's standard output.
    ///
    /// # Errors
    /// The system's, if the thread cannot be started.
    pub fn stdout() -> io::Result<ConsoleOut> {
        ConsoleOut::spawn(Target::stdout(), BACKLOG)
    }

    fn spawn(target: Target, limit: usize) -> io::Result<ConsoleOut> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                backlog: Backlog::new(limit),
                writing: false,
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("console-out".to_owned())
            .spawn(move || write_out(&thread, target))?;
        Ok(ConsoleOut(shared))
    }

    /// A writing end.
    #[must_use]
    pub fn writer(&self) -> ConsoleWriter {
        ConsoleWriter(Arc::clone(&self.0))
    }

    /// Bytes dropped so far because they did not fit or could not be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.lock().backlog.dropped()
    }
}

impl Drop for ConsoleOut {
    fn drop(&mut self) {
        let until = Instant::now() + LAST_WORDS;
        let mut state = self.0.lock();
        while state.writing || !state.backlog.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .0
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.closed = true;
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        if state.closed {
            return Ok(bytes.len());
        }
        let idle = state.backlog.is_empty();
        let burst_begins = state.backlog.push(bytes);
        drop(state);
        if idle {
            self.0.changed.notify_all();
        }
        if burst_begins {
            tracing::warn!("the console's reader is too slow: its oldest output is dropped");
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread: takes what waits, writes it without the lock, until the console is closed.
fn write_out(shared: &Shared, mut target: Target) {
    let mut failing = false;
    loop {
        let mut state = shared.lock();
        state.writing = false;
        shared.changed.notify_all();
        while state.backlog.is_empty() && !state.closed {
            state = shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return;
        }
        let (bytes, burst) = state.backlog.take();
        state.writing = true;
        drop(state);
        if burst > 0 {
            tracing::warn!(bytes = burst, "console output was dropped");
        }
        let written = target.write(&bytes, || shared.lock().closed);
        match written {
            Ok(()) => failing = false,
            Err(error) => {
                shared.lock().backlog.lost(bytes.len() as u64);
                if !failing {
                    tracing::warn!(%error, "console output cannot be written and is dropped");
                }
                failing = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
