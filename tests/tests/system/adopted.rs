//! A VM's process outlives its agent: the next one goes on with it, and clients do not notice.

use agent::control::{EventKind, Role};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

fn takeovers(cluster: &Cluster, hosts: &[&str]) -> usize {
    let events = hosts.iter().flat_map(|host| cluster.events(host));
    events.filter(|e| e.kind == EventKind::Activated).count()
}

pub(crate) fn kill_agent(cluster: &Cluster, host: &str) {
    let killed = cluster.lab().kill_agent(host);
    killed.unwrap_or_else(|e| panic!("{e}"));
}

/// The VM of host `a`, once its agent answers again.
fn adopted(cluster: &Cluster) -> u32 {
    wait("a's agent to go on with its VM", || {
        let status = cluster.status("a")?;
        (status.role == Role::Owner && status.pid != 0).then_some(status.pid)
    })
}

#[test]
fn an_owners_agent_that_is_killed_costs_nothing() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    let before = cluster.status("a").expect("the VM");
    for _ in 0..3 {
        kill_agent(&cluster, "a");
        // Without an agent everything but changes goes on.
        more_answers(&client, 100);
        cluster.start_agent("a", None);
        assert_eq!(adopted(&cluster), before.pid, "the same process");
        more_answers(&client, 100);
    }
    cluster.wait_protected("a", &["b", "c"]);
    let now = cluster.status("a").expect("the VM");
    assert_eq!(now.generation, before.generation, "nothing was decided");
    assert_eq!(takeovers(&cluster, &["a", "b", "c"]), 0);
    let found = cluster.events("a");
    assert!(found.iter().any(|e| e.kind == EventKind::Adopted));
    // And the new agent is a whole one.
    cluster.kill("b");
    cluster.wait_protected("a", &["c"]);
    more_answers(&client, 100);
    cluster.kill("a");
    cluster.wait_owner("c");
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn all_agents_may_be_exchanged_at_once() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    more_answers(&client, 100);
    let pid = cluster.status("a").expect("the VM").pid;
    for host in ["a", "b", "c"] {
        kill_agent(&cluster, host);
    }
    for host in ["a", "b", "c"] {
        cluster.start_agent(host, None);
    }
    assert_eq!(adopted(&cluster), pid, "with all of its memory");
    cluster.wait_protected("a", &["b", "c"]);
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn an_agent_that_does_not_come_back_is_waited_for_and_then_a_backup_takes_over() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    kill_agent(&cluster, "a");
    let path = cluster.path("a.toml");
    let text = std::fs::read_to_string(&path).expect("a's configuration");
    std::fs::write(&path, format!("agent_return_s = 1\n{text}")).expect("a's configuration");
    cluster.start_agent("a", None);
    cluster.protect(&VmFile::default(), &["b"]);
    let client = cluster.client();
    more_answers(&client, 100);
    let pid = cluster.status("a").expect("the VM").pid;
    kill_agent(&cluster, "a");
    cluster.wait_owner("b");
    more_answers(&client, 100);
    wait("the process left behind to end", || {
        // Its parent is gone: this process is to wait for it.
        agent::lab::process::is_gone(pid).then_some(())
    });
    cluster.start_agent("a", None);
    cluster.wait_protected("b", &["a"]);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
    assert!(cluster.status_of(VM, "a").is_some());
}
