//! A VM that is this host's and runs nowhere. A replica that still holds a complete checkpoint takes it over, as after any
//! other failure. Only if none does, it boots from this host's disks; the master decides that first, and with its decision
//! every other copy, and every checkpoint, is void (I4, I5).

use chain::master::Command;
use chain::{Held, VmRecord};
use checkpoint::HostId;

use super::input::health_of;
use super::machine::{Part, Purpose};
use super::owner::{Leaving, Owner, answer_switched};
use super::{Disks, Effect, Health, MS, Machine, Micros, SECOND, Ticket};
use crate::control::EventKind;

/// Between looks at the other hosts.
const PERIOD: Micros = 100 * MS;
/// Between requests to the chain's head to take it over.
const YIELD: Micros = 2 * SECOND;
/// Between attempts to boot: at first, and at most.
const RETRY: (Micros, Micros) = (500 * MS, 60 * SECOND);

/// What the members of a chain have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Survey {
    /// One of them is going to take the VM over.
    Resumable(String),
    /// Some do not answer.
    Unknown(String),
    /// None has anything.
    Nothing,
}

pub(super) fn sum_up(answers: &[(HostId, Held)]) -> Survey {
    let mut unknown = Vec::new();
    for (host, held) in answers {
        match held {
            Held::Checkpoint(mark) => {
                return Survey::Resumable(format!("{host} holds checkpoint {mark}"));
            }
            Held::Unknown(why) => unknown.push(why.clone()),
            Held::Nothing => {}
        }
    }
    match unknown.is_empty() {
        true => Survey::Nothing,
        false => Survey::Unknown(unknown.join("; ")),
    }
}

/// What is being done about it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Orphan {
    /// In words, for `status`.
    pub(super) state: String,
    since: Micros,
    look_at: Micros,
    /// The other hosts are being asked.
    surveying: bool,
    boot_at: Micros,
    pause: Micros,
    yielded: Option<Micros>,
    /// Booting has begun: the disks are looked for, or the master is asked.
    booting: bool,
    /// Who has ordered to boot without waiting.
    ordered: Option<Ticket>,
    /// Who waits for another host to own it.
    pub(super) leaving: Option<Leaving>,
}

impl Orphan {
    /// Everybody who waits for something.
    pub(super) fn tickets(&mut self) -> Vec<Ticket> {
        let leaving = self.leaving.take().map(|leaving| leaving.ticket());
        self.ordered.take().into_iter().chain(leaving).collect()
    }

    pub(super) fn wakes_at(&self) -> Micros {
        let leaving = self.leaving.as_ref().map_or(Micros::MAX, Leaving::until);
        match self.surveying || self.booting {
            true => leaving,
            false => self.look_at.min(leaving),
        }
    }
}

impl Machine {
    /// The VM's process is gone, or never was.
    pub(super) fn orphan(&mut self, now: Micros, state: &str) {
        self.part = Part::Orphan(Orphan {
            state: state.into(),
            since: now,
            look_at: now,
            surveying: false,
            boot_at: now,
            pause: RETRY.0,
            yielded: None,
            booting: false,
            ordered: None,
            leaving: None,
        });
    }

    fn orphan_mut(&mut self) -> Option<&mut Orphan> {
        match &mut self.part {
            Part::Orphan(orphan) => Some(orphan),
            _ => None,
        }
    }

    pub(super) fn settle_orphan(&mut self, now: Micros, out: &mut Vec<Effect>) {
        let view = self.record.view.clone();
        let Some(orphan) = self.orphan_mut() else {
            return;
        };
        if let Some(ticket) = orphan.leaving.as_ref().and_then(|l| l.overdue(now)) {
            orphan.leaving = None;
            let why = format!(
                "nobody has taken {} over in time: look at its backups (`understudy events` there)",
                view.name
            );
            out.push(Effect::Answer(ticket, Err(why)));
        }
        if !orphan.surveying && !orphan.booting && now >= orphan.look_at {
            orphan.surveying = true;
            out.push(Effect::Survey(view));
        }
    }

