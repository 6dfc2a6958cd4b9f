//! Every interleaving of a small cluster (`tests/cluster`: the shipped machines of replicas, master, senders and epoch
//! pipelines), checked with Stateright: within the bounds of [`Bounds`], whatever can happen next does happen. Agents are
//! free: they ask for anything at any time. (The shipped one keeps the time, which makes its states too many.)
//!
//! `CHAIN_MODEL=deep cargo test --release -p agent --test model` explores wider bounds; `scripts/simulate --model` does so.

#[path = "../cluster/mod.rs"]
mod cluster;

use cluster::{Agents, Grain, Mutant, Plan, Rules, Step, World, index};
use stateright::{Checker, HasDiscoveries, Model, Property};

/// What may happen how often, all in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bounds {
    /// Epochs of the VM.
    runs: u8,
    /// Times that a replica suspects its predecessor, rightly or not.
    asks: u8,
    /// Times that it hears nothing of what it asked for.
    give_ups: u8,
    lost_answers: u8,
    crashes: u8,
    /// Hosts that return.
    backs: u8,
    cuts: u8,
    /// Times that an owner wishes for another chain.
    wishes: u8,
    /// Checkpoints that cannot be prepared.
    dooms: u8,
}

const NOTHING: Bounds = Bounds {
    runs: 0,
    asks: 0,
    give_ups: 0,
    lost_answers: 0,
    crashes: 0,
    backs: 0,
    cuts: 0,
    wishes: 0,
    dooms: 0,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    world: World,
    left: Bounds,
    broken: Option<String>,
}

struct Cluster {
    /// The owner and its replicas.
    hosts: usize,
    /// Of which so many are in the chain at first.
    replicas: usize,
    bounds: Bounds,
    mutant: Mutant,
    grain: Grain,
    /// Replicas keep what they have prepared when they crash.
    durable: bool,
    /// The chain has been decided on, and nothing sent.
    empty: bool,
}

impl Cluster {
    /// The owner is protected by the first replicas, which hold its first checkpoints: with the third, output is held.
    fn begun(&self) -> World {
        let mut world = World::new(Rules {
            hosts: self.hosts,
            in_flight: 2,
            wanted: self.hosts - 1,
            slow_disks: false,
            grain: self.grain,
            mutant: self.mutant,
            agents: Agents::Free,
            freezes: false,
            story: false,
        });
        let chain = (1..=self.replicas).collect();
        let plan = Step::Propose(0, Plan::Anew(chain));
        world.apply(&plan).expect("a wish");
        let settle = |world: &mut World| {
            for n in 0..500 {
                let mut steps = world.deliveries();
                steps.extend(world.errands());
                steps.retain(|s| !matches!(s, Step::ListenToTail(_) | Step::StillFailed(_)));
                if steps.is_empty() {
                    return;
                }
                // In turn: some wait for others.
                world.apply(&steps[n % steps.len()]).expect("the beginning");
            }
            panic!("the beginning does not end");
        };
        settle(&mut world);
        if self.empty {
            return world;
        }
        for _ in 0..3 {
            world.apply(&Step::Run(0)).expect("a checkpoint");
            settle(&mut world);
        }
        assert_eq!(
            world.visible.len(),
            3,
            "the first checkpoints are committed"
        );
        world
    }

    /// What an owner may wish for.
    fn wishes(&self, world: &World, i: usize) -> Vec<Plan> {
        let Some(owner) = &world.hosts[i].owner else {
            return Vec::new();
        };
        let chain: Vec<usize> = owner.view.chain.iter().map(|m| index(&m.host)).collect();
        let mut plans: Vec<Plan> = chain.iter().map(|h| Plan::Without(vec![*h])).collect();
        let spare = |h: &usize| *h != i && !chain.contains(h) && world.hosts[*h].up;
        match &owner.view.joining {
            Some(_) if owner.ready => plans.push(Plan::Promote),
            Some(_) if self.mutant == Mutant::PromoteEarly => plans.push(Plan::Promote),
            Some(_) => {}
            None if chain.is_empty() => {
                plans.push(Plan::Anew((0..self.hosts).filter(spare).collect()));
            }
            None => plans.extend((0..self.hosts).filter(spare).map(Plan::Join)),
        }
        if owner.unfit {
            plans.push(Plan::Anew(
                (0..self.hosts)
                    .filter(|h| *h != i && world.hosts[*h].up)
                    .collect(),
            ));
        }
        plans
    }
}

