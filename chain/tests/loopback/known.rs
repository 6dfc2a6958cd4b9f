//! What has gone wrong in another chain-replicated store, 3FS (github.com/deepseek-ai/3FS), and must not here.

use crate::cluster::{Cluster, VM, Vm, host, until};
use crate::flow::Flow;

/// 3FS issue 345, "storage failover: some targets stay OFFLINE and do not heal": three replicas A, B, C. C commits a write
/// and its process dies before the answer to B, which has the write prepared but not committed. When C comes back, B
/// compares checksums of versions that differ by that write, takes the difference for damage and ends the resync,
/// every time: C stays out for good, unless somebody fills it by hand.
///
/// Here the tail dies with checkpoints committed whose acks nobody has heard, and joins again: as the process's
/// successor that holds nothing, or cut off and still holding all of it.
#[test]
fn issue_345_of_3fs_a_tail_that_dies_between_commit_and_answer_joins_again() {
    for restarts in [true, false] {
        let mut cluster = Cluster::new(3);
        let mut flow = Flow::start(&cluster.view, Vm::new(), None);
        flow.progress(3);
        // Acks leave the tail, and arrive nowhere.
        let acked = flow.acked();
        cluster.hosts[2].wire.hold_answers();
        until("the tail has committed what nobody knows of", || {
            cluster.hosts[2].epoch() > Some(flow.acked()) && flow.acked() >= acked
        });
        let server = match restarts {
            true => {
                cluster.hosts[2].kill();
                None
            }
            // Not dead, but nobody reaches it, and it hears of nothing.
            false => cluster.hosts[2].server.take(),
        };
        cluster.hosts[2].wire.cut();
        cluster.reconfigure(&[0, 1], None);
        flow.reconnect(&cluster.view);
        flow.progress(3);
        cluster.hosts[2].wire.release();
        match server {
            None => cluster.hosts[2].restart(),
            back => cluster.hosts[2].server = back,
        }
        cluster.reconfigure(&[0, 1], Some(2));
        flow.reconnect(&cluster.view);
        flow.joiner_ready();
        cluster.reconfigure(&[0, 1, 2], None);
        flow.reconnect(&cluster.view);
        until("it could be resumed from", || {
            cluster.hosts[2].could_resume()
        });
        flow.progress(3);
        let (vm, acked) = flow.die();
        let handover = cluster.take_over(2);
        assert!(handover.epoch >= acked);
        vm.at(handover.epoch).check(&handover);
    }
}

/// 3FS issue 229: T1 and T2 serve, T3 is syncing, and stays so: T2 cannot send T3 a chunk because T3 holds it in a newer
/// version of the chain than T2 does. It neither gets ready nor is it given up.
///
/// Here the replica that joins holds checkpoints that are newer than its predecessor's: the owner died, and a replica
/// took over that had not received them. They belong to no history and are cut; it is filled.
#[test]
fn issue_229_of_3fs_a_joining_replica_that_holds_something_newer_than_its_predecessor() {
    let mut cluster = Cluster::new(3);
    let flow = Flow::start(&cluster.view, Vm::new(), None);
    flow.progress(3);
    cluster.hosts[1].wire.hold();
    cluster.wait_ahead();
    let (vm, acked) = flow.die();
    // The head hears of nothing while the others go on.
    let ahead = cluster.hosts[0].server.take();
    cluster.hosts[1].wire.cut();
    cluster.hosts[1].wire.release();
    let handover = cluster.take_over(1);
    assert!(handover.epoch >= acked);
    let resumed = vm.resumed(handover.epoch);
    resumed.check(&handover);
    let mut flow = Flow::start(&cluster.view, resumed, Some(handover.mark));
    flow.progress(1);
    // Now it is to join: at its own epoch others have other content.
    cluster.hosts[0].server = ahead;
    cluster.reconfigure(&[2], Some(0));
    assert_eq!(cluster.hosts[0].epoch(), None, "cut");
    flow.reconnect(&cluster.view);
    flow.joiner_ready();
    cluster.reconfigure(&[2, 0], None);
    flow.reconnect(&cluster.view);
    until("it could be resumed from", || {
        cluster.hosts[0].could_resume()
    });
    flow.progress(3);
    let (vm, acked) = flow.die();
    let handover = cluster.take_over(0);
    assert!(handover.epoch >= acked);
    vm.at(handover.epoch).check(&handover);
}

/// Of the same kind as 3FS issue 229, a replica that is syncing for ever: its predecessor changes in the middle of the
/// filling, again and again. Each time it begins anew with another one; it gets ready with the last, or is given up.
#[test]
fn issue_229_of_3fs_predecessors_that_change_in_the_middle_of_the_filling() {
    for given_up in [false, true] {
        let mut cluster = Cluster::with_spares(3, 1);
        let mut flow = Flow::start(&cluster.view, Vm::new(), None);
        flow.progress(2);
        cluster.hosts[3].wire.hold_in_filling(2);
        cluster.reconfigure(&[0, 1, 2], Some(3));
        flow.reconnect(&cluster.view);
        for tail in [2, 1] {
            cluster.hosts[3].wire.wait_held();
            cluster.hosts[tail].kill();
            flow.lost(&host(&format!("r{tail}")));
            // Held up again, in the middle of what the next one sends.
            cluster.hosts[3].wire.cut();
            cluster.hosts[3].wire.hold_in_filling(2 + tail);
            let chain: Vec<usize> = (0..tail).collect();
            cluster.reconfigure(&chain, Some(3));
            flow.reconnect(&cluster.view);
            flow.progress(2);
        }
        cluster.hosts[3].wire.wait_held();
        flow.progress(2);
        if given_up {
            cluster.reconfigure(&[0], None);
            assert!(cluster.hosts[3].server().status(VM).is_none());
            flow.reconnect(&cluster.view);
            flow.progress(2);
            cluster.hosts[3].wire.release();
            cluster.reconfigure(&[0], Some(3));
            flow.reconnect(&cluster.view);
        }
        cluster.hosts[3].wire.release();
        flow.joiner_ready();
        cluster.reconfigure(&[0, 3], None);
        flow.reconnect(&cluster.view);
        until("it could be resumed from", || {
            cluster.hosts[3].could_resume()
        });
        flow.progress(2);
        let (vm, acked) = flow.die();
        let handover = cluster.take_over(3);
        assert!(handover.epoch >= acked);
        vm.at(handover.epoch).check(&handover);
    }
}
