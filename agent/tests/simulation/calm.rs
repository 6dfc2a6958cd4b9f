//! After the faults: hosts and links stay as they are, nobody suspects the living, requests and answers arrive. Then
//! everything has to come right within a bounded number of steps, by what hosts can really know: there are no timers
//! here that would paper over a replica that is stuck.

use agent::host::{Order, Role};
use chain::View;
use chain::master::Command;
use chain::replica::State;
use checkpoint::HostId;

use crate::cluster::{Host, Mutant, Plan, Step, World, index, name};
use crate::stepper::Stepper;

/// Steps in which a VM has to be protected again.
const PATIENCE: usize = 6000;
/// Attempts to connect that take as long as is waited for one.
const TRIES: u32 = 40;
/// Steps without a commit after which the owner says so.
const SLOW: u32 = 300;
/// Microseconds that pass before anything else happens then.
const CALM_US: u64 = 120_000_000;
/// Epochs that have to be committed then.
const EPOCHS: usize = 3;

/// What free agents do of their own accord.
fn free_steps(world: &World, i: usize) -> Vec<Step> {
    let mut steps: Vec<Step> = sensible(world, i).into_iter().collect();
    if let Some(standby) = &world.hosts[i].standby
        && standby.asking.is_some()
        && !world.asked.iter().any(|asked| asked.host == i)
        && !world.answers.iter().any(|answer| answer.host == i)
    {
        steps.push(Step::GiveUp(i));
    }
    steps
}

/// What has been waited for long enough.
fn overdue(world: &World, i: usize) -> Vec<Step> {
    let host = &world.hosts[i];
    let mut steps = Vec::new();
    if let Some(owner) = &host.owner {
        if world.can_connect(i) && owner.tries.0 > TRIES {
            steps.push(Step::ConnectFails(i));
        }
        if owner.is_overdue(SLOW) {
            steps.push(Step::Slow(i));
        }
    }
    if host.bridge.as_ref().is_some_and(|b| b.tries.0 > TRIES) {
        steps.push(Step::BridgeFails(i));
    }
    steps
}

/// What an owner's agent does with what it knows; nothing if all is well, or a wish is under way.
pub fn sensible(world: &World, i: usize) -> Option<Step> {
    let owner = world.hosts[i].owner.as_ref()?;
    if owner.asked {
        return None;
    }
    let chain: Vec<usize> = owner.view.chain.iter().map(|m| index(&m.host)).collect();
    let joining = owner.view.joining.as_ref().map(|m| index(&m.host));
    let is_up = |h: &usize| world.hosts[*h].up && world.reaches(i, *h);
    let spare = |taken: &[usize]| {
        let free = |h: &usize| *h != i && !taken.contains(h) && is_up(h);
        (0..world.hosts.len()).filter(free).collect::<Vec<usize>>()
    };
    let plan = if owner.unfit {
        // Whoever is up, those of the chain first.
        let mut hosts: Vec<usize> = chain.iter().copied().filter(is_up).collect();
        let more = spare(&hosts);
        hosts.extend(more);
        hosts.truncate(world.rules.wanted);
        match hosts.is_empty() {
            true => Plan::Unprotected,
            false => Plan::Anew(hosts),
        }
    } else if owner
        .troubles
        .iter()
        .any(|h| chain.contains(h) || joining == Some(*h))
    {
        Plan::Without(owner.troubles.iter().copied().collect())
    } else if joining.is_some() && owner.ready {
        Plan::Promote
    } else if let Some(joining) = joining
        && world.is(Mutant::PromoteEarly)
        && is_up(&joining)
        && owner.connected()
    {
        Plan::Promote
    } else if chain.is_empty() {
        let mut hosts = spare(&[]);
        hosts.truncate(world.rules.wanted);
        (!hosts.is_empty()).then_some(Plan::Anew(hosts))?
    } else if chain.len() < world.rules.wanted && joining.is_none() && owner.connected() {
        Plan::Join(*spare(&chain).first()?)
    } else {
        return None;
    };
    Some(Step::Propose(i, plan))
}

impl Stepper {
    /// Lets the dust settle.
    ///
    /// # Errors
    /// What did not come right.
    pub fn calm(&mut self) -> Result<(), String> {
        if self.below(4) == 0 {
            self.last_suspicion()?;
        }
        self.world.clock.0 += CALM_US;
        self.world.blocked.clear();
        self.world.say(|| "--- no more faults".into());
        // Some hosts never return.
        for i in 0..self.world.hosts.len() {
            if !self.world.hosts[i].up && self.below(3) != 0 {
                self.world.apply(&Step::Back(i))?;
            }
            if self.world.hosts[i].up && self.world.hosts[i].agent_gone {
                self.world.apply(&Step::AgentReturns(i))?;
            }
            if let Some(standby) = self.world.standby(i) {
                standby.doomed = None;
            }
            if let Some(owner) = &mut self.world.hosts[i].owner {
                // A wish that was lost is wished again.
                owner.asked = self.world.asked.iter().any(|asked| {
                    asked.host == i && matches!(asked.command, Command::Reconfigure { .. })
                });
            }
        }
        for step in 0..PATIENCE {
            if self.is_over() {
                return Ok(());
            }
            if self.is_protected() {
                return self
                    .goes_on()
                    .map_err(|why| format!("calm step {step}: {why}"));
            }
            self.calm_step()
                .map_err(|why| format!("calm step {step}: {why}"))?;
        }
        Err(format!("liveness: {}", self.what_is_missing()))
    }

