//! Queries of a VM's checkpoints, and replicas that keep them on disk.

use agent::control::{ControlClient, Point, Reply, Request};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

fn points(control: &mut ControlClient) -> Vec<Point> {
    match control.call(&Request::Points { vm: VM.into() }) {
        Ok(Reply::Points(points)) => points,
        other => panic!("{other:?}"),
    }
}

/// The checkpoints that the tail has are a stretch of the VM's history without a gap that only moves on, whoever
/// is the tail; and a VM whose replicas keep everything on disk survives like any other.
fn queried(durability: &'static str) {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    let vm = VmFile {
        retain: 5,
        durability,
        ..VmFile::default()
    };
    cluster.protect(&vm, &["b", "c"]);
    let client = cluster.client();
    let mut newest = 0;
    for asked in ["a", "b", "c", "m"] {
        more_answers(&client, 20);
        let all = wait("five checkpoints to be kept", || {
            let all = points(&mut cluster.control(asked));
            (all.len() == 5).then_some(all)
        });
        assert!(
            all.windows(2).all(|w| w[1].epoch == w[0].epoch + 1),
            "{all:?}"
        );
        assert!(all[4].epoch > newest, "{newest}, then {all:?}");
        newest = all[4].epoch;
    }
    cluster.kill("a");
    cluster.wait_owner("b");
    more_answers(&client, 50);
    let all = points(&mut cluster.control("c"));
    assert!(all.last().is_some_and(|p| p.epoch > newest), "{all:?}");
    // The tail dies: nobody is left to be asked, and that is said.
    cluster.kill("c");
    more_answers(&client, 20);
    wait("b to go on alone", || {
        let status = cluster.status("b")?;
        status.chain.is_empty().then_some(())
    });
    let error = cluster
        .control("b")
        .call(&Request::Points { vm: VM.into() })
        .expect_err("nobody holds a checkpoint");
    assert!(error.to_string().contains("not protected"), "{error}");
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn checkpoints_in_memory_can_be_asked_for() {
    queried("memory");
}

#[test]
fn checkpoints_on_disk_can_be_asked_for() {
    queried("disk");
}
