//! I4: an owner that somebody else has succeeded stops its VM.
//!
//! What it would be heard saying otherwise is in `partition`, mechanism switched off.

use agent::control::{EventKind, Request, Role};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

fn stopped(cluster: &Cluster, pid: u32) {
    cluster.wait_event("a", EventKind::Superseded);
    wait("the superseded VM's process to end", || {
        (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    });
    let role = cluster.status("a").map(|s| s.role);
    assert_ne!(role, Some(Role::Owner), "a does not own it any more");
}

#[test]
fn an_ordered_failover_stops_the_old_owner() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    let pid = cluster.status("a").expect("the VM").pid;
    cluster
        .control("b")
        .order(&Request::Failover { vm: VM.into() })
        .expect("b takes over");
    cluster.wait_owner("b");
    stopped(&cluster, pid);
    cluster.wait_protected("b", &["c"]);
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

/// When it wakes it may find an acknowledgement of its own generation that came while it stood still, and let that
/// epoch's frames out before it learns anything. They are of a checkpoint that the new owner has too, so they contradict
/// nothing; no protocol without clocks can keep them in. Hence the client's view is checked here, not the wire.
#[test]
fn an_owner_that_stood_still_stops_when_it_wakes() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    let pid = cluster.status("a").expect("the VM").pid;
    cluster.freeze("a");
    cluster.wait_owner("b");
    more_answers(&client, 50);
    cluster.thaw("a");
    stopped(&cluster, pid);
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}
