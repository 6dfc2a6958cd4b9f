//! Linearizability of the chain as its clients see it: an owner's updates (a checkpoint, on top of the one before it)
//! and queries of the newest checkpoint, which a tail answers. Histories of the simulation, checked with Stateright's
//! tester against a log that takes an update only on top of its newest entry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chain::replica::State;
use chain::{Mark, View};
use checkpoint::{Epoch, Generation};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use crate::cluster::{Agents, Mutant, Op, World, index};
use crate::stepper::Stepper;

/// The newest checkpoint.
#[derive(Clone, Debug, Default)]
struct Log(Option<Mark>);

#[derive(Clone, Debug)]
enum Call {
    /// Without a base it replaces everything.
    Update {
        base: Option<Mark>,
        mark: Mark,
    },
    Query,
}

#[derive(Clone, Debug, PartialEq)]
enum Return {
    Done,
    No,
    Newest(Option<Mark>),
}

impl SequentialSpec for Log {
    type Op = Call;
    type Ret = Return;

    fn invoke(&mut self, op: &Call) -> Return {
        match op {
            Call::Query => Return::Newest(self.0),
            Call::Update { base, mark } if base.is_none() || *base == self.0 => {
                self.0 = Some(*mark);
                Return::Done
            }
            Call::Update { .. } => Return::No,
        }
    }
}

/// What a client of queries is at.
#[derive(Clone, Debug, Default)]
enum Asking {
    #[default]
    Idle,
    Asked(usize, Arc<View>),
    Answered(usize, Arc<View>, Mark),
}

/// What the tail of `view` answers.
fn answer(world: &World, view: &View) -> Option<Mark> {
    let tail = index(&view.chain.last()?.host);
    let machine = &world.hosts[tail]
        .standby
        .as_ref()
        .filter(|_| world.hosts[tail].up)?
        .machine;
    let unsure = machine.state() == State::Joining && world.is(Mutant::QueryIncompleteTail);
    let sure = machine.state().could_resume() || unsure;
    (machine.generation() == view.generation && machine.is_tail() && sure)
        .then(|| machine.hist())?
}

/// A client's next step.
fn ask(stepper: &mut Stepper, client: &mut Asking, known: &mut Arc<View>, queries: &mut usize) {
    let now = stepper.world.view();
    if stepper.below(3) == 0 {
        *known = now.clone();
    }
    let stale = stepper.world.is(Mutant::QueryStaleTail);
    let world = &mut stepper.world;
    *client = match std::mem::take(client) {
        Asking::Idle if known.chain.is_empty() => Asking::Idle,
        Asking::Idle => {
            *queries += 1;
            world.ops.0.push(Op::Query(*queries));
            Asking::Asked(*queries, known.clone())
        }
        Asking::Asked(id, view) => match answer(world, &view) {
            Some(mark) => Asking::Answered(id, view, mark),
            None => Asking::Idle,
        },
        // It counts only if the master has decided nothing else meanwhile.
        Asking::Answered(id, view, mark) => {
            if view.generation == now.generation || stale {
                world.counts.0.queries += 1;
                world.ops.0.push(Op::Answered(id, mark));
            }
            Asking::Idle
        }
    };
}

/// Runs a seed with clients that query; what the clients saw.
fn history(seed: u64, agents: Agents, mutant: Mutant) -> (Vec<Op>, u64) {
    let mut stepper = Stepper::new(seed, agents, mutant, false);
    let mut clients = [Asking::Idle, Asking::Idle, Asking::Idle];
    let mut known = [(); 3].map(|()| stepper.world.view());
    let mut queries = 0;
    if stepper.begin().is_err() {
        return (Vec::new(), 0);
    }
    for _ in 0..700 {
        // What else a mutant breaks is not of interest here.
        if stepper.storm_step().is_err() {
            break;
        }
        if stepper.below(4) == 0 {
            let client = stepper.below(clients.len());
            ask(
                &mut stepper,
                &mut clients[client],
                &mut known[client],
                &mut queries,
            );
        }
    }
    let counts = stepper.world.counts.0;
    (std::mem::take(&mut stepper.world.ops.0), counts.queries)
}

