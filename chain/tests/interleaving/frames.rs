//! Frames on their way, and the replicas' machines that take them.

use std::collections::VecDeque;

use chain::replica::{Action, Event};
use checkpoint::{Epoch, Generation};

use crate::owner::digest;
use crate::world::{LinkId, Message, Mutant, Way, World};

impl World {
    /// The host that `i` sends to in `generation`, if that link stands.
    pub(super) fn downstream(&self, i: usize, generation: Generation) -> Option<usize> {
        self.linked(i, generation, Way::Down)
    }

    pub(super) fn linked(&self, i: usize, generation: Generation, way: Way) -> Option<usize> {
        self.links
            .keys()
            .find(|(from, _, g, w)| *from == i && *g == generation && *w == way)
            .map(|(_, to, _, _)| *to)
    }

    pub(super) fn send(&mut self, link: LinkId, messages: impl IntoIterator<Item = Message>) {
        if let Some(queue) = self.links.get_mut(&link) {
            queue.extend(messages);
        }
    }

    pub(super) fn deliver(&mut self) -> Result<(), String> {
        let waiting: Vec<LinkId> = self
            .links
            .iter()
            .filter(|(_, queue)| !queue.is_empty())
            .map(|(id, _)| *id)
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let link = waiting[self.below(waiting.len())];
        let Some(message) = self.links.get_mut(&link).and_then(VecDeque::pop_front) else {
            return Ok(());
        };
        let (_, to, generation, way) = link;
        match (way, message) {
            (Way::Down, message) => self.replica_hears(link, message),
            (Way::Up, Message::Ack(epoch)) if self.hosts[to].standby.is_some() => {
                let generation = self.as_taken(to, generation);
                self.step_machine(to, Event::SuccessorAck { generation, epoch }, None)
            }
            (Way::Acks, Message::Ack(epoch)) => self.owner_hears(to, generation, epoch),
            (Way::Up, Message::Refused(newer)) => {
                self.refused(to, generation, newer);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The generation a frame is taken for.
    pub(super) fn as_taken(&self, at: usize, generation: Generation) -> Generation {
        match &self.hosts[at].standby {
            Some(standby) if self.mutant == Mutant::AnyGeneration => standby.machine.generation(),
            _ => generation,
        }
    }

    pub(super) fn owner_hears(
        &mut self,
        i: usize,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<(), String> {
        let any = self.mutant == Mutant::AnyGeneration;
        let Some(owner) = &mut self.hosts[i].owner else {
            return Ok(());
        };
        if (generation == owner.generation || any) && owner.ack(epoch) {
            self.counts.commits += 1;
            self.say(format!("h{i} has the ack of {epoch} ({generation})"));
            return self.let_out(i);
        }
        Ok(())
    }

    pub(super) fn refused(&mut self, i: usize, generation: Generation, newer: Generation) {
        let host = &mut self.hosts[i];
        if host.owner.as_ref().is_some_and(|o| newer > o.generation) {
            host.owner = None;
            self.counts.fenced += 1;
            self.say(format!("h{i} is told of {newer} and stops"));
        } else if let Some(before) = self.linked(i, generation, Way::Up) {
            self.send((i, before, generation, Way::Up), [Message::Refused(newer)]);
        }
    }

    pub(super) fn replica_hears(&mut self, link: LinkId, message: Message) -> Result<(), String> {
        let (from, to, sent_in, _) = link;
        let generation = self.as_taken(to, sent_in);
        let Some(standby) = &self.hosts[to].standby else {
            // Taken over, or taken away: its connection answers for it.
            let newer = self.hosts[to].seen;
            if self.hosts[to].up && newer > sent_in {
                self.send((to, from, sent_in, Way::Up), [Message::Refused(newer)]);
            }
            return Ok(());
        };
        let event = match &message {
            Message::Begin { epoch, base } => Event::Begin {
                generation,
                epoch: *epoch,
                base: match self.mutant {
                    Mutant::AnyBase if base.is_some() => standby.machine.hist(),
                    _ => *base,
                },
            },
            Message::Data { epoch, .. } => Event::Data {
                generation,
                epoch: *epoch,
            },
            Message::End { epoch, .. } => Event::End {
                generation,
                epoch: *epoch,
            },
            Message::Heartbeat => Event::Heartbeat { generation },
            _ => return Ok(()),
        };
        if self.mutant == Mutant::AckBeforeProcessed
            && let Message::Begin { epoch, .. } = &message
            && let Some(owner) = self.linked(to, generation, Way::Acks)
        {
            let ack = Message::Ack(*epoch);
            self.send((to, owner, generation, Way::Acks), [ack]);
        }
        if self.mutant == Mutant::ForwardEndEarly
            && matches!(message, Message::End { .. })
            && let Some(next) = self.downstream(to, generation)
        {
            self.send((to, next, generation, Way::Down), [message.clone()]);
        }
        self.step_machine(to, event, Some((from, sent_in, message)))
    }

    /// Feeds a replica's machine and carries out what it answers.
    pub(super) fn step_machine(
        &mut self,
        at: usize,
        event: Event,
        hand: Option<(usize, Generation, Message)>,
    ) -> Result<(), String> {
        let mut actions = VecDeque::new();
        if let Some(standby) = &mut self.hosts[at].standby {
            standby.machine.step(event, &mut actions);
        }
        while let Some(action) = actions.pop_front() {
            let trouble = self.below(60);
            let Some(standby) = &mut self.hosts[at].standby else {
                break;
            };
            let generation = standby.machine.generation();
            match action {
                Action::Forward => {
                    let early = self.mutant == Mutant::ForwardEndEarly;
                    if let Some((_, _, message)) = &hand
                        && !(early && matches!(message, Message::End { .. }))
                        && let Some(next) = self.downstream(at, generation)
                    {
                        self.send((at, next, generation, Way::Down), [message.clone()]);
                    }
                }
                Action::Open { full, .. } => standby.staged = Some((full, Vec::new())),
                Action::Stage => {
                    if let (Some((_, _, Message::Data { items, .. })), Some((_, staged))) =
                        (&hand, &mut standby.staged)
                    {
                        staged.extend(items);
                    }
                }
                Action::Prepare => {
                    let (Some((_, _, Message::End { digest: said, .. })), Some((_, staged))) =
                        (&hand, &standby.staged)
                    else {
                        return Err(format!("h{at} prepares a checkpoint without its frames"));
                    };
                    let follows = if trouble == 0 || digest(staged) != *said {
                        self.counts.failures += 1;
                        Event::StoreFailed {
                            why: "a planted failure".into(),
                            damaged: self.below(2) == 0,
                        }
                    } else {
                        Event::Prepared { digest: *said }
                    };
                    if let Some(standby) = &mut self.hosts[at].standby {
                        standby.machine.step(follows, &mut actions);
                    }
                }
                Action::Commit(mark) => {
                    let (full, staged) = standby.staged.take().unwrap_or_default();
                    if full {
                        standby.store.clear();
                    }
                    standby.store.extend(staged);
                    let sent_in = hand.as_ref().map_or(mark.generation, |(_, g, _)| *g);
                    if self.truth.get(&(sent_in, mark.epoch)) != Some(&standby.store) {
                        return Err(format!(
                            "I3: what h{at} has as checkpoint {mark} is not what the owner sent"
                        ));
                    }
                }
                Action::AckUp(epoch) => {
                    if let Some(before) = self.linked(at, generation, Way::Up) {
                        self.send((at, before, generation, Way::Up), [Message::Ack(epoch)]);
                    }
                }
                Action::AckOwner(epoch) => {
                    if let Some(owner) = self.linked(at, generation, Way::Acks) {
                        self.send((at, owner, generation, Way::Acks), [Message::Ack(epoch)]);
                    }
                }
                Action::Refuse(newer) => {
                    if let Some((from, sent_in, _)) = &hand {
                        let back = (at, *from, *sent_in, Way::Up);
                        self.send(back, [Message::Refused(newer)]);
                    }
                }
                Action::Failed(why) => self.say(format!("h{at} has failed: {why}")),
                Action::Suspect(_) => {}
            }
        }
        Ok(())
    }
}
