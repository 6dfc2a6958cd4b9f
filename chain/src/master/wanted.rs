//! Whether somebody still waits for a request: one that was given up must not be carried out later.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The asker's end of a request, as an engine sees it. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    given_up: Arc<AtomicBool>,
    asker: Option<Arc<TcpStream>>,
}

impl Wanted {
    /// By a caller that waits until it is answered.
    #[must_use]
    pub fn always() -> Self {
        Self::default()
    }

    /// By whoever is at the other end of that connection, on which nothing else is said until this is answered.
    #[must_use]
    pub fn by(asker: Arc<TcpStream>) -> Self {
        Self {
            given_up: Arc::default(),
            asker: Some(asker),
        }
    }

    /// Nobody waits any more.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }

    /// Whether somebody does. Asked right before a decision.
    #[must_use]
    pub fn still(&self) -> bool {
        !self.given_up.load(Ordering::SeqCst) && self.asker.as_deref().is_none_or(waits)
    }
}

/// Whether the peer has neither closed nor broken the connection; what it may have said before does not matter.
fn waits(asker: &TcpStream) -> bool {
    let mut fd = libc::pollfd {
        fd: asker.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one pollfd, which outlives the call; its descriptor is open as long as `asker` is.
    let ready = unsafe { libc::poll(&mut fd, 1, 0) };
    ready == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn a_request_is_wanted_until_its_asker_closes_or_gives_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let asker = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (served, _) = listener.accept().unwrap();
        let wanted = Wanted::by(Arc::new(served));
        assert!(wanted.still());
        (&asker).write_all(b"x").unwrap();
        assert!(wanted.still(), "it only speaks out of turn");
        drop(asker);
        // The kernel delivers a close on loopback before the call that makes it returns.
        assert!(!wanted.still());
        let wanted = Wanted::always();
        let other = wanted.clone();
        assert!(other.still());
        wanted.give_up();
        assert!(!other.still());
    }
}
