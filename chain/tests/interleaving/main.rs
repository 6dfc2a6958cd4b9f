//! The production machines (replicas and master) in random, seeded interleavings: hosts crash and come back, links
//! break, stores fail, views arrive late, anybody suspects anybody at any time. What the outside sees must at every
//! instant be one history that the newest owner has.
//!
//! Each protective mechanism is also switched off in turn, to see that the checks notice: see `mutants`.
//!
//! `CHAIN_SEEDS=100000 cargo test -p chain --test interleaving --release` runs longer; a failure names its seed, and
//! `CHAIN_SEED=<seed>` replays exactly that one with its story.

mod agents;
mod frames;
mod owner;
mod owning;
mod world;

use world::{Counts, Mutant, World};

const STEPS: usize = 1000;

fn run(seed: u64, mutant: Mutant) -> Result<Counts, String> {
    let mut world = World::new(seed, mutant);
    for step in 0..STEPS {
        if let Err(why) = world.step().and_then(|()| world.check()) {
            return Err(format!(
                "seed {seed}, step {step}: {why}\n{}",
                world.story.join("\n")
            ));
        }
    }
    Ok(world.counts)
}

fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("CHAIN_SEED") {
        return seed..seed + 1;
    }
    0..number("CHAIN_SEEDS").unwrap_or(1500)
}

#[test]
fn no_interleaving_loses_what_was_acknowledged_or_lets_two_owners_speak() {
    let mut total = Counts::default();
    let seeds = seeds();
    let one = seeds.end - seeds.start == 1;
    for seed in seeds {
        match run(seed, Mutant::None) {
            Ok(counts) => total.add(&counts),
            Err(why) => panic!("{why}"),
        }
    }
    println!("{total:?}");
    // A world in which nothing happens proves nothing.
    if !one {
        for (what, count, least) in [
            ("commits", total.commits, 10_000),
            ("takeovers", total.takeovers, 500),
            ("takeovers refused", total.refused, 100),
            ("crashes", total.crashes, 500),
            ("reconfigurations", total.reconfigurations, 1000),
            ("continued in place", total.continued, 100),
            ("failed replicas", total.failures, 100),
            ("resumed after a lost answer", total.resumed, 10),
            ("owners told by a refusal", total.fenced, 50),
        ] {
            assert!(count >= least, "only {count} {what}: {total:?}");
        }
    }
}

/// Finds a seed that shows the mutant up.
fn killed(mutant: Mutant, expected: &str) {
    const SEEDS: u64 = 20_000;
    for seed in 0..SEEDS {
        if let Err(why) = run(seed, mutant) {
            assert!(
                why.contains(expected),
                "{mutant:?} was noticed, but for another reason: {why}"
            );
            return;
        }
    }
    panic!("{mutant:?} went unnoticed in {SEEDS} seeds");
}

mod mutants {
    use super::*;

    #[test]
    fn i1_acknowledging_before_processing_is_noticed() {
        killed(Mutant::AckBeforeProcessed, "lost");
    }

    #[test]
    fn i2_forwarding_the_end_before_preparing_is_noticed() {
        killed(Mutant::ForwardEndEarly, "I2");
    }

    #[test]
    fn i3_telling_checkpoints_apart_by_number_only_is_noticed() {
        killed(Mutant::AnyBase, "is not what the owner sent");
    }

    #[test]
    fn i4_listening_to_old_generations_is_noticed() {
        killed(Mutant::AnyGeneration, "");
    }

    #[test]
    fn i4_a_master_that_does_not_compare_generations_is_noticed() {
        killed(Mutant::NoCompare, "");
    }

    #[test]
    fn i5_not_freezing_before_asking_is_noticed() {
        killed(Mutant::AskWithoutFreezing, "lost");
    }

    #[test]
    fn i5_resuming_from_an_earlier_configuration_is_noticed() {
        killed(Mutant::ResumeOutdated, "lost");
    }
}
