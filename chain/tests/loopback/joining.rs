//! A replica joins at the tail while checkpoints flow without a pause.

use std::time::Duration;

use chain::ClientEvent;
use diskbuf::Durability;

use crate::cluster::{Cluster, VM, Vm, host, shape, until};
use crate::flow::Flow;

/// Makes `who`, which is filled, the tail after `before`, and waits until it could be resumed from.
fn promote(cluster: &mut Cluster, flow: &mut Flow, before: &[usize], who: usize) {
    flow.joiner_ready();
    let error = cluster.hosts[who].server().freeze(VM).unwrap_err();
    assert!(error.to_string().contains("still joining"), "{error}");
    cluster.reconfigure(&[before, &[who]].concat(), None);
    flow.reconnect(&cluster.view);
    until("it could be resumed from", || {
        cluster.hosts[who].could_resume()
    });
}

/// Everybody dies, the owner too, but for `who`: it is what the VM was.
fn all_but(cluster: &mut Cluster, flow: Flow, who: usize) {
    flow.progress(3);
    let (vm, acked) = flow.die();
    for (i, host) in cluster.hosts.iter_mut().enumerate() {
        if i != who {
            host.kill();
        }
    }
    let handover = cluster.take_over(who);
    assert!(handover.epoch >= acked, "{acked} was acknowledged");
    vm.at(handover.epoch).check(&handover);
}

#[test]
fn i5_a_fresh_replica_joins_and_is_the_last_that_is_left() {
    for length in 1..=2 {
        let mut cluster = Cluster::with_spares(length, 1);
        let chain: Vec<usize> = (0..length).collect();
        let mut flow = Flow::start(&cluster.view, Vm::new(), None);
        flow.progress(5);
        cluster.reconfigure(&chain, Some(length));
        flow.reconnect(&cluster.view);
        promote(&mut cluster, &mut flow, &chain, length);
        assert_eq!(cluster.hosts[length].wire.installs(), 1);
        assert_eq!(cluster.fulls(), length, "the owner sent no full checkpoint");
        all_but(&mut cluster, flow, length);
    }
}

#[test]
fn i5_what_changes_while_it_is_copied_is_copied_again() {
    // So much that most of it is copied while checkpoints are processed, rather than between two.
    const SIZE: u64 = 24 << 20;
    for durability in [Durability::Memory, Durability::Disk] {
        let mut cluster = Cluster::of_shape(1, 1, shape(SIZE), durability);
        let mut flow = Flow::start(&cluster.view, Vm::with_old_disk(SIZE), None);
        flow.progress(5);
        let wire = &cluster.hosts[1].wire;
        wire.hold_in_filling(2);
        cluster.reconfigure(&[0], Some(1));
        flow.reconnect(&cluster.view);
        for _ in 0..8 {
            // The guest writes to what was copied and to what was not.
            cluster.hosts[1].wire.wait_held();
            flow.progress(10);
            cluster.hosts[1].wire.hold_in_filling(6);
        }
        cluster.hosts[1].wire.release();
        promote(&mut cluster, &mut flow, &[0], 1);
        all_but(&mut cluster, flow, 1);
    }
}

#[test]
fn i3_a_host_that_returns_is_sent_the_blocks_that_differ() {
    const SIZE: u64 = 64 << 20;
    for durability in [Durability::Memory, Durability::Disk] {
        let mut cluster = Cluster::of_shape(2, 0, shape(SIZE), durability);
        let mut flow = Flow::start(&cluster.view, Vm::with_old_disk(SIZE), None);
        flow.progress(5);
        // A guest that writes faster than hosts come and go would leave nothing equal.
        cluster.hosts[0].wire.slow(Duration::from_millis(20));
        // It goes, with all that its disk has, and what it has of its last moments nobody asks.
        cluster.hosts[1].kill();
        cluster.reconfigure(&[0], None);
        flow.reconnect(&cluster.view);
        flow.progress(20);
        cluster.hosts[1].restart();
        cluster.reconfigure(&[0], Some(1));
        flow.reconnect(&cluster.view);
        promote(&mut cluster, &mut flow, &[0], 1);
        let filled = cluster.hosts[0]
            .server()
            .status(VM)
            .unwrap()
            .filled
            .unwrap();
        let blocks = SIZE >> 16;
        assert!(filled.blocks_equal > blocks / 8, "{filled:?} of {blocks}");
        assert!(
            filled.blocks_sent > 0,
            "it has written meanwhile: {filled:?}"
        );
        assert_eq!(cluster.hosts[1].wire.installs(), 1);
        // Disk and memory are compared with the VM's, byte by byte.
        all_but(&mut cluster, flow, 1);
    }
}

#[test]
fn i5_one_after_the_other_joins() {
    // From a chain of one to a chain of three that shares no host with it.
    let mut cluster = Cluster::with_spares(1, 3);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    for joiner in 1..=3 {
        let chain: Vec<usize> = (0..joiner).collect();
        cluster.reconfigure(&chain, Some(joiner));
        flow.reconnect(&cluster.view);
        promote(&mut cluster, &mut flow, &chain, joiner);
        flow.progress(2);
    }
    cluster.hosts[0].kill();
    cluster.reconfigure(&[1, 2, 3], None);
    flow.reconnect(&cluster.view);
    flow.progress(3);
    assert_eq!(cluster.fulls(), 1);
    all_but(&mut cluster, flow, 2);
}

