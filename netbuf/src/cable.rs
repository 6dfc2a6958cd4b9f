//! A tap's cable to its bridge, as a plain state machine: told what interfaces there are, it says what to mend and what
//! to tell.
//!
//! Somebody else may take the bridge away and make it again (`netplan apply`), take the tap off or set it down. It is
//! put back each time; against something that does it again and again, ever more slowly.

use crate::bridge::wanted_mtu;
use crate::netconf::LinkState;

/// A bridge is told to be down when it has been for so long: one that is made again is for a moment.
const DOWN_MS: u64 = 2_000;
/// Repairs further apart than this have nothing to do with each other.
const CALM_MS: u64 = 60_000;
/// The wait before a second repair; it doubles ...
const FIRST_MS: u64 = 100;
/// ... up to this.
const LONGEST_MS: u64 = 10_000;

/// What stands between a tap and its bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    NoTap,
    NoBridge,
    Off,
    /// It is a port of something else, by somebody's wish.
    Elsewhere(String),
    Down,
    BridgeDown,
    /// The tap holds its bridge to smaller packets than the other ports take.
    Small(u16),
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Put the tap on its bridge and set it up.
    Join,
    /// Set the tap up.
    Up,
    /// Let the tap take packets of this size, bytes.
    Mtu(u16),
}

/// One tap that belongs on one bridge.
#[derive(Clone, Debug)]
pub struct Cable {
    tap: String,
    bridge: String,
    fault: Option<(Fault, u64)>,
    /// The fault has been told of.
    said: bool,
    /// The last repair that was tried did not help.
    failed: bool,
    /// The bridge has been away since the tap was on it.
    was_away: bool,
    tries: u32,
    tried_ms: Option<u64>,
}

impl Cable {
    /// `tap` belongs on `bridge`.
    #[must_use]
    pub fn new(tap: &str, bridge: &str) -> Cable {
        Cable {
            tap: tap.into(),
            bridge: bridge.into(),
            fault: None,
            said: false,
            failed: false,
            was_away: false,
            tries: 0,
            tried_ms: None,
        }
    }

    /// The tap's name.
    #[must_use]
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// The bridge's name.
    #[must_use]
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// These are the interfaces now. What is to be told goes to `say`; what is to be mended is returned, and answered
    /// with [`Cable::repaired`] or [`Cable::failed`]. Times are milliseconds on any clock that only grows.
    pub fn look(
        &mut self,
        now_ms: u64,
        links: &[LinkState],
        say: &mut Vec<String>,
    ) -> Option<Repair> {
        let Some(fault) = self.diagnose(links) else {
            if self.said {
                say.push(format!(
                    "tap `{}` is on bridge `{}` again",
                    self.tap, self.bridge
                ));
            }
            self.fault = None;
            (self.said, self.failed, self.was_away) = (false, false, false);
            return None;
        };
        self.was_away |= fault == Fault::NoBridge;
        match &self.fault {
            Some((same, _)) if *same == fault => {}
            _ => {
                self.fault = Some((fault.clone(), now_ms));
                (self.said, self.failed) = (false, false);
            }
        }
        let repair = match fault {
            Fault::Off => Some(Repair::Join),
            Fault::Down => Some(Repair::Up),
            Fault::Small(mtu) => Some(Repair::Mtu(mtu)),
            _ => None,
        };
        if repair.is_none() {
            self.tell(now_ms, say);
        }
        repair.filter(|_| now_ms >= self.next_try())
    }

