//! Frames on the wire, seen and sent past every protocol stack (packet(7)).

use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::sys::socket::{
    ControlMessageOwned, LinkAddr, MsgFlags, recvmsg, send, setsockopt, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal};
use nix::time::{ClockId, clock_gettime};

use agent::lab::net::{CLIENT, CLIENT_PORT};

use crate::cluster::Network;

const ETH_ALEN: usize = 6;
const ETH_HEADER: usize = 14;

/// A frame that entered an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When, by the kernel, in CLOCK_MONOTONIC microseconds: comparable with an agent's events.
    pub at_us: u64,
    /// Sender's MAC address.
    pub source: [u8; 6],
    /// Length in bytes.
    pub length: usize,
}

/// Records what enters the switch through one port, from construction to drop.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Everything that `host` sends into the guest LAN.
    ///
    /// # Panics
    /// If there can be no packet socket.
    #[must_use]
    pub fn from_host(network: Network<'_>, host: &str) -> Self {
        let socket = network.within("switch", || {
            let socket = packet_socket(&format!("lan-{host}"));
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true).expect("SO_TIMESTAMPNS");
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))
                .expect("SO_RCVTIMEO");
            socket
        });
        let (seen, stop) = (
            Arc::<Mutex<Vec<Seen>>>::default(),
            Arc::<AtomicBool>::default(),
        );
        let thread = {
            let (seen, stop) = (seen.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Some(frame) = receive(&socket) {
                        seen.lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(frame);
                    }
                }
            })
        };
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// Frames so far whose sender is `source`.
    #[must_use]
    pub fn of(&self, source: [u8; 6]) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter()
            .filter(|s| s.source == source)
            .copied()
            .collect()
    }

    /// Those later than `at_us` (CLOCK_MONOTONIC).
    #[must_use]
    pub fn of_after(&self, source: [u8; 6], at_us: u64) -> usize {
        self.of(source).iter().filter(|s| s.at_us > at_us).count()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks for an address in the guest LAN, as the client: everybody hears it, the stale owner's guest too.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
    mac: [u8; 6],
}

impl Injector {
    /// Sends from the client's interface.
    ///
    /// # Panics
    /// If there can be no packet socket.
    #[must_use]
    pub fn at_client(network: Network<'_>) -> Self {
        network.within("client", || Self {
            socket: packet_socket(CLIENT_PORT),
            mac: mac_of(CLIENT_PORT),
        })
    }

    /// Broadcasts an ARP request (RFC 826) for `target`.
    ///
    /// # Panics
    /// If it cannot be sent.
    pub fn who_has(&self, target: Ipv4Addr) {
        let mut frame = Vec::with_capacity(60);
        frame.extend_from_slice(&[0xff; ETH_ALEN]);
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&CLIENT.octets());
        frame.extend_from_slice(&[0; ETH_ALEN]);
        frame.extend_from_slice(&target.octets());
        frame.resize(60, 0);
        send(self.socket.as_raw_fd(), &frame, MsgFlags::empty()).expect("sending an ARP request");
    }
}

/// The MAC address of an interface of this thread's namespace.
fn mac_of(interface: &str) -> [u8; 6] {
    nix::ifaddrs::getifaddrs()
        .expect("getifaddrs")
        .filter(|i| i.interface_name == interface)
        .find_map(|i| i.address?.as_link_addr()?.addr())
        .unwrap_or_else(|| panic!("interface {interface} has no MAC address"))
}

fn packet_socket(interface: &str) -> OwnedFd {
    let fail = |what: &str| -> ! {
        panic!("{what} on {interface}: {}", io::Error::last_os_error());
    };
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // Bound before it receives anything: protocol 0 until then.
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        fail("a packet socket");
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = CString::new(interface).expect("interface names have no NUL");
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        fail("if_nametoindex");
    }
    // SAFETY: sockaddr_ll is plain integers, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    // SAFETY: `address` is a sockaddr_ll of the length given.
    let bound = unsafe {
        libc::bind(
            fd,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if bound < 0 {
        fail("binding a packet socket");
    }
    socket
}

/// The next frame that entered; `None` after a short while, or for one that left.
fn receive(socket: &OwnedFd) -> Option<Seen> {
    let mut buf = [0u8; 2048];
    let mut space = nix::cmsg_space!(TimeSpec);
    let mut iov = [IoSliceMut::new(&mut buf)];
    let message = recvmsg::<LinkAddr>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::empty(),
    )
    .ok()?;
    let entered = message.address?.pkttype() != libc::PACKET_OUTGOING;
    let at = message.cmsgs().ok()?.find_map(|c| match c {
        ControlMessageOwned::ScmTimestampns(at) => Some(at),
        _ => None,
    })?;
    let length = message.bytes;
    if !entered || length < ETH_HEADER {
        return None;
    }
    Some(Seen {
        at_us: monotonic_us(at),
        source: buf[ETH_ALEN..2 * ETH_ALEN].try_into().ok()?,
        length,
    })
}

/// Packet timestamps are CLOCK_REALTIME; agents' events CLOCK_MONOTONIC.
fn monotonic_us(realtime: TimeSpec) -> u64 {
    let us = |t: TimeSpec| t.tv_sec() as i128 * 1_000_000 + t.tv_nsec() as i128 / 1000;
    let now = |clock| us(clock_gettime(clock).expect("these clocks always exist"));
    let at = us(realtime) - now(ClockId::CLOCK_REALTIME) + now(ClockId::CLOCK_MONOTONIC);
    at.max(0) as u64
}
