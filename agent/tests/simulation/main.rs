//! A whole cluster in random, seeded interleavings (`tests/cluster`): hosts crash with and without what they had, links
//! break, hosts are parted, disks are slow or fail, configurations arrive late or never, anybody suspects anybody at any
//! time, administrators order other backups and takeovers. Each host runs the shipped agent's machine. After every step what
//! must hold at every instant is checked; then the faults end, and the VM has to be protected again. The same once more with
//! agents that are free to ask for anything at any time: what the chain withstands is no merit of its agents.
//!
//! `scripts/simulate` runs longer. A failure names its seed: `CHAIN_SEED=<seed>` replays exactly that one, with its story.

#[path = "../cluster/mod.rs"]
mod cluster;

mod calm;
mod linear;
mod mutants;
mod scenarios;
mod stepper;

use cluster::{Agents, Counts, Mutant};
use stepper::Stepper;

fn run(seed: u64, agents: Agents, mutant: Mutant, story: bool) -> Result<Counts, String> {
    let mut stepper = Stepper::new(seed, agents, mutant, story);
    let result = stepper.storm().and_then(|()| stepper.calm());
    let world = &stepper.world;
    result
        .map(|()| world.counts.0)
        .map_err(|why| format!("{}\nseed {seed}, {why}", world.story.0.join("\n")))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds() -> std::ops::Range<u64> {
    if let Some(seed) = number("CHAIN_SEED") {
        return seed..seed + 1;
    }
    let from = number("CHAIN_FROM").unwrap_or(0);
    from..from + number("CHAIN_SEEDS").unwrap_or(500)
}

fn all_seeds(agents: Agents, test: &str) -> (u64, Counts) {
    let mut total = Counts::default();
    let seeds = seeds();
    let count = seeds.end - seeds.start;
    for seed in seeds {
        match run(seed, agents, Mutant::None, false) {
            Ok(counts) => total.add(&counts),
            Err(why) => {
                let story = run(seed, agents, Mutant::None, true)
                    .err()
                    .unwrap_or_default();
                panic!(
                    "{story}\n{why}\nreplay: CHAIN_SEED={seed} cargo test -p agent --test simulation {test}"
                );
            }
        }
    }
    println!("{count} seeds: {total:?}");
    (count, total)
}

/// A world in which nothing happens proves nothing: how often at least, in a hundred seeds.
fn at_least(count: u64, seen: &[(&str, u64, u64)]) {
    for (what, seen, in_a_hundred) in seen {
        let least = in_a_hundred * count / 100;
        assert!(count < 500 || *seen >= least, "only {seen} {what}");
    }
}

fn of_the_chain(total: &Counts) -> [(&'static str, u64, u64); 13] {
    [
        ("commits", total.commits, 1500),
        ("takeovers", total.takeovers, 100),
        ("refusals", total.refused, 30),
        ("owners superseded", total.superseded, 30),
        ("crashes", total.crashes, 100),
        ("stores recovered", total.recoveries, 1),
        ("partitions", total.partitions, 30),
        ("changes of the chain", total.reconfigurations, 500),
        ("chains gone on in place", total.in_place, 200),
        ("chains begun anew", total.anew, 200),
        ("chains bridged after a takeover", total.bridged, 4),
        ("checkpoints sent again", total.resent, 200),
        ("failed stores", total.failures, 10),
    ]
}

#[test]
fn no_interleaving_loses_what_was_acknowledged_and_all_comes_right_again() {
    let (count, total) = all_seeds(Agents::Shipped, "no_interleaving");
    at_least(count, &of_the_chain(&total));
    at_least(
        count,
        &[
            ("replicas fed", total.feeds, 80),
            ("replicas joined", total.joins, 40),
            ("orders", total.orders, 300),
            ("planned switchovers begun", total.switches, 3),
            ("boots from disks", total.booted, 10),
            ("VMs stopped", total.stopped, 5),
            ("VMs started", total.started, 5),
            ("guests switched off", total.powered_off, 10),
            ("guests booted again", total.rebooted, 10),
            ("VMs given up by their owners", total.given_up, 4),
            ("VMs configured anew", total.applied, 10),
            ("VMs unprotected by order", total.unprotected, 4),
            ("agents that died", total.agents_died, 40),
            ("processes adopted", total.adopted, 4),
        ],
    );
}

#[test]
fn whatever_agents_ask_for_nothing_is_lost() {
    let (count, total) = all_seeds(Agents::Free, "whatever_agents");
    at_least(count, &of_the_chain(&total));
    at_least(
        count,
        &[
            ("resumed after a lost answer", total.resumed, 50),
            ("replicas fed", total.feeds, 80),
            ("replicas joined", total.joins, 20),
        ],
    );
}
