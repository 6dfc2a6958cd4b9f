//! Replicas that are lost while checkpoints flow without a pause: what is left goes on in place, and whoever is left can be
//! resumed from.

use checkpoint::Epoch;

use crate::cluster::{Cluster, Vm, host};
use crate::flow::Flow;

/// Chains of one to three, and who is lost in them.
const CASES: [(usize, &[usize]); 11] = [
    (1, &[]),
    (2, &[]),
    (2, &[0]),
    (2, &[1]),
    (3, &[]),
    (3, &[0]),
    (3, &[1]),
    (3, &[2]),
    (3, &[0, 1]),
    (3, &[0, 2]),
    (3, &[1, 2]),
];

/// Loses those, goes on with the others, loses the owner too, and resumes from `taker`.
fn lose(length: usize, lost: &[usize], taker: usize) {
    let case = format!("chain of {length}, lost {lost:?}, resumed from {taker}");
    let mut cluster = Cluster::new(length);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(5);
    for i in lost {
        cluster.hosts[*i].kill();
    }
    let left: Vec<usize> = (0..length).filter(|i| !lost.contains(i)).collect();
    let before = flow.acked();
    cluster.reconfigure(&left, None);
    // From this moment on, before the owner has spoken to anybody, what was acknowledged can be resumed from.
    for i in &left {
        assert!(cluster.hosts[*i].could_resume(), "{case}: {i}");
        assert!(cluster.hosts[*i].epoch() >= Some(before), "{case}: {i}");
    }
    flow.reconnect(&cluster.view);
    flow.progress(5);
    for i in &left {
        assert_eq!(cluster.hosts[*i].failed(), None, "{case}: {i}");
    }
    let (vm, acked) = flow.die();
    let handover = cluster.take_over(taker);
    assert!(handover.epoch >= acked, "{case}: {acked} was acknowledged");
    assert!(handover.epoch <= vm.epoch, "{case}");
    vm.at(handover.epoch).check(&handover);
    assert_eq!(
        cluster.fulls(),
        length,
        "{case}: a full checkpoint was sent"
    );
}

#[test]
fn i5_whoever_is_lost_the_others_go_on_in_place_and_nothing_acknowledged_is_lost() {
    for (length, lost) in CASES {
        for taker in (0..length).filter(|i| !lost.contains(i)) {
            lose(length, lost, taker);
        }
    }
}

#[test]
fn one_after_the_other_is_lost_until_the_last() {
    for order in [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]] {
        let mut cluster = Cluster::new(3);
        let mut flow = Flow::start(&cluster.view, Vm::new(), None);
        let mut left = vec![0, 1, 2];
        for lost in order {
            flow.progress(3);
            cluster.hosts[lost].kill();
            flow.lost(&host(&format!("r{lost}")));
            left.retain(|i| *i != lost);
            cluster.reconfigure(&left, None);
            flow.reconnect(&cluster.view);
        }
        flow.progress(3);
        let (vm, acked) = flow.die();
        let handover = cluster.take_over(left[0]);
        assert!(handover.epoch >= acked);
        vm.at(handover.epoch).check(&handover);
        assert_eq!(cluster.fulls(), 3);
    }
}

#[test]
fn configurations_that_follow_each_other_faster_than_checkpoints_lose_nothing() {
    let mut cluster = Cluster::new(3);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(3);
    for _ in 0..20 {
        cluster.reconfigure(&[0, 1, 2], None);
    }
    flow.reconnect(&cluster.view);
    for _ in 0..5 {
        cluster.reconfigure(&[0, 1, 2], None);
        flow.reconnect(&cluster.view);
    }
    flow.progress(3);
    assert!(cluster.hosts.iter().all(|h| h.failed().is_none()));
    let (vm, acked) = flow.die();
    let handover = cluster.take_over(2);
    assert!(handover.epoch >= acked);
    vm.at(handover.epoch).check(&handover);
    assert_eq!(cluster.fulls(), 3);
}

#[test]
fn an_owner_that_has_waited_long_for_a_chain_sends_it_what_it_kept() {
    // All that is under way when the head is lost, over three configurations without a word between them.
    let mut cluster = Cluster::new(3);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(3);
    cluster.hosts[0].wire.hold();
    cluster.hosts[0].kill();
    for chain in [&[1, 2][..], &[1, 2], &[2]] {
        cluster.reconfigure(chain, None);
    }
    let held = cluster.hosts[2].epoch();
    flow.reconnect(&cluster.view);
    flow.progress(5);
    assert!(cluster.hosts[2].epoch() > held);
    let (vm, acked) = flow.die();
    let handover = cluster.take_over(2);
    assert!(handover.epoch >= acked && acked > Epoch::ZERO);
    vm.at(handover.epoch).check(&handover);
}
