//! What the kernel says of its interfaces: a reading of all, and word of changes, by rtnetlink(7).
//!
//! Not by /sys/class/net: that shows the network namespace that /sys was mounted in, not the calling thread's.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use super::netlink::{IFLA_INFO_DATA, IFLA_INFO_KIND, Message};
use super::{NetconfError, socket};

/// linux/if_link.h: a bridge's settings in `IFLA_INFO_DATA`.
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
/// The kernel states times in hundredths of a second.
const USER_HZ_MS: u64 = 10;
/// Bytes of the headers before a link's attributes: nlmsghdr and ifinfomsg.
const HEADERS: usize = 32;
/// The kernel fills at most 32 KiB per read of a dump.
const BUFFER: usize = 64 << 10;
/// Readings made anew because an interface came or went in the middle of one.
const READINGS: u32 = 8;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    /// The number the kernel knows it by.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is set up.
    pub up: bool,
    /// Its largest packet, bytes without the Ethernet header.
    pub mtu: u32,
    /// The bridge (or bond) that it is a port of.
    pub master: Option<u32>,
    /// The driver's word for what it is: `bridge`, `veth`, `tun` (a tap); empty for most hardware.
    pub kind: String,
    /// Set for a bridge.
    pub bridge: Option<BridgeState>,
}

/// A bridge's settings that concern a new port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BridgeState {
    /// The spanning tree protocol is on.
    pub stp: bool,
    /// How long a port listens, and then learns, before it forwards.
    pub forward_delay: Duration,
}

/// All interfaces of this thread's network namespace.
///
/// # Errors
/// [`NetconfError::Io`] naming the kernel's refusal.
pub fn links() -> Result<Vec<LinkState>, NetconfError> {
    let failed = |e| NetconfError::from_io("reading the interfaces of", "this namespace", e);
    for _ in 0..READINGS {
        if let Some(links) = read_once().map_err(failed)? {
            return Ok(links);
        }
    }
    Err(failed(io::Error::from_raw_os_error(libc::EAGAIN)))
}

/// `None`: something changed in the middle of it.
fn read_once() -> io::Result<Option<Vec<LinkState>>> {
    let sock = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    let request = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, 0).finish();
    // SAFETY: the buffer is readable for its length.
    if unsafe { libc::send(sock.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let (mut found, mut whole) = (Vec::new(), true);
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = receive(&sock, &mut buffer, 0)?;
        for message in messages(&buffer[..n]) {
            whole &= message.flags & libc::NLM_F_DUMP_INTR as u16 == 0;
            match libc::c_int::from(message.kind) {
                libc::NLMSG_DONE => return Ok(whole.then_some(found)),
                libc::NLMSG_ERROR => {
                    let code = message.bytes.get(16..20).map_or(0, |b| word(b) as i32);
                    return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                }
                _ => found.extend(link_of(&message)),
            }
        }
    }
}

fn receive(sock: &OwnedFd, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer is writable for its length.
        let n = unsafe {
            libc::recv(
                sock.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                flags,
            )
        };
        if n >= 0 {
            return Ok(n as usize);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Word of every change of an interface in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct LinkMonitor(OwnedFd);

/// What has changed since the last time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These interfaces, as they are now; one that is gone is here as it was.
    Links(Vec<LinkState>),
    /// More than the kernel could keep: everything has to be looked at.
    Unknown,
}

impl LinkMonitor {
    /// Hears of what changes from here on.
    ///
    /// # Errors
    /// The kernel's refusal of the socket.
    pub fn new() -> io::Result<LinkMonitor> {
        let sock = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        // SAFETY: sockaddr_nl is a plain C structure of integers, for which zero is valid.
        let mut addr: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        addr.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        addr.nl_groups = libc::RTMGRP_LINK as u32;
        // SAFETY: `addr` is a sockaddr_nl of the length given, and only read.
        let rc = unsafe {
            libc::bind(
                sock.as_raw_fd(),
                (&raw const addr).cast(),
                size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(LinkMonitor(sock))
    }

    /// Waits until something changes, `wake` is readable, or `timeout` has passed; `None` in the latter two cases.
    pub(crate) fn next(
        &self,
        wake: libc::c_int,
        timeout: Option<Duration>,
    ) -> io::Result<Option<Change>> {
        let mut fds = [self.0.as_raw_fd(), wake].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        let ms = timeout.map_or(-1, |t| {
            libc::c_int::try_from(t.as_millis().max(1)).unwrap_or(libc::c_int::MAX)
        });
        // SAFETY: `fds` are two valid pollfds.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, ms) } < 0 {
            let e = io::Error::last_os_error();
            return match e.kind() {
                io::ErrorKind::Interrupted => Ok(None),
                _ => Err(e),
            };
        }
        if fds[0].revents == 0 {
            return Ok(None);
        }
        self.take().map(Some)
    }

    fn take(&self) -> io::Result<Change> {
        let mut buffer = vec![0; BUFFER];
        let mut changed = Vec::new();
        loop {
            match receive(&self.0, &mut buffer, libc::MSG_DONTWAIT) {
                Ok(n) => changed.extend(messages(&buffer[..n]).filter_map(|m| link_of(&m))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Change::Links(changed));
                }
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Change::Unknown),
                Err(e) => return Err(e),
            }
        }
    }
}

