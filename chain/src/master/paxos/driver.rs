//! A member's thread: gives the node what happens, writes its record, lets out what it says.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::ClusterId;
use nix::fcntl::Flock;

use super::entry::Pid;
use super::node::{Answer, Event, Node, Output, Ticket};
use super::transport::{Heard, Transport};
use crate::master::record::{RecordFile, StoreError};
use crate::master::{MasterError, Request, Wanted};

/// Length of a tick. Late ticks are not made up for: a member that stood still must not believe the others did.
const TICK: Duration = Duration::from_millis(20);
/// Longest wait for an answer, should this member's disk not come back: beyond the node's own patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Events that wait for the node; who brings more has to wait.
const EVENTS: usize = 256;
/// Events that share one write.
const BATCH: usize = 64;

/// Between attempts to write a record that there is no room for, or that cannot be written.
const STUCK_PAUSE: Duration = Duration::from_millis(100);

/// Of a client.
#[derive(Clone, Debug)]
pub enum Question {
    Propose(Box<Request>),
    Read,
}

enum Input {
    Heard(Heard),
    Asked(Question, Wanted, SyncSender<Answer>),
    Stop,
}

#[derive(Debug, Default)]
struct Shared {
    revision: Mutex<u64>,
    changed: Condvar,
    leads: AtomicBool,
    answering: AtomicUsize,
    members: usize,
    ended: AtomicBool,
    /// Why its record cannot be written at present.
    stuck: Mutex<Option<Stuck>>,
    /// Why it does not take part any more.
    stopped: OnceLock<String>,
}

/// A record that cannot be written: the member stands still until it can.
#[derive(Clone, Debug)]
struct Stuck {
    path: PathBuf,
    why: String,
    /// There is only no room for it.
    full: bool,
}

impl From<Stuck> for MasterError {
    fn from(Stuck { path, why, full }: Stuck) -> Self {
        match full {
            true => Self::NoRoom { path, why },
            false => Self::Storage { path, why },
        }
    }
}

impl Shared {
    fn revision(&self) -> MutexGuard<'_, u64> {
        self.revision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stuck(&self) -> MutexGuard<'_, Option<Stuck>> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is applied here, and that somebody may have reason to look.
    fn tell(&self, revision: Option<u64>) {
        let mut known = self.revision();
        if let Some(revision) = revision {
            *known = revision;
        }
        self.changed.notify_all();
    }
}

