//! One replica's share in the heartbeats that go by datagram ([`crate::pulse`]), and the socket that they come in by.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::env::{Env, ServerError, lock, spawn};
use super::registry::Registry;
use super::state::State;
use crate::pulse::{Ear, Expected, PULSE, Pulse, Voice};

/// Ports tried for a server that may have any.
const TRIES: u32 = 16;
/// The end of the server is noticed after so long at the latest.
const LOOK: Duration = Duration::from_secs(1);

/// Apart from the replica's lock: whatever is being processed, its predecessor is heard and its successor hears it.
#[derive(Debug, Default)]
pub(super) struct Pulses {
    ear: Mutex<Ear>,
    voice: Mutex<Option<Arc<Voice>>>,
}

impl Pulses {
    pub(super) fn hear(&self, pulse: &Pulse) {
        lock(&self.ear).hear(pulse);
    }

    pub(super) fn beat(&self) {
        let voice = lock(&self.voice).clone();
        if let Some(voice) = voice {
            voice.beat();
        }
    }

    /// One heartbeat's time has passed, and this is where the replica stands. Whether its predecessor has been heard.
    pub(super) fn tick(&self, env: &Env, state: &State) -> bool {
        self.speak_to_the_next(env, state);
        let host = &env.options.host;
        let generation = state.replica.generation();
        let expected = Expected::of(host, &state.view).filter(|e| e.generation == generation);
        lock(&self.ear).tick(expected)
    }

    /// One that has failed, or that has been taken apart, is to be missed.
    fn speak_to_the_next(&self, env: &Env, state: &State) {
        let serves = state.store.is_some() && state.replica.failed().is_none();
        let next = state.replica.successor().filter(|_| serves);
        let to = next
            .and_then(|position| state.view.chain.get(position))
            .map(|m| m.addr);
        let mut voice = lock(&self.voice);
        let generation = state.replica.generation();
        match (to, &*voice) {
            (None, _) => *voice = None,
            (Some(to), Some(now)) if now.is(to, generation) => {}
            (Some(to), _) => match Voice::new(to, &env.options.host, &state.view) {
                Ok(new) => *voice = Some(Arc::new(new)),
                Err(e) => {
                    tracing::debug!("{}: no heartbeats by datagram: {e}", state.view.name);
                    *voice = None;
                }
            },
        }
    }
}

/// A listener for connections, and a socket for datagrams at the same address; without the latter, heartbeats come by
/// connection only.
pub(super) fn bind(addr: SocketAddr) -> Result<(TcpListener, Option<UdpSocket>), ServerError> {
    let failed = |source| ServerError::Bind { addr, source };
    let mut tries = 0;
    loop {
        tries += 1;
        let listener = TcpListener::bind(addr).map_err(failed)?;
        match UdpSocket::bind(listener.local_addr().map_err(failed)?) {
            Ok(socket) => return Ok((listener, Some(socket))),
            Err(_) if addr.port() == 0 && tries < TRIES => {}
            Err(e) => {
                tracing::warn!(
                    "chain server: no datagrams at {addr}: {e}; heartbeats come by connection only, and packet loss may be \
                     taken for a host's death"
                );
                return Ok((listener, None));
            }
        }
    }
}

/// Hears datagrams until the server ends.
pub(super) fn listen(registry: Arc<Registry>, socket: UdpSocket) -> Result<(), ServerError> {
    socket
        .set_read_timeout(Some(LOOK))
        .map_err(ServerError::Thread)?;
    spawn("chain-pulse", move || {
        crate::urgent::urgent_thread();
        // One byte more: what is longer is something else.
        let mut bytes = [0; PULSE + 1];
        while !registry.is_stopping() {
            match socket.recv(&mut bytes) {
                Ok(n) => {
                    if let Some(pulse) = Pulse::from_bytes(&bytes[..n])
                        && let Some(slot) = registry.find(pulse.vm)
                    {
                        slot.pulses.hear(&pulse);
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => {
                    tracing::debug!("chain server: datagrams: {e}");
                    std::thread::sleep(registry.env.options.heartbeat);
                }
            }
        }
    })
}