/// One netlink message, its header included.
struct Received<'a> {
    kind: u16,
    flags: u16,
    bytes: &'a [u8],
}

fn word(b: &[u8]) -> u32 {
    b.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b))
}

fn half(b: &[u8]) -> u16 {
    b.first_chunk().map_or(0, |b| u16::from_ne_bytes(*b))
}

fn messages(mut rest: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = word(rest) as usize;
        if !(16..=rest.len()).contains(&length) {
            return None;
        }
        let bytes = &rest[..length];
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: half(&bytes[4..]),
            flags: half(&bytes[6..]),
            bytes,
        })
    })
}

/// Kind and value of each attribute.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// The two upper bits say that it is nested, or in network byte order.
    const KIND: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let length = usize::from(half(rest));
        if !(4..=rest.len()).contains(&length) {
            return None;
        }
        let attribute = (half(&rest[2..]) & KIND, &rest[4..length]);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(attribute)
    })
}

fn text(b: &[u8]) -> String {
    let end = b.iter().position(|c| *c == 0).unwrap_or(b.len());
    String::from_utf8_lossy(&b[..end]).into_owned()
}

/// The interface that a message is about; `None` if it is about something else.
fn link_of(message: &Received<'_>) -> Option<LinkState> {
    let (family, link) = (message.bytes.get(16)?, message.bytes.get(HEADERS..)?);
    // A bridge also speaks of its ports, as AF_BRIDGE and with other attributes.
    if ![libc::RTM_NEWLINK, libc::RTM_DELLINK].contains(&message.kind) || *family != 0 {
        return None;
    }
    let mut state = LinkState {
        index: word(&message.bytes[20..]),
        up: word(&message.bytes[24..]) & libc::IFF_UP as u32 != 0,
        ..LinkState::default()
    };
    for (kind, value) in attributes(link) {
        match kind {
            libc::IFLA_IFNAME => state.name = text(value),
            libc::IFLA_MTU => state.mtu = word(value),
            libc::IFLA_MASTER => state.master = Some(word(value)),
            libc::IFLA_LINKINFO => info(value, &mut state),
            _ => {}
        }
    }
    Some(state)
}

fn info(value: &[u8], state: &mut LinkState) {
    let mut data = None;
    for (kind, value) in attributes(value) {
        match kind {
            IFLA_INFO_KIND => state.kind = text(value),
            IFLA_INFO_DATA => data = Some(value),
            _ => {}
        }
    }
    if state.kind != "bridge" {
        return;
    }
    let mut bridge = BridgeState::default();
    for (kind, value) in attributes(data.unwrap_or_default()) {
        match kind {
            IFLA_BR_STP_STATE => bridge.stp = word(value) != 0,
            IFLA_BR_FORWARD_DELAY => {
                bridge.forward_delay = Duration::from_millis(u64::from(word(value)) * USER_HZ_MS);
            }
            _ => {}
        }
    }
    state.bridge = Some(bridge);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_or_lies_about_its_length_is_not_read_beyond() {
        let whole = Message::new(libc::RTM_NEWLINK, 0, 7).finish();
        for cut in 0..whole.len() {
            for message in messages(&whole[..cut]) {
                let _ = link_of(&message);
            }
        }
        for lie in [0, 3, 15, 31, 33, u32::MAX] {
            let mut bytes = whole.clone();
            bytes[..4].copy_from_slice(&lie.to_ne_bytes());
            assert!(messages(&bytes).filter_map(|m| link_of(&m)).count() <= 1);
        }
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[5, 0, 1, 0, 9]).count(), 1);
    }
}
