//! The services: numbered requests over TCP, UDP echo.

use smoltcp::iface::{SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Duration;

use crate::cell::Once;
use crate::load::Load;
use crate::log;
use crate::proto::{
    ECHO_PORT, FLAG_FLUSH, FLAG_NO_WAIT, MAX_CONNECTIONS, MAX_OUTSTANDING, Op, PORT, REQUEST_LEN,
    RESPONSE_LEN, Request, Response, Status,
};
use crate::stack::TIME_SCALE;
use crate::store::{Need, Store};

const TCP_BUFFER: usize = 8192;
const UDP_BUFFER: usize = 16 * 1024;
const UDP_PACKETS: usize = 32;
/// Unanswered for so long, a connection is dead (seconds of real time): far longer than any failover.
const TIMEOUT_S: u64 = 120;
/// An idle connection is probed this often (seconds of real time), so that a vanished client does not keep its socket.
const KEEP_ALIVE_S: u64 = 20;

static TCP_RX: Once<[[u8; TCP_BUFFER]; MAX_CONNECTIONS]> =
    Once::new([[0; TCP_BUFFER]; MAX_CONNECTIONS]);
static TCP_TX: Once<[[u8; TCP_BUFFER]; MAX_CONNECTIONS]> =
    Once::new([[0; TCP_BUFFER]; MAX_CONNECTIONS]);
static UDP_RX: Once<[u8; UDP_BUFFER]> = Once::new([0; UDP_BUFFER]);
static UDP_TX: Once<[u8; UDP_BUFFER]> = Once::new([0; UDP_BUFFER]);
static UDP_RX_META: Once<[udp::PacketMetadata; UDP_PACKETS]> =
    Once::new([udp::PacketMetadata::EMPTY; UDP_PACKETS]);
static UDP_TX_META: Once<[udp::PacketMetadata; UDP_PACKETS]> =
    Once::new([udp::PacketMetadata::EMPTY; UDP_PACKETS]);
static SOCKETS: Once<[SocketStorage<'static>; MAX_CONNECTIONS + 1]> =
    Once::new([SocketStorage::EMPTY; MAX_CONNECTIONS + 1]);

/// A request that has been executed and not yet answered.
#[derive(Clone, Copy)]
struct Owed {
    op: u16,
    status: Status,
    seq: u64,
    value: u64,
    need: Need,
}

const NONE: Owed = Owed {
    op: 0,
    status: Status::Ok,
    seq: 0,
    value: 0,
    need: Need::Nothing,
};

/// One connection's replies owed, oldest first.
struct Connection {
    socket: SocketHandle,
    owed: [Owed; MAX_OUTSTANDING],
    first: usize,
    len: usize,
}

/// What the requests act on.
pub struct State {
    /// The counter and its disk.
    pub store: Store,
    /// The load loop.
    pub load: Load,
}

/// All connections and the echo.
pub struct Server {
    connections: [Connection; MAX_CONNECTIONS],
    echo: SocketHandle,
}

impl Server {
    /// The sockets, listening.
    pub fn new() -> (Server, SocketSet<'static>) {
        let mut sockets = SocketSet::new(&mut SOCKETS.take()[..]);
        let (mut rx, mut tx) = (TCP_RX.take().iter_mut(), TCP_TX.take().iter_mut());
        let connections = core::array::from_fn(|_| {
            let buffers = rx.next().zip(tx.next());
            let Some((rx, tx)) = buffers else {
                unreachable!("as many buffers as connections")
            };
            let mut s = tcp::Socket::new(
                tcp::SocketBuffer::new(&mut rx[..]),
                tcp::SocketBuffer::new(&mut tx[..]),
            );
            s.set_nagle_enabled(false);
            s.set_ack_delay(None);
            s.set_timeout(Some(Duration::from_secs(TIMEOUT_S * TIME_SCALE)));
            s.set_keep_alive(Some(Duration::from_secs(KEEP_ALIVE_S * TIME_SCALE)));
            Connection {
                socket: sockets.add(s),
                owed: [NONE; MAX_OUTSTANDING],
                first: 0,
                len: 0,
            }
        });
        let mut echo = udp::Socket::new(
            udp::PacketBuffer::new(&mut UDP_RX_META.take()[..], &mut UDP_RX.take()[..]),
            udp::PacketBuffer::new(&mut UDP_TX_META.take()[..], &mut UDP_TX.take()[..]),
        );
        if echo.bind(ECHO_PORT).is_err() {
            log!("UDP port {ECHO_PORT} cannot be bound");
        }
        let echo = sockets.add(echo);
        (Server { connections, echo }, sockets)
    }

    /// Executes what has come in and sends what is ready.
    pub fn poll(&mut self, sockets: &mut SocketSet<'_>, state: &mut State, uptime_us: u64) {
        for c in &mut self.connections {
            c.accept(sockets.get_mut(c.socket), state);
        }
        // After all requests, so that one disk write covers them.
        state.store.poll();
        for c in &mut self.connections {
            c.answer(sockets.get_mut(c.socket), state, uptime_us);
        }
        let echo = sockets.get_mut::<udp::Socket>(self.echo);
        while echo.can_recv() && echo.can_send() {
            let mut copy = [0; 1500];
            let Ok((len, from)) = echo.recv_slice(&mut copy) else {
                continue;
            };
            // An address nobody can be answered at (port 0, 0.0.0.0) is dropped by smoltcp; so is what does not fit.
            let _ = echo.send_slice(&copy[..len], from);
        }
    }
}

impl Connection {
    fn accept(&mut self, s: &mut tcp::Socket<'_>, state: &mut State) {
        if s.state() == tcp::State::Closed {
            self.len = 0;
            if s.listen(PORT).is_err() {
                log!("TCP port {PORT} cannot be listened on");
            }
            return;
        }
        while self.len < MAX_OUTSTANDING && s.recv_queue() >= REQUEST_LEN {
            let mut bytes = [0; REQUEST_LEN];
            if s.recv_slice(&mut bytes) != Ok(REQUEST_LEN) {
                break;
            }
            match Request::from_bytes(&bytes) {
                Ok(r) => {
                    self.owed[(self.first + self.len) % MAX_OUTSTANDING] = execute(&r, state);
                    self.len += 1;
                }
                Err(_) => {
                    s.abort();
                    self.len = 0;
                    return;
                }
            }
        }
    }

    fn answer(&mut self, s: &mut tcp::Socket<'_>, state: &State, uptime_us: u64) {
        while self.len > 0 && s.may_send() && s.send_capacity() - s.send_queue() >= RESPONSE_LEN {
            let o = self.owed[self.first];
            let Some(outcome) = state.store.outcome(o.need) else {
                break;
            };
            let mut disk_counter = state.store.on_disk;
            if let Need::Read(_) = o.need {
                disk_counter = state.store.last_read().1;
            }
            let r = Response {
                op: o.op,
                status: if o.status == Status::Ok {
                    outcome
                } else {
                    o.status
                } as u16,
                seq: o.seq,
                counter: o.value,
                passes: state.load.passes,
                disk_counter,
                uptime_us,
            };
            if s.send_slice(&r.to_bytes()) != Ok(RESPONSE_LEN) {
                break;
            }
            self.first = (self.first + 1) % MAX_OUTSTANDING;
            self.len -= 1;
        }
        // The client has said its last word and has all its answers.
        if s.state() == tcp::State::CloseWait && self.len == 0 && s.recv_queue() < REQUEST_LEN {
            s.close();
        }
    }
}

fn execute(r: &Request, state: &mut State) -> Owed {
    let mut o = Owed {
        op: r.op,
        seq: r.seq,
        ..NONE
    };
    match Op::from_u16(r.op) {
        Some(Op::Incr) => {
            o.need = state
                .store
                .increment(r.flags & FLAG_FLUSH != 0, r.flags & FLAG_NO_WAIT != 0)
        }
        Some(Op::Read | Op::Stats) => {}
        Some(Op::SetLoad) => {
            o.value = state.load.set(r.arg0, r.arg1);
            return o;
        }
        Some(Op::ReadDisk) => {
            o.need = state.store.read_back();
            if o.need == Need::Nothing {
                o.status = Status::NoDisk;
            }
        }
        None => o.status = Status::BadOp,
    }
    o.value = state.store.counter;
    o
}
