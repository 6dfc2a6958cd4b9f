//! A client of the guest's service, for the tests.
#![allow(dead_code)] // each test uses its part

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use guest::proto::*;

/// The guest's address.
pub const GUEST: &str = "10.77.0.2";
/// Liveness bound of one answer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to the guest's service.
pub struct Client {
    /// The stream itself.
    pub stream: TcpStream,
    seq: u64,
}

impl Client {
    /// Connects, as soon as the guest is there.
    pub fn connect() -> Client {
        let from = Instant::now();
        loop {
            match TcpStream::connect((GUEST, PORT)) {
                Ok(stream) => {
                    stream.set_nodelay(true).expect("nodelay");
                    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
                    return Client { stream, seq: 0 };
                }
                Err(e) => assert!(from.elapsed() < PATIENCE, "cannot connect: {e}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a request under the next number.
    pub fn send(&mut self, mut r: Request) {
        self.seq += 1;
        r.seq = self.seq;
        self.stream.write_all(&r.to_bytes()).expect("send");
    }

    /// Takes the next response.
    pub fn receive(&mut self) -> Response {
        let mut b = [0; RESPONSE_LEN];
        self.stream.read_exact(&mut b).expect("an answer");
        Response::from_bytes(&b).expect("a response")
    }

    /// Sends a request and takes its response.
    pub fn ask(&mut self, r: Request) -> Response {
        self.send(r);
        let a = self.receive();
        assert_eq!((a.seq, a.op), (self.seq, r.op));
        a
    }

    /// The same for a request without arguments.
    pub fn op(&mut self, op: Op) -> Response {
        self.ask(Request::new(op, 0))
    }
}
