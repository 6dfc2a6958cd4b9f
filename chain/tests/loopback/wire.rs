//! The way to a host: every connection to its server goes through one of these, which counts frames, and can be cut,
//! held up, or hold answers back; and so do datagrams, which it can lose.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chain::wire::{FLAG_FULL, FLAG_INSTALL, HEADER, Kind};
use nix::sys::socket::{setsockopt, sockopt};

use crate::cluster::PATIENCE;

/// What is on its way to a host that does not read stays with the sender.
const BUFFER: usize = 64 << 10;

/// What happens to checkpoints on their way to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    No,
    /// Held up from the frame after this many of the content that fills a joining replica.
    Filling(usize),
    Now,
}

struct Shared {
    target: Mutex<SocketAddr>,
    open: Mutex<Vec<TcpStream>>,
    hold: Mutex<Hold>,
    answers: Mutex<Hold>,
    /// How long each frame of pages takes.
    slow: Mutex<Duration>,
    changed: Condvar,
    full: AtomicUsize,
    installs: AtomicUsize,
    greetings: AtomicUsize,
    loses_datagrams: AtomicBool,
    datagrams: AtomicUsize,
}

pub struct Wire {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// A way to `target`; it ends with the test's process.
    pub fn to(target: SocketAddr) -> Self {
        let (listener, socket, addr) = bind();
        setsockopt(&listener, sockopt::RcvBuf, &BUFFER).unwrap();
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            open: Mutex::default(),
            hold: Mutex::new(Hold::No),
            answers: Mutex::new(Hold::No),
            slow: Mutex::default(),
            changed: Condvar::new(),
            full: AtomicUsize::new(0),
            installs: AtomicUsize::new(0),
            greetings: AtomicUsize::new(0),
            loses_datagrams: AtomicBool::new(false),
            datagrams: AtomicUsize::new(0),
        });
        let passing = shared.clone();
        std::thread::spawn(move || passing.datagrams(&socket));
        let serving = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let target = *lock(&serving.target);
                let Ok(server) = TcpStream::connect(target) else {
                    continue;
                };
                let ends = [&client, &server].map(|end| end.try_clone().unwrap());
                let mut open = lock(&serving.open);
                open.retain(|end| end.peer_addr().is_ok());
                open.extend([&client, &server].map(|e| e.try_clone().unwrap()));
                drop(open);
                let (there, back) = (serving.clone(), serving.clone());
                let [from, to] = ends;
                std::thread::spawn(move || over(&from, &to, there.frames(&from, &to)));
                std::thread::spawn(move || over(&server, &client, back.answers(&server, &client)));
            }
        });
        Self { addr, shared }
    }

    /// The host listens somewhere else now.
    pub fn point_to(&self, target: SocketAddr) {
        *lock(&self.shared.target) = target;
    }

    /// All connections end.
    pub fn cut(&self) {
        for end in lock(&self.shared.open).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn set(&self, which: &Mutex<Hold>, hold: Hold) {
        *lock(which) = hold;
        self.shared.changed.notify_all();
    }

    /// Holds up checkpoints to the host, from the next frame on.
    pub fn hold(&self) {
        self.set(&self.shared.hold, Hold::Now);
    }

    /// Holds them up once the host has been sent so many frames of what fills it.
    pub fn hold_in_filling(&self, frames: usize) {
        self.set(&self.shared.hold, Hold::Filling(frames));
    }

    /// Waits until that is so.
    pub fn wait_held(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut hold = lock(&self.shared.hold);
        while *hold != Hold::Now {
            assert!(Instant::now() < deadline, "no filling came");
            let (guard, _) = self.shared.changed.wait_timeout(hold, PATIENCE).unwrap();
            hold = guard;
        }
    }

    /// Lets everything pass again.
    pub fn release(&self) {
        self.set(&self.shared.hold, Hold::No);
        self.set(&self.shared.answers, Hold::No);
    }

    /// The host takes so long for each frame of pages.
    pub fn slow(&self, each: Duration) {
        *lock(&self.shared.slow) = each;
    }

    /// Holds back what the host says.
    pub fn hold_answers(&self) {
        self.set(&self.shared.answers, Hold::Now);
    }

    /// Datagrams to the host are lost from here on.
    pub fn lose_datagrams(&self) {
        self.shared.loses_datagrams.store(true, Ordering::SeqCst);
    }

    /// Datagrams that came so far, lost ones too.
    pub fn datagrams(&self) -> usize {
        self.shared.datagrams.load(Ordering::SeqCst)
    }

    /// Full checkpoints begun so far.
    pub fn full(&self) -> usize {
        self.shared.full.load(Ordering::SeqCst)
    }

    /// Fillings begun so far.
    pub fn installs(&self) -> usize {
        self.shared.installs.load(Ordering::SeqCst)
    }

    /// Connections made so far.
    pub fn greetings(&self) -> usize {
        self.shared.greetings.load(Ordering::SeqCst)
    }
}

/// The same port for both.
fn bind() -> (TcpListener, UdpSocket, SocketAddr) {
    for _ in 0..16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        if let Ok(socket) = UdpSocket::bind(addr) {
            return (listener, socket, addr);
        }
    }
    panic!("no port is free for both");
}

/// However a direction ended, so does the connection.
fn over(from: &TcpStream, to: &TcpStream, _: io::Result<()>) {
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

impl Shared {
    fn wait(&self, which: &Mutex<Hold>) {
        let mut hold = lock(which);
        while *hold == Hold::Now {
            hold = self
                .changed
                .wait(hold)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn datagrams(&self, socket: &UdpSocket) {
        let mut bytes = [0; 2048];
        loop {
            // What is refused at the other end shows here, as an error of the next call.
            let Ok(n) = socket.recv(&mut bytes) else {
                continue;
            };
            self.datagrams.fetch_add(1, Ordering::SeqCst);
            if !self.loses_datagrams.load(Ordering::SeqCst) {
                let _ = socket.send_to(&bytes[..n], *lock(&self.target));
            }
        }
    }

    /// Passes on frames towards the host, one by one.
    fn frames(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let (mut frame, mut filling) = (Vec::new(), false);
        loop {
            frame.resize(HEADER, 0);
            from.read_exact(&mut frame)?;
            let word = |at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().unwrap());
            let (kind, length, flags) = (word(4) >> 16, word(32), word(40));
            frame.resize(HEADER + length as usize, 0);
            from.read_exact(&mut frame[HEADER..])?;
            let is = |k: Kind| kind == k as u32;
            if is(Kind::Begin) {
                filling = flags & FLAG_INSTALL != 0;
                self.installs
                    .fetch_add(usize::from(filling), Ordering::SeqCst);
                let full = flags & FLAG_FULL != 0;
                self.full.fetch_add(usize::from(full), Ordering::SeqCst);
            } else if filling && !is(Kind::Heartbeat) {
                let mut hold = lock(&self.hold);
                *hold = match *hold {
                    Hold::Filling(0) => Hold::Now,
                    Hold::Filling(more) => Hold::Filling(more - 1),
                    other => other,
                };
                self.changed.notify_all();
            }
            if is(Kind::Hello) {
                self.greetings.fetch_add(1, Ordering::SeqCst);
            } else {
                self.wait(&self.hold);
            }
            if is(Kind::Pages) {
                let slow = *lock(&self.slow);
                std::thread::sleep(slow);
            }
            to.write_all(&frame)?;
        }
    }

    fn answers(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            self.wait(&self.answers);
            to.write_all(&buffer[..n])?;
        }
    }
}
