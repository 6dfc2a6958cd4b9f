//! H19, loss is not death: packets between the hosts are lost, and nobody is suspected.
//!
//! Without heartbeats by datagram (their port closed, below) the same losses must be taken for deaths: a connection is
//! held up for 200 ms by each, which is longer than the silence that is waited for here.

use std::process::Command;

use agent::control::EventKind;
use understudy_tests::{Cluster, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

const HOSTS: [&str; 2] = ["a", "b"];
/// Answers to the client under loss. The owner's stream of checkpoints stands still some hundred times meanwhile.
const ANSWERS: u64 = 3000;

fn iptables(cluster: &Cluster, host: &str, rule: &str) {
    let run = || Command::new("iptables").args(rule.split(' ')).output();
    let output = cluster.network().within(host, run);
    let output = output.unwrap_or_else(|e| panic!("iptables: {e}"));
    assert!(
        output.status.success(),
        "iptables {rule}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

/// A protected VM whose hosts lose one packet in fifty of those that they receive from each other.
fn lossy() -> Cluster {
    let options = Options {
        missed: 15,
        ..Options::of(&HOSTS)
    };
    let cluster = Cluster::launch(PROGRAM, options);
    cluster.protect(&VmFile::default(), &HOSTS[1..]);
    for host in HOSTS {
        let rule = "-A INPUT -i repl -m statistic --mode random --probability 0.02 -j DROP";
        iptables(&cluster, host, rule);
    }
    cluster
}

fn suspected(cluster: &Cluster) -> usize {
    let events = cluster.events("b");
    events
        .iter()
        .filter(|e| e.kind == EventKind::Suspected)
        .count()
}

#[test]
#[ignore = "needs iptables"]
fn h19_lost_packets_are_not_taken_for_a_lost_host() {
    let cluster = lossy();
    let client = cluster.client();
    more_answers(&client, ANSWERS);
    assert_eq!(suspected(&cluster), 0);
    let status = cluster.status("a").expect("the VM");
    assert_eq!(status.role, "owner");
    check_survived(&cluster.stop_client(client));
}

#[test]
#[ignore = "needs iptables"]
fn h19_without_datagrams_the_check_notices() {
    let cluster = lossy();
    for host in HOSTS {
        iptables(&cluster, host, "-I INPUT -i repl -p udp -j DROP");
    }
    let client = cluster.client();
    more_answers(&client, ANSWERS);
    assert!(suspected(&cluster) > 0, "the mutant went unnoticed");
}
