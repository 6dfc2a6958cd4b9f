//! A probe guest in this process, which can be told to misbehave.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use guest::proto::{Op, REQUEST_LEN, Request, Response, Status};
use nix::sys::socket::{setsockopt, sockopt};

/// What goes wrong when the INCR with this number (1 for the first one to arrive) is executed. Each happens once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is acknowledged, but the counter is set back by so many: they never happened.
    Forget(u64, u64),
    /// The connection is reset instead of an answer.
    Reset(u64),
    /// The answer has the wrong magic number.
    Garbage(u64),
    /// The answer bears another request's number.
    WrongSeq(u64),
    /// It is executed twice.
    Twice(u64),
    /// It and all after it wait until `resume` is called.
    Hang(u64),
    /// Its answer comes together with the first bytes of the next one, whose rest comes alone.
    Torn(u64),
    /// It is answered with a disk error.
    DiskError(u64),
}

#[derive(Default)]
struct Guest {
    counter: u64,
    incrs: u64,
    faults: Vec<Fault>,
    hanging: bool,
    connections: Vec<TcpStream>,
}

/// The fake guest; its threads end with their connections.
pub struct Fake {
    pub addr: SocketAddr,
    guest: Arc<(Mutex<Guest>, Condvar)>,
}

impl Fake {
    pub fn start(counter: u64, faults: &[Fault]) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let addr = listener.local_addr().expect("its address");
        let guest = Arc::new((
            Mutex::new(Guest {
                counter,
                faults: faults.to_vec(),
                ..Guest::default()
            }),
            Condvar::new(),
        ));
        let shared = guest.clone();
        // Accepts until the test's process ends.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let guest = shared.clone();
                let copy = stream.try_clone().expect("a copy");
                guest.0.lock().expect("lock").connections.push(copy);
                std::thread::spawn(move || serve(stream, &guest));
            }
        });
        Fake { addr, guest }
    }

    /// Ends a `Hang`.
    pub fn resume(&self) {
        self.guest.0.lock().expect("lock").hanging = false;
        self.guest.1.notify_all();
    }

    pub fn is_hanging(&self) -> bool {
        self.guest.0.lock().expect("lock").hanging
    }

    pub fn counter(&self) -> u64 {
        self.guest.0.lock().expect("lock").counter
    }

    /// Sets the counter, as a machine resumed from an old checkpoint would have it.
    pub fn set_counter(&self, to: impl Fn(u64) -> u64) {
        let mut g = self.guest.0.lock().expect("lock");
        g.counter = to(g.counter);
    }
}

fn serve(mut stream: TcpStream, guest: &(Mutex<Guest>, Condvar)) {
    stream.set_nodelay(true).expect("nodelay");
    let mut bytes = [0; REQUEST_LEN];
    let mut kept = Vec::new();
    while stream.read_exact(&mut bytes).is_ok() {
        let request = Request::from_bytes(&bytes).expect("our client keeps to the protocol");
        let Some((mut answer, torn)) = execute(&mut stream, guest, request) else {
            return;
        };
        if torn {
            kept = answer;
            continue;
        }
        if !kept.is_empty() {
            let rest = answer.split_off(13);
            kept.append(&mut answer);
            if stream.write_all(&kept).is_err() {
                return;
            }
            // For the first part to arrive alone.
            std::thread::sleep(Duration::from_millis(20));
            kept.clear();
            answer = rest;
        }
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

fn execute(
    stream: &mut TcpStream,
    guest: &(Mutex<Guest>, Condvar),
    request: Request,
) -> Option<(Vec<u8>, bool)> {
    let mut g = guest.0.lock().expect("lock");
    let mut answer = Response {
        op: request.op,
        status: Status::Ok as u16,
        seq: request.seq,
        counter: g.counter,
        passes: 0,
        disk_counter: 0,
        uptime_us: 0,
    };
    match Op::from_u16(request.op) {
        Some(Op::Incr) => {}
        Some(Op::SetLoad) => {
            answer.counter = request.arg0.min(1000);
            return Some((answer.to_bytes().to_vec(), false));
        }
        Some(Op::ReadDisk) => {
            answer.status = Status::NoDisk as u16;
            return Some((answer.to_bytes().to_vec(), false));
        }
        Some(Op::Read | Op::Stats) => return Some((answer.to_bytes().to_vec(), false)),
        None => {
            answer.status = Status::BadOp as u16;
            return Some((answer.to_bytes().to_vec(), false));
        }
    }
    g.incrs += 1;
    let n = g.incrs;
    let fault = g.faults.iter().copied().find(|f| {
        matches!(f, Fault::Forget(at, _) | Fault::Reset(at) | Fault::Garbage(at) | Fault::WrongSeq(at)
            | Fault::Twice(at) | Fault::Hang(at) | Fault::Torn(at) | Fault::DiskError(at) if *at == n)
    });
    if let Some(Fault::Reset(_)) = fault {
        // Closing with linger 0 sends RST; the guest's list holds a copy of the socket that must close first.
        g.connections.clear();
        let hard = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(stream, sockopt::Linger, &hard).expect("linger");
        return None;
    }
    g.counter += 1;
    answer.counter = g.counter;
    let mut bytes = answer.to_bytes().to_vec();
    match fault {
        Some(Fault::Forget(_, by)) => g.counter -= by,
        Some(Fault::Garbage(_)) => bytes[0] ^= 0xff,
        Some(Fault::WrongSeq(_)) => bytes[8] ^= 0xff,
        Some(Fault::Twice(_)) => g.counter += 1,
        Some(Fault::DiskError(_)) => bytes[6] = Status::DiskError as u8,
        Some(Fault::Hang(_)) => {
            g.hanging = true;
            while g.hanging {
                g = guest.1.wait(g).expect("lock");
            }
        }
        Some(Fault::Reset(_) | Fault::Torn(_)) | None => {}
    }
    Some((bytes, matches!(fault, Some(Fault::Torn(_)))))
}
