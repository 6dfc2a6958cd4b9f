//! The wires of a lab: a network namespace for each host, one for the client, one for the switches between them.
//!
//! ```text
//!   client -- lan0 --+-- host a: br0 -- tap of the VM        (guest LAN, 10.77.0.0/24)
//!                    +-- host b: br0 -- tap of its standby
//!             repl0 -+-- a, b, ..., m (the master's host)    (checkpoints, decisions, 10.78.0.0/24)
//! ```
//!
//! The namespaces have no names: they are open files, and go with the process.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

use netbuf::netconf;
use nix::sched::{CloneFlags, setns};

use super::LabError;

/// The client's address on the guest LAN.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The client's interface.
pub const CLIENT_PORT: &str = "lan";
/// The bridge that each host's taps are put on.
pub const HOST_BRIDGE: &str = "br0";

/// Host number `i`'s address on the replication network.
#[must_use]
pub fn repl_addr(i: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, 1 + i as u8)
}

/// A network namespace, alive as long as this.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A new one, with loopback up. Takes `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn new() -> Result<Self, LabError> {
        // On a thread of its own: unshare moves the thread that calls it.
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                netconf::unshare_netns()?;
                let file = File::open("/proc/thread-self/ns/net");
                Ok(Self(file.map_err(|e| LabError::io("a namespace", e))?))
            });
            made.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        })
    }

    /// Runs `f` on a thread inside. Threads and sockets that it makes stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered, or as `f` does.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let done = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("a namespace of our own");
                f()
            });
            done.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        })
    }

    /// For setns(2).
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The kernel's number of it: what `/proc/PID/ns/net` of a process inside names.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn number(&self) -> Result<u64, LabError> {
        let meta = self.0.metadata();
        Ok(meta.map_err(|e| LabError::io("a namespace", e))?.ino())
    }
}

/// One of the two networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Where guests and clients are.
    Lan,
    /// Where hosts talk to each other and to the master.
    Repl,
}

impl Wire {
    fn name(self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Repl => "repl",
        }
    }
}

/// All of it.
#[derive(Debug)]
pub struct Network {
    switch: Namespace,
    client: Namespace,
    hosts: Vec<(String, Namespace)>,
}

impl Network {
    /// The switches, the client, and `hosts`, whose addresses on the replication network are 10.78.0.1, .2, ...
    ///
    /// # Errors
    /// [`LabError`], naming the interface.
    pub fn build(hosts: &[String]) -> Result<Self, LabError> {
        let network = Self {
            switch: Namespace::new()?,
            client: Namespace::new()?,
            hosts: hosts
                .iter()
                .map(|name| Ok((name.clone(), Namespace::new()?)))
                .collect::<Result<_, LabError>>()?,
        };
        network.switch.within(|| {
            // An address of its own: without one a bridge takes a port's and changes it when that port goes.
            bridge("lan0", [0x52, 0x54, 0x00, 0x75, 0x70, 0x00])?;
            bridge("repl0", [0x52, 0x54, 0x00, 0x75, 0x70, 0x01])
        })?;
        network.cable(Wire::Lan, "client", &network.client)?;
        network
            .client
            .within(|| netconf::set_addr_v4(CLIENT_PORT, CLIENT, 24))?;
        for (i, (name, namespace)) in network.hosts.iter().enumerate() {
            network.cable(Wire::Lan, name, namespace)?;
            network.cable(Wire::Repl, name, namespace)?;
            namespace.within(|| {
                bridge(HOST_BRIDGE, [0x52, 0x54, 0x00, 0x75, 0x71, i as u8])?;
                netconf::add_to_bridge(HOST_BRIDGE, Wire::Lan.name())?;
                netconf::set_addr_v4(Wire::Repl.name(), repl_addr(i), 24)
            })?;
        }
        Ok(network)
    }

    /// A cable from the switch's bridge (port `<wire>-<host>`) into `to`, where the interface has the wire's name.
    fn cable(&self, wire: Wire, host: &str, to: &Namespace) -> Result<(), LabError> {
        let (name, port) = (wire.name(), port(wire, host));
        self.switch.within(|| {
            netconf::create_veth(&port, name)?;
            netconf::move_to_netns(name, to.0.as_fd())?;
            netconf::add_to_bridge(&format!("{name}0"), &port)?;
            netconf::set_link(&port, true)
        })?;
        Ok(to.within(|| netconf::set_link(name, true))?)
    }

    /// Pulls or plugs `host`'s cable. Frames are lost without a word; nobody hears a FIN.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn plug(&self, host: &str, wire: Wire, plugged: bool) -> Result<(), LabError> {
        let port = port(wire, host);
        Ok(self.switch.within(|| netconf::set_link(&port, plugged))?)
    }

    /// The namespace of that host, or of `client` or `switch`.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn namespace(&self, host: &str) -> Result<&Namespace, LabError> {
        let found = match host {
            "client" => Some(&self.client),
            "switch" => Some(&self.switch),
            _ => self.hosts.iter().find(|(n, _)| n == host).map(|(_, n)| n),
        };
        found.ok_or_else(|| LabError::NoHost(host.into()))
    }
}

/// The switch's end of a cable.
#[must_use]
pub fn port(wire: Wire, host: &str) -> String {
    format!("{}-{host}", wire.name())
}

fn bridge(name: &str, mac: [u8; 6]) -> Result<(), netconf::NetconfError> {
    netconf::create_bridge(name)?;
    netconf::set_mac(name, mac)?;
    netconf::set_link(name, true)
}
