//! Members of the production code in random, seeded worlds: links break and lose what was under way, delay and repeat,
//! networks fall apart, members crash before and after their writes, disks fail.
//!
//! `PAXOS_SEEDS=20000 cargo test -p chain --release paxos::sim` runs longer; a failure names its seed, and
//! `PAXOS_SEED=<seed>` replays exactly that one with its story.

mod world;

use world::{Counts, Mutant, World};

const STEPS: usize = 4000;

fn run(seed: u64, mutant: Mutant) -> Result<Counts, String> {
    let mut world = World::new(seed, mutant);
    let mut all = || {
        for _ in 0..STEPS {
            world.step()?;
        }
        world.heal()
    };
    let result = all();
    let tail = world.story.len().saturating_sub(60);
    result.map_err(|why| {
        format!(
            "PAXOS_SEED={seed}: {why}\n{}",
            world.story[tail..].join("\n")
        )
    })?;
    Ok(world.counts)
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("PAXOS_SEED") {
        return seed..seed + 1;
    }
    0..number("PAXOS_SEEDS").unwrap_or(default)
}

#[test]
fn i4_members_agree_whatever_happens_and_go_on_when_it_is_over() {
    let mut total = Counts::default();
    let seeds = seeds(60);
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
            ("entries decided", total.decided, 5_000),
            ("answers", total.answered, 2_000),
            ("reads", total.reads, 1_000),
            ("takeovers granted", total.granted, 100),
            ("takeovers refused", total.refused, 100),
            ("requests given up", total.undecided, 50),
            ("crashes", total.crashes, 500),
            (
                "crashes between write and sending",
                total.crashes_written,
                50,
            ),
            ("broken links", total.breaks, 500),
            ("partitions", total.partitions, 300),
            ("failed disks", total.failed_disks, 10),
            ("leaders", total.leaders, 200),
            ("states sent whole", total.snapshots, 100),
            ("messages repeated", total.repeated, 500),
        ] {
            assert!(count >= least, "only {count} {what}: {total:?}");
        }
    }
}

#[test]
fn a_seed_replays_exactly() {
    let story = |seed| {
        let mut world = World::new(seed, Mutant::None);
        for _ in 0..STEPS {
            world.step().unwrap();
        }
        world.story
    };
    assert_eq!(story(7), story(7));
    assert_ne!(story(7), story(8));
}

/// Finds a seed in which the mutant does the harm that is expected of it. It may do other harm before.
fn killed(mutant: Mutant, expected: &[&str]) {
    let mut others = Vec::new();
    for seed in 0..400 {
        if let Err(why) = run(seed, mutant) {
            let first = why.lines().next().unwrap_or_default();
            if expected.iter().any(|e| first.contains(e)) {
                return;
            }
            others.push(first.to_string());
        }
    }
    panic!("{mutant:?} did not do {expected:?} in 400 seeds, but {others:#?}");
}

#[test]
fn messages_before_the_record_is_written_are_noticed() {
    killed(Mutant::SendBeforeWriting, &["records", "differs"]);
}

#[test]
fn a_forgotten_promise_is_noticed() {
    killed(Mutant::ForgetPromise, &["records", "differs"]);
}

#[test]
fn a_member_that_begins_empty_after_damage_is_noticed() {
    killed(Mutant::BeginEmpty, &["records", "differs"]);
}

#[test]
fn reads_past_the_log_are_noticed() {
    killed(Mutant::ReadLocally, &["a read"]);
}

#[test]
fn the_librarys_differences_of_snapshots_are_noticed() {
    killed(Mutant::SendDifferences, &["differs"]);
}
