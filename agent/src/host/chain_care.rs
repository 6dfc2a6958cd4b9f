//! What an owner does about its chain: leaves out what is lost, brings back what is missing, and comes to the backups that an
//! administrator has asked for, by joining and leaving, without one unprotected moment.
//!
//! One question is under way at a time, to the master or to other hosts. What else is to be done stays noted and is looked at
//! again when that is answered.

use chain::master::Command;
use chain::{Held, Member};
use checkpoint::{Generation, HostId};

use super::input::health_of;
use super::machine::{Part, Purpose};
use super::owner::{Owner, Phase};
use super::{Effect, Health, Loss, MS, Machine, Micros, Tell};
use crate::control::EventKind;

/// Between looks for hosts that are missing.
const PERIOD: Micros = 250 * MS;

/// Why other hosts are being asked whether they are well.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Probing {
    /// The chain does not go on.
    Losses(Vec<Loss>),
    /// Backups are missing; who is asked.
    Missing(Vec<Member>),
    /// This one is to go, if the others hold everything.
    Leaving(HostId),
}

/// What is left of a chain.
struct Left {
    chain: Vec<Member>,
    joining: Option<Member>,
    lost: Vec<HostId>,
}

impl Machine {
    /// What is due for the chain, the most urgent first. What needs nobody's answer does not keep the rest waiting.
    pub(super) fn settle_chain(&mut self, now: Micros, out: &mut Vec<Effect>) {
        for next in [
            Self::settle_attempt,
            Self::settle_losses,
            Self::settle_joined,
            Self::settle_orders,
            Self::settle_members,
        ] {
            if self.may_settle() {
                next(self, now, out);
            }
        }
    }

    /// Nothing is under way, and the VM is there.
    fn may_settle(&self) -> bool {
        let Part::Owner(owner) = &self.part else {
            return false;
        };
        let runs = matches!(owner.phase, Phase::Running | Phase::Activating(..));
        self.ask.is_none() && owner.probing.is_none() && runs
    }

    fn settle_attempt(&mut self, now: Micros, out: &mut Vec<Effect>) {
        let current = self.generation();
        let Some(owner) = self.owner() else { return };
        if let Some((_, why)) = owner.failed_attempt.take_if(|(of, _)| *of == current) {
            self.attempt_failed(now, &why, out);
        }
    }

    fn settle_losses(&mut self, _now: Micros, out: &mut Vec<Effect>) {
        let Part::Owner(owner) = &mut self.part else {
            return;
        };
        let view = &self.record.view;
        let of_this = |loss: &mut Loss| loss.generation == view.generation;
        let losses: Vec<Loss> = owner.losses.extract_if(.., of_this).collect();
        if losses.is_empty() || owner.frozen == Some(view.generation) {
            return;
        }
        let members = view.chain.iter().chain(&view.joining).cloned().collect();
        owner.probing = Some(Probing::Losses(losses));
        out.push(Effect::Probe(members));
    }

    fn settle_joined(&mut self, _now: Micros, out: &mut Vec<Effect>) {
        let current = self.generation();
        let Some(owner) = self.owner() else { return };
        if owner.joiner_ready.take_if(|of| *of == current).is_some() {
            self.promote(out);
        }
    }

    /// What an administrator has ordered.
    fn settle_orders(&mut self, _now: Micros, out: &mut Vec<Effect>) {
        let vm = self.vm();
        let Some(owner) = self.owner() else { return };
        if std::mem::take(&mut owner.choose) {
            let backups = owner.wanted.clone();
            let by = self.me.clone();
            let command = Command::Choose { vm, by, backups };
            return self.propose(Purpose::Choose, command, out);
        }
        if owner.leaving.is_some() {
            return;
        }
        if !owner.parting.is_empty() {
            self.settle_parting(out);
        }
        if self.ask.is_none()
            && let Some(update) = self.owner().and_then(|owner| owner.update.take())
        {
            self.ask_update(update, out);
        }
    }