/// The thread, from outside.
#[derive(Debug)]
pub struct Driver {
    input: SyncSender<Input>,
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Driver {
    /// Starts it; `output` is what the node has to say already, with its record if that is not on disk yet.
    ///
    /// # Errors
    /// [`MasterError::Bind`].
    pub fn start(
        node: Node,
        output: Output,
        file: RecordFile,
        lock: Flock<File>,
        members: &[(String, SocketAddr)],
    ) -> Result<Self, MasterError> {
        let me = node.me();
        let addr = members[me as usize - 1].1;
        let fail = |e: std::io::Error| MasterError::Bind {
            addr,
            why: e.to_string(),
        };
        let (sender, receiver) = sync_channel(EVENTS);
        let hearing = sender.clone();
        let hear = Arc::new(move |heard| hearing.send(Input::Heard(heard)).is_ok());
        let cluster = Arc::new(Mutex::new(node.cluster()));
        let transport = Transport::start(me, members, cluster.clone(), hear).map_err(fail)?;
        let shared = Arc::new(Shared {
            members: members.len(),
            ..Shared::default()
        });
        let mut member = Member {
            node,
            file,
            transport,
            cluster,
            shared: shared.clone(),
            sessions: BTreeMap::new(),
            tickets: BTreeMap::new(),
            next_ticket: 0,
            _lock: lock,
        };
        let thread = std::thread::Builder::new()
            .name("paxos".into())
            .spawn(move || {
                member.carry_out(output);
                member.run(&receiver);
            })
            .map_err(fail)?;
        Ok(Self {
            input: sender,
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Asks, and waits for the answer. A question that has waited in vain is not taken up later.
    ///
    /// # Errors
    /// [`MasterError::GivenUp`] if nobody waited for it when its turn came. [`MasterError::Stopped`] if the member has ended, [`MasterError::NoDecision`] if it does not come to answering.
    pub fn ask(&self, question: Question, wanted: &Wanted) -> Result<Answer, MasterError> {
        let stopped = || MasterError::Stopped("this member has been stopped".into());
        // Its thread is stuck, in a slow disk most likely, or the machine is.
        let late = || MasterError::NoDecision {
            answering: self.shared.answering.load(Ordering::Relaxed),
            members: self.shared.members,
        };
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let (answer, answered) = sync_channel(1);
        let mut input = Input::Asked(question, wanted.clone(), answer);
        loop {
            if self.shared.ended.load(Ordering::SeqCst) {
                return Err(stopped());
            }
            if let Some(stuck) = self.shared.stuck().clone() {
                return Err(stuck.into());
            }
            match self.input.try_send(input) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return Err(stopped()),
                Err(TrySendError::Full(_)) if Instant::now() > deadline => return Err(late()),
                Err(TrySendError::Full(back)) => {
                    input = back;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
        match answered.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            // It may have been under way when its record could not be written: whether it counts is decided once it can.
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) if !wanted.still() => Err(MasterError::GivenUp),
            Err(RecvTimeoutError::Disconnected) => Err(stopped()),
            Err(RecvTimeoutError::Timeout) => {
                wanted.give_up();
                Err(late())
            }
        }
    }

    /// Waits until more than `since` is applied here, or `deadline`.
    pub fn wait_revision(&self, since: u64, deadline: Instant) {
        let mut revision = self.shared.revision();
        while *revision <= since && !self.shared.ended.load(Ordering::SeqCst) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(revision, left);
            revision = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What keeps this member from taking part.
    pub fn trouble(&self) -> Option<String> {
        let stopped = self.shared.stopped.get().cloned();
        let stuck = || {
            let stuck = self.shared.stuck().clone()?;
            Some(MasterError::from(stuck).to_string())
        };
        stopped.or_else(stuck)
    }

    /// Whether this member leads.
    pub fn leads(&self) -> bool {
        self.shared.leads.load(Ordering::Relaxed)
    }

    /// Ends the thread, and waits for it.
    pub fn stop(&self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _ = self.input.send(Input::Stop);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            let _ = thread.join();
        }
        self.shared.tell(None);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Member {
    node: Node,
    file: RecordFile,
    transport: Transport,
    /// What its connections say it is of.
    cluster: Arc<Mutex<ClusterId>>,
    shared: Arc<Shared>,
    /// The newest connection of each member: what an earlier one still brings would come out of order.
    sessions: BTreeMap<Pid, u64>,
    tickets: BTreeMap<Ticket, SyncSender<Answer>>,
    next_ticket: Ticket,
    /// Held while this member lives: two with one record would promise the same twice.
    _lock: Flock<File>,
}

impl Member {
    fn run(&mut self, input: &Receiver<Input>) {
        let mut next_tick = Instant::now() + TICK;
        loop {
            let wait = next_tick.saturating_duration_since(Instant::now());
            match input.recv_timeout(wait) {
                Ok(first) => {
                    let more = input.try_iter().take(BATCH);
                    let mut all = std::iter::once(first).chain(more);
                    if !all.all(|input| self.take_in(input)) {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let now = Instant::now();
            if now >= next_tick {
                self.node.handle(Event::Tick);
                next_tick = now + TICK;
            }
            self.act();
        }
        self.transport.stop();
    }

    /// False: it is over.
    fn take_in(&mut self, input: Input) -> bool {
        let event = match input {
            Input::Stop => return false,
            Input::Heard(Heard::Connected(from, session)) => {
                let newest = self.sessions.entry(from).or_default();
                if session < *newest {
                    return true;
                }
                *newest = session;
                Event::Reconnected(from)
            }
            Input::Heard(Heard::Message(from, session, message)) => {
                if self.sessions.get(&from) != Some(&session) {
                    return true;
                }
                Event::Message(from, message)
            }
            Input::Heard(Heard::Reached(peer)) => Event::Reconnected(peer),
            Input::Asked(_, wanted, _) if !wanted.still() => return true,
            Input::Asked(question, _, answer) => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.tickets.insert(ticket, answer);
                match question {
                    Question::Propose(request) => Event::Propose(ticket, request),
                    Question::Read => Event::Read(ticket),
                }
            }
        };
        self.node.handle(event);
        true
    }

    fn act(&mut self) {
        let output = self.node.take();
        self.carry_out(output);
    }

    fn carry_out(&mut self, mut output: Output) {
        let was = self.shared.stopped.get().is_some();
        if let Some(record) = output.record.take()
            && let Err(e) = self.store(&record)
        {
            let why = format!(
                "{}: {e}; this member ends without it",
                self.file.path().display()
            );
            self.node.stop(&why);
            // What was to be answered depends on what was not written.
            for (ticket, _) in output.answers {
                if let Some(asker) = self.tickets.remove(&ticket) {
                    let stopped = super::node::Refusal::Stopped(why.clone());
                    let _ = asker.try_send(Answer::Refused(stopped));
                }
            }
            output = self.node.take();
        }
        if let (false, Some(why)) = (was, self.node.stopped()) {
            tracing::error!("master: {why}");
            let _ = self.shared.stopped.set(why.into());
        }
        self.perform(output);
    }

    /// Writes the record. While it cannot be written the member stands still: what the record is to cover has not left it,
    /// and to the others it is one that does not answer. Fails only once the member is to end.
    fn store(&mut self, record: &[u8]) -> Result<(), StoreError> {
        loop {
            let e = match self.file.store(record) {
                Ok(()) => {
                    if self.shared.stuck().take().is_some() {
                        tracing::info!("master: its record can be written again");
                    }
                    return Ok(());
                }
                Err(e) if self.shared.ended.load(Ordering::SeqCst) => return Err(e),
                Err(e) => e,
            };
            let stuck = Stuck {
                path: self.file.path(),
                why: e.to_string(),
                full: matches!(e, StoreError::NoRoom(_)),
            };
            let text = format!(
                "{}: {e}; this member stands still until it can be written",
                stuck.path.display()
            );
            if self.shared.stuck().replace(stuck).is_none() {
                tracing::error!("master: {text}");
            }
            self.shared.leads.store(false, Ordering::Relaxed);
            std::thread::sleep(STUCK_PAUSE);
        }
    }

    fn perform(&mut self, output: Output) {
        for message in &output.messages {
            self.transport.send(message);
        }
        let mut cluster = self.cluster.lock().unwrap_or_else(PoisonError::into_inner);
        *cluster = self.node.cluster();
        drop(cluster);
        let leads = self.node.leader() == Some(self.node.me()) && self.node.stopped().is_none();
        self.shared.leads.store(leads, Ordering::Relaxed);
        let answering = self.node.answering();
        self.shared.answering.store(answering, Ordering::Relaxed);
        if output.revision.is_some() {
            self.shared.tell(output.revision);
        }
        for (ticket, answer) in output.answers {
            if let Some(asker) = self.tickets.remove(&ticket) {
                let _ = asker.try_send(answer);
            }
        }
    }
}
