//! Whether a replica takes a connection.

use checkpoint::Generation;

use super::World;

/// Why somebody does not take a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// It is this one's fault.
    Lost(usize),
    /// It may pass.
    NotYet,
    /// It follows a newer generation.
    Refused(Generation),
}

impl World {
    /// Whether host `r` takes a connection from `from`.
    pub fn greet(&self, from: usize, r: usize, generation: Generation) -> Result<(), Greeting> {
        let host = &self.hosts[r];
        if !self.serves(r) || !self.reaches(from, r) {
            return Err(Greeting::Lost(r));
        }
        let Some(standby) = &host.standby else {
            if host.seen > generation {
                return Err(Greeting::Refused(host.seen));
            }
            return Err(match host.declined.is_some_and(|then| generation <= then) {
                true => Greeting::Lost(r),
                false => Greeting::NotYet,
            });
        };
        let machine = &standby.machine;
        if standby.preparing.is_some() || machine.generation() < generation {
            return Err(Greeting::NotYet);
        }
        if machine.generation() > generation {
            return Err(Greeting::Refused(machine.generation()));
        }
        if machine.failed().is_some() {
            return Err(Greeting::Lost(r));
        }
        let waits = machine.successor().is_some() && self.down_link(r).is_none();
        match standby.trouble.filter(|_| waits) {
            Some(trouble) => Err(Greeting::Lost(trouble)),
            None if waits => Err(Greeting::NotYet),
            None => Ok(()),
        }
    }

    /// Whether the host's chain server is there.
    pub fn serves(&self, i: usize) -> bool {
        self.hosts[i].up && !self.hosts[i].agent_gone
    }
}
