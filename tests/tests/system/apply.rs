//! A VM's configuration is a file: it is applied, again and again, and what differs is what changes (FIELD L9, L10, L11).

use std::process::Output;

use agent::control::{EventKind, Role};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::adopted::kill_agent;
use crate::kill::{check_disk, check_survived, more_answers};

/// The program on a host, against its agent.
fn understudy(cluster: &Cluster, host: &str, args: &[&str]) -> Output {
    let mut command = cluster.command_on(host);
    let control = cluster.path(&format!("{host}.sock"));
    command.args(args).arg("--control").arg(control);
    command.output().expect("the program")
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// What it says; it succeeds.
fn well(cluster: &Cluster, host: &str, args: &[&str]) -> String {
    let output = understudy(cluster, host, args);
    let (out, err) = said(&output);
    assert!(output.status.success(), "{args:?}: {out}{err}");
    out
}

/// What it says on standard output and error; it fails with exit code 1.
fn badly(cluster: &Cluster, host: &str, args: &[&str]) -> (String, String) {
    let output = understudy(cluster, host, args);
    let (out, err) = said(&output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {out}{err}");
    (out, err)
}

/// Writes the file and returns its path.
fn file(cluster: &Cluster, toml: &str) -> String {
    let path = cluster.path("applied.toml");
    std::fs::write(&path, toml).unwrap();
    path.display().to_string()
}

#[test]
fn l10_a_vm_is_defined_changed_moved_and_let_go_by_its_file() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    let toml = VmFile::default().write(cluster.dir());
    let path = file(&cluster, &toml);
    // Defined: off, and here.
    let out = well(&cluster, "a", &["apply", &path, "--dry-run"]);
    assert!(out.contains("would be defined"), "{out}");
    assert!(cluster.status("a").is_none());
    let out = well(&cluster, "a", &["define", &path]);
    assert!(out.contains("vm is defined"), "{out}");
    assert_eq!(cluster.status("a").expect("a VM").role, Role::Off);
    let out = well(&cluster, "a", &["apply", &path]);
    assert_eq!(out, "vm is configured like this already\n");
    well(&cluster, "a", &["start", VM]);
    let client = cluster.client();
    more_answers(&client, 20);
    // The same file again, and again (L9).
    for _ in 0..2 {
        let out = well(&cluster, "a", &["protect", &path, "--backups", "b"]);
        assert!(out.contains("vm is protected by b"), "{out}");
    }
    let generation = cluster.status("a").unwrap().generation;
    // What counts at once, and what does not.
    let changed = toml
        .replace("epoch_ms = 25", "epoch_ms = 30")
        .replace("memory_mib = 64", "memory_mib = 96");
    assert_ne!(changed, toml);
    let path = file(&cluster, &changed);
    let (out, err) = badly(&cluster, "a", &["apply", &path]);
    assert!(
        out.contains("protect.epoch_ms: 25 -> 30 (now)")
            && out.contains("memory_mib: 64 -> 96 (not while it runs)"),
        "{out}"
    );
    assert!(
        err.contains("memory_mib can be changed only while it is off"),
        "{err}"
    );
    cluster.wait_protected("a", &["b"]);
    let status = cluster.status("a").unwrap();
    assert_eq!(status.generation, generation + 1);
    more_answers(&client, 20);
    // Other backups: they join before the old one leaves.
    let path = file(&cluster, &format!("{toml}backups = [\"c\"]\n"));
    let lost = |kind| {
        cluster
            .events("a")
            .iter()
            .filter(|e| e.kind == kind)
            .count()
    };
    let protected = lost(EventKind::Protected);
    well(&cluster, "a", &["apply", &path]);
    cluster.wait_protected("a", &["c"]);
    more_answers(&client, 20);
    assert!(lost(EventKind::Protected) >= protected, "in place");
    let anew = cluster
        .events("a")
        .into_iter()
        .any(|e| e.text.contains("begin anew"));
    assert!(!anew, "never unprotected");
    // A backup that does not exist: nothing is done (L11).
    let path = file(&cluster, &format!("{toml}backups = [\"nobody\"]\n"));
    let (_, err) = badly(&cluster, "a", &["apply", &path]);
    assert!(err.contains("\"nobody\" is not among"), "{err}");
    // Another set of disks is another VM.
    let path = file(&cluster, &toml.replace("vm.img", "other.img"));
    let (_, err) = badly(&cluster, "a", &["apply", &path]);
    assert!(
        err.contains("disk[0].path belongs to the VM for life"),
        "{err}"
    );
    // Not where it does not run.
    let (_, err) = badly(&cluster, "b", &["apply", &path]);
    assert!(err.contains("ask that host's agent"), "{err}");
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn l10_what_cannot_be_changed_while_it_runs_is_changed_while_it_is_off() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let toml = VmFile::default().write(cluster.dir());
    let path = file(&cluster, &toml);
    well(&cluster, "a", &["protect", &path, "--backups", "b"]);
    let client = cluster.client();
    more_answers(&client, 20);
    check_survived(&cluster.stop_client(client));
    well(&cluster, "a", &["stop", VM, "--now"]);
    let path = file(
        &cluster,
        &toml.replace("memory_mib = 64", "memory_mib = 96"),
    );
    let (_, err) = badly(&cluster, "a", &["start", &path]);
    assert!(err.contains("understudy apply"), "{err}");
    let out = well(&cluster, "a", &["apply", &path]);
    assert!(
        out.contains("memory_mib: 64 -> 96 (when it is started)"),
        "{out}"
    );
    well(&cluster, "a", &["start", &path]);
    // Those that backed it up do so again, with as much memory.
    cluster.wait_protected("a", &["b"]);
    let client = cluster.client();
    more_answers(&client, 20);
    cluster.strike("a");
    cluster.wait_owner("b");
    more_answers(&client, 20);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

/// Protection that was ended stays so, whatever the file names; the VM runs on meanwhile, and nothing of it is lost.
#[test]
fn unprotect_takes_the_backups_away_until_they_are_ordered_again() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let toml = VmFile::default().write(cluster.dir());
    let path = file(&cluster, &format!("{toml}backups = [\"b\"]\n"));
    well(&cluster, "a", &["protect", &path]);
    let client = cluster.client();
    more_answers(&client, 20);
    let out = well(&cluster, "a", &["unprotect", VM]);
    assert!(out.contains("has no backups any more"), "{out}");
    let status = cluster.status("a").unwrap();
    assert!(!status.protected && status.chain.is_empty(), "{status:?}");
    assert!(status.lacking.is_empty(), "{status:?}");
    more_answers(&client, 20);
    wait("b to hold nothing of it", || {
        cluster.status("b").is_none().then_some(())
    });
    // An agent that is started again does not bring them back.
    kill_agent(&cluster, "a");
    cluster.start_agent("a", None);
    let status = wait("a to have it again", || {
        cluster.status("a").filter(|s| s.pid != 0)
    });
    assert!(
        !status.protected && status.lacking.is_empty() && !status.pending,
        "{status:?}"
    );
    more_answers(&client, 20);
    let out = well(&cluster, "a", &["protect", VM]);
    assert!(out.contains("vm is protected by b"), "{out}");
    cluster.strike("a");
    cluster.wait_owner("b");
    more_answers(&client, 20);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

/// FIELD L8: an order of which nobody heard the outcome is not given twice.
#[test]
fn l8_an_order_that_is_repeated_under_its_id_is_not_carried_out_twice() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let id = "6f0c1f54-0e1d-4a57-9d6e-2b8f7c3a1d42";
    let generation = cluster.status("a").unwrap().generation;
    let order = ["failover", VM, "--planned", "--request", id];
    let first = well(&cluster, "a", &order);
    assert!(first.contains("b owns vm"), "{first}");
    cluster.wait_protected("b", &["c", "a"]);
    let there = cluster.status("b").unwrap().generation;
    assert!(there > generation);
    // The answer is lost, say: given again it is answered, by the agent that it was given to.
    assert_eq!(well(&cluster, "a", &order), first);
    let asked = well(&cluster, "a", &["outcome", id]);
    assert!(asked.contains("b owns"), "{asked}");
    assert_eq!(cluster.status("b").unwrap().generation, there);
    // What nobody knows of is neither done nor refused.
    let unknown = "00000000-0000-4000-8000-000000000001";
    let output = understudy(&cluster, "b", &["outcome", unknown]);
    assert_eq!(output.status.code(), Some(3), "{:?}", said(&output));
}
