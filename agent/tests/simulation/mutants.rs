//! Each protective mechanism switched off in turn: the checks have to notice, and for the right reason.

use crate::cluster::{Agents, Mutant};
use crate::run;

/// Finds a seed in which the check meant for it shows the mutant up; others may have done so before. Where that takes many, the
/// search begins shortly before one that is known, in worlds as they are now.
fn killed(agents: Agents, mutant: Mutant, from: u64, expected: &[&str]) {
    let seeds = crate::number("CHAIN_MUTANT_SEEDS").unwrap_or(30_000);
    let mut others = 0;
    for seed in from..from + seeds {
        if let Err(why) = run(seed, agents, mutant, false) {
            let why = why.trim();
            if expected.iter().any(|reason| why.contains(reason)) {
                let line = why.lines().next().unwrap_or_default();
                println!(
                    "{mutant:?}, {agents:?}, seed {seed}, noticed otherwise {others} times before: {line}"
                );
                return;
            }
            if others == 0 {
                println!(
                    "{mutant:?}, otherwise: {}",
                    why.lines().next().unwrap_or_default()
                );
            }
            others += 1;
        }
    }
    panic!(
        "{mutant:?} went unnoticed in {seeds} seeds from {from} on ({others} times it was noticed otherwise)"
    );
}

macro_rules! mutants {
    ($($name:ident: $agents:ident, $mutant:ident $(from $from:literal)?, $expected:expr;)*) => {
        $(#[test] fn $name() {
            killed(Agents::$agents, Mutant::$mutant, 0 $(+ $from)?, &$expected);
        })*
    };
}

mutants! {
    i1_acknowledging_before_processing: Shipped, AckBeforeProcessed, ["I5", "I1"];
    i1_passing_on_acks_of_what_is_not_processed: Shipped, AckUnprocessed, ["I1"];
    i2_forwarding_the_end_before_preparing: Shipped, ForwardEndEarly, ["I2"];
    i3_telling_checkpoints_apart_by_number_only: Shipped, AnyBase from 1_100, ["I3", "no part of the owner's history"];
    i4_listening_to_old_generations: Shipped, AnyGeneration, ["failed without a reason"];
    i4_a_master_that_does_not_compare_generations: Shipped, NoCompare, ["I4", "I5"];
    i5_not_freezing_before_asking: Shipped, AskWithoutFreezing, ["I5"];
    i5_resuming_from_before_output_was_unprotected: Shipped, ResumeOutdated, ["I5"];
    i5_a_fork_that_the_master_does_not_record: Shipped, ForkNotRecorded from 12_800, ["no part of the owner's history"];
    i5_a_fork_that_the_replica_ignores: Shipped, ForkIgnored from 12_800, ["no part of the owner's history"];
    i5_resuming_a_new_member_before_it_is_complete: Shipped, ResumeIncomplete, ["I5"];
    i5_not_looking_at_since_when_somebody_is_a_member: Shipped, SinceIgnored from 3_000, ["I5"];
    i5_resuming_from_a_full_checkpoint_at_once: Shipped, FullHeld, ["I5"];
    i5_a_full_checkpoint_without_a_decision: Shipped, FullUndecided, ["I5", "I4"];
    i6_a_vm_that_is_off_and_runs_on: Shipped, StopOnlyDecided, ["I6"];
    i6_a_running_vm_that_is_booted_again: Shipped, AdoptNothing, ["I6"];
    liveness_what_a_process_tells_only_one_agent: Shipped, ReportedOnce from 2_200, ["liveness"];
    liveness_a_stale_snapshot_that_is_believed: Shipped, StaleTaken, ["liveness", "I4", "I5", "I6"];
    sent_is_not_resent: Shipped, SentNotResent, ["failed without a reason"];
    sent_is_resent_whatever_the_successor_holds: Shipped, ResendAnyway, ["failed without a reason"];
    i7_a_failed_store_that_is_not_owned_up_to: Shipped, FailureHidden, ["I3"];
    liveness_a_joining_replica_promoted_before_it_is_ready: Shipped, PromoteEarly, ["liveness"];
    liveness_readiness_said_once: Shipped, ReadyOnce from 6_500, ["liveness"];
    liveness_a_successor_that_came_while_frozen: Free, NextNotAsked, ["liveness"];
    liveness_what_was_lost_while_frozen: Free, PreviousNotAsked, ["liveness"];
    liveness_a_next_replica_that_does_not_come: Shipped, TroubleOnce from 1_800, ["liveness"];
}
