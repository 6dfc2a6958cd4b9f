//! The clients of one VM, all the time: one adds to its counter and one asks for it, each on a TCP connection of its own
//! that has to last; a third asks on a new connection each time, and so hears a machine that has forgotten the others'. All
//! that they called and were answered is its history. The counter is the one on the guest's disk: what is in its memory only
//! a reset takes away, and rightly so.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest::proto::{Op as GuestOp, PORT, Request, Response, Status};

use super::history::{Ask, Op, Violation, check};
use crate::lab::{Lab, LabError};
use crate::probe::{ProbeConn, ProbeError};

/// A VM that says nothing for so long is lost.
pub const SILENCE: Duration = Duration::from_secs(120);
/// Between an answer and the next call.
const PAUSE: Duration = Duration::from_millis(4);
/// One question in so many is what the disk holds.
const DISK: u64 = 16;
/// Between two questions on new connections.
const VISIT: Duration = Duration::from_millis(300);
/// How long such a question waits.
const VISIT_WAITS: Duration = Duration::from_secs(10);
/// One attempt to connect.
const CONNECT: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Book {
    ops: Vec<Op>,
    /// When the addition under way was called: it may have happened already.
    under_way: Option<u64>,
    /// The highest value that is acknowledged to be on the disk.
    on_disk: u64,
    /// Connections that have ended: when the call that noticed was made, and why.
    broken: Vec<(u64, String)>,
    /// When the machine had last forgotten its connections, at the latest.
    reset: u64,
    /// What no machine may answer.
    wrong: Vec<String>,
    longest: Duration,
}

#[derive(Debug)]
struct Shared {
    begun: Instant,
    base: u64,
    addr: SocketAddr,
    book: Mutex<Book>,
    answers: AtomicU64,
    stop: AtomicBool,
}

/// The clients, until they are stopped.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Connects to the guest at `ip`, and begins.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn start(lab: &Lab, ip: Ipv4Addr) -> Result<Self, Box<dyn std::error::Error>> {
        let addr = SocketAddr::from((ip, PORT));
        lab.within_client(|| {
            let mut first = ProbeConn::connect(addr, SILENCE)?;
            let base = first.call(Request::new(GuestOp::Read, 0))?.disk_counter;
            let shared = Arc::new(Shared {
                begun: Instant::now(),
                base,
                addr,
                book: Mutex::default(),
                answers: AtomicU64::new(0),
                stop: AtomicBool::new(false),
            });
            // Threads of this thread are where it is.
            let threads = [Some(Ask::Add), Some(Ask::Read), None].map(|ask| {
                let shared = shared.clone();
                let thread = std::thread::Builder::new().name("soak-client".into());
                thread.spawn(move || match ask {
                    Some(ask) => shared.run(ask),
                    None => shared.visit(),
                })
            });
            let threads = threads.into_iter().collect::<Result<_, _>>();
            let threads = threads.map_err(|e| LabError::io("a thread", e))?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Self { shared, threads })
        })
        .map_err(|e| e.to_string().into())
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.shared.answers.load(Ordering::Relaxed)
    }

    /// The longest time that a call took.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.shared.book().longest
    }

    /// Why connections have ended since this was asked last.
    #[must_use]
    pub fn take_broken(&self) -> Vec<String> {
        let mut book = self.shared.book();
        let (broken, reset) = (std::mem::take(&mut book.broken), book.reset);
        let unasked = broken.into_iter().filter(|(from, _)| *from > reset);
        unasked.map(|(_, why)| why).collect()
    }

    /// The machine has been reset or started anew, as was asked. A call that it had taken in before is never answered, which
    /// its client learns when its patience is over.
    pub fn forgive(&self) {
        let now = self.shared.now();
        self.shared.book().reset = now;
    }

    /// Checks all that was seen so far.
    ///
    /// # Errors
    /// What no counter explains, in words.
    pub fn check(&self) -> Result<(), String> {
        let (ops, wrong) = {
            let book = self.shared.book();
            let mut ops = book.ops.clone();
            ops.extend(book.under_way.map(|from| Op {
                ask: Ask::Add,
                from,
                answer: None,
            }));
            (ops, book.wrong.first().cloned())
        };
        check(self.shared.base, &ops).map_err(|v: Violation| v.to_string())?;
        wrong.map_or(Ok(()), Err)
    }

    /// Ends the clients after their calls under way; the answers that came.
    #[must_use]
    pub fn stop(&mut self) -> u64 {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.answers()
    }
}