impl Model for Cluster {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            world: self.begun(),
            left: self.bounds,
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.broken.is_some() {
            return;
        }
        let (world, left) = (&state.world, &state.left);
        actions.extend(world.deliveries());
        let errands = world.errands();
        actions.extend(
            errands
                .into_iter()
                .filter(|s| !matches!(s, Step::ListenToTail(_) | Step::StillFailed(_))),
        );
        for i in world.hosts_where(|_| true) {
            if left.runs > 0 && world.can_run(i) {
                actions.push(Step::Run(i));
            }
            if left.asks > 0 && world.can_ask(i) {
                actions.push(Step::Ask(i));
            }
            let standby = world.hosts[i].standby.as_ref();
            if left.give_ups > 0 && standby.is_some_and(|s| s.asking.is_some()) {
                actions.push(Step::GiveUp(i));
            }
            if left.dooms > 0 && standby.is_some_and(|s| s.doomed.is_none()) {
                let damaged = |damaged| Step::Doom { host: i, damaged };
                actions.extend([damaged(false), damaged(true)]);
            }
            if left.crashes > 0 {
                actions.push(Step::Crash {
                    host: i,
                    recovers: self.durable,
                    prepared: false,
                });
            }
            if left.wishes > 0 {
                let plans = self.wishes(world, i);
                actions.extend(plans.into_iter().map(|plan| Step::Propose(i, plan)));
            }
        }
        if left.backs > 0 {
            let down = (0..self.hosts).filter(|i| !world.hosts[*i].up);
            actions.extend(down.map(Step::Back));
        }
        if left.cuts > 0 {
            actions.extend(world.links.keys().copied().map(Step::Cut));
        }
        if left.lost_answers > 0 {
            actions.extend((0..world.answers.len()).map(Step::Lose));
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        let left = &mut state.left;
        let budget = match &step {
            Step::Run(_) => Some(&mut left.runs),
            Step::Ask(_) => Some(&mut left.asks),
            Step::GiveUp(_) => Some(&mut left.give_ups),
            Step::Lose(_) => Some(&mut left.lost_answers),
            Step::Crash { .. } => Some(&mut left.crashes),
            Step::Back(_) => Some(&mut left.backs),
            Step::Cut(_) => Some(&mut left.cuts),
            Step::Propose(..) => Some(&mut left.wishes),
            Step::Doom { .. } => Some(&mut left.dooms),
            _ => None,
        };
        if let Some(budget) = budget {
            *budget -= 1;
        }
        if let Err(why) = state.world.apply(&step) {
            state.broken = Some(why);
        }
        state.world.ops.0.clear();
        // A step that changes nothing leads nowhere.
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            // I1, I2, I3, I4, I5 and no failure without a reason: `tests/cluster/check.rs`, after every step.
            Property::always("what must hold holds", |_, state: &State| {
                state.broken.is_none()
            }),
            Property::always("a generation has one owner", |_, state: &State| {
                let owners = state.world.hosts.iter().filter_map(|h| h.owner.as_ref());
                let mut generations: Vec<_> = owners.map(|o| o.generation()).collect();
                let count = generations.len();
                generations.sort();
                generations.dedup();
                generations.len() == count
            }),
            Property::sometimes(
                "somebody took over, and is acknowledged by those left",
                |model: &Self, state: &State| {
                    model.replicas == 1
                        || model.bounds.asks == 0
                        || state.world.owner_in_force().is_some_and(|i| {
                            let owner = state.world.hosts[i].owner.as_ref();
                            i > 0
                                && owner.is_some_and(|o| {
                                    o.output.holds() && o.connected() && o.output.committed().0 > 3
                                })
                        })
                },
            ),
            Property::sometimes(
                "a chain of one was taken over",
                |model: &Self, state: &State| {
                    model.replicas > 1
                        || model.bounds.asks == 0
                        || state.world.owner_in_force().is_some_and(|i| i > 0)
                },
            ),
            Property::sometimes(
                "a chain was repaired in place, and went on",
                |model: &Self, state: &State| {
                    let view = state.world.view();
                    let shorter = view.chain.len() + 1 == model.replicas;
                    model.replicas == 1
                        || model.bounds.wishes == 0
                        || shorter
                            && index(&view.owner) == 0
                            && view.in_place()
                            && state.world.visible.len() > 3
                },
            ),
            Property::sometimes(
                "a replica joined and acknowledges as the tail",
                |model: &Self, state: &State| {
                    let view = state.world.view();
                    let joined = view.chain.last().is_some_and(|m| {
                        let standby = state.world.hosts[index(&m.host)].standby.as_ref();
                        view.in_place()
                            && m.since > view.history.since
                            && standby.is_some_and(|s| s.machine.state().could_resume())
                    });
                    model.hosts == model.replicas + 1 || joined
                },
            ),
        ]
    }
}

fn deep() -> bool {
    std::env::var("CHAIN_MODEL").is_ok_and(|v| v == "deep")
}

/// Explores everything within the bounds.
fn explore(what: &str, cluster: Cluster) {
    let checker = cluster.checker().threads(2).spawn_bfs().join();
    println!(
        "{what}: {} unique states, depth {}",
        checker.unique_state_count(),
        checker.max_depth()
    );
    if let Some(path) = checker.discovery("what must hold holds") {
        let why = path.last_state().broken.clone().unwrap_or_default();
        panic!("{what}: {why}\n{:#?}", path.into_actions());
    }
    checker.assert_properties();
}

/// A cluster within one of two bounds.
fn cluster(hosts: usize, replicas: usize, grain: Grain, small: Bounds, deeper: Bounds) -> Cluster {
    Cluster {
        hosts,
        replicas,
        bounds: if deep() { deeper } else { small },
        mutant: Mutant::None,
        grain,
        durable: false,
        empty: false,
    }
}

