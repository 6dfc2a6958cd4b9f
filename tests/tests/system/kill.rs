//! I5, nothing lost: the owner's processes are killed and a backup goes on, with everything it acknowledged and with the
//! clients' connections.
//!
//! Switched off in `output_commit` (`UNDERSTUDY_BREAK=output-commit`): the same check, `ProbeReport::survived`, then
//! finds requests lost.

use std::time::Duration;

use agent::control::EventKind;
use agent::lab::Random;
use agent::probe::{ProbeClient, ProbeReport};
use guest::proto::{Op, Request, Status};
use understudy_tests::{Cluster, Options, PATIENCE, VmFile};

use crate::PROGRAM;

/// Waits for answers from whoever runs the guest now.
pub fn more_answers(client: &ProbeClient, n: u64) {
    let progress = client.progress();
    assert!(
        client.wait_acked(progress.acked + n, PATIENCE),
        "no {n} answers more: {progress:?}, now {:?}",
        client.progress()
    );
}

/// The newest counter that the client was told.
pub fn told(client: &ProbeClient) -> u64 {
    let timeline = client.timeline();
    timeline.samples().last().map_or(0, |s| s.counter)
}

/// What the guest's disk holds, against what the client was told.
///
/// An INCR is answered when the disk has it, so the disk may not be behind any answer; and it may not be ahead of
/// memory, which gave out the number.
pub fn check_disk(client: &ProbeClient) {
    let told = told(client);
    let on_disk = client
        .call(Request::new(Op::ReadDisk, 0), PATIENCE)
        .expect("the disk is read back");
    assert_eq!(
        on_disk.status,
        Status::Ok as u16,
        "the disk's block: {on_disk:?}"
    );
    let memory = client.stats(PATIENCE).expect("the counter is read").counter;
    assert!(
        (told..=memory).contains(&on_disk.disk_counter),
        "the disk has {}, the client was told {told}, memory has {memory}",
        on_disk.disk_counter
    );
}

pub fn check_survived(report: &ProbeReport) {
    assert!(report.survived(), "{report:#?}");
    assert_eq!((report.failed, report.extra), (0, 0), "{report:#?}");
}

/// A different moment in each run; the seed is printed, and `UNDERSTUDY_SEED` gives it again.
pub fn seed() -> u64 {
    let given = std::env::var("UNDERSTUDY_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = given.unwrap_or_else(agent::lab::fresh_seed);
    println!("UNDERSTUDY_SEED={seed}");
    seed
}

/// The next number that `state`, a seed at first, gives.
pub fn mix(state: &mut u64) -> u64 {
    let mut random = Random(*state);
    let number = random.number();
    *state = random.0;
    number
}

fn kill_owner(hosts: &[&str], vm: &VmFile, random: &mut u64) {
    let backups = &hosts[1..];
    let mut cluster = Cluster::launch(PROGRAM, Options::of(hosts));
    cluster.protect(vm, backups);
    let client = cluster.client();
    std::thread::sleep(Duration::from_micros(mix(random) % 300_000));
    cluster.kill(hosts[0]);
    let status = cluster.wait_owner(backups[0]);
    let left: Vec<&str> = status.chain.iter().map(|m| m.host.as_str()).collect();
    assert_eq!(
        left,
        backups[1..],
        "the rest of the chain follows the new owner"
    );
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn nothing_is_lost_whenever_the_owner_dies() {
    let mut random = seed();
    for _ in 0..4 {
        let vm = VmFile {
            pages: 64 << (mix(&mut random) % 5),
            epoch_ms: 5 + mix(&mut random) % 60,
            ..VmFile::default()
        };
        println!("{vm:?}");
        kill_owner(&["a", "b"], &vm, &mut random);
    }
}

#[test]
fn a_chain_of_two_backups_loses_nothing() {
    kill_owner(&["a", "b", "c"], &VmFile::default(), &mut seed());
}

#[test]
fn a_chain_of_three_backups_and_two_vcpus_loses_nothing() {
    let vm = VmFile {
        vcpus: 2,
        ..VmFile::default()
    };
    kill_owner(&["a", "b", "c", "d"], &vm, &mut seed());
}

#[test]
fn a_second_failover_after_protection_is_back_loses_nothing() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    cluster.kill("a");
    let first = cluster.wait_owner("b");
    cluster.wait_event("b", EventKind::Protected);
    cluster.wait_protected("b", &["c"]);
    more_answers(&client, 50);
    cluster.kill("b");
    let second = cluster.wait_owner("c");
    assert!(second.generation > first.generation, "{first:?} {second:?}");
    let (first, second) = (
        first.failover.expect("a report"),
        second.failover.expect("a report"),
    );
    assert!(
        second.epoch > first.epoch,
        "epochs only grow, across owners too"
    );
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn a_backup_that_dies_costs_nothing_but_protection() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    cluster.kill("c");
    cluster.wait_protected("a", &["b"]);
    more_answers(&client, 50);
    cluster.kill("a");
    cluster.wait_owner("b");
    more_answers(&client, 50);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}
