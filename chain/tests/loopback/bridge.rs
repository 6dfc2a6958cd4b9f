//! The chain of a VM that was taken over is brought up to what the new owner resumed from.

use chain::{ClientError, Handover, Kept, bridge};

use crate::cluster::{Cluster, Vm, until};
use crate::flow::Flow;

/// Brings the chain up to date, however long it takes to come up.
fn bridged(cluster: &Cluster, handover: &Handover) {
    let view = &cluster.view;
    until("the chain has it", || {
        match bridge(&view.owner, view, handover.mark, &handover.kept) {
            Ok(()) => true,
            Err(e @ (ClientError::Unfit { .. } | ClientError::Refused { .. })) => panic!("{e}"),
            Err(_) => false,
        }
    });
}

/// A chain whose head is ahead by all that is under way; its owner is dead. The VM as it was.
fn ahead(cluster: &mut Cluster) -> Vm {
    let flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(3);
    cluster.hosts[1].wire.hold();
    cluster.wait_ahead();
    let (vm, acked) = flow.die();
    assert!(cluster.hosts[1].epoch() >= Some(acked));
    vm
}

#[test]
fn i5_what_nobody_acknowledged_follows_from_the_new_owner() {
    for length in 2..=3 {
        for taker_of_the_rest in 1..length {
            let mut cluster = Cluster::new(length);
            let vm = ahead(&mut cluster);
            let handover = cluster.take_over(0);
            let resumed = vm.resumed(handover.epoch);
            resumed.check(&handover);
            assert!(cluster.hosts[1].epoch() < Some(handover.epoch));
            // What was on its way is not heard any more, and comes again.
            cluster.hosts[1].wire.cut();
            cluster.hosts[1].wire.release();
            bridged(&cluster, &handover);
            for host in &cluster.hosts[1..] {
                assert_eq!(host.epoch(), Some(handover.epoch));
                // Protected before the new owner has sent anything of its own.
                assert!(host.could_resume());
            }
            // Once more changes nothing.
            bridged(&cluster, &handover);
            // From there on it goes on in place, and says other things than the old owner would have.
            let flow = Flow::start(&cluster.view, resumed, Some(handover.mark));
            flow.progress(5);
            let (vm, acked) = flow.die();
            let handover = cluster.take_over(taker_of_the_rest);
            assert!(handover.epoch >= acked);
            vm.at(handover.epoch).check(&handover);
            assert_eq!(cluster.fulls(), length);
        }
    }
}

#[test]
fn a_new_owner_that_did_not_keep_enough_says_so() {
    let mut cluster = Cluster::new(2);
    ahead(&mut cluster);
    let handover = cluster.take_over(0);
    cluster.hosts[1].wire.cut();
    cluster.hosts[1].wire.release();
    let view = &cluster.view;
    let nothing = Kept::default();
    let mut error = String::new();
    until("the chain is up", || {
        match bridge(&view.owner, view, handover.mark, &nothing) {
            Err(unfit @ ClientError::Unfit { .. }) => {
                error = unfit.to_string();
                true
            }
            Err(_) => false,
            Ok(()) => panic!("it lacks something"),
        }
    });
    assert!(error.contains("too far behind"), "{error}");
    assert_eq!(cluster.hosts[1].failed(), None, "it has what it had");
}

#[test]
fn i4_a_bridge_to_a_chain_that_has_moved_on_is_refused() {
    let mut cluster = Cluster::new(3);
    ahead(&mut cluster);
    let handover = cluster.take_over(0);
    let stale = cluster.view.clone();
    cluster.hosts[1].wire.cut();
    cluster.hosts[1].wire.release();
    let by_another = cluster.take_over(1);
    assert_ne!(by_another.mark, handover.mark);
    let refused = bridge(&stale.owner, &stale, handover.mark, &handover.kept);
    let Err(ClientError::Refused { generation, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(generation, cluster.view.generation);
}