/// FIELD H16: output flows until the first checkpoint has been acknowledged, whoever suspects whom meanwhile.
fn beginning() -> Cluster {
    let small = Bounds {
        runs: 4,
        asks: 1,
        ..NOTHING
    };
    let deeper = Bounds {
        runs: 5,
        crashes: 1,
        ..small
    };
    Cluster {
        empty: true,
        ..cluster(2, 1, Grain::Half, small, deeper)
    }
}

#[test]
fn a_chain_that_begins() {
    explore("a chain begins", beginning());
}

#[test]
fn two_hosts() {
    let small = Bounds {
        runs: 2,
        asks: 2,
        give_ups: 1,
        lost_answers: 1,
        crashes: 1,
        wishes: 1,
        ..NOTHING
    };
    let deeper = Bounds { cuts: 1, ..small };
    explore("two hosts", cluster(2, 1, Grain::Half, small, deeper));
}

#[test]
fn two_hosts_with_a_store_that_fails() {
    let small = Bounds {
        runs: 2,
        crashes: 1,
        backs: 1,
        wishes: 1,
        dooms: 1,
        asks: 1,
        ..NOTHING
    };
    let deeper = Bounds {
        runs: 3,
        wishes: 2,
        ..small
    };
    explore(
        "two hosts, failing store",
        cluster(2, 1, Grain::Half, small, deeper),
    );
}

#[test]
fn three_hosts_and_a_takeover() {
    let small = Bounds {
        runs: 2,
        asks: 1,
        ..NOTHING
    };
    let deeper = Bounds {
        crashes: 1,
        backs: 1,
        ..small
    };
    explore(
        "three hosts, takeover",
        cluster(3, 2, Grain::Half, small, deeper),
    );
}

#[test]
fn three_hosts_repaired_in_place() {
    let small = Bounds {
        runs: 1,
        wishes: 1,
        ..NOTHING
    };
    let deeper = Bounds { asks: 1, ..small };
    explore(
        "three hosts, repair",
        cluster(3, 2, Grain::Checkpoint, small, deeper),
    );
}

#[test]
fn a_third_host_joins() {
    let small = Bounds {
        wishes: 2,
        ..NOTHING
    };
    let deeper = Bounds { runs: 1, ..small };
    explore(
        "a third joins",
        cluster(3, 1, Grain::Checkpoint, small, deeper),
    );
}

#[test]
fn four_hosts_and_a_takeover() {
    let small = Bounds {
        runs: 1,
        asks: 1,
        ..NOTHING
    };
    let deeper = Bounds {
        crashes: 1,
        ..small
    };
    explore(
        "four hosts, takeover",
        cluster(4, 3, Grain::Checkpoint, small, deeper),
    );
}

/// A planted bug: what the checker finds.
fn planted(mutant: Mutant, cluster: Cluster, expected: &str) {
    let checker = Cluster { mutant, ..cluster }
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let path = checker
        .discovery("what must hold holds")
        .unwrap_or_else(|| panic!("{mutant:?} went unnoticed"));
    let why = path.last_state().broken.clone().unwrap_or_default();
    println!(
        "{mutant:?}: found among {} states, in {} steps: {why}",
        checker.unique_state_count(),
        path.into_actions().len()
    );
    assert!(why.contains(expected), "{mutant:?}: {why}");
}

mod mutants {
    use super::*;

    fn three(bounds: Bounds) -> Cluster {
        cluster(3, 2, Grain::Half, bounds, bounds)
    }

    #[test]
    fn i1_acknowledging_before_processing_is_found() {
        let bounds = Bounds { runs: 1, ..NOTHING };
        planted(Mutant::AckBeforeProcessed, three(bounds), "I5");
    }

    #[test]
    fn i2_forwarding_the_end_before_preparing_is_found() {
        let bounds = Bounds {
            runs: 1,
            dooms: 1,
            ..NOTHING
        };
        planted(Mutant::ForwardEndEarly, three(bounds), "I2");
    }

    #[test]
    fn i5_resuming_from_a_full_checkpoint_at_once_is_found() {
        planted(Mutant::FullHeld, beginning(), "I5");
    }

    #[test]
    fn i5_not_freezing_before_asking_is_found() {
        let bounds = Bounds {
            runs: 1,
            asks: 1,
            ..NOTHING
        };
        planted(Mutant::AskWithoutFreezing, three(bounds), "I4");
    }

    #[test]
    fn i3_a_failed_store_that_is_not_owned_up_to_is_found() {
        let bounds = Bounds {
            runs: 1,
            dooms: 1,
            ..NOTHING
        };
        planted(Mutant::FailureHidden, three(bounds), "I3");
    }

    #[test]
    fn sent_that_is_not_resent_is_found() {
        let bounds = Bounds {
            runs: 1,
            cuts: 1,
            ..NOTHING
        };
        planted(
            Mutant::SentNotResent,
            three(bounds),
            "failed without a reason",
        );
    }
}