    /// When to look again though nothing has changed.
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        match self.fault.as_ref()? {
            (Fault::Off | Fault::Down | Fault::Small(_), _) => Some(self.next_try()),
            (Fault::BridgeDown, since) if !self.said => Some(since + DOWN_MS),
            _ => None,
        }
    }

    /// That repair has been carried out.
    pub fn repaired(&mut self, now_ms: u64, say: &mut Vec<String>) {
        self.tried(now_ms);
        let (tap, bridge) = (&self.tap, &self.bridge);
        match self.fault.take() {
            Some((Fault::Off, _)) if self.was_away => say.push(format!(
                "bridge `{bridge}` is there again: tap `{tap}` has been put back on it"
            )),
            Some((Fault::Off, _)) => say.push(format!(
                "tap `{tap}` had been taken off bridge `{bridge}`: put back"
            )),
            Some((Fault::Down, _)) => {
                say.push(format!("tap `{tap}` had been set down: set up again"));
            }
            _ => {}
        }
        (self.said, self.failed, self.was_away) = (false, false, false);
    }

    /// That repair did not work.
    pub fn failed(&mut self, now_ms: u64, why: &str, say: &mut Vec<String>) {
        self.tried(now_ms);
        if !std::mem::replace(&mut self.failed, true) {
            self.said = true;
            let what = match self.fault {
                Some((Fault::Small(_), _)) => "holds its bridge to small packets",
                _ => "is cut off from its bridge",
            };
            say.push(format!(
                "tap `{}` {what} (`{}`), and that could not be mended: {why}; tried again from time to time",
                self.tap, self.bridge
            ));
        }
    }

    fn tried(&mut self, now_ms: u64) {
        let calm = self
            .tried_ms
            .is_none_or(|then| now_ms.saturating_sub(then) > CALM_MS);
        self.tries = if calm {
            0
        } else {
            self.tries.saturating_add(1)
        };
        self.tried_ms = Some(now_ms);
    }

    fn next_try(&self) -> u64 {
        let pause = FIRST_MS
            .checked_shl(self.tries)
            .unwrap_or(LONGEST_MS)
            .min(LONGEST_MS);
        self.tried_ms.map_or(0, |then| then.saturating_add(pause))
    }

    fn diagnose(&self, links: &[LinkState]) -> Option<Fault> {
        let find = |name: &str| links.iter().find(|link| link.name == name);
        let Some(tap) = find(&self.tap) else {
            return Some(Fault::NoTap);
        };
        let bridge = find(&self.bridge);
        if let Some(master) = tap.master.filter(|m| bridge.map(|b| b.index) != Some(*m)) {
            let name = links.iter().find(|link| link.index == master);
            return Some(Fault::Elsewhere(name.map_or_else(
                || format!("interface {master}"),
                |link| link.name.clone(),
            )));
        }
        let Some(bridge) = bridge else {
            return Some(Fault::NoBridge);
        };
        if tap.master.is_none() {
            return Some(Fault::Off);
        }
        if !tap.up {
            return Some(Fault::Down);
        }
        if !bridge.up {
            return Some(Fault::BridgeDown);
        }
        wanted_mtu(links, &self.bridge, &self.tap)
            .filter(|mtu| u32::from(*mtu) > tap.mtu)
            .map(Fault::Small)
    }

    /// Tells of a fault that this program does not mend, once.
    fn tell(&mut self, now_ms: u64, say: &mut Vec<String>) {
        let Some((fault, since)) = self.fault.as_ref().filter(|_| !self.said) else {
            return;
        };
        let (tap, bridge) = (&self.tap, &self.bridge);
        say.push(match fault {
            Fault::NoTap => format!(
                "tap `{tap}` has been deleted: this network card is cut off until the VM's process is started anew"
            ),
            Fault::NoBridge => format!(
                "bridge `{bridge}` is gone: tap `{tap}` is cut off until there is a bridge of that name again"
            ),
            Fault::Elsewhere(other) => format!(
                "tap `{tap}` has been put on `{other}`: left there, though it belongs on bridge `{bridge}`"
            ),
            Fault::BridgeDown if now_ms.saturating_sub(*since) >= DOWN_MS => {
                format!("bridge `{bridge}` is down: tap `{tap}` is cut off")
            }
            _ => return,
        });
        self.said = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(master: Option<u32>, up: bool) -> LinkState {
        LinkState {
            index: 9,
            name: "t0".into(),
            kind: "tun".into(),
            mtu: 1500,
            master,
            up,
            ..LinkState::default()
        }
    }

    fn bridge(name: &str, index: u32, up: bool) -> LinkState {
        LinkState {
            index,
            name: name.into(),
            kind: "bridge".into(),
            mtu: 1500,
            up,
            ..LinkState::default()
        }
    }

    fn fine() -> [LinkState; 2] {
        [tap(Some(7), true), bridge("br0", 7, true)]
    }

    #[test]
    fn a_bridge_made_again_gets_its_tap_back_and_both_are_told_once() {
        let (mut cable, mut said) = (Cable::new("t0", "br0"), Vec::new());
        assert_eq!(cable.look(0, &fine(), &mut said), None);
        for now in [10, 20] {
            assert_eq!(cable.look(now, &[tap(None, true)], &mut said), None);
        }
        assert_eq!((said.len(), cable.due_ms()), (1, None));
        assert!(said[0].contains("`br0` is gone"), "{said:?}");
        let again = [tap(None, true), bridge("br0", 12, false)];
        assert_eq!(cable.look(30, &again, &mut said), Some(Repair::Join));
        cable.repaired(31, &mut said);
        assert!(said[1].contains("there again"), "{said:?}");
        let still_down = [tap(Some(12), true), bridge("br0", 12, false)];
        assert_eq!(cable.look(32, &still_down, &mut said), None);
        assert_eq!(cable.due_ms(), Some(2032));
        assert_eq!(
            cable.look(
                40,
                &[tap(Some(12), true), bridge("br0", 12, true)],
                &mut said
            ),
            None
        );
        assert_eq!(said.len(), 2, "{said:?}");
    }

    #[test]
    fn a_tap_taken_off_or_set_down_is_put_back_ever_more_slowly() {
        let off = [tap(None, true), bridge("br0", 7, true)];
        let down = [tap(Some(7), false), bridge("br0", 7, true)];
        let (mut cable, mut said) = (Cable::new("t0", "br0"), Vec::new());
        assert_eq!(cable.look(5, &down, &mut said), Some(Repair::Up));
        cable.repaired(5, &mut said);
        let mut times = vec![5];
        while times.len() < 12 {
            let now = cable.look(times[times.len() - 1], &off, &mut said);
            assert_eq!(now, None, "at once again");
            let due = cable.due_ms().expect("a time");
            assert_eq!(cable.look(due, &off, &mut said), Some(Repair::Join));
            cable.repaired(due, &mut said);
            times.push(due);
        }
        let waits: Vec<u64> = times.windows(2).map(|w| w[1] - w[0]).collect();
        assert_eq!(waits[..3], [100, 200, 400]);
        assert!(waits.iter().all(|w| *w <= LONGEST_MS) && waits[10] == LONGEST_MS);
        assert_eq!(said.len(), 12);
        // Much later, at once.
        let later = times[11] + CALM_MS + 1;
        assert_eq!(cable.look(later, &off, &mut said), Some(Repair::Join));
        cable.repaired(later, &mut said);
        assert_eq!(cable.due_ms(), None);
        assert_eq!(cable.look(later + 50, &off, &mut said), None);
        assert_eq!(cable.due_ms(), Some(later + 100));
    }

    #[test]
    fn what_cannot_be_mended_is_told_once_and_so_is_its_end() {
        let (mut cable, mut said) = (Cable::new("t0", "br0"), Vec::new());
        let off = [tap(None, true), bridge("br0", 7, true)];
        for now in [0, 1000, 3000] {
            assert_eq!(cable.look(now, &off, &mut said), Some(Repair::Join));
            cable.failed(now, "no permission", &mut said);
        }
        assert_eq!(said.len(), 1, "{said:?}");
        cable.look(4000, &fine(), &mut said);
        assert_eq!(said[1], "tap `t0` is on bridge `br0` again");
        // Somebody's wish is left alone.
        let moved = [
            tap(Some(8), true),
            bridge("br0", 7, true),
            bridge("br1", 8, true),
        ];
        assert_eq!(cable.look(5000, &moved, &mut said), None);
        assert_eq!(cable.look(6000, &moved, &mut said), None);
        assert!(
            said[2].contains("put on `br1`") && said.len() == 3,
            "{said:?}"
        );
        assert_eq!(cable.look(7000, &[bridge("br0", 7, true)], &mut said), None);
        assert!(said[3].contains("deleted"), "{said:?}");
        let down = [tap(Some(7), true), bridge("br0", 7, false)];
        for now in [8000, 9999, 10_000, 20_000] {
            assert_eq!(cable.look(now, &down, &mut said), None);
        }
        assert!(said[4].contains("is down") && said.len() == 5, "{said:?}");
    }

    #[test]
    fn a_network_card_that_comes_later_is_not_held_to_the_taps_packets() {
        let (mut cable, mut said) = (Cable::new("t0", "br0"), Vec::new());
        let mut card = tap(Some(7), true);
        (card.name, card.kind, card.mtu, card.index) = ("eth0".into(), String::new(), 9000, 3);
        let [mine, br] = fine();
        let found = cable.look(0, &[mine, br, card], &mut said);
        assert_eq!(found, Some(Repair::Mtu(9000)));
        cable.repaired(0, &mut said);
        assert!(said.is_empty(), "{said:?}");
    }
}
