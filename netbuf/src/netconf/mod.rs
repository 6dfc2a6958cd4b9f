//! The few interface settings that taps, the demo and the tests need, by ioctl and netlink: no external programs.
//!
//! Everything acts on the calling thread's network namespace and takes `CAP_NET_ADMIN` there.

mod link;
mod netlink;
mod ns;
mod state;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use thiserror::Error;

pub use link::{
    add_to_bridge, create_bridge, delete_bridge, exists, index, mac, remove_from_bridge,
    set_addr_v4, set_forward_delay, set_link, set_mac, set_mtu, set_stp,
};
pub use netlink::{create_veth, delete_link, move_to_netns, no_ipv6_address};
pub use ns::{NsError, unshare_netns, unshare_userns_netns};
pub use state::{BridgeState, Change, LinkMonitor, LinkState, links};

/// Why an interface could not be set up.
#[derive(Debug, Error)]
pub enum NetconfError {
    /// Linux takes 1 to 15 bytes, without `/`, `:` and white space.
    #[error(
        "`{0}` is no name for a network interface (1 to 15 bytes, without '/', ':' and spaces)"
    )]
    BadName(String),
    /// There is no such interface in this network namespace.
    #[error("{what}: there is no interface `{name}` in this network namespace")]
    Missing {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
    },
    /// The name is taken.
    #[error("{what}: `{name}` already exists")]
    Exists {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
    },
    /// Not allowed.
    #[error("{what} `{name}`: no permission; it takes CAP_NET_ADMIN in this network namespace")]
    NotAllowed {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
    },
    /// A setting that makes no sense.
    #[error("{what} `{name}`: {why}")]
    Invalid {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Anything else.
    #[error("{what} `{name}`: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl NetconfError {
    fn from_io(what: &'static str, name: &str, source: io::Error) -> NetconfError {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => NetconfError::Missing { what, name },
            Some(libc::EEXIST) => NetconfError::Exists { what, name },
            Some(libc::EPERM | libc::EACCES) => NetconfError::NotAllowed { what, name },
            _ => NetconfError::Io { what, name, source },
        }
    }

    fn last(what: &'static str, name: &str) -> NetconfError {
        NetconfError::from_io(what, name, io::Error::last_os_error())
    }
}

/// An interface request without name and content.
pub(crate) fn blank_ifreq() -> libc::ifreq {
    // SAFETY: ifreq is a plain C structure of integers and byte arrays, for which zero is valid.
    unsafe { std::mem::zeroed() }
}

/// An interface request about `name`.
pub(crate) fn ifreq(name: &str) -> Result<libc::ifreq, NetconfError> {
    let bad = |c: u8| c == b'/' || c == b':' || c == 0 || c.is_ascii_whitespace();
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    if !fits || name == "." || name == ".." || name.bytes().any(bad) {
        return Err(NetconfError::BadName(name.to_owned()));
    }
    let mut req = blank_ifreq();
    for (to, from) in req.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(req)
}

/// The name in an interface request.
pub(crate) fn name_of(req: &libc::ifreq) -> String {
    let bytes: Vec<u8> = req
        .ifr_name
        .iter()
        .take_while(|c| **c != 0)
        .map(|c| *c as u8)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A socket in this thread's network namespace, only to ask the kernel through.
fn control_socket() -> io::Result<OwnedFd> {
    socket(libc::AF_INET, libc::SOCK_DGRAM, 0)
}

fn socket(family: libc::c_int, kind: libc::c_int, proto: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers; the result is checked before use.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, proto) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fd was just returned by socket and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Does an ioctl that reads and writes the request, on a socket of its own.
fn ioctl(
    what: &'static str,
    name: &str,
    op: libc::c_ulong,
    req: &mut libc::ifreq,
) -> Result<(), NetconfError> {
    let sock = control_socket().map_err(|e| NetconfError::from_io(what, name, e))?;
    // SAFETY: every `op` used in this module takes one ifreq, which `req` is for the call's length; a pointer in it, if
    // the operation takes one, is the caller's to keep valid.
    if unsafe { libc::ioctl(sock.as_raw_fd(), op, std::ptr::from_mut(req)) } < 0 {
        return Err(NetconfError::last(what, name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_refuse_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a:1",
            "a\0b",
            "0123456789abcdef",
        ] {
            assert!(matches!(ifreq(bad), Err(NetconfError::BadName(_))), "{bad}");
        }
        let longest = "0123456789abcde";
        assert_eq!(name_of(&ifreq(longest).expect("15 bytes")), longest);
    }
}