#[test]
fn a_joining_replica_that_dies_while_it_is_filled_harms_nobody_and_may_come_back() {
    let mut cluster = Cluster::with_spares(2, 1);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(2);
    cluster.hosts[2].wire.hold_in_filling(2);
    cluster.reconfigure(&[0, 1], Some(2));
    flow.reconnect(&cluster.view);
    cluster.hosts[2].wire.wait_held();
    flow.progress(3);
    cluster.hosts[2].kill();
    cluster.hosts[2].wire.cut();
    cluster.hosts[2].wire.release();
    flow.lost(&host("r2"));
    flow.progress(3);
    // In the same generation: it is filled from the beginning, and the owner hears of it over the same connection.
    cluster.hosts[2].restart();
    cluster.create([2]);
    promote(&mut cluster, &mut flow, &[0, 1], 2);
    assert!(cluster.hosts[2].wire.installs() >= 2);
    all_but(&mut cluster, flow, 2);
}

#[test]
fn a_joining_replica_that_died_can_be_left_out() {
    let mut cluster = Cluster::with_spares(1, 2);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    cluster.hosts[1].wire.hold_in_filling(2);
    cluster.reconfigure(&[0], Some(1));
    flow.reconnect(&cluster.view);
    cluster.hosts[1].wire.wait_held();
    cluster.hosts[1].kill();
    // Another one in its place.
    cluster.reconfigure(&[0], Some(2));
    flow.reconnect(&cluster.view);
    promote(&mut cluster, &mut flow, &[0], 2);
    all_but(&mut cluster, flow, 2);
}

#[test]
fn a_tail_that_dies_while_it_fills_leaves_the_filling_to_the_next() {
    let mut cluster = Cluster::with_spares(2, 1);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(2);
    cluster.hosts[2].wire.hold_in_filling(2);
    cluster.reconfigure(&[0, 1], Some(2));
    flow.reconnect(&cluster.view);
    cluster.hosts[2].wire.wait_held();
    cluster.hosts[1].kill();
    cluster.hosts[2].wire.release();
    flow.lost(&host("r1"));
    cluster.reconfigure(&[0], Some(2));
    flow.reconnect(&cluster.view);
    promote(&mut cluster, &mut flow, &[0], 2);
    all_but(&mut cluster, flow, 2);
}

#[test]
fn a_link_to_a_joining_replica_that_breaks_is_made_again() {
    let mut cluster = Cluster::with_spares(1, 1);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    cluster.reconfigure(&[0], Some(1));
    flow.reconnect(&cluster.view);
    flow.joiner_ready();
    for _ in 0..3 {
        cluster.hosts[1].wire.cut();
        flow.lost(&host("r1"));
        flow.joiner_ready();
        flow.progress(2);
    }
    cluster.hosts[1].wire.cut();
    promote(&mut cluster, &mut flow, &[0], 1);
    all_but(&mut cluster, flow, 1);
}

#[test]
fn an_owner_that_missed_that_a_replica_is_ready_is_told_again() {
    let mut cluster = Cluster::with_spares(2, 1);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    cluster.reconfigure(&[0, 1], Some(2));
    flow.reconnect(&cluster.view);
    flow.joiner_ready();
    // What was said before is forgotten: as if the connection had broken on the way.
    cluster.hosts[0].wire.cut();
    flow.reconnect(&cluster.view);
    promote(&mut cluster, &mut flow, &[0, 1], 2);
    all_but(&mut cluster, flow, 2);
}

#[test]
fn a_joining_replica_that_reads_slowly_does_not_slow_the_chain_down() {
    let mut cluster = Cluster::with_spares(2, 1);
    let mut vm = Vm::new();
    vm.busy = true;
    let mut flow = Flow::start(&cluster.view, vm, None);
    cluster.reconfigure(&[0, 1], Some(2));
    flow.reconnect(&cluster.view);
    flow.joiner_ready();
    flow.said();
    // It is filled, and is sent every checkpoint that the chain is sent, but takes long for each. Sockets hold 8 MiB at
    // most of what it has not read, which is 32 checkpoints: a tail that waits for it is not further ahead.
    cluster.hosts[2].wire.slow(Duration::from_millis(1000));
    let epoch = |i: usize| cluster.hosts[i].epoch().map_or(0, |epoch| epoch.0);
    until("the chain is ahead of it", || {
        flow.acked().0 >= epoch(2) + 48
    });
    // That it is ready may be said once more at any time: the owner may have missed it.
    let trouble = |flow: &Flow| {
        let mut said = flow.said();
        said.retain(|event| !matches!(event, ClientEvent::JoinerReady { .. }));
        said
    };
    assert_eq!(trouble(&flow), [], "it has not been given up");
    cluster.hosts[2].wire.slow(Duration::ZERO);
    let behind = flow.acked().0;
    until("it catches up", || epoch(2) >= behind);
    assert_eq!(trouble(&flow), []);
    cluster.reconfigure(&[0, 1, 2], None);
    flow.reconnect(&cluster.view);
    until("it could be resumed from", || {
        cluster.hosts[2].could_resume()
    });
    all_but(&mut cluster, flow, 2);
}
