//! The master's members are the hosts themselves: the one that dies may be owner and member, leader of the members too.

use agent::control::EventKind;
use understudy_tests::{Cluster, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

const HOSTS: [&str; 3] = ["a", "b", "c"];

fn launch() -> Cluster {
    let options = Options {
        members: true,
        ..Options::of(&HOSTS)
    };
    Cluster::launch(PROGRAM, options)
}

#[test]
fn an_owner_that_dies_with_its_member_of_the_master_loses_nothing() {
    let mut cluster = launch();
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    cluster.kill("a");
    cluster.wait_owner("b");
    more_answers(&client, 100);
    // The two that are left decide on the new chain, and on the order to end.
    cluster.wait_event("b", EventKind::Protected);
    cluster.wait_protected("b", &["c"]);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn a_member_that_returns_counts_again() {
    let mut cluster = launch();
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    cluster.kill("a");
    cluster.wait_owner("b");
    cluster.wait_protected("b", &["c"]);
    // Without a, its return, there would be no majority for what follows.
    cluster.start_agent("a", None);
    more_answers(&client, 50);
    cluster.kill("b");
    cluster.wait_owner("c");
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}
