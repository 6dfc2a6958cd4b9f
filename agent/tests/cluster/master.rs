//! The master: the shipped state machine decides what it is asked, in any order.

use std::sync::Arc;

use agent::host::Refusal;
use chain::master::Command;

use super::{Answer, Aside, Asked, Begun, Mutant, Reply, World, name};

impl World {
    /// The master decides on something it was asked.
    pub fn decide(&mut self, which: usize) {
        let Asked {
            host,
            by,
            mut command,
        } = self.asked.remove(which);
        let now = self.view().generation;
        if let (Command::TakeOver { expect, at, .. }, Mutant::NoCompare) =
            (&mut command, self.rules.mutant)
        {
            *expect = now;
            at.generation = now;
        }
        let revision = self.master.0.revision();
        let result = Arc::make_mut(&mut self.master.0).apply(&command);
        let result = result.map(|mut record| {
            if self.is(Mutant::ForkNotRecorded) {
                record.view.history.forks.clear();
            }
            Arc::new(record)
        });
        if let Ok(record) = &result
            && self.master.0.revision() > revision
        {
            let gone = matches!(command, Command::Remove { .. });
            self.now = Arc::new(record.view.clone());
            let news = (!gone).then(|| record.clone());
            self.past.0.push((self.master.0.revision(), news));
            self.note(&command, host);
        }
        let answer = |granted, reply| Answer {
            host,
            expect: now,
            granted,
            reply: Aside(reply),
        };
        if !self.is_free() {
            let result = result.map_err(|why| {
                self.say(|| format!("the master refuses h{host}: {why}"));
                self.counts.0.refused += 1;
                Refusal::Rejected(why.to_string())
            });
            if self.hosts[host].up {
                self.answers.push(answer(None, Some(Reply { by, result })));
            }
            return;
        }
        if let Command::TakeOver { expect, .. } = command {
            self.counts.0.refused += u64::from(result.is_err());
            let granted = result.ok().map(|record| Arc::new(record.view.clone()));
            if self.hosts[host].up {
                let mut answer = answer(granted, None);
                answer.expect = expect;
                self.answers.push(answer);
            }
        } else if let Some(owner) = &mut self.hosts[host].owner {
            // Refused, or asked twice, and known already.
            let known = |record: Arc<chain::VmRecord>| record.view.generation == owner.generation();
            if result.map_or(true, known) {
                owner.asked = false;
            }
        }
    }

    /// Notes what was decided just now.
    fn note(&mut self, command: &Command, host: usize) {
        let view = self.now.clone();
        match command {
            Command::Reconfigure { .. } => {
                self.counts.0.reconfigurations += 1;
                let was_joined = view
                    .chain
                    .last()
                    .is_some_and(|m| m.since == view.generation);
                self.counts.0.joins += u64::from(was_joined && view.in_place());
                self.counts.0.anew += u64::from(!view.in_place());
            }
            Command::Start { .. } => self.begun = Some(Begun::Started),
            Command::Restart { .. } => {
                let before = &self.past.0[self.past.0.len() - 2].1;
                let newest = before.as_ref().is_some_and(|r| r.view.owner == name(host));
                self.begun = Some(Begun::Restarted { newest });
            }
            _ => {}
        }
        self.say(|| {
            let chain: Vec<&str> = view.chain.iter().map(|m| m.host.as_str()).collect();
            let joining = view.joining.as_ref().map(|m| m.host.as_str());
            format!(
                "the master: {} has {}, chain {chain:?}, joining {joining:?}, history {:?}",
                view.generation, view.owner, view.history
            )
        });
    }

    /// Whether the VM is known to the master.
    pub fn is_known(&self) -> bool {
        self.record().is_some()
    }

    /// What the master has of it.
    pub fn record(&self) -> Option<&Arc<chain::VmRecord>> {
        self.past.0.last().and_then(|(_, record)| record.as_ref())
    }

    pub fn is_on(&self) -> bool {
        self.record().is_some_and(|r| r.life == chain::Life::On)
    }
}