    /// Which hosts are in the chain.
    fn settle_members(&mut self, now: Micros, out: &mut Vec<Effect>) {
        if self.owner().is_none_or(|owner| owner.leaving.is_some()) {
            return;
        }
        let missing = self.missing(now);
        if !missing.is_empty() {
            if let Some(owner) = self.owner() {
                owner.probing = Some(Probing::Missing(missing.clone()));
            }
            return out.push(Effect::Probe(missing));
        }
        if let Some(leaver) = self.leaver() {
            // One that has just come may lack the last that was acknowledged before.
            let view = self.record.view.clone();
            if let Some(owner) = self.owner()
                && now >= owner.leave_at
            {
                owner.probing = Some(Probing::Leaving(leaver));
                out.push(Effect::Survey(view));
            }
            return;
        }
        self.arranged();
    }

    /// What the members of the chain hold: whoever is to go does so once the others could do without it.
    pub(super) fn leaver_surveyed(
        &mut self,
        now: Micros,
        answers: &[(HostId, Held)],
        out: &mut Vec<Effect>,
    ) {
        let Some(owner) = self.owner() else { return };
        let Some(Probing::Leaving(leaver)) =
            owner.probing.take_if(|p| matches!(p, Probing::Leaving(_)))
        else {
            return;
        };
        owner.leave_at = now + PERIOD;
        if self.ask.is_some() || self.leaver().as_ref() != Some(&leaver) {
            return;
        }
        let members = &self.record.view.chain;
        let stay: Vec<Member> = members
            .iter()
            .filter(|m| m.host != leaver)
            .cloned()
            .collect();
        let holds = |member: &Member| {
            let answer = answers.iter().find(|(host, _)| *host == member.host);
            matches!(answer, Some((_, Held::Checkpoint(_))))
        };
        if stay.iter().all(holds) {
            let text = format!("{leaver} leaves the chain, as an administrator has ordered");
            out.push(Effect::Say(EventKind::ChainLost, text));
            self.reconfigure(stay, None, false, out);
        }
    }

    /// Nothing more is to be moved.
    fn arranged(&mut self) {
        let Part::Owner(owner) = &self.part else {
            return;
        };
        let protected = owner.protected == Some(self.generation());
        let done = protected && self.is_settled(owner) && self.lacks(owner).next().is_none();
        if done && let Some(owner) = self.owner() {
            owner.arrange = false;
        }
    }

    pub(super) fn chain_wakes_at(&self, owner: &Owner) -> Option<Micros> {
        // While the configuration comes about, or the VM leaves, nothing is looked for.
        let busy = self.ask.is_some() || owner.probing.is_some() || owner.leaving.is_some();
        if busy || !self.is_settled(owner) {
            return None;
        }
        let next = |host| owner.next_look().max(owner.retries.due_at(host));
        let missing = self.lacks(owner).map(next).min();
        let leaver = self.leaver().map(|_| owner.leave_at);
        [missing, leaver].into_iter().flatten().min()
    }

    /// Wanted hosts that are not in the chain.
    fn lacks<'a>(&'a self, owner: &'a Owner) -> impl Iterator<Item = &'a HostId> {
        let view = &self.record.view;
        let stands_still = owner.frozen == Some(view.generation);
        owner.wanted.iter().filter(move |host| {
            let there = view.position(host).is_some() && !stands_still;
            **host != self.me && !there
        })
    }

    /// The configuration is in force, so that it may be changed.
    fn is_settled(&self, owner: &Owner) -> bool {
        let view = &self.record.view;
        let current = Some(view.generation);
        let there = view.chain.is_empty() || owner.protected == current;
        // A VM that stands still has nobody who could fill the one that joins.
        (there && view.joining.is_none() || owner.frozen == current) && owner.runs()
    }

    /// The backups that the VM should have and has not, if now is the time for one.
    fn missing(&mut self, now: Micros) -> Vec<Member> {
        let Part::Owner(owner) = &self.part else {
            return Vec::new();
        };
        if !self.is_settled(owner) || !owner.looks(now) {
            return Vec::new();
        }
        let due = self
            .lacks(owner)
            .filter(|host| owner.retries.due(host, now));
        let missing = due.filter_map(|host| self.member(host)).collect();
        if let Some(owner) = self.owner() {
            owner.looked(now, PERIOD);
        }
        missing
    }

