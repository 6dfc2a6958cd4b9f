//! Frames on their way, and what takes them.

use chain::replica::{Base, Event, Replica};
use chain::{History, View};
use checkpoint::{Epoch, Generation};

use super::standby::Feeding;
use super::{Grain, LinkId, Message, Mutant, Role, World, digest, name};

impl World {
    pub fn send_down(&mut self, link: LinkId, messages: impl IntoIterator<Item = Message>) {
        if let Some(link) = self.links.get_mut(&link) {
            link.down.extend(messages);
        }
    }

    pub fn send_up(&mut self, link: LinkId, message: Message) {
        if let Some(link) = self.links.get_mut(&link) {
            link.up.push_back(message);
        }
    }

    /// Whether the host at that end of the link can take something now.
    pub fn takes(&self, i: usize) -> bool {
        let host = &self.hosts[i];
        host.up && host.standby.as_ref().is_none_or(|s| s.preparing.is_none())
    }

    pub fn deliver_down(&mut self, link: LinkId) -> Result<(), String> {
        let grain = self.rules.grain;
        loop {
            let Some(queue) = self.links.get_mut(&link) else {
                return Ok(());
            };
            let Some(message) = queue.down.pop_front() else {
                return Ok(());
            };
            let begins = matches!(message, Message::Begin { .. } | Message::Data { .. });
            self.replica_hears(link, message)?;
            let next = self.links.get(&link).and_then(|l| l.down.front());
            let goes_on = match next {
                Some(Message::Data { .. }) => grain != Grain::Frame,
                Some(Message::End { .. }) => grain == Grain::Checkpoint,
                _ => false,
            };
            if !(begins && goes_on) {
                self.drop_if_stale(link);
                return Ok(());
            }
        }
    }

    /// The generation a frame is taken for.
    fn as_taken(&self, at: usize, generation: Generation) -> Generation {
        match &self.hosts[at].standby {
            Some(standby) if self.is(Mutant::AnyGeneration) => standby.machine.generation(),
            _ => generation,
        }
    }

    fn replica_hears(&mut self, link: LinkId, message: Message) -> Result<(), String> {
        let to = link.to;
        let generation = self.as_taken(to, link.generation);
        let mutant = self.rules.mutant;
        let Some(standby) = self.hosts[to].standby.as_mut() else {
            // Taken over, or taken away: its connection answers for it.
            let newer = self.hosts[to].seen;
            if newer > link.generation {
                self.send_up(link, Message::Refused(newer));
            }
            return Ok(());
        };
        let event = match &message {
            Message::Begin { epoch, base, held } => {
                let mut base = *base;
                if mutant == Mutant::AnyBase
                    && let Base::On { origin, .. } = base
                    && let Some(hist) = standby.machine.hist()
                    && hist.epoch.next() == *epoch
                {
                    let origin = origin.max(hist.generation);
                    base = Base::On { base: hist, origin };
                }
                if mutant == Mutant::FullUndecided
                    && base == Base::Nothing
                    && generation == standby.machine.generation()
                {
                    let mut view = View::clone(&standby.view);
                    view.history = History::new(generation);
                    standby.machine = Replica::new(name(to), &view, 3);
                    standby.machine.step(
                        Event::NextUp {
                            generation,
                            holds: None,
                        },
                        &mut Default::default(),
                    );
                }
                Event::Begin {
                    generation,
                    epoch: *epoch,
                    base,
                    held: *held,
                }
            }
            Message::Data { epoch, .. } => Event::Data {
                generation,
                epoch: *epoch,
            },
            Message::End { epoch, install, .. } => Event::End {
                generation,
                epoch: *epoch,
                install: *install,
            },
            Message::Complete(epoch) => Event::Complete {
                generation,
                epoch: *epoch,
            },
            Message::Heartbeat => Event::Heartbeat { generation },
            Message::Yield(epoch) => Event::Yield {
                generation,
                epoch: *epoch,
            },
            _ => return Ok(()),
        };
        if mutant == Mutant::AckBeforeProcessed
            && standby.machine.is_tail()
            && let Message::Begin { epoch, .. } = &message
        {
            self.ack_owner(to, generation, *epoch);
        }
        if mutant == Mutant::ForwardEndEarly
            && matches!(message, Message::End { .. })
            && let Some(down) = self.down_link(to)
        {
            self.send_down(down, [message.clone()]);
        }
        self.step_machine(to, event, Some((link, &message)))?;
        let preparing = self.standby(to).is_some_and(|s| s.preparing.is_some());
        match preparing {
            true => Ok(()),
            false => self.frame_done(to, message),
        }
    }