    /// The last fault: a replica suspects the living, cannot reach the master, and goes on.
    fn last_suspicion(&mut self) -> Result<(), String> {
        let able: Vec<usize> = (0..self.world.hosts.len())
            .filter(|i| self.world.can_ask(*i))
            .collect();
        if able.is_empty() {
            return Ok(());
        }
        let i = able[self.below(able.len())];
        match self.world.is_free() {
            true => self.world.apply(&Step::Ask(i))?,
            false => self.world.apply(&Step::Suspect(i))?,
        }
        let asked = self.world.asked.iter().rposition(|asked| asked.host == i);
        if let Some(asked) = asked {
            self.world.apply(&Step::Forget(asked))?;
        }
        for _ in 0..self.below(60) {
            let mut steps = self.world.deliveries();
            let errands = self.world.errands();
            steps.extend(
                errands
                    .into_iter()
                    .filter(|s| matches!(s, Step::Link(_) | Step::Feed(_))),
            );
            let owners = self.world.hosts_where(|h| h.owner.is_some());
            steps.extend(
                owners
                    .into_iter()
                    .filter(|o| self.world.can_run(*o))
                    .map(Step::Run),
            );
            if !steps.is_empty() {
                let step = steps[self.below(steps.len())].clone();
                self.world.apply(&step)?;
            }
        }
        if !self.world.is_free() {
            return self.world.apply(&Step::Silence(i));
        }
        match self.world.standby(i).is_some_and(|s| s.asking.is_some()) {
            true => self.world.apply(&Step::GiveUp(i)),
            false => Ok(()),
        }
    }

    fn calm_step(&mut self) -> Result<(), String> {
        for host in &mut self.world.hosts {
            if let Some(owner) = &mut host.owner {
                owner.overdue.0 += 1;
            }
        }
        let world = &self.world;
        let mut steps = world.deliveries();
        steps.extend(world.errands());
        for i in world.hosts_where(|_| true) {
            match world.is_free() {
                true => steps.extend(free_steps(world, i)),
                false => steps.extend(overdue(world, i)),
            }
            // Suspicion only of the really dead: the VM runs nowhere.
            if world.is_on()
                && world.owner_in_force().is_none()
                && world.can_ask(i)
                && !self.is_granted()
            {
                steps.push(match world.is_free() {
                    true => Step::Ask(i),
                    false => Step::Suspect(i),
                });
            }
            if self.world.can_run(i) {
                steps.push(Step::Run(i));
            }
        }
        if !self.world.is_free() {
            let busy = self.world.owner_in_force().is_some();
            if self.below(if busy { 40 } else { 4 }) == 0 {
                return self.world.apply(&Step::Wait);
            }
            if self.below(20) == 0
                && let Some(step) = self.last_order()
            {
                return self.world.apply(&step);
            }
        }
        if steps.is_empty() {
            return Ok(());
        }
        let step = steps[self.below(steps.len())].clone();
        self.world.apply(&step)
    }

    /// What an administrator does at last: a VM that is off is started, one that nobody backs up is protected.
    fn last_order(&self) -> Option<Step> {
        let world = &self.world;
        let i = index(&world.view().owner);
        let host = &world.hosts[i];
        let agent = host.agent.0.as_ref()?;
        let summary = agent.machine.as_ref()?.summary();
        if !agent.tickets.is_empty() || summary.record.view.generation < world.generation() {
            return None;
        }
        let is_up = |host: &str| world.hosts[index(&HostId::new(host).expect("ours"))].up;
        let lacks = summary.lacking.iter().any(|(host, _)| is_up(host));
        let chain = &summary.record.view.chain;
        let frozen = host.owner.as_ref().is_some_and(|owner| owner.is_frozen());
        let alone = !lacks && (frozen || !chain.iter().any(|m| is_up(m.host.as_str())));
        match summary.role {
            Role::Off => Some(Step::Order(i, Order::Start)),
            Role::Owner if alone => {
                let up = (0..world.hosts.len()).filter(|h| *h != i && world.hosts[*h].up);
                let backups: Vec<HostId> = up.take(world.rules.wanted).map(name).collect();
                (!backups.is_empty()).then_some(Step::Order(i, Order::Protect { backups }))
            }
            _ => None,
        }
    }

    /// Whether the master's choice is about to resume it.
    fn is_granted(&self) -> bool {
        let view = self.world.view();
        let i = index(&view.owner);
        let host = &self.world.hosts[i];
        let heard = match self.world.machine(i) {
            Some(machine) => machine.generation(),
            None => host.seen,
        };
        host.up && host.standby.is_some() && heard < view.generation
    }

