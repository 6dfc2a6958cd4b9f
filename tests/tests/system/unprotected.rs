//! I5 while protection is missing: a VM whose only complete machine died may be gone, but it never comes back as an older
//! self that has forgotten what it told its clients.
//!
//! Once no backup is left, output flows; the master has recorded so before. A replica that still has a checkpoint from
//! before must not be resumed from then.

use std::time::{Duration, Instant};

use agent::control::{Request, Role};
use guest::proto::Op;
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{mix, more_answers, seed, told};

/// `host` may take the VM over if it has everything; otherwise it has to refuse.
fn resumes_only_what_was_told(cluster: &Cluster, host: &str, told: u64) {
    if let Err(why) = cluster
        .control(host)
        .order(&Request::Failover { vm: VM.into() })
    {
        println!("{host} refuses: {why}");
        if cluster.status(host).is_none_or(|s| s.role != Role::Owner) {
            return;
        }
    }
    cluster.wait_owner(host);
    let counter = cluster.ask(Op::Read).counter;
    assert!(
        counter >= told,
        "the client was told {told}, {host} resumed a machine that only knows {counter}"
    );
}

/// b takes over from a while c stands still, goes on unprotected, and dies; c still has what a sent it.
#[test]
fn what_is_left_of_an_older_generation_is_not_resumed() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    cluster.freeze("c");
    cluster.kill("a");
    let generation = cluster.wait_owner("b").generation;
    more_answers(&client, 100);
    cluster.kill("b");
    let told = told(&client);
    cluster.thaw("c");
    // It learns that b has gone on without it, and gives its replica up; or is asked before it has.
    wait("c to learn of b's generation", || {
        let status = cluster.status("c");
        status
            .is_none_or(|s| s.generation >= generation)
            .then_some(())
    });
    resumes_only_what_was_told(&cluster, "c", told);
}

/// The owner dies at any moment while it makes do without a backup that died just before.
#[test]
fn an_owner_that_dies_during_repair_is_not_resumed_as_an_older_self() {
    let mut random = seed();
    for _ in 0..5 {
        let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
        cluster.protect(&VmFile::default(), &["b", "c"]);
        let client = cluster.client();
        cluster.strike("c");
        let delay = Duration::from_micros(mix(&mut random) % 600_000);
        std::thread::sleep(delay);
        println!("{delay:?} later: {:?}", cluster.status("a"));
        cluster.kill("a");
        let told = told(&client);
        // It takes over by itself, or has nothing to resume; then it is asked to.
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until && cluster.status("b").is_some_and(|s| s.failover.is_none()) {
            std::thread::sleep(Duration::from_millis(20));
        }
        resumes_only_what_was_told(&cluster, "b", told);
    }
}
