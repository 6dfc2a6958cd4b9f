//! H19, loss is not death: packets between the hosts are lost, and nobody is suspected.
//!
//! Without heartbeats by datagram (their port closed, below) the same losses must be taken for deaths: a connection is
//! held up for 200 ms by each, which is longer than the silence that is waited for here.

use std::process::Command;

use agent::control::{EventKind, Role};
use understudy_tests::{Cluster, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

const HOSTS: [&str; 2] = ["a", "b"];
/// Answers to the client under loss. The owner's stream of checkpoints stands still some hundred times meanwhile.
const ANSWERS: u64 = 3000;

/// What becomes of packets that `host` receives from the others: `rule` as nft has it.
fn filter(cluster: &Cluster, host: &str, table: &str, rule: &str) {
    let rules = format!(
        "table inet {table} {{\n chain in {{\n type filter hook input priority 0;\n iifname \"repl\" {rule} drop;\n }}\n}}\n"
    );
    let file = cluster.path(&format!("{host}-{table}.nft"));
    std::fs::write(&file, rules).expect("a file for the rules");
    let output = cluster.network().within(host, || {
        Command::new("nft")
            .arg("-f")
            .arg(&file)
            .output()
            .unwrap_or_else(|e| panic!("nft: {e} (package nftables)"))
    });
    assert!(
        output.status.success(),
        "nft: {}",
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
        filter(&cluster, host, "loss", "numgen random mod 50 == 0");
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
fn h19_lost_packets_are_not_taken_for_a_lost_host() {
    let cluster = lossy();
    let client = cluster.client();
    more_answers(&client, ANSWERS);
    assert_eq!(suspected(&cluster), 0);
    let status = cluster.status("a").expect("the VM");
    assert_eq!(status.role, Role::Owner);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn h19_without_datagrams_the_check_notices() {
    let cluster = lossy();
    for host in HOSTS {
        filter(&cluster, host, "pulses", "meta l4proto udp");
    }
    let client = cluster.client();
    more_answers(&client, ANSWERS);
    assert!(suspected(&cluster) > 0, "the mutant went unnoticed");
}
