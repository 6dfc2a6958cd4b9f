//! A tap device: a network interface whose other end is this program.
//!
//! Opened with `IFF_TAP | IFF_NO_PI`, and `IFF_VNET_HDR` where asked for, with a header of 12 bytes. Offloads are
//! switched off (`TUNSETOFFLOAD` 0), so the host's stack hands over whole, checksummed frames of at most one MTU.
//!
//! The header is ours on both ways. Out: the guest's is not passed on but replaced by zeros, since no offload is
//! negotiated and the kernel would act on what a hostile guest wrote there. In: it is set to zero and `num_buffers` to
//! 1 (virtio 1.2, 5.1.6.4), since the kernel leaves those two bytes alone and may flag `DATA_VALID`, which nobody
//! negotiated. Hence a tap with `IFF_VNET_HDR` and one without look the same from here. With it is the usual choice:
//! one copy less of twelve bytes does not matter, but other programs that attach to the same persistent tap expect it.
//! (The flags of the newest attachment count, not those a persistent tap was made with.)

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

use crate::netconf::{self, NetconfError, ifreq};
use crate::port::{NET_HEADER, Port};

const TUN: &str = "/dev/net/tun";

/// Why a tap could not be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// Linux takes 1 to 15 bytes, without `/`, `:` and white space.
    #[error(
        "`{0}` is no name for a network interface (1 to 15 bytes, without '/', ':' and spaces)"
    )]
    BadName(String),
    /// The device node or the module behind it is missing.
    #[error(
        "no {TUN}: {0}; load the module (`modprobe tun`) or create the node (`mknod {TUN} c 10 200`)"
    )]
    NoTun(#[source] io::Error),
    /// The device node may not be opened.
    #[error(
        "no permission to open {TUN}: {0}; run as root, or allow it (`chmod 666 {TUN}`, the usual mode)"
    )]
    NotAllowed(#[source] io::Error),
    /// The tap may not be made or attached to.
    #[error(
        "no permission for tap `{name}`: {source}; it takes CAP_NET_ADMIN in this network namespace, or a persistent \
         tap owned by this user (`ip tuntap add {name} mode tap vnet_hdr user $USER`)"
    )]
    NotYours {
        /// The tap's name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another program has it.
    #[error("tap `{name}` is in use: another program is attached to it")]
    Busy {
        /// The tap's name.
        name: String,
    },
    /// There is an interface of that name which is something else.
    #[error(
        "`{name}` exists but is not a tap of this kind (single queue, vnet_hdr {}): {source}; delete it, or choose another name",
        if *.vnet_hdr { "on" } else { "off" }
    )]
    WrongKind {
        /// The tap's name.
        name: String,
        /// Whether it was opened with `IFF_VNET_HDR`.
        vnet_hdr: bool,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("tap `{name}`: {what}: {source}")]
    Io {
        /// The tap's name.
        name: String,
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// An attached tap, non-blocking.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    vnet_hdr: bool,
}

