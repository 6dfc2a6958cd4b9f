//! Links that break and come back in the same generation.

use chain::ClientError;

use crate::cluster::{Cluster, Vm, committed, until};
use crate::flow::Flow;

#[test]
fn i5_a_link_that_breaks_and_comes_back_loses_nothing() {
    // With a configuration that goes on in place, and with one that has just begun.
    for in_place in [true, false] {
        for length in 1..=3 {
            for cut in 0..length {
                let case = format!("{cut} of {length}, in place: {in_place}");
                let mut cluster = Cluster::new(length);
                let mut flow = Flow::start(&cluster.view, Vm::new(), None);
                flow.progress(2);
                if in_place {
                    cluster.reconfigure(&(0..length).collect::<Vec<_>>(), None);
                    flow.reconnect(&cluster.view);
                }
                for _ in 0..5 {
                    let made = cluster.hosts[cut].wire.greetings();
                    cluster.hosts[cut].wire.cut();
                    if cut > 0 {
                        // The replicas see to it themselves.
                        until("the replica before it has connected again", || {
                            cluster.hosts[cut].wire.greetings() > made
                        });
                    }
                    // The owner's own connections, to head or tail, are among those that broke.
                    flow.reconnect(&cluster.view);
                    flow.progress(3);
                }
                for host in &cluster.hosts {
                    assert_eq!(host.failed(), None, "{case}");
                }
                let (vm, acked) = flow.die();
                let handover = cluster.take_over(length - 1);
                assert!(handover.epoch >= acked, "{case}");
                vm.at(handover.epoch).check(&handover);
                assert_eq!(cluster.fulls(), length, "{case}");
            }
        }
    }
}

#[test]
fn a_link_between_replicas_that_breaks_needs_nothing_of_the_owner() {
    let mut cluster = Cluster::new(3);
    let flow = Flow::start(&cluster.view, Vm::new(), None);
    for _ in 0..10 {
        flow.progress(3);
        // The middle's predecessor; the owner's connections go to head and tail.
        cluster.hosts[1].wire.cut();
    }
    flow.progress(3);
    let (vm, acked) = flow.die();
    let handover = cluster.take_over(2);
    assert!(handover.epoch >= acked);
    vm.at(handover.epoch).check(&handover);
    assert_eq!(cluster.fulls(), 3);
}

#[test]
fn what_a_dead_head_had_and_nobody_acknowledged_reaches_the_next_one_under_its_old_name() {
    let mut cluster = Cluster::new(2);
    let mut flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(3);
    // The head takes checkpoints that do not get any further.
    cluster.hosts[1].wire.hold();
    cluster.wait_ahead();
    let ahead = cluster.hosts[0].epoch().unwrap();
    cluster.hosts[0].kill();
    cluster.hosts[1].wire.cut();
    cluster.hosts[1].wire.release();
    cluster.reconfigure(&[1], None);
    flow.reconnect(&cluster.view);
    until("the owner has sent it again", || flow.acked() >= ahead);
    flow.progress(2);
    let (vm, acked) = flow.die();
    let handover = cluster.take_over(1);
    assert!(handover.epoch >= acked);
    vm.at(handover.epoch).check(&handover);
}

#[test]
fn a_head_that_lost_what_it_held_is_not_taken_for_one_that_has_just_begun() {
    // In the same generation: the replica behind it holds everything still.
    let mut cluster = Cluster::new(2);
    let mut owner = cluster.connect();
    let mut vm = Vm::new();
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, cluster.view.generation);
    cluster.reconfigure(&[0, 1], None);
    owner.reconnect(&cluster.view);
    cluster.hosts[0].restart();
    cluster.create([0]);
    let mut unfit = false;
    until("the owner is told", || {
        match owner.client.connect(&cluster.view) {
            Err(ClientError::Peer { .. }) => false,
            Err(ClientError::Unfit { .. }) => {
                unfit = true;
                true
            }
            other => panic!("{other:?}"),
        }
    });
    assert!(unfit);
    cluster.reconfigure(&[1], None);
    owner.reconnect(&cluster.view);
    vm.run(1);
    vm.checkpoint(&owner, false);
    committed(&owner, vm.epoch, cluster.view.generation);
    vm.check(&cluster.take_over(1));
}