/// What an answer says of the counter on the disk. With an error of the disk an addition may get there later, or not.
fn told(ask: Ask, answer: &Response) -> Option<u64> {
    match ask {
        Ask::Add if answer.status == Status::Ok as u16 => Some(answer.counter),
        Ask::Add => None,
        Ask::Read => Some(answer.disk_counter),
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // Not waited for: a call may be under way to a VM that is gone.
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }

    fn run(&self, ask: Ask) {
        let mut connection: Option<ProbeConn> = None;
        let mut number = 0u64;
        while !self.stop.load(Ordering::Relaxed) {
            let Some(open) = &mut connection else {
                connection = ProbeConn::connect(self.addr, CONNECT).ok();
                if let Some(open) = &mut connection {
                    open.set_timeout(SILENCE);
                }
                continue;
            };
            number += 1;
            let from = self.now();
            let done = match (ask, number % DISK) {
                (Ask::Read, 0) => self.ask_disk(open),
                _ => self.call(open, ask),
            };
            if let Err(e) = done {
                self.book().broken.push((from, e.to_string()));
                connection = None;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn call(&self, open: &mut ProbeConn, ask: Ask) -> Result<(), ProbeError> {
        let op = match ask {
            Ask::Add => GuestOp::Incr,
            Ask::Read => GuestOp::Read,
        };
        let from = self.now();
        if ask == Ask::Add {
            self.book().under_way = Some(from);
        }
        let answer = open.call(Request::new(op, 0));
        let at = self.now();
        let mut book = self.book();
        if ask == Ask::Add {
            book.under_way = None;
        }
        let told = answer.as_ref().ok().and_then(|a| told(ask, a));
        let told = told.map(|value| (at, value));
        book.ops.push(Op {
            ask,
            from,
            answer: told,
        });
        answer?;
        self.answers.fetch_add(1, Ordering::Relaxed);
        book.longest = book.longest.max(Duration::from_nanos(at - from));
        if let (Ask::Add, Some((_, value))) = (ask, told) {
            book.on_disk = book.on_disk.max(value);
        }
        Ok(())
    }

    /// A question that nobody answers, or on a connection that fails, says nothing about the counter.
    fn visit(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(VISIT);
            let from = self.now();
            let Ok(mut open) = ProbeConn::connect(self.addr, CONNECT) else {
                continue;
            };
            open.set_timeout(VISIT_WAITS);
            if let Ok(answer) = open.call(Request::new(GuestOp::Read, 0)) {
                let answer = told(Ask::Read, &answer).map(|value| (self.now(), value));
                self.book().ops.push(Op {
                    ask: Ask::Read,
                    from,
                    answer,
                });
            }
        }
    }

    /// An addition is answered when the disk has it: the disk is behind no answer.
    fn ask_disk(&self, open: &mut ProbeConn) -> Result<(), ProbeError> {
        let least = self.book().on_disk;
        let answer = open.call(Request::new(GuestOp::ReadDisk, 0))?;
        self.answers.fetch_add(1, Ordering::Relaxed);
        if answer.status == Status::DiskTorn as u16 && least > 0 {
            let mut book = self.book();
            book.wrong.push("the block on the disk is torn".into());
        }
        if answer.status == Status::Ok as u16 && answer.disk_counter < least {
            let has = answer.disk_counter;
            let what = format!("the disk has {has}, after {least} was acknowledged");
            self.book().wrong.push(what);
        }
        Ok(())
    }
}
