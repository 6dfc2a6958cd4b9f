//! A VM is stopped and started, deleted and made again: what it had acknowledged is there each time, and nothing of an earlier
//! life is in the way.

use agent::control::{EventKind, Reply, Request, Role};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers, told};

fn order(cluster: &Cluster, host: &str, request: &Request) {
    let done = cluster.control(host).order(request);
    done.unwrap_or_else(|e| panic!("{host}: {request:?}: {e}"));
}

fn stop(cluster: &Cluster, host: &str) {
    order(cluster, host, &Request::Stop { vm: VM.into() });
    let status = cluster.status(host).expect("a VM that is off is known");
    assert_eq!((status.role, status.pid), (Role::Off, 0));
}

/// FIELD L1 and L2.
#[test]
fn a_stopped_vm_starts_from_its_newest_disks_and_is_protected_by_the_same_hosts() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    let file = VmFile::default();
    let toml = file.write(cluster.dir());
    cluster.start_vm_on("a", toml.clone());
    cluster.protect_vm_of(VM, "a", &["b", "c"]);
    let client = cluster.client();
    more_answers(&client, 100);
    // The newest disks are with `b` from here on; `a`'s image, which the file names, is older.
    let moved = cluster
        .control("a")
        .call(&Request::HandOver { vm: VM.into() });
    assert!(matches!(moved, Ok(Reply::Switched(_))), "{moved:?}");
    cluster.wait_owner("b");
    more_answers(&client, 100);
    check_disk(&client);
    let acknowledged = told(&client);
    drop(cluster.stop_client(client));
    stop(&cluster, "b");
    // Not from an older image, whoever is asked.
    let start = Request::Start {
        toml,
        name: "vm.toml".into(),
    };
    let refused = cluster.control("a").order(&start).expect_err("b has them");
    assert!(
        refused.to_string().contains("newest disks are on b"),
        "{refused}"
    );
    let again = Request::StartAgain { vm: VM.into() };
    order(&cluster, "b", &again);
    let client = cluster.client();
    more_answers(&client, 50);
    assert!(
        told(&client) >= acknowledged,
        "{acknowledged} was acknowledged"
    );
    cluster.wait_protected("b", &["a", "c"]);
    check_disk(&client);
    cluster.kill("b");
    cluster.wait_owner("a");
    more_answers(&client, 50);
    check_survived(&cluster.stop_client(client));
}

/// FIELD L2 and I1: another VM of the same name is another VM.
#[test]
fn a_name_has_a_life_and_then_another() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    for life in 0..3 {
        cluster.protect(&VmFile::default(), &["b"]);
        let client = cluster.client();
        more_answers(&client, 50);
        check_survived(&cluster.stop_client(client));
        stop(&cluster, "a");
        order(&cluster, "a", &Request::Delete { vm: VM.into() });
        wait("nobody to know it", || {
            let known = |host| cluster.status(host).is_some();
            (!known("a") && !known("b")).then_some(())
        });
        let events = cluster.events("b");
        let aside = events.iter().filter(|e| e.text.contains("put aside"));
        assert_eq!(aside.count(), life, "what the one before left is kept");
    }
}

/// A host whose agent comes back knows that its VM is off.
#[test]
fn a_vm_that_is_off_stays_so() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    cluster.protect(&VmFile::default(), &["b"]);
    stop(&cluster, "a");
    cluster.kill("a");
    cluster.start_agent("a", None);
    wait("a to know that it is off", || {
        (cluster.status("a")?.role == Role::Off).then_some(())
    });
    let resumed = [EventKind::Activated, EventKind::Orphaned];
    for host in ["a", "b"] {
        let events = cluster.events(host);
        assert!(!events.iter().any(|e| resumed.contains(&e.kind)), "{host}");
    }
    order(&cluster, "a", &Request::StartAgain { vm: VM.into() });
    let client = cluster.client();
    more_answers(&client, 50);
    check_survived(&cluster.stop_client(client));
}