    /// A replica that is to go, once all that are wanted are there: one that is not wanted, or not in its place. (It joins
    /// again, at the tail.) The last one never goes.
    fn leaver(&self) -> Option<HostId> {
        let Part::Owner(owner) = &self.part else {
            return None;
        };
        let chain = &self.record.view.chain;
        let protected = owner.protected == Some(self.generation());
        if !owner.arrange || !self.is_settled(owner) || !protected || chain.len() < 2 {
            return None;
        }
        if self.lacks(owner).any(|host| self.peers.contains_key(host)) {
            return None;
        }
        let superfluous = chain.iter().find(|m| !owner.wanted.contains(&m.host));
        let misplaced = || {
            // A wanted host that cannot be had has no place.
            let wanted = owner
                .wanted
                .iter()
                .filter(|host| chain.iter().any(|m| m.host == **host));
            chain
                .iter()
                .map(|m| &m.host)
                .zip(wanted)
                .find(|(is, wanted)| is != wanted)
        };
        superfluous
            .map(|m| m.host.clone())
            .or_else(|| misplaced().map(|(host, _)| host.clone()))
    }

    /// The replica that was joining has everything: it becomes the tail.
    fn promote(&mut self, out: &mut Vec<Effect>) {
        let mut chain = self.record.view.chain.clone();
        let Some(joining) = self.record.view.joining.clone() else {
            return;
        };
        if let Some(owner) = self.owner() {
            owner.joined(&joining.host);
        }
        let text = format!("{} has everything and becomes the tail", joining.host);
        out.push(Effect::Say(EventKind::Joined, text));
        chain.push(joining);
        self.reconfigure(chain, None, false, out);
    }

    /// The chain is complete: whatever kept its members away does not any more.
    pub(super) fn all_joined(&mut self) {
        if let Part::Owner(owner) = &mut self.part {
            let chain = self.record.view.chain.iter();
            chain.for_each(|member| owner.joined(&member.host));
        }
    }

    /// Asks the master for another chain. Output stays held until it has decided.
    pub(super) fn reconfigure(
        &mut self,
        chain: Vec<Member>,
        joining: Option<Member>,
        anew: bool,
        out: &mut Vec<Effect>,
    ) {
        let command = Command::Reconfigure {
            vm: self.vm(),
            expect: self.generation(),
            by: self.me.clone(),
            joining: joining.filter(|_| !chain.is_empty()),
            chain,
            anew,
        };
        self.propose(Purpose::Chain, command, out);
    }

    pub(super) fn bridged(
        &mut self,
        generation: Generation,
        result: Result<(), Loss>,
        out: &mut Vec<Effect>,
    ) {
        if generation != self.generation() {
            return;
        }
        let view = self.record.view.clone();
        let Some(owner) = self.owner() else { return };
        match result {
            Ok(()) => {
                owner.bridge = None;
                out.push(Effect::Tell(Tell::Protect(view)));
            }
            Err(loss) => owner.losses.push(loss),
        }
    }

    pub(super) fn probed(
        &mut self,
        now: Micros,
        answers: &[(HostId, Health)],
        out: &mut Vec<Effect>,
    ) {
        if matches!(self.part, Part::Orphan(_)) {
            return self.recover_probed(answers, out);
        }
        let Some(owner) = self.owner() else { return };
        match owner.probing.take() {
            Some(Probing::Losses(losses)) => {
                // A configuration that was replaced meanwhile lost nobody.
                let current = self.generation();
                for loss in losses.iter().filter(|loss| loss.generation == current) {
                    if self.ask.is_none() {
                        self.chain_lost(now, loss, answers, out);
                    } else if let Some(owner) = self.owner() {
                        owner.losses.push(loss.clone());
                    }
                }
            }
            Some(Probing::Missing(missing)) => {
                for (host, health) in answers {
                    if let Some(why) = health.trouble(false) {
                        owner.absent.insert(host.clone(), why);
                    }
                }
                if self.ask.is_none() {
                    self.bring_back(missing, answers, out);
                }
            }
            // Answered by a survey.
            Some(leaving @ Probing::Leaving(_)) => owner.probing = Some(leaving),
            None => {}
        }
    }

