//! A client that keeps asking: numbered INCRs, several outstanding, every answer booked.
//!
//! One thread sends, one per connection receives; between them the [`Ledger`] behind a lock. A connection that breaks
//! is counted and made anew, so that the counter can still be checked afterwards. What was outstanding is not sent again.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest::proto::{MAX_OUTSTANDING, Op, RESPONSE_LEN, Request, Response};
use serde::Serialize;

use super::conn::{self, ProbeConn, ProbeError, closed, is_timeout, ok};
use super::ledger::{Ledger, LedgerError};
use super::timeline::{Gap, Latency, Timeline, micros};

/// Of the guest's [`MAX_OUTSTANDING`], what is left to calls beside the INCRs.
const CALLS: usize = 4;
/// Descriptions of broken connections kept.
const MAX_ERRORS: usize = 16;
/// How often a blocked thread looks whether it should end; not how fast it notices an answer.
const LOOK: Duration = Duration::from_millis(100);
/// One attempt to connect again after a break.
const AGAIN: Duration = Duration::from_millis(500);

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct ProbeConfig {
    /// The guest's address and [`guest::proto::PORT`].
    pub addr: SocketAddr,
    /// INCRs outstanding at most, 1 to 60 (a value outside is cut).
    pub window: usize,
    /// Time between two INCRs; zero: the next one as soon as the window allows.
    pub interval: Duration,
    /// `FLAG_*` bits of each INCR.
    pub flags: u16,
    /// `TCP_USER_TIMEOUT`; none: the kernel's default.
    pub user_timeout: Option<Duration>,
}

impl ProbeConfig {
    /// 32 outstanding, one every 10 ms.
    pub fn new(addr: SocketAddr) -> ProbeConfig {
        ProbeConfig {
            addr,
            window: 32,
            interval: Duration::from_millis(10),
            flags: 0,
            user_timeout: None,
        }
    }
}

/// How far the client is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// INCRs sent.
    pub sent: u64,
    /// INCRs acknowledged.
    pub acked: u64,
    /// INCRs sent and not answered yet.
    pub outstanding: usize,
    /// Acknowledged INCRs known to be lost so far.
    pub lost: u64,
    /// Connections that broke.
    pub broken: u64,
}

/// What a client saw, from start to stop. Times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProbeReport {
    /// INCRs sent.
    pub sent: u64,
    /// INCRs acknowledged.
    pub acked: u64,
    /// INCRs answered with an error.
    pub failed: u64,
    /// INCRs that were never answered.
    pub unacknowledged: u64,
    /// Acknowledged INCRs the guest does not know any more. 0 means something only if `verified`.
    pub lost: u64,
    /// Whether the counter was read after the last acknowledgement.
    pub verified: bool,
    /// Times the counter went back.
    pub went_back: u64,
    /// Increments nobody here asked for (see [`Ledger::extra`]).
    pub extra: u64,
    /// Connections that broke.
    pub broken: u64,
    /// Why, for the first few.
    pub errors: Vec<String>,
    /// Counter before the first INCR.
    pub counter_before: u64,
    /// Newest counter seen.
    pub counter_after: u64,
    /// Round-trip times.
    pub latency: Latency,
    /// Longest time between two acknowledgements.
    pub longest_gap_us: u64,
}

impl ProbeReport {
    /// Whether the one connection lasted and everything acknowledged is there.
    pub fn survived(&self) -> bool {
        self.verified && self.lost == 0 && self.broken == 0 && self.went_back == 0
    }
}

/// A question in the order it was sent.
enum Slot {
    Incr,
    Call(Request, SyncSender<Response>),
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    next_seq: u64,
    /// Sent, not answered, oldest first.
    slots: VecDeque<Slot>,
    /// To be sent before the next INCR.
    calls: VecDeque<(Request, SyncSender<Response>)>,
    /// Why the present connection ended.
    ended: Option<ProbeError>,
    errors: Vec<String>,
    stop: bool,
    /// Nothing is sent any more: calls are refused.
    gone: bool,
    verified: bool,
}

struct Shared {
    config: ProbeConfig,
    state: Mutex<State>,
    changed: Condvar,
}

/// The client, running on threads of its own until [`ProbeClient::stop`] or drop.
pub struct ProbeClient {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for ProbeClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProbeClient")
            .field("progress", &self.progress())
            .finish()
    }
}

