//! The network device under smoltcp.

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

use crate::log;
use crate::params::Params;
use crate::virtio::Transport;
use crate::virtio::net::Net;

/// smoltcp's clock runs this much faster than time does. Its shortest retransmission timeout is a built-in second, and
/// after a failover what the dead host still held back is only sent again at such a timeout: scaled, it is 62 ms.
/// (ARP's one second between questions and the 60 seconds' backoff limit shrink alike, which suits a LAN.)
pub const TIME_SCALE: u64 = 16;

/// Frames taken in per poll: bounds the time the load loop and the disk wait.
const FRAMES_PER_POLL: usize = 64;

/// The interface and its device.
pub struct Stack {
    net: Net,
    iface: Interface,
}

fn instant(now_us: u64) -> Instant {
    Instant::from_micros((now_us * TIME_SCALE) as i64)
}

impl Stack {
    /// Finds the network device, if there is one, and configures it.
    pub fn new(params: &Params, now_us: u64) -> Option<Stack> {
        let Some(transport) = Transport::find(1) else {
            log!("no network device");
            return None;
        };
        let slot = transport.slot();
        let mut net = match Net::new(transport) {
            Ok(n) => n,
            Err(why) => {
                log!("network device in slot {slot} is unusable: {why}");
                return None;
            }
        };
        let mac = EthernetAddress(net.mac);
        if !mac.is_unicast() {
            log!("network device in slot {slot} has no unicast address: {mac}");
            return None;
        }
        let mut config = Config::new(mac.into());
        config.random_seed = crate::time::tsc();
        let mut iface = Interface::new(config, &mut net, instant(now_us));
        match params.ip {
            Some(ip) => iface.update_ip_addrs(|a| {
                let _ = a.push(IpCidr::Ipv4(ip));
            }),
            None => log!("no ip= on the command line: the network stays silent"),
        }
        if let Some(gw) = params.gateway
            && iface.routes_mut().add_default_ipv4_route(gw).is_err()
        {
            log!("no room for the default route");
        }
        if let Some(ip) = params.ip {
            log!("network in slot {slot}: {mac}, {ip}");
        }
        Some(Stack { net, iface })
    }

    /// Takes frames in; true if there were any.
    pub fn ingress(&mut self, now_us: u64, sockets: &mut SocketSet<'_>) -> bool {
        let mut any = false;
        for _ in 0..FRAMES_PER_POLL {
            match self
                .iface
                .poll_ingress_single(instant(now_us), &mut self.net, sockets)
            {
                PollIngressSingleResult::None => break,
                _ => any = true,
            }
        }
        any
    }

    /// Sends what the sockets have to send; true if there was something.
    pub fn egress(&mut self, now_us: u64, sockets: &mut SocketSet<'_>) -> bool {
        let mut any = false;
        for _ in 0..FRAMES_PER_POLL {
            match self
                .iface
                .poll_egress(instant(now_us), &mut self.net, sockets)
            {
                PollResult::None => break,
                PollResult::SocketStateChanged => any = true,
            }
        }
        self.net.kick();
        any
    }

    /// Frames wait to be taken in.
    pub fn pending(&self) -> bool {
        self.net.pending()
    }

    /// Microseconds until smoltcp has something to do by itself.
    pub fn delay_us(&mut self, now_us: u64, sockets: &SocketSet<'_>) -> Option<u64> {
        self.iface
            .poll_delay(instant(now_us), sockets)
            .map(|d| d.total_micros() / TIME_SCALE)
    }

    /// Interrupts for the device. The last one is acknowledged before the next can come, not when it came: that costs an
    /// exit to the VMM, and there was a frame to answer.
    pub fn interrupts(&mut self, on: bool) {
        if on {
            self.net.acknowledge();
        }
        self.net.interrupts(on);
    }
}
