//! A guest with PostgreSQL on ext4: two owners die, the first host returns, and the VM goes back to it, with pgbench
//! running all the time.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Instant;

use agent::control::{EventKind, Reply, Request};
use understudy_tests::cluster::VM;
use understudy_tests::stock::given;
use understudy_tests::{Cluster, GUEST, Options, wait};

use crate::number;
use crate::pgbench::{self, Pgbench, ROWS, SUMS, query};
use crate::unpacked::{Unpacked, run};

/// Connections of pgbench.
const CLIENTS: u64 = 3;
/// Transactions a second it begins at most.
const RATE: u64 = 6;
/// Rows of a table that is left alone.
const ROWS_LEFT: u64 = 1000;
/// Transactions that each of its clients has to be told of before one is content.
const SOME: u64 = 2;

/// The text of `vm.toml`; makes the disk.
fn vm_toml(cluster: &Cluster) -> String {
    let disk = cluster.path("vm.img");
    run(Command::new("cp")
        .arg("--sparse=always")
        .arg(given("UNDERSTUDY_PG_DISK"))
        .arg(&disk));
    format!(
        r#"name = "{VM}"
vcpus = 1
memory_mib = 192
kernel = "{kernel}"
initrd = "{initrd}"
cmdline = "console=ttyS0 quiet us.ip={GUEST}/24 us.service=postgres"
console = "{console}"

[[net]]
mac = "52:54:00:75:73:03"
network = "lan"
ip = "{GUEST}"

[[disk]]
path = "{disk}"

[protect]
epoch_ms = {epoch_ms}
min_epoch_ms = 20
"#,
        kernel = given("UNDERSTUDY_STOCK_VMLINUZ").display(),
        initrd = given("UNDERSTUDY_STOCK_INITRD").display(),
        console = cluster.path("console.log").display(),
        disk = disk.display(),
        epoch_ms = number("UNDERSTUDY_TIER2_EPOCH_MS", 200),
    )
}

/// Says what has been reached, and when.
fn reached(begun: Instant, what: &str) {
    println!("{:4} s: {what}", begun.elapsed().as_secs());
}

/// Waits until each of pgbench's clients has been told of some transactions more by the guest on `host`.
fn more(cluster: &Cluster, host: &str, clients: &mut Pgbench) {
    let before = clients.acked();
    wait(
        &format!("acknowledged transactions from the guest on {host}"),
        || {
            let ended = cluster
                .events(host)
                .into_iter()
                .find(|e| e.kind == EventKind::GuestEnded);
            assert!(ended.is_none(), "no more can be acknowledged: {ended:?}");
            let now = clients.acked();
            now.iter()
                .all(|(client, n)| *n >= before[client] + SOME)
                .then_some(())
        },
    );
}

/// The table that is left by the guest on `host`.
fn left(host: &str) -> String {
    format!("left_on_{host}")
}

/// Makes a table that nobody touches again, and has it written to the disk: what pgbench works on is written again and
/// again, so that a write that an owner made and its successor never had would not be missed at the end.
fn leave(cluster: &Cluster, host: &str) {
    let table = format!(
        "CREATE TABLE {} AS SELECT n, md5(n::text) AS digest FROM generate_series(1, {ROWS_LEFT}) n",
        left(host)
    );
    query(cluster, &[&table, "CHECKPOINT"]);
}

