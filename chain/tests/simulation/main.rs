//! A whole cluster in random, seeded interleavings (`tests/cluster`): hosts crash with and without what they had, links
//! break, hosts are parted, disks are slow or fail, configurations arrive late or never, anybody suspects anybody at any
//! time, owners wish for anything. After every step what must hold at every instant is checked; then the faults end, and
//! the VM has to be protected again.
//!
//! `scripts/simulate` runs longer. A failure names its seed: `CHAIN_SEED=<seed>` replays exactly that one, with its story.

#[path = "../cluster/mod.rs"]
mod cluster;

mod calm;
mod linear;
mod mutants;
mod scenarios;
mod stepper;

use cluster::{Counts, Mutant};
use stepper::Stepper;

fn run(seed: u64, mutant: Mutant, story: bool) -> Result<Counts, String> {
    let mut stepper = Stepper::new(seed, mutant, story);
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

/// Seeds in which something was found once.
#[test]
fn what_was_found_once_stays_mended() {
    // A new owner's bridge waited for ever for an ack that its head had missed while frozen.
    for seed in [10_073_883, 10_092_747, 10_137_835, 10_157_210] {
        if let Err(why) = run(seed, Mutant::None, true) {
            panic!("{why}");
        }
    }
}

#[test]
fn no_interleaving_loses_what_was_acknowledged_and_all_comes_right_again() {
    let mut total = Counts::default();
    let seeds = seeds();
    let count = seeds.end - seeds.start;
    for seed in seeds {
        match run(seed, Mutant::None, false) {
            Ok(counts) => total.add(&counts),
            Err(why) => {
                let story = run(seed, Mutant::None, true).err().unwrap_or_default();
                panic!(
                    "{story}\n{why}\nreplay: CHAIN_SEED={seed} cargo test -p chain --test simulation no_interleaving"
                );
            }
        }
    }
    println!("{count} seeds: {total:?}");
    // A world in which nothing happens proves nothing.
    if count >= 500 {
        for (what, seen, in_a_hundred) in [
            ("commits", total.commits, 1500),
            ("takeovers", total.takeovers, 100),
            ("takeovers refused", total.refused, 30),
            ("resumed after a lost answer", total.resumed, 50),
            ("owners told by a refusal", total.fenced, 30),
            ("crashes", total.crashes, 100),
            ("stores recovered", total.recoveries, 1),
            ("partitions", total.partitions, 30),
            ("changes of the chain", total.reconfigurations, 500),
            ("chains gone on in place", total.in_place, 200),
            ("chains begun anew", total.anew, 200),
            ("chains bridged after a takeover", total.bridged, 4),
            ("checkpoints sent again", total.resent, 200),
            ("replicas fed", total.feeds, 80),
            ("replicas joined", total.joins, 20),
            ("failed stores", total.failures, 10),
        ] {
            let least = in_a_hundred * count / 100;
            assert!(seen >= least, "only {seen} {what}: {total:?}");
        }
    }
}
