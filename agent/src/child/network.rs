//! A VM's network cards: taps that are on their bridges before the guest is, and that stay there.
//!
//! A bridge with the spanning tree protocol forwards nothing through a new port for half a minute. So a standby's tap is
//! put on its bridge, and set up, when the standby is built; until it is activated its gate lets nothing through.

use std::net::Ipv4Addr;
use std::sync::Arc;

use netbuf::{Cable, Gate, Tap, Watcher, announce, bridge, netconf};

use super::build::BuildError;
use super::proto::TapSpec;
use crate::busy::once_free;

/// A card's tap, behind a gate that lets nothing through yet, and the bridge that it belongs on, if any.
///
/// A tap that is on no bridge stays down until the guest is there: a route of the host's may lead to it.
pub(super) fn connect(
    spec: &TapSpec,
    limit: usize,
) -> Result<(Arc<Gate>, Option<Cable>), BuildError> {
    let tap = once_free(
        |e| matches!(e, netbuf::TapError::Busy { .. }),
        || Tap::open(&spec.name, true),
    )?;
    let gate = Gate::new(tap, limit)
        .map_err(|source| BuildError::Mismatch(format!("tap {}: {source}", spec.name)))?;
    gate.stand_by();
    if spec.bridge.is_some() {
        bridge::quieten(&spec.name)?;
    }
    // One that an administrator has made, and put on a bridge, stays on that.
    let on = spec
        .bridge
        .clone()
        .or_else(|| bridge::bridge_of(&spec.name));
    if let Some(on) = &on {
        bridge::join(on, &spec.name)?;
    }
    Ok((gate, on.map(|on| Cable::new(&spec.name, &on))))
}

/// Opens the gates, and announces the cards if that is wanted.
pub(super) fn go_live<'a>(
    cards: impl Iterator<Item = (&'a TapSpec, [u8; 6], Option<Ipv4Addr>, &'a Arc<Gate>)>,
    announce: bool,
) -> Result<(), BuildError> {
    let mut announced = Vec::new();
    for (spec, mac, ip, gate) in cards {
        gate.activate();
        netconf::set_link(&spec.name, true)?;
        let mut frames = vec![announce::rarp(mac)];
        frames.extend(ip.map(|ip| announce::gratuitous_arp(mac, ip)));
        announced.push((gate.clone(), frames));
    }
    if announce && let Err(e) = announce::begin(announced) {
        tracing::warn!("the VM is announced once only: starting a thread: {e}");
    }
    Ok(())
}

/// Watches `cables`; what is known of their bridges already is said at once.
pub(super) fn watch(cables: Vec<Cable>, say: impl Fn(String) + Send + 'static) -> Option<Watcher> {
    let mut bridges: Vec<&str> = cables.iter().map(Cable::bridge).collect();
    bridges.sort_unstable();
    bridges.dedup();
    bridges
        .into_iter()
        .flat_map(netbuf::bridge_warnings)
        .for_each(&say);
    if cables.is_empty() {
        return None;
    }
    match Watcher::start(cables, Box::new(say)) {
        Ok(watcher) => Some(watcher),
        Err(e) => {
            tracing::warn!("nobody watches that the taps stay on their bridges: {e}");
            None
        }
    }
}
