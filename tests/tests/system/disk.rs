//! I6, disk and memory agree: the new owner's disk is at the checkpoint its memory is at.
//!
//! Switched off: `UNDERSTUDY_BREAK=disk-stream` on the owner, whose disk writes then do not travel with its checkpoints
//! (`QueueSink::disk_write`). The same look at the disk has to find it behind.

use guest::proto::Op;
use understudy_tests::{Cluster, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

/// The client rests while the owner dies, so that nothing is written after the failover: what the disk holds then is
/// what the checkpoint brought. Returns counter and disk as the new owner's guest sees them, and what was acknowledged.
fn disk_after_failover(broken: &[(&str, &str)]) -> (u64, u64, u64) {
    let hosts = ["a", "b"];
    let mut cluster = Cluster::launch(
        PROGRAM,
        Options {
            broken,
            ..Options::of(&hosts)
        },
    );
    cluster.protect(&VmFile::default(), &["b"]);
    let client = cluster.client();
    more_answers(&client, 50);
    check_disk(&client);
    let report = cluster.stop_client(client);
    check_survived(&report);
    cluster.kill("a");
    cluster.wait_owner("b");
    let on_disk = cluster.ask(Op::ReadDisk).disk_counter;
    (cluster.ask(Op::Read).counter, on_disk, report.counter_after)
}

#[test]
fn disk_and_memory_are_at_the_same_checkpoint() {
    let (memory, on_disk, acknowledged) = disk_after_failover(&[]);
    assert_eq!((memory, on_disk), (acknowledged, acknowledged));
}

#[test]
fn without_the_stream_of_disk_writes_the_check_notices() {
    let (memory, on_disk, acknowledged) = disk_after_failover(&[("a", "disk-stream")]);
    assert_eq!(memory, acknowledged);
    assert!(
        on_disk < acknowledged,
        "the disk has {on_disk} of {acknowledged}"
    );
}
