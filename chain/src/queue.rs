//! Frames that wait for a slow peer, so that their sender does not.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::link::with;
use crate::wire::{self, Frame, HEADER, Payload};

/// Bytes that may wait. A peer that is further behind holds its sender up, until it takes something or is lost.
pub const QUEUE_MAX: usize = 64 << 20;

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<(Frame, Payload)>,
    /// Of all that is in it or just being written.
    bytes: usize,
    over: bool,
}

/// Frames in the order they are to be sent.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, waiting: MutexGuard<'a, Waiting>) -> MutexGuard<'a, Waiting> {
        self.changed
            .wait(waiting)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame, once there is room.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] once the connection is over.
    pub(crate) fn push(&self, frame: Frame, payload: Payload) -> io::Result<()> {
        let mut waiting = self.lock();
        while waiting.bytes > QUEUE_MAX && !waiting.over {
            // Not for long: a write that makes no progress fails.
            waiting = self.wait(waiting);
        }
        if waiting.over {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        waiting.bytes += HEADER + payload.len();
        waiting.frames.push_back((frame, payload));
        self.changed.notify_all();
        Ok(())
    }

    /// Nothing more is sent.
    pub(crate) fn end(&self) {
        let mut waiting = self.lock();
        waiting.over = true;
        waiting.frames.clear();
        self.changed.notify_all();
    }

    /// Sends what comes, until the end.
    pub(crate) fn drain(&self, stream: &Mutex<TcpStream>) {
        loop {
            let mut waiting = self.lock();
            while waiting.frames.is_empty() && !waiting.over {
                waiting = self.wait(waiting);
            }
            let Some((frame, payload)) = waiting.frames.pop_front() else {
                return;
            };
            drop(waiting);
            if with(stream, |to| wire::forward(to, &frame, &payload)).is_err() {
                return self.end();
            }
            self.lock().bytes -= HEADER + payload.len();
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Kind;
    use checkpoint::{Epoch, Generation, VmId};
    use std::net::TcpListener;
    use std::sync::Arc;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (here, listener.accept().unwrap().0)
    }

    fn frame(epoch: u64) -> Frame {
        Frame {
            kind: Kind::Pages,
            vm: VmId(1),
            generation: Generation(2),
            epoch: Epoch(epoch),
            flags: 0,
        }
    }

    fn payload(bytes: usize) -> Payload {
        let mut payload = Payload::default();
        payload.fill(&vec![7; bytes]);
        payload
    }

    #[test]
    fn what_waits_is_sent_in_order_and_a_sender_waits_only_for_room() {
        let (here, mut there) = pair();
        let queue = Arc::<Queue>::default();
        // Nobody sends yet: all of this has to find room.
        let (size, count) = (1 << 20, (QUEUE_MAX >> 20) as u64);
        for epoch in 0..count {
            queue.push(frame(epoch), payload(size)).unwrap();
        }
        let late = queue.clone();
        let late = std::thread::spawn(move || late.push(frame(count), payload(1)));
        let sending = queue.clone();
        let sending = std::thread::spawn(move || sending.drain(&Mutex::new(here)));
        let mut received = Payload::default();
        for epoch in 0..=count {
            let frame = wire::read(&mut there, &mut received).unwrap();
            assert_eq!(frame.epoch, Epoch(epoch));
        }
        late.join().unwrap().unwrap();
        queue.end();
        sending.join().unwrap();
        assert!(queue.push(frame(0), payload(1)).is_err());
        assert!(wire::read(&mut there, &mut received).is_err(), "it is over");
    }

    #[test]
    fn a_connection_that_ends_ends_the_queue_and_who_waits_for_room() {
        let (here, there) = pair();
        let queue = Arc::<Queue>::default();
        while queue.lock().bytes <= QUEUE_MAX {
            queue.push(frame(0), payload(1 << 20)).unwrap();
        }
        let waits = queue.clone();
        let waits = std::thread::spawn(move || waits.push(frame(1), payload(1)));
        drop(there);
        queue.drain(&Mutex::new(here));
        assert!(waits.join().unwrap().is_err());
    }
}
