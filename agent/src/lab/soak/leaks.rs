//! What hosts hold when nothing is wrong: how much of it, and that it never grows.

use crate::lab::process::Holding;
use crate::lab::{Lab, LabError};

/// Descriptors that a process may have more than the fullest one had at first: connections come and go.
const DESCRIPTORS: usize = 64;
/// The same for threads.
const THREADS: u64 = 64;
/// The same for memory of its own, KiB.
const MEMORY_KIB: u64 = 128 << 10;

/// What the fullest agent, and the fullest VM process, hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fullest {
    /// Of the agents.
    pub agent: Holding,
    /// Of the VMs' and standbys' processes.
    pub vm: Holding,
}

impl Fullest {
    /// What they hold now.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn now(lab: &Lab) -> Result<Self, LabError> {
        let mut fullest = Self::default();
        for host in lab.hosts() {
            for (i, (_, held)) in lab.processes(host)?.into_iter().enumerate() {
                let most = if i == 0 {
                    &mut fullest.agent
                } else {
                    &mut fullest.vm
                };
                most.descriptors = most.descriptors.max(held.descriptors);
                most.threads = most.threads.max(held.threads);
                most.memory_kib = most.memory_kib.max(held.memory_kib);
            }
        }
        Ok(fullest)
    }

    /// What has grown beyond all bounds since `first`.
    #[must_use]
    pub fn beyond(&self, first: &Self) -> Option<String> {
        let pairs = [
            ("agent", self.agent, first.agent),
            ("VM process", self.vm, first.vm),
        ];
        pairs.into_iter().find_map(|(who, now, first)| {
            let more = now.descriptors > first.descriptors + DESCRIPTORS
                || now.threads > first.threads + THREADS
                || now.memory_kib > first.memory_kib + MEMORY_KIB;
            more.then(|| format!("an {who} holds {now:?}; at first the fullest held {first:?}"))
        })
    }
}

/// What is there too much or too little on some host: with `vms` VMs, each has an agent, and of each VM a process and a tap.
///
/// # Errors
/// [`LabError`].
pub fn out_of_place(lab: &Lab, vms: usize) -> Result<Option<String>, LabError> {
    for host in lab.hosts() {
        let (processes, taps) = (lab.processes(host)?.len(), lab.taps(host)?);
        if processes != 1 + vms || taps.len() != vms {
            return Ok(Some(format!(
                "{host} has {processes} processes, not {}, and the taps {taps:?}, not {vms}",
                1 + vms
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_noticed_and_coming_and_going_is_not() {
        let held = |descriptors, memory_kib| Fullest {
            agent: Holding {
                descriptors,
                memory_kib,
                threads: 9,
            },
            ..Fullest::default()
        };
        let first = held(40, 10_000);
        assert_eq!(held(60, 50_000).beyond(&first), None);
        assert!(held(140, 10_000).beyond(&first).is_some());
        assert!(held(40, 200_000).beyond(&first).is_some());
    }
}
