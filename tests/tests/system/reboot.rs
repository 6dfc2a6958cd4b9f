//! A guest's reset is a reset: it boots again in place, as protected as it was, and whoever takes it over finds a guest that
//! boots or has booted (FIELD L3).

use agent::control::{EventKind, Request, Role};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers, told};

fn count(cluster: &Cluster, host: &str, kind: EventKind) -> usize {
    let events = cluster.events(host);
    events.iter().filter(|e| e.kind == kind).count()
}

/// Presses the button. Whether it was too late, or who takes over was too early, does not matter.
fn press(cluster: &Cluster, host: &str) {
    let request = Request::Reboot {
        vm: VM.into(),
        timeout_s: None,
    };
    let done = cluster.control(host).order(&request);
    done.unwrap_or_else(|e| panic!("{host}: {e}"));
}

/// Resets the VM on its owner, and waits until it has booted again.
fn reset(cluster: &Cluster, owner: &str) {
    let before = count(cluster, owner, EventKind::Rebooted);
    press(cluster, owner);
    wait("the guest to be reset", || {
        (count(cluster, owner, EventKind::Rebooted) > before).then_some(())
    });
}

/// A new connection's answers: the guest has its disk's counter, not less than `acknowledged`. What it says in the end.
fn answers(cluster: &Cluster, acknowledged: u64) -> u64 {
    let client = cluster.client();
    more_answers(&client, 50);
    let now = told(&client);
    assert!(
        now >= acknowledged,
        "{acknowledged} was acknowledged, the guest is at {now}"
    );
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
    now
}

#[test]
fn l3_a_reset_guest_boots_again_in_place_and_stays_protected() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let before = cluster.status("a").expect("it runs");
    let mut acknowledged = answers(&cluster, 0);
    for _ in 0..3 {
        reset(&cluster, "a");
        acknowledged = answers(&cluster, acknowledged);
    }
    let after = cluster.status("a").expect("it runs");
    assert!(after.protected, "{}", after.state());
    assert_eq!(before.pid, after.pid);
    for host in ["b", "c"] {
        assert_eq!(count(&cluster, host, EventKind::Activated), 0, "{host}");
    }
    // One that was a standby can be reset, too.
    cluster.kill("a");
    cluster.wait_owner("b");
    acknowledged = answers(&cluster, acknowledged);
    reset(&cluster, "b");
    acknowledged = answers(&cluster, acknowledged);
    cluster.wait_protected("b", &["c"]);
    cluster.kill("b");
    cluster.wait_owner("c");
    answers(&cluster, acknowledged);
}

#[test]
fn l3_an_owner_may_die_at_any_moment_of_a_reset() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let mut acknowledged = answers(&cluster, 0);
    let mut owner = "a";
    for round in 0..6u64 {
        let next = match owner {
            "a" => "b",
            _ => "a",
        };
        press(&cluster, owner);
        // Before, while, or after it is loaded and boots; the exact moments do not matter.
        std::thread::sleep(std::time::Duration::from_millis(round * 7));
        cluster.kill(owner);
        wait("somebody to run it", || {
            ["a", "b", "c"]
                .into_iter()
                .filter(|host| *host != owner)
                .find(|host| {
                    cluster
                        .status(host)
                        .is_some_and(|s| s.role == Role::Owner && s.pid != 0)
                })
                .map(drop)
        });
        let now = ["a", "b", "c"].into_iter().filter(|host| *host != owner);
        let now = now
            .into_iter()
            .find(|host| cluster.status(host).is_some_and(|s| s.role == Role::Owner))
            .unwrap_or(next);
        acknowledged = answers(&cluster, acknowledged);
        cluster.start_agent(owner, None);
        let others: Vec<&str> = ["a", "b", "c"].into_iter().filter(|h| *h != now).collect();
        wait("all to back it up again", || {
            let status = cluster.status(now)?;
            let all = others
                .iter()
                .all(|host| status.chain.iter().any(|m| m.host == **host));
            (all && status.protected && status.joining.is_none()).then_some(())
        });
        owner = now;
    }
}