impl ProbeClient {
    /// Connects within `within`, reads the counter, and begins.
    ///
    /// # Errors
    /// [`ProbeError`]: no connection, or no answer to the first read.
    pub fn start(config: ProbeConfig, within: Duration) -> Result<ProbeClient, ProbeError> {
        let config = ProbeConfig {
            window: config.window.clamp(1, MAX_OUTSTANDING - CALLS),
            ..config
        };
        let before = read_counter(config.addr, within)?;
        let stream = conn::connect(config.addr, within, config.user_timeout)?;
        let mut state = State::default();
        state.ledger.counter_read(before);
        let shared = Arc::new(Shared {
            config,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let sender = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("probe-send".to_owned())
                .spawn(move || shared.run(stream))
                .map_err(ProbeError::Thread)?
        };
        Ok(ProbeClient {
            shared,
            sender: Some(sender),
        })
    }

    /// Asks on the client's own connection, between the INCRs.
    ///
    /// # Errors
    /// [`ProbeError::NoAnswer`] after `within`, [`ProbeError::Stopped`] if the connection broke first. A late answer is
    /// thrown away.
    pub fn call(&self, request: Request, within: Duration) -> Result<Response, ProbeError> {
        let (tx, rx) = sync_channel(1);
        {
            let mut state = self.shared.lock();
            if state.gone || state.stop {
                return Err(ProbeError::Stopped);
            }
            state.calls.push_back((request, tx));
        }
        self.shared.changed.notify_all();
        rx.recv_timeout(within).map_err(|e| match e {
            std::sync::mpsc::RecvTimeoutError::Timeout => ProbeError::NoAnswer(within),
            std::sync::mpsc::RecvTimeoutError::Disconnected => ProbeError::Stopped,
        })
    }

    /// Sets the guest's load: `pages` dirtied per pass, `work` iterations after each. Returns the pages in force.
    ///
    /// # Errors
    /// As [`ProbeClient::call`], or a status other than `Ok`.
    pub fn set_load(&self, pages: u64, work: u64, within: Duration) -> Result<u64, ProbeError> {
        ok(self.call(Request::set_load(0, pages, work), within)?).map(|a| a.counter)
    }

    /// The guest's counters.
    ///
    /// # Errors
    /// As [`ProbeClient::set_load`].
    pub fn stats(&self, within: Duration) -> Result<Response, ProbeError> {
        ok(self.call(Request::new(Op::Stats, 0), within)?)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let state = self.shared.lock();
        Progress {
            sent: state.ledger.sent(),
            acked: state.ledger.acked(),
            outstanding: state.ledger.outstanding(),
            lost: state.ledger.lost(),
            broken: state.ledger.broken(),
        }
    }

    /// When the first acknowledgement later than `t` came, if it has.
    pub fn first_reply_after(&self, t: Instant) -> Option<Instant> {
        self.shared.lock().ledger.timeline().first_after(t)
    }

    /// Waits for the first acknowledgement later than `t`.
    pub fn wait_reply_after(&self, t: Instant, within: Duration) -> Option<Instant> {
        self.wait(within, |s| s.ledger.timeline().first_after(t))
    }

    /// Waits until `n` INCRs are acknowledged; says whether they are.
    pub fn wait_acked(&self, n: u64, within: Duration) -> bool {
        self.wait(within, |s| (s.ledger.acked() >= n).then_some(()))
            .is_some()
    }

    /// The longest stretch without acknowledgements that ended after `t`: the outage a failover at `t` caused.
    pub fn longest_gap_after(&self, t: Instant) -> Option<Gap> {
        self.shared.lock().ledger.timeline().longest_gap_after(t)
    }

    /// A copy of all acknowledgements so far.
    pub fn timeline(&self) -> Timeline {
        self.shared.lock().ledger.timeline().clone()
    }

    /// Stops asking, waits up to `drain` for what is outstanding and for the counter's last value, and reports.
    pub fn stop(mut self, drain: Duration) -> ProbeReport {
        self.begin_stop();
        let done = self.wait(drain, |s| (s.gone || s.slots.is_empty()).then_some(()));
        if done.is_some() {
            self.verify(drain);
        }
        self.finish();
        let state = self.shared.lock();
        let l = &state.ledger;
        ProbeReport {
            sent: l.sent(),
            acked: l.acked(),
            failed: l.failed(),
            unacknowledged: l.unacknowledged() + l.outstanding() as u64,
            lost: l.lost(),
            verified: state.verified,
            went_back: l.went_back(),
            extra: l.extra(),
            broken: l.broken(),
            errors: state.errors.clone(),
            counter_before: l.base().unwrap_or(0),
            counter_after: l.counter(),
            latency: l.timeline().latency(),
            longest_gap_us: l.timeline().longest_gap().map_or(0, |g| micros(g.len())),
        }
    }

    /// Reads the counter on a connection of its own: that the client's lives must not be a condition.
    fn verify(&self, within: Duration) {
        match read_counter(self.shared.config.addr, within) {
            Ok(counter) => {
                let mut state = self.shared.lock();
                state.ledger.counter_read(counter);
                state.verified = true;
            }
            Err(e) => self.shared.lock().note(&e),
        }
    }

    fn begin_stop(&self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
    }

    fn finish(&mut self) {
        self.shared.lock().gone = true;
        self.shared.changed.notify_all();
        if let Some(t) = self.sender.take() {
            // A panic there would be a bug; what was booked until then is still told.
            let _ = t.join();
        }
    }

    fn wait<T>(&self, within: Duration, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + within;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.shared.wait(state, left);
        }
    }
}

