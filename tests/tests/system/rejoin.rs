//! Back to as many backups as wanted, whoever was lost: what is left of a chain goes on in place, and hosts that return
//! join at its tail while the VM runs.

use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

fn protected(hosts: &[&str]) -> Cluster {
    let cluster = Cluster::launch(PROGRAM, Options::of(hosts));
    cluster.protect(&VmFile::default(), &hosts[1..]);
    cluster
}

#[test]
fn a_backup_that_returns_joins_at_the_tail_and_can_take_over() {
    for lost in ["b", "c"] {
        let other = if lost == "b" { "c" } else { "b" };
        let mut cluster = protected(&["a", "b", "c"]);
        let client = cluster.client();
        cluster.kill(lost);
        cluster.wait_protected("a", &[other]);
        more_answers(&client, 50);
        cluster.start_agent(lost, None);
        cluster.wait_protected("a", &[other, lost]);
        more_answers(&client, 50);
        // The one that was there all the time goes, and then the owner: what joined is all that is left.
        cluster.kill(other);
        cluster.wait_protected("a", &[lost]);
        more_answers(&client, 50);
        cluster.kill("a");
        cluster.wait_owner(lost);
        more_answers(&client, 100);
        check_disk(&client);
        check_survived(&cluster.stop_client(client));
    }
}

#[test]
fn any_replica_of_three_may_die_while_the_rest_goes_on() {
    for lost in ["b", "c", "d"] {
        let mut cluster = protected(&["a", "b", "c", "d"]);
        let client = cluster.client();
        cluster.kill(lost);
        let left: Vec<&str> = ["b", "c", "d"].into_iter().filter(|h| *h != lost).collect();
        cluster.wait_protected("a", &left);
        more_answers(&client, 50);
        cluster.kill("a");
        cluster.wait_owner(left[0]);
        cluster.wait_protected(left[0], &left[1..]);
        more_answers(&client, 50);
        cluster.kill(left[0]);
        cluster.wait_owner(left[1]);
        more_answers(&client, 50);
        check_disk(&client);
        check_survived(&cluster.stop_client(client));
    }
}

#[test]
fn owner_and_head_may_die_at_once() {
    let mut cluster = protected(&["a", "b", "c"]);
    let client = cluster.client();
    cluster.strike("b");
    cluster.strike("a");
    cluster.kill("a");
    cluster.kill("b");
    cluster.wait_owner("c");
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn hosts_take_turns_and_the_vm_is_protected_again_after_each() {
    let mut cluster = protected(&["a", "b", "c"]);
    let client = cluster.client();
    let mut order = vec!["a", "b", "c"];
    for _ in 0..4 {
        let dead = order.remove(0);
        cluster.kill(dead);
        cluster.wait_owner(order[0]);
        cluster.wait_protected(order[0], &order[1..]);
        cluster.start_agent(dead, None);
        order.push(dead);
        cluster.wait_protected(order[0], &order[1..]);
        more_answers(&client, 50);
        check_disk(&client);
    }
    check_survived(&cluster.stop_client(client));
}

/// A host that is lost for longer than one owner lives is not forgotten: the last one wants both back.
#[test]
fn owners_lost_one_after_the_other_both_come_back() {
    let mut cluster = protected(&["a", "b", "c"]);
    let client = cluster.client();
    for (dead, owner, left) in [("a", "b", vec!["c"]), ("b", "c", vec![])] {
        cluster.kill(dead);
        cluster.wait_owner(owner);
        if !left.is_empty() {
            cluster.wait_protected(owner, &left);
        }
        more_answers(&client, 50);
    }
    cluster.start_agent("a", None);
    cluster.wait_protected("c", &["a"]);
    cluster.start_agent("b", None);
    cluster.wait_protected("c", &["a", "b"]);
    more_answers(&client, 50);
    cluster.kill("c");
    cluster.wait_owner("a");
    cluster.wait_protected("a", &["b"]);
    more_answers(&client, 50);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

/// `protect.alone`: what a VM does once its last backup is lost, and that it is protected again when one is back.
fn alone(policy: &'static str) {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let vm = VmFile {
        alone: policy,
        ..VmFile::default()
    };
    cluster.protect(&vm, &["b"]);
    let client = cluster.client();
    cluster.kill("b");
    if policy == "run" {
        wait("the VM to run unprotected", || {
            let status = cluster.status("a")?;
            (status.chain.is_empty() && !status.protected).then_some(())
        });
        more_answers(&client, 50);
    } else {
        wait("the VM to stand still", || {
            let status = cluster.status("a")?;
            status.state().contains("frozen").then_some(())
        });
        let before = client.progress().acked;
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(client.progress().acked, before, "a frozen VM says nothing");
    }
    cluster.start_agent("b", None);
    cluster.wait_protected("a", &["b"]);
    more_answers(&client, 50);
    cluster.kill("a");
    cluster.wait_owner("b");
    more_answers(&client, 50);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn without_a_backup_a_vm_runs_on_if_it_may() {
    alone("run");
}

#[test]
fn without_a_backup_a_vm_stands_still_if_it_must() {
    alone("freeze");
}
