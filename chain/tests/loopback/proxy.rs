//! A wire that damages what goes over it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

/// What happens to the bytes towards the replica, on the first connection only.
#[derive(Clone, Copy, Debug)]
pub enum Damage {
    /// A bit of this byte is flipped.
    Flip(u64),
    /// The connection ends after this many bytes.
    Cut(u64),
}

/// Starts a proxy in front of `target`; it ends with the test's process.
pub fn start(target: SocketAddr, damage: Damage) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut damage = Some(damage);
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(target) else {
                continue;
            };
            let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let damage = damage.take();
            std::thread::spawn(move || copy(from, to, damage));
            std::thread::spawn(move || copy(server, client, None));
        }
    });
    addr
}

fn copy(mut from: TcpStream, mut to: TcpStream, damage: Option<Damage>) {
    let mut buffer = [0u8; 4096];
    let mut passed = 0u64;
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 {
            break;
        }
        let mut bytes = &mut buffer[..n];
        let mut last = false;
        match damage {
            Some(Damage::Flip(at)) if (passed..passed + n as u64).contains(&at) => {
                bytes[(at - passed) as usize] ^= 0x20;
            }
            Some(Damage::Cut(at)) if at < passed + n as u64 => {
                bytes = &mut bytes[..(at - passed) as usize];
                last = true;
            }
            _ => {}
        }
        if to.write_all(bytes).is_err() || last {
            break;
        }
        passed += n as u64;
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