    fn bring_back(
        &mut self,
        missing: Vec<Member>,
        answers: &[(HostId, Health)],
        out: &mut Vec<Effect>,
    ) {
        let Part::Owner(owner) = &self.part else {
            return;
        };
        if !self.is_settled(owner) || !owner.losses.is_empty() {
            return;
        }
        let up: Vec<Member> = missing
            .into_iter()
            .filter(|member| {
                health_of(answers, &member.host).is_some_and(|health| match health {
                    // One that declines in this generation may come in the next.
                    Health::Declines(_) => true,
                    other => other.trouble(true).is_none(),
                })
            })
            .collect();
        let Some(first) = up.first().cloned() else {
            return;
        };
        let view = &self.record.view;
        if view.chain.is_empty() || owner.frozen == Some(view.generation) {
            self.reconfigure(up, None, true, out);
        } else {
            self.reconfigure(view.chain.clone(), Some(first), false, out);
        }
    }

    /// A chain could not begin, for a cause of this host's own. It is tried again later; meanwhile the backups do not wait for
    /// what does not come.
    fn attempt_failed(&mut self, now: Micros, why: &str, out: &mut Vec<Effect>) {
        let view = self.record.view.clone();
        let Some(owner) = self.owner() else { return };
        for member in &view.chain {
            owner.retries.failed(&member.host, now);
            owner.absent.insert(member.host.clone(), why.to_string());
        }
        owner.protected = None;
        let text = format!("the first copy to the backups failed, it is tried again: {why}");
        out.push(Effect::Say(EventKind::ChainLost, text.clone()));
        owner.trouble = Some(text);
        // Without a backup a frozen VM stands still until one is tried again.
        if owner.frozen.is_some() {
            owner.frozen = Some(view.generation);
        } else {
            self.reconfigure(Vec::new(), None, true, out);
        }
    }

    /// Nothing happens if all replicas answer and none is named: then the chain is only slow.
    fn chain_lost(
        &mut self,
        now: Micros,
        loss: &Loss,
        answers: &[(HostId, Health)],
        out: &mut Vec<Effect>,
    ) {
        let in_place = self.chain_is_filled();
        let Left {
            chain: left,
            joining,
            lost,
        } = self.left(loss, answers);
        let whole = loss.unfit && loss.host.is_none();
        let anew = !in_place || whole;
        if lost.is_empty() && !whole {
            return;
        }
        let only_the_joining = left.len() == self.record.view.chain.len() && !lost.is_empty();
        let names: Vec<String> = lost.iter().map(ToString::to_string).collect();
        let names = names.join(", ");
        let (why, generation) = (&loss.why, loss.generation);
        let alone = left.is_empty() && self.policy.freezes_alone;
        let Some(owner) = self.owner() else { return };
        let freezes = alone && (in_place || owner.frozen.is_some());
        if !only_the_joining {
            owner.trouble = Some(match lost.is_empty() {
                true => why.clone(),
                false => format!("{names} is lost: {why}"),
            });
        }
        for host in &lost {
            owner.retries.failed(host, now);
            // What the host itself answered, or did not, says more than what its chain missed.
            let why = health_of(answers, host).and_then(|health| health.trouble(in_place));
            owner
                .absent
                .insert(host.clone(), why.unwrap_or_else(|| loss.why.clone()));
        }
        let text = match lost.is_empty() {
            true => format!("the chain of generation {generation} has to begin anew: {why}"),
            false => format!(
                "{names} is lost in generation {generation}: {why}; {} backups left",
                left.len()
            ),
        };
        out.push(Effect::Say(EventKind::ChainLost, text));
        if freezes {
            owner.frozen = Some(generation);
            owner.losses.clear();
            owner.trouble =
                Some("frozen: its last backup is lost, and protect.alone is \"freeze\"".into());
            return out.push(Effect::Tell(Tell::Freeze));
        }
        self.reconfigure(left, joining.filter(|_| !anew), anew, out);
    }

    fn left(&self, loss: &Loss, answers: &[(HostId, Health)]) -> Left {
        let view = &self.record.view;
        let waited_for = self.chain_is_filled();
        let stays = |member: &&Member| {
            let named = Some(&member.host) == loss.host.as_ref();
            let health = health_of(answers, &member.host);
            !named && health.is_some_and(|health| health.trouble(waited_for).is_none())
        };
        let chain: Vec<Member> = view.chain.iter().filter(stays).cloned().collect();
        let joining = view.joining.as_ref().filter(stays).cloned();
        let members = view.chain.iter().chain(&view.joining);
        let lost = members
            .filter(|m| !chain.contains(m) && joining.as_ref() != Some(m))
            .map(|m| m.host.clone())
            .collect();
        Left {
            chain,
            joining,
            lost,
        }
    }
}
