//! What happens next in a soak: chosen by chance alone, so that a seed gives the same again.

use std::time::Duration;

use crate::lab::Random;

/// Something that happens to a host or a VM, given by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Act {
    /// What.
    pub kind: Kind,
    /// Which host, of those that there are.
    pub host: usize,
    /// Which VM.
    pub vm: usize,
    /// How long it stays so.
    pub stays: Duration,
    /// A command that is given meanwhile, to another host.
    pub meanwhile: Option<Kind>,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident $text:literal $fault:literal,)*) => {
        /// What happens.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind { $($(#[$doc])* $name,)* }

        impl Kind {
            /// All of them.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// Its name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Kind::$name => $text,)* }
            }

            /// Whether it is a fault, as opposed to a command.
            #[must_use]
            pub fn is_fault(self) -> bool {
                match self { $(Kind::$name => $fault,)* }
            }
        }
    };
}

kinds! {
    /// All processes of the host are killed; its kernel closes their connections.
    Kill "kill" true,
    /// All frames of the host are dropped, then everything on it is killed.
    Host "host" true,
    /// The VM's process is killed on its owner.
    Crash "crash" true,
    /// The host stands still.
    Freeze "freeze" true,
    /// The host is cut off from the others, not from clients.
    Partition "partition" true,
    /// The agent is killed, and nothing else.
    Agent "agent" true,
    /// The host's disk refuses writes.
    DiskError "disk-error" true,
    /// The host's disk is full.
    DiskFull "disk-full" true,
    /// The host's disk does not answer.
    DiskHang "disk-hang" true,
    /// The VM's backups change places.
    Protect "protect" false,
    /// A planned switchover of the VM.
    Planned "planned" false,
    /// A drill with the VM.
    Drill "drill" false,
    /// The host hands its VMs over.
    Evacuate "evacuate" false,
    /// The VM is stopped, and started again.
    StopStart "stop-start" false,
    /// The guest is reset.
    Reboot "reboot" false,
    /// `status` and `events`.
    Status "status" false,
}

/// The next act, among `kinds`, on `hosts` hosts with `vms` VMs.
pub fn next(random: &mut Random, kinds: &[Kind], hosts: usize, vms: usize) -> Option<Act> {
    let kind = *random.of(kinds)?;
    let milliseconds = match kind {
        Kind::DiskHang | Kind::DiskError | Kind::DiskFull => 500 + random.below(5000),
        _ => 50 + random.below(2500),
    };
    let commands: Vec<Kind> = kinds
        .iter()
        .copied()
        .filter(|k| {
            matches!(
                k,
                Kind::Protect | Kind::Planned | Kind::Drill | Kind::Status
            )
        })
        .collect();
    let meanwhile = (random.below(3) == 0).then(|| random.of(&commands).copied());
    Some(Act {
        kind,
        host: random.below(hosts as u64) as usize,
        vm: random.below(vms as u64) as usize,
        stays: Duration::from_millis(milliseconds),
        meanwhile: meanwhile.flatten().filter(|_| kind.is_fault()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_acts_and_all_kinds_come() {
        let acts = |seed| -> Vec<Act> {
            let mut random = Random(seed);
            (0..400)
                .filter_map(|_| next(&mut random, Kind::ALL, 3, 3))
                .collect()
        };
        assert_eq!(acts(7), acts(7));
        assert_ne!(acts(7), acts(8));
        for kind in Kind::ALL {
            assert!(acts(7).iter().any(|a| a.kind == *kind), "{kind:?}");
        }
        assert!(acts(7).iter().all(|a| a.host < 3 && a.vm < 3));
        assert_eq!(next(&mut Random(1), &[], 3, 3), None);
    }
}