    /// Whether the VM is lost: nobody has it, and nobody could resume it.
    fn is_over(&mut self) -> bool {
        let view = self.world.view();
        if !self.world.is_known() {
            let gone = |host: &Host| host.owner.is_none() && host.standby.is_none();
            return self.world.hosts.iter().all(gone);
        }
        if self.world.owner_in_force().is_some() || self.is_granted() {
            return false;
        }
        // With its disks it has all that it needs to come back.
        if !self.world.is_free() && self.world.hosts[index(&view.owner)].up {
            return false;
        }
        let waiting = !self.world.asked.is_empty() || !self.world.answers.is_empty();
        let may = |i: usize| self.world.can_ask(i) || self.world.can_look(i);
        let chain: Vec<usize> = view.chain.iter().map(|m| index(&m.host)).collect();
        if waiting || chain.iter().any(|i| self.world.hosts[*i].up && may(*i)) {
            return false;
        }
        self.world.counts.0.lost += 1;
        // Somebody may have had everything all the same.
        let had = self.world.hosts.iter().any(|host| {
            host.up
                && host.standby.as_ref().is_some_and(|s| {
                    !s.store.is_empty() && s.store.starts_with(&self.world.visible)
                })
        });
        self.world.counts.0.stranded += u64::from(had);
        true
    }

    fn wanted(&self) -> usize {
        let up = self.world.hosts_where(|_| true).len();
        self.world.rules.wanted.min(up - 1)
    }

    /// Every host that is to back the VM up, and could, does.
    fn has_all_wanted(&self, view: &View) -> bool {
        let owner = index(&view.owner);
        let Some(machine) = self.world.machine(owner) else {
            return view.chain.len() >= self.wanted();
        };
        let summary = machine.summary();
        let is_up = |host: &str| self.world.hosts[index(&HostId::new(host).expect("ours"))].up;
        let lacks = summary.lacking.iter().any(|(host, _)| is_up(host));
        let others = (0..self.world.hosts.len()).any(|h| h != owner && self.world.hosts[h].up);
        !lacks && (summary.protected || !others)
    }

    fn is_protected(&self) -> bool {
        let world = &self.world;
        let view = world.view();
        let Some(owner) = world
            .owner_in_force()
            .and_then(|i| world.hosts[i].owner.as_ref())
        else {
            return false;
        };
        let serves = |i: usize| {
            world.hosts[i].standby.as_ref().is_some_and(|s| {
                s.machine.generation() == view.generation
                    && matches!(s.machine.state(), State::Serving | State::LastSurvivor)
            })
        };
        owner.generation() == view.generation
            && owner.connected()
            && owner.output.holds()
            && view.joining.is_none()
            && self.has_all_wanted(&view)
            && view.chain.iter().all(|m| serves(index(&m.host)))
    }

    /// Protected: then what is done from now on is committed.
    fn goes_on(&mut self) -> Result<(), String> {
        let mut boot = self.world.boot;
        let mut enough = self.world.visible.len() + EPOCHS;
        for _ in 0..PATIENCE {
            if self.world.visible.len() >= enough {
                return Ok(());
            }
            self.calm_step()?;
            if std::mem::replace(&mut boot, self.world.boot) != self.world.boot {
                enough = EPOCHS;
            }
        }
        Err(format!(
            "liveness: nothing is committed any more: {}",
            self.what_is_missing()
        ))
    }

    fn what_is_missing(&self) -> String {
        let world = &self.world;
        let view = world.view();
        let mut text = format!(
            "{} with owner {}, chain {:?}, joining {:?}",
            view.generation,
            view.owner,
            view.chain
                .iter()
                .map(|m| m.host.as_str())
                .collect::<Vec<_>>(),
            view.joining.as_ref().map(|m| m.host.as_str())
        );
        if let Some(machine) = world.machine(index(&view.owner)) {
            text += &format!("\n{machine:?}");
        }
        for (i, host) in world.hosts.iter().enumerate() {
            text += &format!("\n  {}: up {}, seen {}", name(i), host.up, host.seen);
            if let Some(owner) = &host.owner {
                text += &format!(
                    ", owner in {}, {:?}, connected {}, unfit {}, troubles {:?}, ready {}, asked {}, bridge {}, has {} committed {}",
                    owner.generation(),
                    owner.still,
                    owner.connected(),
                    owner.unfit,
                    owner.troubles,
                    owner.ready,
                    owner.asked,
                    host.bridge.is_some(),
                    owner.content.len(),
                    owner.output.committed(),
                );
            }
            if let Some(s) = &host.standby {
                text += &format!(
                    ", {:?} in {}, holds {:?}, acked {:?}, linked {}, down {:?}, feeding {:?}, asking {:?}, trouble {:?}, failed {:?}",
                    s.machine.state(),
                    s.machine.generation(),
                    s.machine.hist().map(|m| m.epoch.0),
                    s.machine.acked(),
                    s.machine.is_linked(),
                    world.down_link(i),
                    s.feeding,
                    s.asking,
                    s.trouble,
                    s.machine.failed(),
                );
            }
        }
        text
    }
}