/// Updates that took effect: those acknowledged, those that somebody saw, and what these are based on.
fn effective(ops: &[Op]) -> BTreeSet<Mark> {
    let mut bases = BTreeMap::new();
    let mut sent: BTreeMap<(usize, Generation), Vec<(Epoch, Mark)>> = BTreeMap::new();
    let mut seen = Vec::new();
    for op in ops {
        match *op {
            Op::Update {
                host,
                owner_since,
                base,
                mark,
            } => {
                bases.insert(mark, base);
                let sent = sent.entry((host, owner_since)).or_default();
                sent.push((mark.epoch, mark));
            }
            Op::Acked {
                host,
                owner_since,
                epoch,
            } => {
                let own = sent.entry((host, owner_since)).or_default();
                seen.extend(
                    own.extract_if(.., |(e, _)| *e <= epoch)
                        .map(|(_, mark)| mark),
                );
            }
            Op::Answered(_, mark) => seen.push(mark),
            Op::Query(_) => {}
        }
    }
    let mut effective = BTreeSet::new();
    while let Some(mark) = seen.pop() {
        if effective.insert(mark) {
            seen.extend(bases.get(&mark).copied().flatten());
        }
    }
    effective
}

/// Whether some order of the operations that keeps to real time explains all answers.
fn is_linearizable(ops: &[Op]) -> bool {
    let effective = effective(ops);
    let answered: BTreeSet<usize> = ops
        .iter()
        .filter_map(|op| match op {
            Op::Answered(id, _) => Some(*id),
            _ => None,
        })
        .collect();
    let mut tester = LinearizabilityTester::new(Log::default());
    let mut free: BTreeSet<usize> = (0..200).collect();
    let mut updates: BTreeMap<(usize, Generation), Vec<(Epoch, usize)>> = BTreeMap::new();
    let mut queries: BTreeMap<usize, usize> = BTreeMap::new();
    for op in ops {
        match *op {
            Op::Update {
                host,
                owner_since,
                base,
                mark,
            } if effective.contains(&mark) => {
                let thread = free.pop_first().expect("few are under way");
                let call = Call::Update { base, mark };
                tester.on_invoke(thread, call).expect("a free thread");
                let own = updates.entry((host, owner_since)).or_default();
                own.push((mark.epoch, thread));
            }
            Op::Acked {
                host,
                owner_since,
                epoch,
            } => {
                let own = updates.entry((host, owner_since)).or_default();
                for (_, thread) in own.extract_if(.., |(e, _)| *e <= epoch) {
                    tester.on_return(thread, Return::Done).expect("one began");
                    free.insert(thread);
                }
            }
            Op::Query(id) if answered.contains(&id) => {
                let thread = free.pop_first().expect("few are under way");
                tester
                    .on_invoke(thread, Call::Query)
                    .expect("a free thread");
                queries.insert(id, thread);
            }
            Op::Answered(id, mark) => {
                let thread = queries.remove(&id).expect("one began");
                let newest = Return::Newest(Some(mark));
                tester.on_return(thread, newest).expect("one began");
                free.insert(thread);
            }
            _ => {}
        }
    }
    // Seen, and never acknowledged: they took effect at some time.
    for (_, thread) in updates.into_values().flatten() {
        tester.on_return(thread, Return::Done).expect("one began");
    }
    tester.is_consistent()
}

#[test]
fn updates_and_queries_are_linearizable() {
    let seeds = crate::number("CHAIN_LINEAR_SEEDS").unwrap_or(300);
    let (mut queries, mut updates) = (0, 0);
    for seed in 0..seeds {
        let (ops, answered) = history(seed, Agents::Shipped, Mutant::None);
        queries += answered;
        updates += ops
            .iter()
            .filter(|op| matches!(op, Op::Acked { .. }))
            .count();
        assert!(is_linearizable(&ops), "seed {seed}: {ops:#?}");
    }
    println!("{seeds} histories, {updates} acknowledgements, {queries} queries answered");
    assert!(queries > 10 * seeds && updates as u64 > 3 * seeds);
}

fn killed(mutant: Mutant) {
    let seeds = 3000;
    let caught = (0..seeds).find(|seed| !is_linearizable(&history(*seed, Agents::Free, mutant).0));
    println!("{mutant:?}: not linearizable with seed {caught:?}");
    assert!(
        caught.is_some(),
        "{mutant:?} went unnoticed in {seeds} seeds"
    );
}

#[test]
fn a_query_answered_by_a_tail_that_is_one_no_more_is_noticed() {
    killed(Mutant::QueryStaleTail);
}

#[test]
fn a_query_answered_by_a_tail_that_is_not_complete_is_noticed() {
    killed(Mutant::QueryIncompleteTail);
}
