//! I1, output commit, on the wire: no frame of an epoch leaves the owner before its checkpoint is acknowledged.
//!
//! The backups stand still and the owner's cable to them is pulled, so that nothing can be acknowledged; the client's
//! requests go on arriving. What the owner's host sends into the guest LAN is watched there.
//!
//! Switched off: `UNDERSTUDY_BREAK=output-commit` on the owner, whose gate then lets frames out when their epoch is
//! sealed (`Gate::break_output_commit`). Answers must then be seen to leave, and to be lost with the owner.

use std::time::Duration;

use agent::child::monotonic_us;
use agent::control::EventKind;
use agent::probe::ProbeReport;
use guest::proto::Op;
use understudy_tests::{Capture, Cluster, GUEST_MAC, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers, told};

/// Longer than anything is under way that left before the acknowledgements ended.
const SETTLED: Duration = Duration::from_millis(500);
/// How long is watched then: hundreds of the client's requests, tens of epochs.
const WATCHED: Duration = Duration::from_secs(2);

/// Epochs go on being sealed while none is acknowledged: this many times 100 ms are longer than the watch.
const SEALING: VmFile = VmFile {
    number: 1,
    disk_bytes: 8 << 20,
    memory_mib: 64,
    vcpus: 1,
    pages: 16,
    work: 20_000,
    epoch_ms: 100,
    max_in_flight: 64,
    alone: "run",
    retain: 1,
    durability: "memory",
};

struct Outcome {
    /// Requests acknowledged while nothing could be committed.
    acked: u64,
    /// The guest's frames that left meanwhile.
    frames: usize,
    /// The newest counter that the client was told before the owner died.
    told: u64,
    /// The counter as the new owner's guest has it.
    counter: u64,
    /// The client's books.
    report: ProbeReport,
}

fn unheard(broken: &[(&str, &str)]) -> Outcome {
    let hosts = ["a", "b", "c"];
    let mut cluster = Cluster::launch(
        PROGRAM,
        Options {
            broken,
            ..Options::of(&hosts)
        },
    );
    cluster.protect(&SEALING, &["b", "c"]);
    let wire = Capture::from_host(cluster.network(), "a");
    let client = cluster.client();
    assert!(!wire.of(GUEST_MAC).is_empty(), "the wire is not watched");
    cluster.freeze("b");
    cluster.freeze("c");
    cluster.network().plug("a", false);
    std::thread::sleep(SETTLED);
    let (before, since_us) = (client.progress().acked, monotonic_us());
    std::thread::sleep(WATCHED);
    let (acked, frames) = (
        client.progress().acked - before,
        wire.of_after(GUEST_MAC, since_us),
    );
    // The owner dies with what it did not get rid of.
    cluster.kill("a");
    let told = told(&client);
    cluster.thaw("b");
    cluster.thaw("c");
    cluster.wait_owner("b");
    if broken.is_empty() {
        more_answers(&client, 50);
        check_disk(&client);
    }
    let counter = cluster.ask(Op::Read).counter;
    Outcome {
        acked,
        frames,
        told,
        counter,
        report: cluster.stop_client(client),
    }
}

#[test]
fn nothing_leaves_the_owner_that_is_not_acknowledged() {
    let outcome = unheard(&[]);
    assert_eq!((outcome.acked, outcome.frames), (0, 0));
    assert!(outcome.counter >= outcome.told);
    check_survived(&outcome.report);
}

#[test]
fn without_output_commit_the_check_notices() {
    let outcome = unheard(&[("a", "output-commit")]);
    assert!(
        outcome.acked > 0 && outcome.frames > 0,
        "{} requests acknowledged, {} frames",
        outcome.acked,
        outcome.frames
    );
    assert!(!outcome.report.survived(), "{:#?}", outcome.report);
    assert!(
        outcome.counter < outcome.told,
        "told {}, the new owner has {}",
        outcome.told,
        outcome.counter
    );
}

/// FIELD C2: a replica that stands still is missed, whatever connections it accepts; the rest goes on, and it comes back.
#[test]
fn c2_a_frozen_tail_is_left_out_and_comes_back() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&SEALING, &["b", "c"]);
    let client = cluster.client();
    let generation = cluster.status("a").expect("the VM").generation;
    cluster.freeze("c");
    cluster.wait_protected("a", &["b"]);
    more_answers(&client, 100);
    let status = cluster.status("a").expect("the VM");
    assert!(status.generation > generation, "the master has decided it");
    let why = status.lacking.iter().find(|(host, _)| host == "c");
    let why = why.and_then(|(_, why)| why.clone()).unwrap_or_default();
    assert!(why.contains("does not answer"), "{status:?}");
    cluster.thaw("c");
    cluster.wait_protected("a", &["b", "c"]);
    more_answers(&client, 100);
    let events = ["a", "b", "c"].map(|host| cluster.events(host)).concat();
    assert!(
        !events.iter().any(|e| e.kind == EventKind::Activated),
        "nobody took over"
    );
    check_survived(&cluster.stop_client(client));
}
