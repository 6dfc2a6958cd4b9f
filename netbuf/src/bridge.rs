//! A tap's place on a bridge: how it is put there without disturbing anybody, and what of the bridge delays it.

use tracing::warn;

use crate::netconf::{self, LinkState, NetconfError};

/// What a tap's driver takes.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_521;

/// Puts `tap` on `bridge` and sets it up. Its largest packet becomes what the bridge's other ports agree on, so that the
/// bridge keeps its own (it takes the smallest of its ports'). A tap that is there already only gets what it lacks.
///
/// # Errors
/// [`NetconfError`]; [`NetconfError::Missing`] if there is no such bridge.
pub fn join(bridge: &str, tap: &str) -> Result<(), NetconfError> {
    let links = netconf::links()?;
    let find = |name: &str| links.iter().find(|link| link.name == name);
    let (on, now) = (find(bridge), find(tap));
    let is_port = on.is_some_and(|on| now.is_some_and(|tap| tap.master == Some(on.index)));
    if let Some(mtu) = wanted_mtu(&links, bridge, tap)
        && now.is_some_and(|tap| tap.mtu != u32::from(mtu))
        && let Err(e) = netconf::set_mtu(tap, mtu)
    {
        // It works with another one, for frames that are small enough.
        warn!("{e}");
    }
    if !is_port {
        netconf::add_to_bridge(bridge, tap)?;
    }
    netconf::set_link(tap, true)
}

/// Keeps the host itself from being heard or seen through a tap that Understudy made: it gets no IPv6 address there, and
/// a MAC address that a bridge does not take for its own (a bridge without a fixed address has the lowest of its ports'
/// addresses, and changes it when that port goes). To be called before the tap is set up.
///
/// # Errors
/// [`NetconfError`].
pub fn quieten(tap: &str) -> Result<(), NetconfError> {
    netconf::no_ipv6_address(tap)?;
    let mut mac = netconf::mac(tap)?;
    mac[0] = 0xfe;
    netconf::set_mac(tap, mac)
}

/// The largest packet that `tap` should take on `bridge`: the bridge's own; or, if the bridge is held lower by taps
/// alone, what all its other ports take.
pub(crate) fn wanted_mtu(links: &[LinkState], bridge: &str, tap: &str) -> Option<u16> {
    let bridge = links.iter().find(|link| link.name == bridge)?;
    let others = links
        .iter()
        .filter(|link| link.master == Some(bridge.index) && link.name != tap && link.kind != "tun");
    let mtu = bridge
        .mtu
        .max(others.map(|port| port.mtu).min().unwrap_or(0));
    u16::try_from(mtu.clamp(*MTU.start(), *MTU.end())).ok()
}

/// The name of the bridge that `tap` is a port of.
#[must_use]
pub fn bridge_of(tap: &str) -> Option<String> {
    let links = netconf::links().ok()?;
    let master = links.iter().find(|link| link.name == tap)?.master?;
    let bridge = links.into_iter().find(|link| link.index == master)?;
    bridge.bridge.is_some().then_some(bridge.name)
}

/// What an administrator should know of the bridge `name`, in sentences; empty if all is well. Asked of this thread's
/// network namespace.
#[must_use]
pub fn bridge_warnings(name: &str) -> Vec<String> {
    match netconf::links() {
        Ok(links) => warnings(&links, name),
        Err(e) => vec![e.to_string()],
    }
}

fn warnings(links: &[LinkState], name: &str) -> Vec<String> {
    let Some(link) = links.iter().find(|link| link.name == name) else {
        return vec![format!("there is no bridge `{name}` on this host")];
    };
    let Some(bridge) = link.bridge else {
        return vec![format!("`{name}` is an interface, but no bridge")];
    };
    let mut said = Vec::new();
    if bridge.stp && !bridge.forward_delay.is_zero() {
        // A port listens for one delay and learns for another before it forwards.
        let silent = bridge.forward_delay * 2;
        said.push(format!(
            "bridge `{name}` runs the spanning tree protocol with a forward delay of {} s: what is put on it anew is cut off \
             for {} s. Standbys are on it beforehand; a VM that starts, or a bridge that is made again, is not. If this host \
             has one way into that network only: `ip link set {name} type bridge stp_state 0`",
            bridge.forward_delay.as_secs_f32(),
            silent.as_secs_f32(),
        ));
    }
    if !link.up {
        said.push(format!("bridge `{name}` is down"));
    }
    said
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::netconf::BridgeState;

    fn bridge(mtu: u32) -> LinkState {
        LinkState {
            index: 7,
            name: "br0".into(),
            up: true,
            mtu,
            kind: "bridge".into(),
            bridge: Some(BridgeState::default()),
            ..LinkState::default()
        }
    }

    fn port(name: &str, kind: &str, mtu: u32) -> LinkState {
        LinkState {
            name: name.into(),
            kind: kind.into(),
            mtu,
            master: Some(7),
            ..LinkState::default()
        }
    }

    #[test]
    fn a_tap_takes_the_bridges_largest_packet_unless_taps_alone_hold_it_low() {
        let wanted = |links: &[LinkState]| wanted_mtu(links, "br0", "mine");
        assert_eq!(wanted(&[]), None, "no such bridge");
        assert_eq!(wanted(&[bridge(1500)]), Some(1500));
        assert_eq!(wanted(&[bridge(9000)]), Some(9000));
        assert_eq!(wanted(&[bridge(1400)]), Some(1400));
        // Two taps wait for each other, and a network card could do more.
        let held = [
            bridge(1500),
            port("other", "tun", 1500),
            port("eth0", "", 9000),
        ];
        assert_eq!(wanted(&held), Some(9000));
        let mixed = [bridge(1500), port("eth1", "", 1500), port("eth0", "", 9000)];
        assert_eq!(wanted(&mixed), Some(1500));
        let mine = [bridge(1500), port("mine", "tun", 9000)];
        assert_eq!(wanted(&mine), Some(1500));
        assert_eq!(wanted(&[bridge(65_535)]), Some(65_521), "a tap's most");
    }

    #[test]
    fn only_a_bridge_that_delays_is_warned_of() {
        let mut link = bridge(1500);
        let said = |link: &LinkState| warnings(std::slice::from_ref(link), "br0");
        assert!(said(&link).is_empty());
        let delay = Duration::from_secs(15);
        for (stp, forward_delay, count) in [
            (true, delay, 1),
            (true, Duration::ZERO, 0),
            (false, delay, 0),
        ] {
            link.bridge = Some(BridgeState { stp, forward_delay });
            assert_eq!(said(&link).len(), count, "{stp} {forward_delay:?}");
        }
        link.bridge = Some(BridgeState {
            stp: true,
            forward_delay: delay,
        });
        assert!(
            said(&link)[0].contains("cut off for 30 s"),
            "{:?}",
            said(&link)
        );
        link.bridge = None;
        assert!(said(&link)[0].contains("no bridge"));
        assert!(warnings(&[], "br0")[0].contains("there is no bridge `br0`"));
    }
}