impl Tap {
    /// Makes the tap `name`, or attaches to the persistent one of that name. A name with `%d` in it makes a new one with
    /// a free number. A tap that was made here goes away with its last descriptor.
    ///
    /// # Errors
    /// [`TapError`], naming the remedy.
    pub fn open(name: &str, vnet_hdr: bool) -> Result<Tap, TapError> {
        let mut req = ifreq(name).map_err(|_| TapError::BadName(name.to_owned()))?;
        let fd = open_tun()?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
        if vnet_hdr {
            flags |= libc::IFF_VNET_HDR;
        }
        // IFF_VNET_HDR is 0x4000: all flags fit the field's sixteen bits.
        req.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which `req` is.
        let rc = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut req) };
        if rc < 0 {
            let source = io::Error::last_os_error();
            let name = name.to_owned();
            return Err(match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::NotYours { name, source },
                Some(libc::EBUSY) => TapError::Busy { name },
                Some(libc::EINVAL | libc::EEXIST) => TapError::WrongKind {
                    name,
                    vnet_hdr,
                    source,
                },
                _ => TapError::Io {
                    name,
                    what: "attaching",
                    source,
                },
            });
        }
        Tap {
            fd,
            name: netconf::name_of(&req),
            vnet_hdr,
        }
        .configure()
    }

    /// Takes over an attached tap descriptor from another process; its name and kind are asked of the kernel.
    ///
    /// # Errors
    /// [`TapError::Io`] if it is not an attached tap.
    pub fn from_fd(fd: OwnedFd) -> Result<Tap, TapError> {
        let mut req = netconf::blank_ifreq();
        let io = |what| {
            let source = io::Error::last_os_error();
            TapError::Io {
                name: "(inherited)".to_owned(),
                what,
                source,
            }
        };
        // SAFETY: TUNGETIFF writes one ifreq, which `req` is.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut req) } < 0 {
            return Err(io("asking for its name"));
        }
        // SAFETY: TUNGETIFF filled in the flags; every bit pattern is a valid c_short.
        let flags = libc::c_int::from(unsafe { req.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(TapError::WrongKind {
                name: netconf::name_of(&req),
                vnet_hdr: flags & libc::IFF_VNET_HDR != 0,
                source: io::Error::from_raw_os_error(libc::EINVAL),
            });
        }
        // SAFETY: F_GETFL and F_SETFL take no pointers.
        let rc = unsafe {
            let old = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, old | libc::O_NONBLOCK)
        };
        if rc < 0 {
            return Err(io("making it non-blocking"));
        }
        Tap {
            fd,
            name: netconf::name_of(&req),
            vnet_hdr: flags & libc::IFF_VNET_HDR != 0,
        }
        .configure()
    }

    fn configure(self) -> Result<Tap, TapError> {
        // A persistent tap keeps the filter of a standby that was killed.
        if self.set_deaf(false).is_err() {
            return Err(self.error("removing its filter"));
        }
        // SAFETY: TUNSETOFFLOAD takes a plain number.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, 0 as libc::c_uint) } < 0 {
            return Err(self.error("switching offloads off"));
        }
        if self.vnet_hdr {
            let size = NET_HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int, which `size` is.
            if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) }
                < 0
            {
                return Err(self.error("setting the header's size"));
            }
        }
        Ok(self)
    }

    fn error(&self, what: &'static str) -> TapError {
        TapError::Io {
            name: self.name.clone(),
            what,
            source: io::Error::last_os_error(),
        }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the tap was made with `IFF_VNET_HDR`.
    pub fn vnet_hdr(&self) -> bool {
        self.vnet_hdr
    }

    /// Keeps the interface when its last descriptor is closed, or not.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn set_persistent(&self, on: bool) -> Result<(), TapError> {
        let on = libc::c_ulong::from(on);
        // SAFETY: TUNSETPERSIST takes a plain number.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETPERSIST, on) } < 0 {
            return Err(self.error("making it persistent"));
        }
        Ok(())
    }

    /// Sets the interface up. A frame sent while it is down is lost. Acts on the calling thread's network namespace,
    /// which must be the tap's.
    ///
    /// # Errors
    /// As [`netconf::set_link`].
    pub fn set_up(&self) -> Result<(), NetconfError> {
        netconf::set_link(&self.name, true)
    }

    /// Sets the interface down. See [`Tap::set_up`].
    ///
    /// # Errors
    /// As [`netconf::set_link`].
    pub fn set_down(&self) -> Result<(), NetconfError> {
        netconf::set_link(&self.name, false)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Port for Tap {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let Some(ethernet) = frame.get(NET_HEADER..) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let header = [0u8; NET_HEADER];
        let all = [
            libc::iovec {
                iov_base: header.as_ptr().cast_mut().cast(),
                iov_len: header.len(),
            },
            libc::iovec {
                iov_base: ethernet.as_ptr().cast_mut().cast(),
                iov_len: ethernet.len(),
            },
        ];
        let used = if self.vnet_hdr { &all[..] } else { &all[1..] };
        // SAFETY: each iovec describes memory that lives through the call and is only read by it.
        let n = unsafe {
            libc::writev(
                self.fd.as_raw_fd(),
                used.as_ptr(),
                used.len() as libc::c_int,
            )
        };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        if buf.len() <= NET_HEADER {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let skip = if self.vnet_hdr { 0 } else { NET_HEADER };
        let into = &mut buf[skip..];
        let n = loop {
            // SAFETY: `into` is writable memory of the length given.
            let n =
                unsafe { libc::read(self.fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len()) };
            if n >= 0 {
                break n as usize;
            }
            let e = io::Error::last_os_error();
            match e.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(e),
            }
        };
        buf[..NET_HEADER].fill(0);
        buf[10] = 1; // num_buffers
        Ok(Some((n + skip).min(buf.len())))
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// By a filter in the kernel: a standby on a busy network costs no wake-up per frame.
    fn set_deaf(&self, deaf: bool) -> io::Result<()> {
        // BPF_RET | BPF_K with 0: nothing of any frame.
        let mut nothing = libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0,
        };
        let program = libc::sock_fprog {
            len: 1,
            filter: &raw mut nothing,
        };
        let op = if deaf {
            libc::TUNATTACHFILTER
        } else {
            libc::TUNDETACHFILTER
        };
        // SAFETY: the one reads a sock_fprog and the filter it points to, which both live through the call; the other
        // looks at nothing.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), op, &raw const program) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn open_tun() -> Result<OwnedFd, TapError> {
    let opened: io::Result<File> = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN);
    match opened {
        Ok(file) => Ok(file.into()),
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun(e),
            Some(libc::EACCES | libc::EPERM) => TapError::NotAllowed(e),
            _ => TapError::Io {
                name: TUN.to_owned(),
                what: "opening",
                source: e,
            },
        }),
    }
}
