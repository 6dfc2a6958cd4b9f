//! What ioctls cannot do, by rtnetlink(7): pairs of virtual Ethernet devices, moving between namespaces, silence.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{NetconfError, ifreq, index, socket};

const VETH_INFO_PEER: u16 = 1; // linux/veth.h
pub(super) const IFLA_INFO_KIND: u16 = 1; // linux/if_link.h
pub(super) const IFLA_INFO_DATA: u16 = 2;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Makes a pair of virtual Ethernet devices, both down: what goes into one comes out of the other.
///
/// # Errors
/// [`NetconfError::Exists`], or another.
pub fn create_veth(name: &str, peer: &str) -> Result<(), NetconfError> {
    const WHAT: &str = "creating veth pair";
    ifreq(name)?;
    ifreq(peer)?;
    let mut m = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, 0);
    m.string(libc::IFLA_IFNAME, name);
    m.nested(libc::IFLA_LINKINFO, |m| {
        m.string(IFLA_INFO_KIND, "veth");
        m.nested(IFLA_INFO_DATA, |m| {
            m.nested(VETH_INFO_PEER, |m| {
                m.ifinfo(0);
                m.string(libc::IFLA_IFNAME, peer);
            });
        });
    });
    m.send(WHAT, name)
}

/// Removes an interface; a veth's peer goes with it.
///
/// # Errors
/// [`NetconfError`].
pub fn delete_link(name: &str) -> Result<(), NetconfError> {
    Message::new(libc::RTM_DELLINK, 0, index(name)?).send("deleting", name)
}

/// Moves an interface into the network namespace behind `netns` (an open `/proc/PID/ns/net`). It arrives down and
/// without addresses.
///
/// # Errors
/// [`NetconfError`].
pub fn move_to_netns(name: &str, netns: BorrowedFd<'_>) -> Result<(), NetconfError> {
    let mut m = Message::new(libc::RTM_NEWLINK, 0, index(name)?);
    m.attribute(libc::IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
    m.send("moving to another network namespace", name)
}

/// The host gives the interface no IPv6 address of its own, so its stack has nothing to say there (neighbour discovery,
/// router solicitation). A host without IPv6 says nothing anyway.
///
/// # Errors
/// [`NetconfError`].
pub fn no_ipv6_address(name: &str) -> Result<(), NetconfError> {
    let mut m = Message::new(libc::RTM_NEWLINK, 0, index(name)?);
    m.nested(libc::IFLA_AF_SPEC, |m| {
        m.nested(libc::AF_INET6 as u16, |m| {
            m.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        });
    });
    match m.send("keeping IPv6 off", name) {
        Err(NetconfError::Io { source, .. })
            if matches!(
                source.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// One rtnetlink request about a link: nlmsghdr, ifinfomsg, attributes; all in the host's byte order, 4-byte aligned.
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(kind: u16, flags: libc::c_int, ifindex: u32) -> Message {
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut m = Message(Vec::with_capacity(128));
        m.0.extend(0u32.to_ne_bytes()); // the length, set by send
        m.0.extend(kind.to_ne_bytes());
        m.0.extend(flags.to_ne_bytes());
        m.0.extend(1u32.to_ne_bytes()); // sequence number
        m.0.extend(0u32.to_ne_bytes()); // port: the kernel
        m.ifinfo(ifindex);
        m
    }

    fn ifinfo(&mut self, ifindex: u32) {
        self.0.extend([0; 4]); // family, padding, type
        self.0.extend(ifindex.to_ne_bytes());
        self.0.extend([0; 8]); // flags and their mask: no change
    }

    fn attribute(&mut self, kind: u16, data: &[u8]) {
        self.nested(kind, |m| m.0.extend(data));
    }

    fn string(&mut self, kind: u16, s: &str) {
        self.nested(kind, |m| {
            m.0.extend(s.as_bytes());
            m.0.push(0);
        });
    }

    fn nested(&mut self, kind: u16, content: impl FnOnce(&mut Message)) {
        let at = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        content(self);
        // Two names of at most 15 bytes: far below 64 KiB.
        let len = (self.0.len() - at) as u16;
        self.0[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// The request's bytes.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }

    /// Sends the request and waits for the kernel's answer, which comes before sending returns.
    fn send(self, what: &'static str, name: &str) -> Result<(), NetconfError> {
        exchange(&self.finish()).map_err(|e| NetconfError::from_io(what, name, e))
    }
}

fn exchange(request: &[u8]) -> io::Result<()> {
    let sock = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    // Unconnected netlink sockets send to the kernel.
    // SAFETY: the buffer is readable for its length.
    let n = unsafe { libc::send(sock.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = [0u8; 1024];
    // SAFETY: the buffer is writable for its length.
    let n = unsafe {
        libc::recv(
            sock.as_raw_fd(),
            answer.as_mut_ptr().cast(),
            answer.len(),
            0,
        )
    };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    error_of(&answer[..n as usize])
}

/// The answer is an nlmsgerr: after its 16-byte header a negative errno, 0 for success.
fn error_of(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    let errno = answer
        .get(16..20)
        .map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    match (kind, errno) {
        (Some(k), Some(0)) if libc::c_int::from(k) == libc::NLMSG_ERROR => Ok(()),
        (Some(k), Some(e)) if libc::c_int::from(k) == libc::NLMSG_ERROR => {
            Err(io::Error::from_raw_os_error(e.saturating_neg()))
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "netlink answered with something else than an acknowledgement",
        )),
    }
}
