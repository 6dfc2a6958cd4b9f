//! Frames on their way to one peer. Whoever sends never waits for the peer, unless he wants to: what the kernel does not
//! take at once waits here, and a thread sends it on.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};

use crate::wire::{HEADER, Header, Payload};

/// Bytes that may wait for a next replica before whoever feeds this one is held up, see [`Queue::wait_for_room`].
pub const QUEUE_MAX: usize = 64 << 20;
/// Bytes that may wait for a peer that is only told something. One that is further behind does not read, and is dropped.
pub const TOLD_MAX: usize = 4 << 20;
/// A thread that has nothing to send ends after this long.
const IDLE: Duration = Duration::from_secs(1);

/// A frame, of which so much has been sent.
#[derive(Debug)]
struct Item {
    header: Header,
    payload: Payload,
    done: usize,
}

impl Item {
    fn len(&self) -> usize {
        HEADER + self.payload.len()
    }

    /// Sends the rest: as much as the kernel takes at once, or all of it, waiting as long as the socket allows. Whether
    /// that was all.
    fn send(&mut self, stream: &TcpStream, wait: bool) -> io::Result<bool> {
        while self.done < self.len() {
            match put(stream, &self.header.rest(&self.payload, self.done), wait)? {
                Some(n) => self.done += n,
                None if wait => {
                    return Err(took_nothing(stream.write_timeout()?.unwrap_or_default()));
                }
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Gives the kernel as much as it takes; `None`: nothing, for now or within the socket's time limit.
fn put(stream: &TcpStream, slices: &[IoSlice<'_>], wait: bool) -> io::Result<Option<usize>> {
    let mut flags = MsgFlags::MSG_NOSIGNAL;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    loop {
        match sendmsg::<()>(stream.as_raw_fd(), slices, &[], flags, None) {
            Ok(n) => return Ok(Some(n)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

fn took_nothing(patience: Duration) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("it has taken nothing for {} ms", patience.as_millis()),
    )
}

#[derive(Debug, Default)]
struct Waiting {
    /// To be sent in this order.
    items: VecDeque<Item>,
    /// While held: what has to wait until those who may send ahead have done so.
    behind: Option<VecDeque<Item>>,
    /// Of all that is in both, or just being sent.
    bytes: usize,
    /// A thread is sending what comes, and just now one frame that is in neither.
    draining: bool,
    writing: bool,
    /// When the peer last took something that had to wait.
    progress: Option<Instant>,
    over: Option<Over>,
}

/// Why nothing is sent any more: of which kind, and in words.
#[derive(Clone, Debug)]
struct Over(io::ErrorKind, String);

impl Over {
    fn ended() -> Self {
        Self(
            io::ErrorKind::BrokenPipe,
            "the connection has been ended".into(),
        )
    }

    fn error(&self) -> io::Error {
        io::Error::new(self.0, self.1.clone())
    }
}

impl From<&io::Error> for Over {
    fn from(error: &io::Error) -> Self {
        Self(error.kind(), error.to_string())
    }
}

impl Waiting {
    fn is_idle(&self) -> bool {
        self.items.is_empty() && !self.writing
    }

    fn is_over(&self) -> bool {
        self.over.is_some()
    }

    /// That nothing is sent any more, and why.
    fn check(&self) -> io::Result<()> {
        match &self.over {
            Some(over) => Err(over.error()),
            None => Ok(()),
        }
    }
}

/// The way to one peer.
#[derive(Debug)]
pub(crate) struct Queue {
    stream: TcpStream,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// Who has the turn while a queue is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Goes before what waits.
    Ahead,
    /// Waits until it is released.
    Behind,
}

impl Queue {
    /// Of a connection whose write time limit says how long a peer may take nothing.
    pub(crate) fn new(stream: TcpStream) -> Arc<Self> {
        Arc::new(Self {
            stream,
            waiting: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &'a self,
        waiting: MutexGuard<'a, Waiting>,
        time: Duration,
    ) -> MutexGuard<'a, Waiting> {
        let (waiting, _) = self
            .changed
            .wait_timeout(waiting, time)
            .unwrap_or_else(PoisonError::into_inner);
        waiting
    }

    /// Sends a frame without waiting: what the kernel does not take is sent by a thread. `content` gives the payload when it
    /// has to be kept.
    ///
    /// # Errors
    /// The connection's, which is over then, as it is if more than `most` bytes wait.
    pub(crate) fn post(
        self: &Arc<Self>,
        header: Header,
        bytes: &[u8],
        content: impl FnOnce() -> Payload,
        turn: Turn,
        most: usize,
    ) -> io::Result<()> {
        let mut waiting = self.lock();
        waiting.check()?;
        let behind = turn == Turn::Behind && waiting.behind.is_some();
        let mut done = 0;
        if !behind && waiting.is_idle() {
            // Only who has this lock begins to send, so the order is kept.
            while done < HEADER + bytes.len() {
                match put(&self.stream, &header.rest(bytes, done), false) {
                    Ok(Some(n)) => done += n,
                    Ok(None) => break,
                    Err(e) => return Err(self.fail(waiting, e)),
                }
            }
            waiting.progress = Some(Instant::now());
            if done == HEADER + bytes.len() {
                return Ok(());
            }
        }
        if waiting.bytes > most {
            let slow = io::Error::new(io::ErrorKind::TimedOut, "it does not read what it is sent");
            return Err(self.fail(waiting, slow));
        }
        let item = Item {
            header,
            payload: content(),
            done,
        };
        waiting.bytes += item.len();
        match &mut waiting.behind {
            Some(items) if behind => items.push_back(item),
            _ => waiting.items.push_back(item),
        }
        self.see_to_it(waiting)
    }

    /// Sends a small frame if that needs no waiting; if other traffic is under way it is not needed.
    ///
    /// # Errors
    /// The connection's.
    pub(crate) fn send_if_idle(self: &Arc<Self>, header: Header) -> io::Result<()> {
        let mut waiting = match self.waiting.try_lock() {
            Ok(waiting) => waiting,
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        waiting.check()?;
        if !waiting.is_idle() {
            return Ok(());
        }
        let mut item = Item {
            header,
            payload: Payload::default(),
            done: 0,
        };
        match item.send(&self.stream, false) {
            Ok(true) => Ok(()),
            // Nothing went out: there is other traffic enough.
            Ok(false) if item.done == 0 => Ok(()),
            Ok(false) => {
                waiting.bytes += item.len();
                waiting.items.push_back(item);
                self.see_to_it(waiting)
            }
            Err(e) => Err(self.fail(waiting, e)),
        }
    }

    /// From here on what is sent behind waits.
    pub(crate) fn hold(&self) {
        self.lock().behind.get_or_insert_default();
    }

    /// What has waited behind is sent.
    ///
    /// # Errors
    /// As [`Queue::post`].
    pub(crate) fn release(self: &Arc<Self>) -> io::Result<()> {
        let mut waiting = self.lock();
        let behind = waiting.behind.take().unwrap_or_default();
        waiting.items.extend(behind);
        self.see_to_it(waiting)
    }

    /// Waits until all has been sent that does not wait behind.
    ///
    /// # Errors
    /// Once the connection is over: what ended it.
    pub(crate) fn wait_sent(&self) -> io::Result<()> {
        let mut waiting = self.lock();
        while !waiting.is_idle() && !waiting.is_over() {
            // Not for ever: a write that makes no progress fails.
            waiting = self.wait(waiting, IDLE);
        }
        waiting.check()
    }

    /// Waits until no more than [`QUEUE_MAX`] bytes wait. A peer that takes nothing for `patience` meanwhile is dropped.
    pub(crate) fn wait_for_room(&self, patience: Duration) {
        let mut waiting = self.lock();
        let since = Instant::now();
        while waiting.bytes > QUEUE_MAX && !waiting.is_over() {
            let last = waiting.progress.map_or(since, |last| last.max(since));
            if last.elapsed() > patience {
                self.finish(&mut waiting, Over::from(&took_nothing(patience)));
                return;
            }
            waiting = self.wait(waiting, patience / 4);
        }
    }

    /// Nothing more is sent.
    pub(crate) fn end(&self) {
        self.finish(&mut self.lock(), Over::ended());
    }

    fn finish(&self, waiting: &mut Waiting, why: Over) {
        waiting.over.get_or_insert(why);
        waiting.items.clear();
        waiting.behind = None;
        waiting.bytes = 0;
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }

    /// Part of a frame may be out: nothing that follows could be understood.
    fn fail(&self, mut waiting: MutexGuard<'_, Waiting>, error: io::Error) -> io::Error {
        self.finish(&mut waiting, Over::from(&error));
        error
    }

    /// Something waits: a thread has to send it.
    fn see_to_it(self: &Arc<Self>, mut waiting: MutexGuard<'_, Waiting>) -> io::Result<()> {
        if !waiting.draining && !waiting.items.is_empty() && !waiting.is_over() {
            let queue = self.clone();
            let spawned = std::thread::Builder::new()
                .name("chain-queue".into())
                .spawn(move || queue.drain());
            if let Err(e) = spawned {
                return Err(self.fail(waiting, e));
            }
            waiting.draining = true;
            waiting.progress = Some(Instant::now());
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Sends what comes, until the end or until nothing has come for a while.
    fn drain(&self) {
        let mut waiting = self.lock();
        loop {
            let mut waited = false;
            while waiting.items.is_empty() && !waiting.is_over() && !waited {
                let since = Instant::now();
                waiting = self.wait(waiting, IDLE);
                waited = since.elapsed() >= IDLE;
            }
            let Some(mut item) = waiting.items.pop_front() else {
                waiting.draining = false;
                return;
            };
            waiting.writing = true;
            drop(waiting);
            let sent = item.send(&self.stream, true);
            waiting = self.lock();
            waiting.writing = false;
            waiting.progress = Some(Instant::now());
            if let Err(e) = sent {
                self.finish(&mut waiting, Over::from(&e));
            } else if !waiting.is_over() {
                waiting.bytes -= item.len();
            }
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, Frame, Kind};
    use checkpoint::{Epoch, Generation, VmId};
    use std::net::TcpListener;

    fn pair() -> (Arc<Queue>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Queue::new(here), listener.accept().unwrap().0)
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

    fn post(
        queue: &Arc<Queue>,
        epoch: u64,
        bytes: usize,
        turn: Turn,
        most: usize,
    ) -> io::Result<()> {
        let mut payload = Payload::default();
        payload.fill(&vec![7; bytes]);
        let header = Header::new(&frame(epoch), bytes, payload.crc())?;
        queue.post(header, &payload.clone(), || payload, turn, most)
    }

    fn read(there: &mut TcpStream, epochs: impl IntoIterator<Item = u64>) {
        let mut received = Payload::default();
        for epoch in epochs {
            assert_eq!(
                wire::read(there, &mut received).unwrap().epoch,
                Epoch(epoch)
            );
        }
    }

    #[test]
    fn what_a_peer_does_not_read_waits_in_order_and_its_sender_does_not() {
        let (queue, mut there) = pair();
        // Far more than sockets hold, and nobody reads.
        let count = 2 * (QUEUE_MAX >> 20) as u64;
        for epoch in 0..count {
            post(&queue, epoch, 1 << 20, Turn::Behind, usize::MAX).unwrap();
        }
        let late = queue.clone();
        let late = std::thread::spawn(move || {
            late.wait_for_room(Duration::from_secs(60));
            late.lock().bytes
        });
        assert!(
            queue
                .send_if_idle(Header::new(&frame(0), 0, 0).unwrap())
                .is_ok()
        );
        read(&mut there, 0..count);
        assert!(late.join().unwrap() <= QUEUE_MAX);
        queue.wait_sent().unwrap();
        assert_eq!(queue.lock().bytes, 0, "every byte is accounted for");
        queue.end();
        assert!(post(&queue, 0, 1, Turn::Behind, usize::MAX).is_err());
        let mut received = Payload::default();
        assert!(wire::read(&mut there, &mut received).is_err(), "it is over");
    }

    #[test]
    fn c9_a_peer_that_is_told_things_and_does_not_read_is_dropped() {
        let (queue, _there) = pair();
        let dropped =
            (0..1 << 20).find(|n| post(&queue, *n, 1000, Turn::Behind, 64 << 10).is_err());
        assert!(dropped.is_some(), "it would take memory without an end");
        assert_eq!(queue.lock().bytes, 0);
    }

    #[test]
    fn one_that_takes_nothing_holds_nobody_up_for_longer_than_its_patience() {
        let (queue, _there) = pair();
        while queue.lock().bytes <= QUEUE_MAX {
            post(&queue, 0, 1 << 20, Turn::Behind, usize::MAX).unwrap();
        }
        queue.wait_for_room(Duration::from_millis(20));
        assert!(post(&queue, 0, 1, Turn::Behind, usize::MAX).is_err());
    }

    #[test]
    fn what_is_held_is_sent_after_what_goes_ahead_of_it() {
        let (queue, mut there) = pair();
        queue.hold();
        for epoch in [10, 11] {
            post(&queue, epoch, 100, Turn::Behind, usize::MAX).unwrap();
        }
        for epoch in [1, 2] {
            post(&queue, epoch, 100, Turn::Ahead, usize::MAX).unwrap();
            queue.wait_sent().unwrap();
        }
        queue.release().unwrap();
        post(&queue, 12, 100, Turn::Behind, usize::MAX).unwrap();
        read(&mut there, [1, 2, 10, 11, 12]);
    }

    #[test]
    fn a_connection_that_ends_ends_the_queue_and_who_waits_for_room() {
        let (queue, there) = pair();
        while queue.lock().bytes <= QUEUE_MAX {
            post(&queue, 0, 1 << 20, Turn::Behind, usize::MAX).unwrap();
        }
        let waits = queue.clone();
        let waits = std::thread::spawn(move || waits.wait_for_room(Duration::from_secs(3600)));
        drop(there);
        waits.join().unwrap();
        assert!(post(&queue, 1, 1, Turn::Behind, usize::MAX).is_err());
    }
}
