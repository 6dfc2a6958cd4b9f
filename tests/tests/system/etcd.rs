//! Decisions in etcd, by whole hosts: an owner is followed by a backup, hosts come back; and while etcd is gone nothing is
//! decided and nothing lost.

use understudy_tests::cluster::MASTER;
use understudy_tests::{Cluster, Options, PATIENCE, VmFile};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

#[test]
fn hosts_that_decide_in_etcd_survive_each_other_and_etcd() {
    let mut cluster = Cluster::launch(
        PROGRAM,
        Options {
            etcd: true,
            ..Options::of(&["a", "b", "c"])
        },
    );
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    cluster.kill("a");
    cluster.wait_owner("b");
    cluster.wait_protected("b", &["c"]);
    cluster.start_agent("a", None);
    cluster.wait_protected("b", &["c", "a"]);
    more_answers(&client, 50);
    // Without etcd a whole chain goes on; one that breaks holds its output until somebody can decide.
    cluster.kill(MASTER);
    more_answers(&client, 50);
    let generation = cluster.status("b").expect("its status").generation;
    cluster.kill("a");
    let before = client.progress().acked;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let held = client.progress().acked;
    assert!(
        held <= before + 5,
        "{} answers that no chain has",
        held - before
    );
    assert_eq!(
        cluster.status("b").expect("its status").generation,
        generation
    );
    cluster.start_agent(MASTER, None);
    cluster.wait_protected("b", &["c"]);
    assert!(client.wait_acked(held + 50, PATIENCE), "it goes on");
    cluster.kill("b");
    cluster.wait_owner("c");
    more_answers(&client, 50);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}
