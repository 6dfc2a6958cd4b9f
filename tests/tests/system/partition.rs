//! I4, one voice: an owner that is cut off from backups and master, but not from its clients, is not heard once a backup
//! has taken over.
//!
//! Its guest runs on and is spoken to: the client keeps asking who has the guest's address, by broadcast, which both
//! guests hear. What the old owner's host sends into the guest LAN is watched there.
//!
//! Switched off: `UNDERSTUDY_BREAK=hold` on the old owner, which then never holds output (`Owner::checkpoint`). The
//! same watch must then see its frames.

use std::time::Duration;

use agent::control::{EventKind, Role};
use understudy_tests::{Capture, Cluster, GUEST, GUEST_MAC, Injector, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

/// Questions the stale guest is asked after the takeover.
const QUESTIONS: u32 = 40;

struct Partition {
    cluster: Cluster,
    client: agent::probe::ProbeClient,
    wire: Capture,
    /// When the master gave the VM to b, CLOCK_MONOTONIC.
    decided_us: u64,
}

/// a is cut off; b has taken over; both guests have been spoken to since.
fn partition(broken: &[(&str, &str)]) -> Partition {
    let hosts = ["a", "b", "c"];
    let cluster = Cluster::launch(
        PROGRAM,
        Options {
            broken,
            ..Options::of(&hosts)
        },
    );
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let wire = Capture::from_host(cluster.network(), "a");
    let client = cluster.client();
    assert!(!wire.of(GUEST_MAC).is_empty(), "the wire is not watched");
    let injector = Injector::at_client(cluster.network());
    cluster.network().plug("a", false);
    let failover = cluster.wait_owner("b").failover.expect("a report");
    let status = cluster.status("a").expect("the old owner's VM");
    assert_eq!(status.role, Role::Owner, "a cannot know yet: {status:?}");
    for _ in 0..QUESTIONS {
        injector.who_has(GUEST);
        std::thread::sleep(Duration::from_millis(50));
    }
    Partition {
        cluster,
        client,
        wire,
        decided_us: failover.decided_us,
    }
}

#[test]
fn a_stale_owner_is_not_heard_and_stops_when_it_learns() {
    let p = partition(&[]);
    more_answers(&p.client, 100);
    assert_eq!(
        p.wire.of_after(GUEST_MAC, p.decided_us),
        0,
        "frames of the stale owner"
    );
    let stale = p.cluster.status("a").expect("the old owner's VM").pid;
    p.cluster.network().plug("a", true);
    p.cluster.wait_event("a", EventKind::Superseded);
    wait("the stale VM's process to end", || {
        (!std::path::Path::new(&format!("/proc/{stale}")).exists()).then_some(())
    });
    more_answers(&p.client, 100);
    check_disk(&p.client);
    check_survived(&p.cluster.stop_client(p.client));
}

#[test]
fn without_holding_output_the_check_notices() {
    let p = partition(&[("a", "hold")]);
    let heard = p.wire.of_after(GUEST_MAC, p.decided_us);
    assert!(
        heard > 0,
        "the stale guest answered none of {QUESTIONS} questions"
    );
}