/// I5, I1 and I6 for a database: whatever a client was told of is there, on the connections that were there at the
/// beginning, and on the disk of the last owner; file system and database are whole.
#[test]
#[ignore = "needs a stock guest and an emulated KVM host: scripts/test --tier2"]
fn postgresql_survives_two_owners_and_goes_back_to_the_first() {
    let program = given("UNDERSTUDY_BIN");
    let begun = Instant::now();
    let mut cluster = Cluster::launch(
        program.to_str().expect("UNDERSTUDY_BIN: not UTF-8"),
        Options {
            // Emulated twice, everything is slow: suspicion after a second of silence.
            heartbeat_ms: 50,
            missed: 20,
            ..Options::of(&["a", "b", "c"])
        },
    );
    cluster.start_vm(vm_toml(&cluster));
    wait("PostgreSQL in the guest to answer", || {
        pgbench::psql(&cluster, &["SELECT 1"])
            .status
            .success()
            .then_some(())
    });
    reached(begun, "PostgreSQL answers");
    let mut clients = Pgbench::start(&cluster, CLIENTS, RATE);
    more(&cluster, "a", &mut clients);
    reached(begun, "pgbench is at work");
    cluster.protect_vm(&["b", "c"]);
    reached(begun, "a is protected by b and c");
    more(&cluster, "a", &mut clients);
    leave(&cluster, "a");

    cluster.kill("a");
    reached(begun, "a is killed");
    cluster.wait_owner("b");
    cluster.wait_protected("b", &["c"]);
    reached(begun, "b has taken over, protected by c");
    more(&cluster, "b", &mut clients);
    leave(&cluster, "b");

    cluster.kill("b");
    reached(begun, "b is killed");
    cluster.wait_owner("c");
    reached(begun, "c has taken over");
    more(&cluster, "c", &mut clients);

    cluster.start_agent("a", None);
    cluster.wait_protected("c", &["a"]);
    reached(begun, "a is back and protects c");
    more(&cluster, "c", &mut clients);
    leave(&cluster, "c");
    match cluster
        .control("c")
        .call(&Request::HandOver { vm: VM.into() })
    {
        Ok(Reply::Switched(switched)) => assert_eq!(switched.owner, "a"),
        other => panic!("the way back to a: {other:?}"),
    }
    cluster.wait_owner("a");
    cluster.wait_protected("a", &["c"]);
    reached(begun, "the VM is back on a, protected by c");
    more(&cluster, "a", &mut clients);

    let acked = clients.stop();
    reached(begun, &format!("acknowledged to each client: {acked:?}"));
    let rows = query(&cluster, &[ROWS]);
    let sums = query(&cluster, &[SUMS]);
    pgbench::check("in the guest", &acked, &rows, &sums);
    reached(begun, "every one is there");

    shut_down(&cluster, "a");
    reached(begun, "the guest has shut down");
    check_disk(&cluster, "a", &acked);
    reached(begun, "and every one is on its disk");
}

/// A clean end: PostgreSQL is told to stop, then the guest unmounts its disk and switches itself off.
fn shut_down(cluster: &Cluster, owner: &str) {
    // The server runs this, in its data directory; whether the answer comes before the end does not matter.
    let stop = "COPY (SELECT 1) TO PROGRAM 'read pid <postmaster.pid; kill -INT $pid'";
    let answer = pgbench::psql(cluster, &[stop]);
    wait("the guest's end", || {
        cluster
            .events(owner)
            .into_iter()
            .find(|e| e.kind == EventKind::GuestEnded)
    });
    let console = cluster.path("console.log");
    let said = std::fs::read(&console).expect("the guest's console");
    let said = String::from_utf8_lossy(&said);
    assert!(
        said.contains("stock-guest: the disk is unmounted"),
        "the guest has ended, but not as it was told to ({answer:?})"
    );
}

/// The owner's disk by itself: the file system, the checksums of all pages, tables against their indexes, and the
/// transactions.
fn check_disk(cluster: &Cluster, owner: &str, acked: &pgbench::Counts) {
    let disk = cluster
        .path(owner)
        .join("replicas")
        .join(VM)
        .join("disk0.img");
    run(Command::new("e2fsck").arg("-fn").arg(&disk));
    // Not below the cluster's directory, which is root's alone.
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("its mode");
    let root = Unpacked::of(&disk, &dir.path().join("root"));
    root.run(&["pg_checksums", "--check", "-D", "/pgdata"]);
    root.run(&[
        "pg_ctl",
        "start",
        "-w",
        "-t",
        "120",
        "-D",
        "/pgdata",
        "-l",
        "/s/log",
        "-o",
        "-c listen_addresses= -k /s",
    ]);
    let log = std::fs::read_to_string(dir.path().join("root/s/log")).expect("PostgreSQL's log");
    assert!(
        log.contains("database system was shut down at"),
        "PostgreSQL had to recover, though it was shut down: {log}"
    );
    let query = |sql: &str| {
        root.run(&[
            "psql", "-h", "/s", "-U", "postgres", "-XAt", "-c", sql, "postgres",
        ])
    };
    let (rows, sums) = (query(ROWS), query(SUMS));
    for host in ["a", "b", "c"] {
        let whole = format!(
            "SELECT count(*) FROM {} WHERE digest = md5(n::text)",
            left(host)
        );
        let there = query(&whole);
        assert_eq!(
            there.trim(),
            ROWS_LEFT.to_string(),
            "rows on the disk of the table that was left when the VM ran on {host}"
        );
    }
    root.run(&[
        "pg_amcheck",
        "-h",
        "/s",
        "-U",
        "postgres",
        "-d",
        "postgres",
        "--heapallindexed",
        "--parent-check",
    ]);
    root.run(&["pg_ctl", "stop", "-w", "-m", "fast", "-D", "/pgdata"]);
    pgbench::check("on the disk", acked, &rows, &sums);
}