    pub(super) fn surveyed(
        &mut self,
        now: Micros,
        answers: &[(HostId, Held)],
        out: &mut Vec<Effect>,
    ) {
        let patience = self.policy.return_wait;
        let record = self.record.clone();
        let Some(orphan) = self.orphan_mut() else {
            return self.leaver_surveyed(now, answers, out);
        };
        orphan.surveying = false;
        orphan.look_at = now + PERIOD;
        if orphan.booting {
            return;
        }
        match sum_up(answers) {
            Survey::Resumable(who) => {
                orphan.state = format!("waiting to be taken over: {who}");
                if orphan.yielded.is_none_or(|at| now >= at + YIELD) {
                    orphan.yielded = Some(now);
                    // It need not wait until it suspects this host. (Another member that holds a checkpoint takes over
                    // when its patience is over.)
                    out.push(Effect::Yield(record.view));
                    // Or somebody did already, and this host has not heard of it.
                    out.push(Effect::Read);
                }
            }
            Survey::Unknown(why) if now < orphan.since + patience => {
                orphan.state = format!(
                    "waiting for other hosts, which may hold a checkpoint: {why} (`understudy recover` does not wait)"
                );
            }
            Survey::Unknown(_) | Survey::Nothing if now < orphan.boot_at => {}
            Survey::Unknown(_) | Survey::Nothing => {
                orphan.booting = true;
                out.push(Effect::FindDisks(record));
            }
        }
    }

    pub(super) fn disks_found(
        &mut self,
        now: Micros,
        result: Result<(), String>,
        out: &mut Vec<Effect>,
    ) {
        if let Part::Off(_) = self.part {
            return self.start_disks_found(result, out);
        }
        if let Err(why) = result {
            return self.not_booted(now, why, out);
        }
        if self.orphan_mut().is_none_or(|orphan| !orphan.booting) {
            return;
        }
        let command = Command::Restart {
            vm: self.vm(),
            expect: self.generation(),
            by: self.me.clone(),
        };
        self.propose(Purpose::Restart, command, out);
    }

    /// The master has decided that this host's disks count.
    pub(super) fn restarted(&mut self, record: VmRecord, out: &mut Vec<Effect>) {
        if record.view.owner != self.me || record.view.generation < self.generation() {
            return;
        }
        let Some(orphan) = self.orphan_mut() else {
            return;
        };
        let ticket = orphan.ordered.take();
        if let Some(leaving) = orphan.leaving.take() {
            let why = format!(
                "nobody has taken {} over: it boots again from this host's disks",
                record.view.name
            );
            out.push(Effect::Answer(leaving.ticket(), Err(why)));
        }
        self.record = record.clone();
        let text = format!(
            "booted from this host's disks in generation {}: no checkpoint of it was left",
            record.view.generation
        );
        let mut owner = Owner::restarting(ticket, text);
        owner.wanted = self.policy.wanted(&record, &self.me);
        self.part = Part::Owner(Box::new(owner));
        out.push(Effect::Boot(record, Disks::Found));
    }

    pub(super) fn not_booted(&mut self, now: Micros, why: String, out: &mut Vec<Effect>) {
        let Some(orphan) = self.orphan_mut() else {
            return;
        };
        orphan.booting = false;
        orphan.state.clone_from(&why);
        orphan.boot_at = now + orphan.pause;
        orphan.pause = RETRY.1.min(orphan.pause * 2);
        let ticket = orphan.ordered.take();
        out.push(Effect::Say(EventKind::Failed, why.clone()));
        if let Some(ticket) = ticket {
            out.push(Effect::Answer(ticket, Err(why)));
        }
    }

    /// Another host has it now.
    pub(super) fn answer_orphans_orders(&mut self, record: &VmRecord, out: &mut Vec<Effect>) {
        let Some(orphan) = self.orphan_mut() else {
            return;
        };
        if let Some(leaving) = orphan.leaving.take() {
            // The time that it took is the asker's to measure; this machine has kept when it began.
            answer_switched(leaving.until(), &leaving, record, out);
        }
        if let Some(ticket) = orphan.ordered.take() {
            let why = format!("{} owns it now", record.view.owner);
            out.push(Effect::Answer(ticket, Err(why)));
        }
    }

