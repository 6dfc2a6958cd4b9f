//! Connections: made, broken, forgotten.

use chain::replica::Event;

use super::greeting::Greeting;
use super::{Link, LinkId, Message, Mutant, Role, World};

impl World {
    /// A connection has been greeted: it begins with what was acknowledged.
    ///
    /// # Errors
    /// An acknowledgement that must not be.
    pub fn open(&mut self, link: LinkId) -> Result<(), String> {
        let incomplete = self.is(Mutant::AckIncomplete);
        let mut up = Vec::new();
        if let Some(standby) = &self.hosts[link.to].standby {
            let machine = &standby.machine;
            let acked = match link.role {
                Role::Update => machine.acked_up(),
                Role::Acks if incomplete => machine.hist().map(|mark| mark.epoch),
                Role::Acks => machine.acked(),
            };
            let generation = machine.generation();
            if let Some(epoch) = acked {
                self.check_ack(link.to, epoch)?;
            }
            up.extend(acked.map(|epoch| Message::Ack(generation, epoch)));
        }
        let new = Link {
            up: up.into(),
            ..Link::default()
        };
        self.links.insert(link, new);
        Ok(())
    }

    /// Whether replica `i` may try to connect to the next one.
    pub fn can_link(&self, i: usize) -> bool {
        self.takes(i)
            && self.down_link(i).is_none()
            && self.hosts[i]
                .standby
                .as_ref()
                .is_some_and(|s| s.next().is_some())
    }

    /// Replica `i` connects to the next one, if that is ready.
    pub fn link_next(&mut self, i: usize) -> Result<(), String> {
        let Some(standby) = &self.hosts[i].standby else {
            return Ok(());
        };
        let Some(next) = standby.next() else {
            return Ok(());
        };
        let generation = standby.machine.generation();
        match self.greet(i, next, generation) {
            Ok(()) => {}
            Err(Greeting::Lost(who)) => {
                let once = self.is(Mutant::TroubleOnce);
                if let Some(standby) = self.standby(i) {
                    standby.trouble = Some(who);
                    // A successor that does not come keeps the owner from connecting, which then asks why. But nobody
                    // waits for a joining replica, or for one whose connection was ended to ask it again.
                    let broken = Message::Broken(who);
                    let said = self
                        .up_link(i)
                        .is_some_and(|up| self.links[&up].up.back() == Some(&broken));
                    if !once && !said {
                        self.tell_up(i, broken);
                    }
                }
                return Ok(());
            }
            Err(_) => return Ok(()),
        }
        let mut holds = self.standby(next).and_then(|s| s.machine.hist());
        if self.is(Mutant::AnyBase)
            && let Some(mine) = self.standby(i).and_then(|s| s.machine.hist())
            && holds.is_some_and(|held| held.epoch == mine.epoch)
        {
            holds = Some(mine);
        }
        self.open(Self::update_link(i, next, generation))?;
        if let Some(standby) = self.standby(i) {
            standby.trouble = None;
            standby.feeding = None;
        }
        self.say(|| format!("h{i} connects to h{next} in {generation}, which holds {holds:?}"));
        self.step_machine(i, Event::NextUp { generation, holds }, None)
    }

    /// A connection ends; what was under way on it is lost.
    pub fn cut(&mut self, link: LinkId) {
        let LinkId {
            from,
            to,
            generation,
            ..
        } = link;
        // A bridge of an older configuration's, that nobody has ended yet, has links of its own.
        let bridge = self.hosts[from].bridge.as_ref();
        let bridges = bridge.is_some_and(|bridge| bridge.view.generation == generation);
        let alone = self.is_free() || !bridges;
        if let Some(owner) = &mut self.hosts[from].owner
            && owner.generation() == generation
            && alone
        {
            owner.sender.lost();
            self.say_lost(from, Some(to), false);
            self.links
                .retain(|l, _| l.from != from || l.generation != generation);
        } else if self.down_link(from) == Some(link) {
            self.lost_next(from);
        }
        self.links.remove(&link);
    }

    fn is_stale(&self, link: LinkId) -> bool {
        let host = &self.hosts[link.from];
        let owner = host.owner.as_ref().map(|o| o.generation());
        let standby = host.standby.as_ref().map(|s| s.machine.generation());
        owner.or(standby) != Some(link.generation)
    }

    pub fn drop_if_stale(&mut self, link: LinkId) {
        let empty = self
            .links
            .get(&link)
            .is_some_and(|l| l.down.is_empty() && l.up.is_empty());
        if empty && self.is_stale(link) {
            self.links.remove(&link);
        }
    }

    pub fn drop_stale_links(&mut self) {
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            self.drop_if_stale(link);
        }
    }
}