impl Drop for ProbeClient {
    fn drop(&mut self) {
        self.begin_stop();
        self.finish();
    }
}

fn read_counter(addr: SocketAddr, within: Duration) -> Result<u64, ProbeError> {
    let mut c = ProbeConn::connect(addr, within)?;
    ok(c.call(Request::new(Op::Read, 0))?).map(|a| a.counter)
}

impl State {
    fn note(&mut self, e: &ProbeError) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(e.to_string());
        }
    }

    /// What to send now, and booked as sent: a call before an INCR, and neither beyond its share of the window.
    fn next_request(
        &mut self,
        config: &ProbeConfig,
        now: Instant,
        due: &mut Instant,
    ) -> Option<Request> {
        let seq = self.next_seq;
        if self.slots.len() < MAX_OUTSTANDING
            && let Some((request, answer_to)) = self.calls.pop_front()
        {
            let request = Request { seq, ..request };
            self.next_seq += 1;
            self.slots.push_back(Slot::Call(request, answer_to));
            return Some(request);
        }
        if self.stop || now < *due || self.ledger.outstanding() >= config.window {
            return None;
        }
        self.next_seq += 1;
        self.slots.push_back(Slot::Incr);
        self.ledger.incr_sent(seq, now);
        // From now, not from when it was due: what a full window held up is not made up for in a burst.
        let late = now.saturating_duration_since(*due) > config.interval;
        *due = if late { now } else { *due } + config.interval;
        Some(Request {
            flags: config.flags,
            ..Request::new(Op::Incr, seq)
        })
    }

    fn answered(&mut self, answer: &Response, now: Instant) -> Result<(), ProbeError> {
        match self.slots.front() {
            None => return Err(LedgerError::Unasked(answer.seq).into()),
            Some(Slot::Incr) => self.ledger.incr_answered(answer, now)?,
            Some(Slot::Call(request, to)) => {
                if answer.seq != request.seq {
                    return Err(LedgerError::OutOfOrder {
                        got: answer.seq,
                        want: request.seq,
                    }
                    .into());
                }
                if answer.op != request.op {
                    let (seq, op) = (answer.seq, answer.op);
                    return Err(LedgerError::WrongOp { seq, op }.into());
                }
                if answer.op == Op::Read as u16 || answer.op == Op::Stats as u16 {
                    self.ledger.counter_read(answer.counter);
                }
                // The caller may have given up.
                let _ = to.try_send(*answer);
            }
        }
        self.slots.pop_front();
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        self.changed
            .wait_timeout(state, at_most)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// The sending thread: one connection after the other.
    fn run(self: Arc<Self>, first: TcpStream) {
        let mut next = Some(first);
        while let Some(stream) = next {
            let ended = self.converse(&stream);
            let mut state = self.lock();
            // What was outstanding will not be answered: its callers learn it from the dropped channels.
            state.slots.clear();
            state.calls.clear();
            if let Some(e) = ended {
                state.ledger.connection_broken();
                state.note(&e);
            }
            drop(state);
            self.changed.notify_all();
            next = self.connect_again();
        }
        let mut state = self.lock();
        state.gone = true;
        state.calls.clear();
        drop(state);
        self.changed.notify_all();
    }

    fn connect_again(&self) -> Option<TcpStream> {
        loop {
            {
                let state = self.lock();
                if state.stop || state.gone {
                    return None;
                }
            }
            if let Ok(s) = conn::connect(self.config.addr, AGAIN, self.config.user_timeout) {
                return Some(s);
            }
        }
    }

    /// Sends on one connection until it breaks (returns why) or the client is stopped.
    fn converse(self: &Arc<Self>, stream: &TcpStream) -> Option<ProbeError> {
        let receiver = stream.try_clone().and_then(|s| {
            let shared = self.clone();
            std::thread::Builder::new()
                .name("probe-recv".to_owned())
                .spawn(move || shared.receive(s))
        });
        let receiver = match receiver {
            Ok(r) => r,
            Err(e) => return Some(ProbeError::Thread(e)),
        };
        let ended = self.send(stream);
        // Wakes the receiver. Not an error if the peer was first.
        let _ = stream.shutdown(Shutdown::Both);
        let _ = receiver.join();
        self.lock().ended = None;
        ended
    }

    fn send(&self, mut stream: &TcpStream) -> Option<ProbeError> {
        let mut due = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(e) = state.ended.take() {
                return Some(e);
            }
            if state.gone {
                return None;
            }
            if let Some(request) = state.next_request(&self.config, Instant::now(), &mut due) {
                drop(state);
                if let Err(e) = stream.write_all(&request.to_bytes()) {
                    return Some(ProbeError::Broken(e));
                }
                state = self.lock();
                continue;
            }
            // Not due, or the window is full, or stopping: until an answer, a call or the time comes.
            let left = due.saturating_duration_since(Instant::now());
            let nap = if left.is_zero() { LOOK } else { left.min(LOOK) };
            state = self.wait(state, nap);
        }
    }

    /// The receiving thread of one connection.
    fn receive(&self, mut stream: TcpStream) {
        let e = self.receive_until_error(&mut stream);
        let mut state = self.lock();
        // The client's own closing is no break.
        if !state.gone {
            state.ended = Some(e);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn receive_until_error(&self, stream: &mut TcpStream) -> ProbeError {
        let mut buf = [0; RESPONSE_LEN * MAX_OUTSTANDING];
        let mut have = 0;
        loop {
            let n = match stream.read(&mut buf[have..]) {
                Ok(0) => return ProbeError::Broken(closed()),
                Ok(n) => n,
                Err(e) if is_timeout(&e) => continue,
                Err(e) => return ProbeError::Broken(e),
            };
            let now = Instant::now();
            have += n;
            let whole = have - have % RESPONSE_LEN;
            let mut state = self.lock();
            for answer in buf[..whole].as_chunks::<RESPONSE_LEN>().0 {
                let booked = Response::from_bytes(answer)
                    .map_err(ProbeError::from)
                    .and_then(|a| state.answered(&a, now));
                if let Err(e) = booked {
                    return e;
                }
            }
            drop(state);
            self.changed.notify_all();
            buf.copy_within(whole..have, 0);
            have -= whole;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_full_window_held_up_is_not_made_up_for_in_a_burst() {
        let config = ProbeConfig {
            window: 4,
            ..ProbeConfig::new(([127, 0, 0, 1], 1).into())
        };
        let mut state = State::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut due = start;
        let mut sent = vec![];
        for ms in (0..=40).chain(1000..1040) {
            if let Some(r) = state.next_request(&config, at(ms), &mut due) {
                sent.push((r.seq, ms));
            }
            if ms == 40 {
                assert_eq!(
                    sent,
                    [(0, 0), (1, 10), (2, 20), (3, 30)],
                    "the window is full"
                );
                state.ledger.connection_broken();
                sent.clear();
            }
        }
        assert_eq!(sent, [(4, 1000), (5, 1010), (6, 1020), (7, 1030)]);
    }

    #[test]
    fn calls_go_first_and_have_their_share_of_the_window() {
        let config = ProbeConfig::new(([127, 0, 0, 1], 1).into());
        let mut state = State::default();
        let now = Instant::now();
        let (tx, _rx) = sync_channel(1);
        for _ in 0..2 * MAX_OUTSTANDING {
            state
                .calls
                .push_back((Request::new(Op::Read, 0), tx.clone()));
        }
        let mut due = now;
        for seq in 0..MAX_OUTSTANDING as u64 {
            let r = state.next_request(&config, now, &mut due).expect("a call");
            assert_eq!((r.op, r.seq), (Op::Read as u16, seq));
        }
        let incr = state.next_request(&config, now, &mut due).expect("an INCR");
        assert_eq!(incr.op, Op::Incr as u16);
    }
}