    /// After a frame: it is kept for another successor, and a joining replica may be due for the rest.
    pub fn frame_done(&mut self, at: usize, message: Message) -> Result<(), String> {
        let Some(standby) = self.standby(at) else {
            return Ok(());
        };
        if std::mem::take(&mut standby.keep) {
            let ends = matches!(message, Message::End { .. });
            standby.kept.push(message);
            if ends && let Some(mark) = standby.machine.hist() {
                standby.kept.close(mark);
            }
        }
        self.send_the_rest(at)
    }

    /// The tail copies one piece more for the replica that joins.
    pub fn fill(&mut self, at: usize) -> Result<(), String> {
        let Some(link) = self.down_link(at) else {
            return Ok(());
        };
        let coarse = self.rules.grain != Grain::Frame;
        let Some(standby) = self.standby(at) else {
            return Ok(());
        };
        match standby.feeding {
            Some(Feeding::Wanted) => {
                standby.feeding = Some(match coarse {
                    true => Feeding::Rest(0),
                    false => Feeding::Copying(0),
                });
                let begin = Message::Begin {
                    epoch: Epoch::ZERO,
                    base: Base::Install,
                    held: false,
                };
                self.send_down(link, [begin]);
            }
            Some(Feeding::Copying(sent)) if sent < standby.store.len() => {
                let to = standby.store.len().min(sent + 3 + standby.store.len() / 16);
                standby.feeding = Some(Feeding::Copying(to));
                let items = standby.store[sent..to].to_vec();
                let epoch = Epoch::ZERO;
                self.send_down(link, [Message::Data { epoch, items }]);
            }
            Some(Feeding::Copying(sent)) => standby.feeding = Some(Feeding::Rest(sent)),
            _ => {}
        }
        self.send_the_rest(at)
    }

    fn send_the_rest(&mut self, at: usize) -> Result<(), String> {
        let Some(standby) = self.standby(at) else {
            return Ok(());
        };
        let Some(Feeding::Rest(sent)) = standby.feeding else {
            return Ok(());
        };
        if !standby.machine.is_between_checkpoints() {
            return Ok(());
        }
        standby.feeding = None;
        let generation = standby.machine.generation();
        let (Some(mark), Some(rest)) = (standby.machine.hist(), standby.store.get(sent..)) else {
            self.lost_next(at);
            return Ok(());
        };
        let (items, whole, epoch) = (rest.to_vec(), digest(&standby.store), Epoch::ZERO);
        let end = Message::End {
            epoch,
            install: Some(mark),
            digest: whole,
        };
        if let Some(link) = self.down_link(at) {
            self.send_down(link, [Message::Data { epoch, items }, end]);
        }
        self.step_machine(at, Event::JoinerFed { generation }, None)
    }

    pub fn deliver_up(&mut self, link: LinkId) -> Result<(), String> {
        let to = link.from;
        let Some(message) = self.links.get_mut(&link).and_then(|l| l.up.pop_front()) else {
            return Ok(());
        };
        self.drop_if_stale(link);
        if link.role == Role::Acks {
            if let Message::Ack(generation, epoch) = message {
                return self.owner_hears_ack(to, link, generation, epoch);
            }
            return Ok(());
        }
        if self.hosts[to].owner.is_some() {
            self.owner_hears(to, link, &message);
            return Ok(());
        }
        let taken = self.as_taken(to, link.generation);
        let Some(standby) = self.standby(to) else {
            return Ok(());
        };
        let current = link.generation == standby.machine.generation();
        match message {
            Message::Ack(generation, epoch) => {
                if self.is(Mutant::AckUnprocessed) && current {
                    self.check_ack(to, epoch)?;
                    self.tell_up(to, Message::Ack(generation, epoch));
                    return Ok(());
                }
                let any = self.is(Mutant::AnyGeneration);
                let generation = if any { taken } else { generation };
                return self.step_machine(to, Event::NextAck { generation, epoch }, None);
            }
            Message::Broken(who) if current => self.tell_up(to, Message::Broken(who)),
            Message::JoinerReady if current => self.tell_up(to, Message::JoinerReady),
            Message::Refused(newer) => self.tell_up(to, Message::Refused(newer)),
            _ => {}
        }
        Ok(())
    }
}
