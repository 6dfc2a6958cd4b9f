//! Bridges, addresses and the like, by ioctl (netdevice(7)).

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::{NetconfError, control_socket, ifreq, ioctl};

// linux/sockios.h and linux/if_bridge.h; not all are in libc.
const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const SIOCBRDELBR: libc::c_ulong = 0x89a1;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const SIOCBRDELIF: libc::c_ulong = 0x89a3;
const SIOCDEVPRIVATE: libc::c_ulong = 0x89f0;
const BRCTL_SET_BRIDGE_FORWARD_DELAY: libc::c_ulong = 8;
const BRCTL_SET_BRIDGE_STP_STATE: libc::c_ulong = 14;
/// The kernel takes a bridge's times in hundredths of a second.
const USER_HZ_MS: u128 = 10;

/// Makes an Ethernet bridge, down, with a forwarding delay of 0 (a port forwards as soon as it is added) and no
/// spanning tree. Ageing is left as the kernel has it.
///
/// # Errors
/// [`NetconfError::Exists`], or another; also if the kernel has no bridge support.
pub fn create_bridge(name: &str) -> Result<(), NetconfError> {
    ifreq(name)?;
    bridge_by_name("creating bridge", name, SIOCBRADDBR)?;
    set_forward_delay(name, Duration::ZERO)
}

/// Sets how long a bridge's new port listens, and then learns, before it forwards; with a spanning tree from 2 to 30 s.
///
/// # Errors
/// [`NetconfError`].
pub fn set_forward_delay(bridge: &str, delay: Duration) -> Result<(), NetconfError> {
    let units = (delay.as_millis() / USER_HZ_MS) as libc::c_ulong;
    let what = "setting the forwarding delay of bridge";
    private(what, bridge, [BRCTL_SET_BRIDGE_FORWARD_DELAY, units, 0, 0])
}

/// Switches a bridge's spanning tree protocol.
///
/// # Errors
/// [`NetconfError`].
pub fn set_stp(bridge: &str, on: bool) -> Result<(), NetconfError> {
    let what = "switching the spanning tree of bridge";
    private(what, bridge, [BRCTL_SET_BRIDGE_STP_STATE, on.into(), 0, 0])
}

/// A private bridge ioctl takes an array of four words, the first one its number.
fn private(
    what: &'static str,
    bridge: &str,
    mut args: [libc::c_ulong; 4],
) -> Result<(), NetconfError> {
    let mut req = ifreq(bridge)?;
    req.ifr_ifru.ifru_data = args.as_mut_ptr().cast();
    ioctl(what, bridge, SIOCDEVPRIVATE, &mut req)
}

/// Removes a bridge, which must be down.
///
/// # Errors
/// [`NetconfError`].
pub fn delete_bridge(name: &str) -> Result<(), NetconfError> {
    ifreq(name)?;
    bridge_by_name("deleting bridge", name, SIOCBRDELBR)
}

