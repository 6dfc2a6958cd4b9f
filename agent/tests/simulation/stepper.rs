//! Picks what happens next, from a seed: first with faults, then without.

use agent::host::Order;
use checkpoint::HostId;

use crate::cluster::{Agents, Grain, LinkId, Mutant, Plan, Rules, Step, World, index, name};

/// Steps with faults.
const STEPS: usize = 1200;

pub struct Stepper {
    random: u64,
    pub world: World,
    /// Some seeds have durable replicas, slow disks, few faults, owners that seldom change their minds.
    durable: bool,
    faults: usize,
    wishes: usize,
}

pub fn rules(seed: u64, agents: Agents, mutant: Mutant, story: bool) -> Rules {
    Rules {
        hosts: 4 + (seed % 2) as usize,
        in_flight: 3,
        wanted: 2 + (seed / 2 % 2) as usize,
        slow_disks: seed / 4 % 2 == 1,
        grain: Grain::Frame,
        mutant,
        agents,
        freezes: seed / 144 % 4 == 3,
        story,
    }
}

impl Stepper {
    pub fn new(seed: u64, agents: Agents, mutant: Mutant, story: bool) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1,
            world: World::new(rules(seed, agents, mutant, story)),
            durable: seed / 8 % 2 == 1,
            faults: [4, 10, 25][(seed / 16 % 3) as usize],
            wishes: [3, 10, 30][(seed / 48 % 3) as usize],
        }
    }

    pub fn below(&mut self, n: usize) -> usize {
        // splitmix64
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.below(of.len())].clone())
    }

    /// The whole run with faults.
    ///
    /// # Errors
    /// What did not hold, and at which step.
    pub fn storm(&mut self) -> Result<(), String> {
        self.begin()?;
        for step in 0..STEPS {
            self.storm_step()
                .map_err(|why| format!("step {step}: {why}"))?;
        }
        Ok(())
    }

    /// What an administrator does first.
    pub fn begin(&mut self) -> Result<(), String> {
        match self.world.is_free() {
            true => Ok(()),
            false => {
                let order = self.protect(0);
                self.world.apply(&order)
            }
        }
    }

    pub fn storm_step(&mut self) -> Result<(), String> {
        if !self.world.is_free() {
            return self.shipped_step();
        }
        let step = match self.below(1000) {
            0..440 => self.some_deliveries()?,
            440..580 => self.owner_runs(),
            580..880 => {
                let steps = self.world.errands();
                self.pick(&steps)
            }
            880..910 => self.sensible_wish(),
            910..930 if self.below(30) < self.wishes => self.wish(),
            930..960 => self.suspicion(),
            960..975 => self.owner_beats(),
            975.. if self.below(25) < self.faults => self.fault(),
            _ => None,
        };
        match step {
            Some(step) => self.world.apply(&step),
            None => Ok(()),
        }
    }

    fn some_deliveries(&mut self) -> Result<Option<Step>, String> {
        for _ in 0..self.below(4) {
            let steps = self.world.deliveries();
            if let Some(step) = self.pick(&steps) {
                self.world.apply(&step)?;
            }
        }
        let steps = self.world.deliveries();
        Ok(self.pick(&steps))
    }

    /// With shipped agents: what they do by themselves, what befalls them, and what an administrator orders.
    fn shipped_step(&mut self) -> Result<(), String> {
        let step = match self.below(1000) {
            0..440 => self.some_deliveries()?,
            440..580 => self.owner_runs(),
            580..880 => {
                let steps = self.world.errands();
                self.pick(&steps)
            }
            880..895 => Some(Step::Wait),
            895..915 if self.below(30) < self.wishes => self.an_order(),
            915..935 => self.a_deadline(),
            935..960 => self.false_suspicion(),
            960..975 => self.owner_beats(),
            975.. if self.below(25) < self.faults => self.fault(),
            _ => None,
        };
        match step {
            Some(step) => self.world.apply(&step),
            None => Ok(()),
        }
    }

    /// Replicas that could ask for the VM.
    fn able(&self) -> Vec<usize> {
        let all = 0..self.world.hosts.len();
        all.filter(|i| self.world.can_ask(*i)).collect()
    }

    /// A replica hears nothing of its predecessor, rightly or not; or one that asks is not answered.
    fn false_suspicion(&mut self) -> Option<Step> {
        if self.below(4) == 0 {
            let asking: Vec<usize> = self.world.asked.iter().map(|asked| asked.host).collect();
            return self.pick(&asking).map(Step::Silence);
        }
        if self.below(3) != 0 {
            return None;
        }
        let able = self.able();
        self.pick(&able).map(Step::Suspect)
    }

    /// Something has been waited for long enough.
    fn a_deadline(&mut self) -> Option<Step> {
        let mut steps = Vec::new();
        for (i, host) in self.world.hosts.iter().enumerate() {
            if host.owner.as_ref().is_some_and(|o| o.tries.0 > 3) && self.world.can_connect(i) {
                steps.push(Step::ConnectFails(i));
            }
            if host.owner.as_ref().is_some_and(|o| o.is_overdue(0)) {
                steps.push(Step::Slow(i));
            }
            if host.bridge.is_some() {
                steps.push(Step::BridgeFails(i));
            }
            if let Some(agent) = &host.agent.0 {
                let errands = 0..agent.errands.len();
                steps.extend(errands.map(|which| Step::ErrandFails(i, which)));
            }
        }
        self.pick(&steps)
    }

    /// An owner of some hosts' is to be backed up by some others.
    fn protect(&mut self, i: usize) -> Step {
        let mut others: Vec<usize> = (0..self.world.hosts.len()).filter(|h| *h != i).collect();
        for n in (1..others.len()).rev() {
            others.swap(n, self.below(n + 1));
        }
        others.truncate(1 + self.below(self.world.rules.wanted + 1));
        let backups: Vec<HostId> = others.into_iter().map(name).collect();
        Step::Order(i, Order::Protect { backups })
    }

    fn an_order(&mut self) -> Option<Step> {
        let owners = self
            .world
            .hosts_where(|h| h.agent.0.as_ref().is_some_and(|agent| agent.owns()));
        let Some(i) = self.pick(&owners) else {
            return self.of_the_off();
        };
        match self.below(10) {
            8 => Some(Step::Order(i, Order::Stop)),
            9 => self.of_the_off(),
            0..3 => Some(self.protect(i)),
            3 | 4 => self.a_change(i),
            5 => Some(Step::Order(i, Order::HandOver)),
            6 => Some(Step::Order(i, Order::Drill)),
            _ => {
                let standbys = self.world.hosts_where(|h| h.standby.is_some());
                let i = self.pick(&standbys)?;
                Some(Step::Order(i, Order::Failover))
            }
        }
    }

    /// A VM that is off is started, by whomever, or deleted.
    fn of_the_off(&mut self) -> Option<Step> {
        if self.world.is_on() {
            return None;
        }
        let agents = self.world.hosts_where(|h| h.agent.0.is_some());
        let i = self.pick(&agents)?;
        match self.below(40) {
            0 => Some(Step::Order(i, Order::Delete)),
            _ => Some(Step::Order(i, Order::Start)),
        }
    }

    /// An agent ends, and its VM runs on; or there is one again.
    fn an_agents_life(&mut self) -> Option<Step> {
        let gone = self.world.hosts_where(|h| h.agent_gone);
        if !gone.is_empty() && self.below(3) != 0 {
            return self.pick(&gone).map(Step::AgentReturns);
        }
        let there = self.world.hosts_where(|h| h.agent.0.is_some());
        let host = self.pick(&there)?;
        Some(Step::AgentEnds {
            host,
            recovers: self.durable,
            prepared: self.below(2) == 0,
        })
    }

    /// A guest switches itself off, or its owner's disk fails.
    fn a_guests_or_disks_end(&mut self) -> Option<Step> {
        let owners = self.world.hosts_where(|h| h.owner.is_some());
        let i = self.pick(&owners)?;
        match self.below(4) {
            0 => Some(Step::PowersOff(i)),
            _ => Some(Step::GivesUp(i)),
        }
    }

    /// What an administrator wants of a VM that runs, beyond where it runs.
    fn a_change(&mut self, i: usize) -> Option<Step> {
        let order = match self.below(6) {
            0 => Order::Unprotect,
            1 => Order::ShutDown { patience: 0 },
            2 => Order::Reboot { patience: None },
            3 => Order::Reboot {
                patience: Some(1_000_000),
            },
            _ => {
                let mut shape = Box::new(self.world.record()?.shape.clone());
                let seconds = self.below(3);
                shape.config_toml = format!("disk_timeout_s = {seconds}");
                Order::Apply { shape }
            }
        };
        Some(Step::Order(i, order))
    }

    /// A host hears of what had been decided long ago.
    fn old_news(&mut self) -> Option<Step> {
        let hosts = self.world.hosts_where(|_| true);
        let host = self.pick(&hosts)?;
        let moments = self.world.past.0.len();
        Some(Step::Watch(host, self.below(moments)))
    }

    pub fn owner_runs(&mut self) -> Option<Step> {
        let able: Vec<usize> = self
            .world
            .hosts_where(|_| true)
            .into_iter()
            .filter(|i| self.world.can_run(*i))
            .collect();
        self.pick(&able).map(Step::Run)
    }

    fn owner_beats(&mut self) -> Option<Step> {
        let owners = self.world.hosts_where(|h| h.owner.is_some());
        self.pick(&owners).map(Step::Beat)
    }

    fn suspicion(&mut self) -> Option<Step> {
        let asking = self
            .world
            .hosts_where(|h| h.standby.as_ref().is_some_and(|s| s.asking.is_some()));
        if self.below(4) == 0 {
            return self.pick(&asking).map(Step::GiveUp);
        }
        if self.below(3) != 0 {
            return None;
        }
        let able = self.able();
        self.pick(&able).map(Step::Ask)
    }

    /// An owner wishes for another chain, for a reason.
    fn sensible_wish(&mut self) -> Option<Step> {
        let owners = self.world.hosts_where(|h| h.owner.is_some());
        let i = self.pick(&owners)?;
        crate::calm::sensible(&self.world, i)
    }

    /// An owner wishes for anything.
    fn wish(&mut self) -> Option<Step> {
        let owners = self.world.hosts_where(|h| h.owner.is_some());
        let i = self.pick(&owners)?;
        let owner = self.world.hosts[i].owner.as_ref()?;
        let chain: Vec<usize> = owner.view.chain.iter().map(|m| index(&m.host)).collect();
        let has_joiner = owner.view.joining.is_some();
        let mut others: Vec<usize> = (0..self.world.hosts.len()).filter(|h| *h != i).collect();
        for n in (1..others.len()).rev() {
            others.swap(n, self.below(n + 1));
        }
        let plan = match self.below(12) {
            0..4 => {
                let lost: Vec<usize> = self.pick(&chain).into_iter().collect();
                Plan::Without(lost)
            }
            4 => Plan::Without(Vec::new()),
            5 => Plan::Unprotected,
            6..8 => {
                others.truncate(1 + self.below(3));
                Plan::Anew(others)
            }
            8..11 => Plan::Join(others.into_iter().find(|h| !chain.contains(h))?),
            // Before it is ready, even: the master cannot know.
            _ if has_joiner => Plan::Promote,
            _ => return None,
        };
        (!matches!(&plan, Plan::Without(_)) || !chain.is_empty()).then_some(Step::Propose(i, plan))
    }

    fn fault(&mut self) -> Option<Step> {
        let hosts = self.world.hosts.len();
        if !self.world.is_free() {
            match self.below(16) {
                0 | 1 => return self.old_news(),
                2 | 3 => return self.an_agents_life(),
                4 => return self.a_guests_or_disks_end(),
                _ => {}
            }
        }
        match self.below(20) {
            0..3 => {
                let up = self.world.hosts_where(|_| true);
                (up.len() > 2).then_some(())?;
                let host = self.pick(&up)?;
                Some(Step::Crash {
                    host,
                    recovers: self.durable,
                    prepared: self.below(2) == 0,
                })
            }
            3..9 => {
                let down: Vec<usize> = (0..hosts).filter(|i| !self.world.hosts[*i].up).collect();
                self.pick(&down).map(Step::Back)
            }
            9..12 => {
                let links: Vec<LinkId> = self.world.links.keys().copied().collect();
                self.pick(&links).map(Step::Cut)
            }
            12 => {
                let a = self.below(hosts);
                let b = (a + 1 + self.below(hosts)) % (hosts + 1);
                Some(Step::Part(a, b))
            }
            13..16 => {
                let blocked: Vec<(usize, usize)> = self.world.blocked.iter().copied().collect();
                self.pick(&blocked).map(|(a, b)| Step::Heal(a, b))
            }
            16 => (!self.world.asked.is_empty())
                .then(|| Step::Forget(self.below(self.world.asked.len()))),
            17 => (!self.world.answers.is_empty())
                .then(|| Step::Lose(self.below(self.world.answers.len()))),
            18 => {
                let replicas = self.world.hosts_where(|h| h.standby.is_some());
                let host = self.pick(&replicas)?;
                let damaged = self.below(2) == 0;
                Some(Step::Doom { host, damaged })
            }
            _ => {
                let replicas = self.world.hosts_where(|h| h.standby.is_some());
                self.pick(&replicas).map(Step::Lie)
            }
        }
    }
}
