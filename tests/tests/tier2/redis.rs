//! A guest with redis: every write that the client was told of is there after a failover, on the same connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::control::{EventKind, Role};
use agent::demo::redis::RedisClient;
use understudy_tests::stock::{StockFile, given};
use understudy_tests::{Cluster, GUEST, Options, patience, wait};

use crate::number;

/// Port of the guest's redis server.
const REDIS: u16 = 6379;
/// Writes that have to be acknowledged before one is content.
const SOME: u64 = 20;

/// When the guest is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protected {
    /// While its kernel starts.
    Booting,
    /// When redis answers.
    Ready,
}

/// How long the guest is written to under protection before its host dies: another moment in each run.
/// `UNDERSTUDY_TIER2_SECONDS` makes it longer.
fn a_while() -> Duration {
    let seconds = number("UNDERSTUDY_TIER2_SECONDS", 1);
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.subsec_nanos());
    Duration::from_secs(seconds) + Duration::from_millis(u64::from(nanos) % 2000)
}

/// Waits for `n` acknowledged writes more from the guest that runs on `host`.
fn more(cluster: &Cluster, host: &str, client: &RedisClient, n: u64) {
    let before = client.acked();
    wait(
        &format!("acknowledged writes from the guest on {host}"),
        || {
            let errors = client.errors();
            assert!(errors.is_empty(), "the client has failed: {errors:?}");
            let ended = cluster
                .events(host)
                .into_iter()
                .find(|e| e.kind == EventKind::GuestEnded);
            assert!(ended.is_none(), "no writes can be acknowledged: {ended:?}");
            (client.acked() >= before + n).then_some(())
        },
    );
}

/// I5 and I1 for a stock guest: every write that the client was told of is there afterwards, on the same connection.
fn redis_survives_its_host(vcpus: u8, protected: Protected) {
    let program = given("UNDERSTUDY_BIN");
    let mut cluster = Cluster::launch(
        program.to_str().expect("UNDERSTUDY_BIN: not UTF-8"),
        Options {
            // Emulated twice, everything is slow: suspicion after a second of silence.
            heartbeat_ms: 50,
            missed: 20,
            ..Options::of(&["a", "b", "c"])
        },
    );
    let guest = StockFile {
        vcpus,
        // Short epochs starve a kernel that boots in two layers of emulation.
        epoch_ms: number(
            "UNDERSTUDY_TIER2_EPOCH_MS",
            match protected {
                Protected::Booting => 400,
                Protected::Ready => 200,
            },
        ),
    };
    cluster.start_vm(guest.write(cluster.dir()));
    if protected == Protected::Booting {
        cluster.protect_vm(&["b", "c"]);
    }
    let client = cluster
        .network()
        .within("client", || {
            RedisClient::start(SocketAddr::from((GUEST, REDIS)), patience())
        })
        .unwrap_or_else(|e| panic!("redis in the guest does not answer: {e}"));
    if protected == Protected::Ready {
        cluster.protect_vm(&["b", "c"]);
    }
    more(&cluster, "a", &client, SOME);
    let (begun, long) = (Instant::now(), a_while());
    while begun.elapsed() < long {
        more(&cluster, "a", &client, 1);
    }
    println!(
        "killing the owner after {} ms more, {} writes acknowledged",
        begun.elapsed().as_millis(),
        client.acked()
    );
    cluster.kill("a");

    let killed_at = client.acked();
    let owner = wait("a backup to take over", || {
        ["b", "c"].into_iter().find(|host| {
            cluster
                .status(host)
                .is_some_and(|s| s.role == Role::Owner && s.failover.is_some())
        })
    });
    more(&cluster, owner, &client, SOME);
    let end = client.stop();
    println!(
        "{owner} took over; {} writes acknowledged, {} after the kill",
        end.acked,
        end.acked - killed_at
    );
    assert!(
        end.verified,
        "the guest could not be asked at the end: {:?}",
        end.errors
    );
    assert_eq!(end.broken, 0, "the TCP connection broke: {:?}", end.errors);
    assert_eq!(
        end.lost, 0,
        "acknowledged writes are missing: {:?}",
        end.errors
    );
    assert!(
        cluster
            .events(owner)
            .iter()
            .any(|e| e.kind == EventKind::Activated),
        "the failover is in the new owner's events"
    );
}

#[test]
#[ignore = "needs a stock guest and an emulated KVM host: scripts/test --tier2"]
fn a_stock_guest_with_one_vcpu_survives_its_host() {
    redis_survives_its_host(1, Protected::Ready);
}

#[test]
#[ignore = "needs a stock guest and an emulated KVM host: scripts/test --tier2"]
fn a_stock_guest_with_two_vcpus_survives_its_host() {
    redis_survives_its_host(2, Protected::Ready);
}

#[test]
#[ignore = "needs a stock guest and an emulated KVM host: scripts/test --tier2"]
fn a_stock_guest_boots_under_protection_and_survives_its_host() {
    redis_survives_its_host(2, Protected::Booting);
}