fn bridge_by_name(what: &'static str, name: &str, op: libc::c_ulong) -> Result<(), NetconfError> {
    let sock = control_socket().map_err(|e| NetconfError::from_io(what, name, e))?;
    let mut buf = [0u8; libc::IFNAMSIZ];
    buf[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: SIOCBRADDBR and SIOCBRDELBR read IFNAMSIZ bytes, which `buf` has; ifreq() checked that the name leaves
    // room for its NUL.
    if unsafe { libc::ioctl(sock.as_raw_fd(), op, buf.as_ptr()) } < 0 {
        return Err(NetconfError::last(what, name));
    }
    Ok(())
}

/// Makes interface `port` a port of `bridge`.
///
/// # Errors
/// [`NetconfError::Missing`], or another; `EBUSY` if it is a port already.
pub fn add_to_bridge(bridge: &str, port: &str) -> Result<(), NetconfError> {
    change_port("adding to bridge", bridge, port, SIOCBRADDIF)
}

/// Takes interface `port` out of `bridge`: the virtual cable is pulled.
///
/// # Errors
/// [`NetconfError`].
pub fn remove_from_bridge(bridge: &str, port: &str) -> Result<(), NetconfError> {
    change_port("removing from bridge", bridge, port, SIOCBRDELIF)
}

fn change_port(
    what: &'static str,
    bridge: &str,
    port: &str,
    op: libc::c_ulong,
) -> Result<(), NetconfError> {
    let mut req = ifreq(bridge)?;
    req.ifr_ifru.ifru_ifindex = index(port)? as libc::c_int;
    ioctl(what, bridge, op, &mut req)
}

/// Gives an interface its IPv4 address and network prefix length (0..=32).
///
/// # Errors
/// [`NetconfError`].
pub fn set_addr_v4(name: &str, ip: Ipv4Addr, prefix: u8) -> Result<(), NetconfError> {
    const WHAT: &str = "setting the address of";
    if prefix > 32 {
        return Err(NetconfError::Invalid {
            what: WHAT,
            name: name.to_owned(),
            why: format!("/{prefix} is no IPv4 prefix length"),
        });
    }
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    for (op, value) in [
        (libc::SIOCSIFADDR, ip),
        (libc::SIOCSIFNETMASK, Ipv4Addr::from(mask)),
    ] {
        let mut req = ifreq(name)?;
        // A sockaddr_in in the place of a sockaddr: family, port, address.
        let mut data = [0 as libc::c_char; 14];
        for (to, from) in data[2..6].iter_mut().zip(value.octets()) {
            *to = from as libc::c_char;
        }
        req.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: libc::AF_INET as libc::sa_family_t,
            sa_data: data,
        };
        ioctl(WHAT, name, op, &mut req)?;
    }
    Ok(())
}

/// Sets an interface up or down.
///
/// # Errors
/// [`NetconfError`].
pub fn set_link(name: &str, up: bool) -> Result<(), NetconfError> {
    const WHAT: &str = "setting the state of";
    let mut req = ifreq(name)?;
    ioctl(WHAT, name, libc::SIOCGIFFLAGS, &mut req)?;
    // SAFETY: SIOCGIFFLAGS filled in the flags; every bit pattern is a valid c_short.
    let flags = unsafe { req.ifr_ifru.ifru_flags };
    let bit = libc::IFF_UP as libc::c_short;
    req.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
    ioctl(WHAT, name, libc::SIOCSIFFLAGS, &mut req)
}

/// Gives an interface the MAC address `mac`.
///
/// # Errors
/// [`NetconfError`]; a multicast address is refused by the kernel.
pub fn set_mac(name: &str, mac: [u8; 6]) -> Result<(), NetconfError> {
    let mut req = ifreq(name)?;
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    req.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: data,
    };
    ioctl("setting the MAC of", name, libc::SIOCSIFHWADDR, &mut req)
}

/// The MAC address of an interface.
///
/// # Errors
/// [`NetconfError`].
pub fn mac(name: &str) -> Result<[u8; 6], NetconfError> {
    let mut req = ifreq(name)?;
    ioctl("reading the MAC of", name, libc::SIOCGIFHWADDR, &mut req)?;
    // SAFETY: SIOCGIFHWADDR filled in a sockaddr of plain bytes.
    let data = unsafe { req.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|i| data[i] as u8))
}

/// Sets an interface's largest packet, bytes without the Ethernet header.
///
/// # Errors
/// [`NetconfError`].
pub fn set_mtu(name: &str, mtu: u16) -> Result<(), NetconfError> {
    let mut req = ifreq(name)?;
    req.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
    ioctl("setting the MTU of", name, libc::SIOCSIFMTU, &mut req)
}

/// The number the kernel knows an interface by.
///
/// # Errors
/// [`NetconfError::Missing`] if there is none of that name.
pub fn index(name: &str) -> Result<u32, NetconfError> {
    let mut req = ifreq(name)?;
    ioctl("looking up", name, libc::SIOCGIFINDEX, &mut req)?;
    // SAFETY: SIOCGIFINDEX filled in an int.
    Ok(unsafe { req.ifr_ifru.ifru_ifindex } as u32)
}

/// Whether there is an interface of that name.
pub fn exists(name: &str) -> bool {
    index(name).is_ok()
}