    pub(super) fn order_recover(
        &mut self,
        now: Micros,
        ticket: Ticket,
        resumable: bool,
        out: &mut Vec<Effect>,
    ) -> Result<(), String> {
        let view = self.record.view.clone();
        let name = &view.name;
        match &self.part {
            Part::Orphan(orphan) if orphan.booting => Err(format!(
                "{name} is being booted from this host's disks already"
            )),
            Part::Orphan(_) => {
                self.boot_now(ticket, out);
                Ok(())
            }
            Part::Owner(_) => Err(format!("{name} runs on this host already")),
            Part::Off(_) => Err(format!("{name} is off: `understudy start {name}` boots it")),
            Part::Nothing {
                declined: Some(declined),
            } => Err(format!(
                "this host cannot stand by for {name}, nor boot it: {}",
                declined.why
            )),
            Part::Nothing { .. } => Err(format!(
                "this host has no copy of {name:?} (`understudy status` lists what it has)"
            )),
            Part::Standby(_) if resumable => Err(format!(
                "this host holds a complete checkpoint of {name}: `understudy failover {name}` resumes it from there"
            )),
            Part::Standby(_) => {
                self.orphan(
                    now,
                    "an administrator wants it booted from this host's disks",
                );
                let owner = self.member(&view.owner);
                if let Some(orphan) = self.orphan_mut() {
                    orphan.ordered = Some(ticket);
                    orphan.booting = true;
                }
                match owner {
                    Some(owner) => out.push(Effect::Probe(vec![owner])),
                    None => self.recover_probed(&[], out),
                }
                Ok(())
            }
        }
    }

    fn boot_now(&mut self, ticket: Ticket, out: &mut Vec<Effect>) {
        let record = self.record.clone();
        if let Some(orphan) = self.orphan_mut() {
            orphan.ordered = Some(ticket);
            orphan.booting = true;
            out.push(Effect::FindDisks(record));
        }
    }

    /// Whether the owner of a VM that is to be booted here from older disks is up.
    pub(super) fn recover_probed(&mut self, answers: &[(HostId, Health)], out: &mut Vec<Effect>) {
        let record = self.record.clone();
        let view = &record.view;
        let up = matches!(
            health_of(answers, &view.owner),
            Some(Health::Answers | Health::Busy { .. })
        );
        let Some(orphan) = self.orphan_mut() else {
            return;
        };
        if up {
            let why = format!(
                "{}, which owns {}, is up: it resumes or boots it itself; `understudy status` there says how far it is",
                view.owner, view.name
            );
            if let Some(ticket) = orphan.ordered.take() {
                out.push(Effect::Answer(ticket, Err(why)));
            }
            // The replica and its process were left as they were.
            self.part = Part::Standby(Box::new(super::standby::Standby::waiting()));
            return;
        }
        out.push(Effect::RemoveReplica(view.generation));
        out.push(Effect::Kill);
        out.push(Effect::FindDisks(record));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chain::Mark;
    use checkpoint::{Epoch, Generation};

    #[test]
    fn only_if_nobody_can_have_a_checkpoint_the_disks_count() {
        let mark = Mark {
            generation: Generation(3),
            epoch: Epoch(9),
            digest: 1,
            held: true,
        };
        let answers = |list: &[(&str, Held)]| {
            let list: Vec<(HostId, Held)> = list
                .iter()
                .map(|(host, held)| (HostId::new(host).unwrap(), held.clone()))
                .collect();
            sum_up(&list)
        };
        let unknown = Held::Unknown("b: refused".into());
        assert_eq!(answers(&[]), Survey::Nothing);
        let none = [("b", Held::Nothing), ("c", Held::Nothing)];
        assert_eq!(answers(&none), Survey::Nothing);
        let some = [("b", unknown.clone()), ("c", Held::Checkpoint(mark))];
        assert!(matches!(answers(&some), Survey::Resumable(who) if who.starts_with("c ")));
        let down = [("b", unknown), ("c", Held::Nothing)];
        assert_eq!(answers(&down), Survey::Unknown("b: refused".into()));
    }
}
