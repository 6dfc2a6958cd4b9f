//! Interleavings told step by step: rare ones, and those that showed something once.

use chain::replica::State;

use crate::cluster::{Agents, Grain, Mutant, Plan, Rules, Step, World};

fn world(mutant: Mutant) -> World {
    World::new(Rules {
        hosts: 4,
        in_flight: 3,
        wanted: 2,
        slow_disks: false,
        grain: Grain::Frame,
        mutant,
        agents: Agents::Free,
        freezes: false,
        story: true,
    })
}

fn apply(world: &mut World, step: Step) -> Result<(), String> {
    world.apply(&step)
}

/// Everything that happens by itself and is `wanted`, until nothing is left.
fn settle(world: &mut World, wanted: impl Fn(&Step) -> bool) -> Result<(), String> {
    for n in 0..2000 {
        let mut steps = world.deliveries();
        steps.extend(world.errands());
        steps.retain(|step| wanted(step));
        if steps.is_empty() {
            return Ok(());
        }
        world.apply(&steps[n % steps.len()])?;
    }
    Ok(())
}

fn all(step: &Step) -> bool {
    !matches!(step, Step::ListenToTail(_) | Step::StillFailed(_))
}

fn wish(world: &mut World, plan: Plan) -> Result<(), String> {
    apply(world, Step::Propose(0, plan))?;
    apply(world, Step::Decide(0))
}

/// The owner 0 is protected by 1 and 2, which hold its first three checkpoints: with the third, output is held.
fn protected(mutant: Mutant) -> World {
    let mut world = world(mutant);
    wish(&mut world, Plan::Anew(vec![1, 2])).unwrap();
    settle(&mut world, all).unwrap();
    for _ in 0..3 {
        apply(&mut world, Step::Run(0)).unwrap();
        settle(&mut world, all).unwrap();
    }
    assert_eq!(world.visible.len(), 3);
    world
}

/// A former head comes back at the tail, ahead of its predecessor, and is made a member before it is ready: what it
/// holds more was never acknowledged, and must not be now.
fn ahead_of_its_predecessor(mutant: Mutant) -> Result<World, String> {
    let mut world = protected(mutant);
    apply(&mut world, Step::Run(0))?;
    apply(&mut world, Step::Run(0))?;
    settle(
        &mut world,
        |s| matches!(s, Step::Down(link) if link.to == 1),
    )?;
    wish(&mut world, Plan::Without(vec![1]))?;
    apply(&mut world, Step::Look(0))?;
    apply(&mut world, Step::Look(2))?;
    // Host 1 hears of none of these but the last.
    wish(&mut world, Plan::Join(1))?;
    apply(&mut world, Step::Look(0))?;
    wish(&mut world, Plan::Promote)?;
    for host in 0..3 {
        apply(&mut world, Step::Look(host))?;
    }
    let holds = |world: &mut World, i| world.standby(i).and_then(|s| s.machine.hist());
    let held = [1, 2].map(|i| holds(&mut world, i).map(|mark| mark.epoch.0));
    assert_eq!(held, [Some(5), Some(3)]);
    apply(&mut world, Step::ListenToTail(0))?;
    settle(&mut world, |s| matches!(s, Step::Up(_)))?;
    Ok(world)
}

#[test]
fn i5_a_tail_that_is_not_complete_acknowledges_nothing_of_before() {
    let world = ahead_of_its_predecessor(Mutant::None).unwrap();
    assert_eq!(world.visible.len(), 3);
    let why = ahead_of_its_predecessor(Mutant::AckIncomplete).unwrap_err();
    assert!(why.contains("I5: h2 could take over"), "{why}");
}

/// 3FS issue 229: a successor that is ahead of its predecessor was synchronised for ever. Here it cannot be gone on with,
/// is named to the owner, and joins again.
#[test]
fn a_successor_that_is_ahead_is_not_stuck() {
    let mut world = ahead_of_its_predecessor(Mutant::None).unwrap();
    settle(&mut world, all).ok();
    for _ in 0..200 {
        if let Some(step) = crate::calm::sensible(&world, 0) {
            apply(&mut world, step).unwrap();
        }
        if world.can_run(0) {
            apply(&mut world, Step::Run(0)).unwrap();
        }
        for n in 0..40 {
            let mut steps = world.deliveries();
            steps.extend(world.errands());
            if !steps.is_empty() {
                let step = steps[n % steps.len()].clone();
                apply(&mut world, step).unwrap();
            }
        }
    }
    let view = world.view();
    assert_eq!((view.chain.len(), view.joining.as_ref()), (2, None));
    for member in &view.chain {
        let i = crate::cluster::index(&member.host);
        assert_eq!(world.standby(i).unwrap().machine.state(), State::Serving);
    }
}

/// 3FS issue 345: the tail crashes after it has committed and before it has said so, and comes back with what it had.
#[test]
fn a_tail_that_committed_and_could_not_say_so_is_not_stuck() {
    let mut world = protected(Mutant::None);
    apply(&mut world, Step::Run(0)).unwrap();
    settle(&mut world, |s| matches!(s, Step::Down(_))).unwrap();
    let crash = Step::Crash {
        host: 2,
        recovers: true,
        prepared: false,
    };
    assert_eq!(world.visible.len(), 3, "nobody has said so");
    apply(&mut world, crash).unwrap();
    apply(&mut world, Step::Back(2)).unwrap();
    settle(&mut world, all).unwrap();
    let tail = world.standby(2).unwrap();
    assert_eq!(tail.machine.hist().map(|mark| mark.epoch.0), Some(4));
    assert_eq!(tail.machine.state(), State::Serving);
    assert_eq!(world.visible.len(), 4, "acknowledged after all");
}

/// A checkpoint that arrives while a replica is frozen for a takeover that is not granted: an owner that waits for its
/// acknowledgement sends no other one that would show the hole.
#[test]
fn what_is_missed_while_frozen_comes_again_without_another_checkpoint() {
    let mut world = protected(Mutant::None);
    apply(&mut world, Step::Ask(2)).unwrap();
    apply(&mut world, Step::Forget(0)).unwrap();
    apply(&mut world, Step::Run(0)).unwrap();
    settle(&mut world, |s| matches!(s, Step::Down(_))).unwrap();
    apply(&mut world, Step::GiveUp(2)).unwrap();
    let tail = world.standby(2).unwrap();
    assert_eq!(tail.machine.state(), State::Serving);
    assert_eq!(tail.machine.hist().map(|mark| mark.epoch.0), Some(3));
    settle(&mut world, all).unwrap();
    assert_eq!(world.visible.len(), 4, "committed after all");
}

/// A new owner sends the head what it lacks, and the head misses the tail's ack because it suspects that owner. (An
/// owner that bridges waited for it for ever: seeds 10073883, 10092747, 10137835 and 10157210, before a replica asked
/// again for what it had missed.)
fn bridged_to_a_head_that_was_frozen(mutant: Mutant) -> World {
    let mut world = world(mutant);
    wish(&mut world, Plan::Anew(vec![1, 2, 3])).unwrap();
    settle(&mut world, all).unwrap();
    for _ in 0..3 {
        apply(&mut world, Step::Run(0)).unwrap();
        settle(&mut world, all).unwrap();
    }
    // The head alone has the fourth checkpoint, and takes over.
    apply(&mut world, Step::Run(0)).unwrap();
    let to = |host| move |s: &Step| matches!(s, Step::Down(link) if link.to == host);
    settle(&mut world, to(1)).unwrap();
    apply(&mut world, Step::Ask(1)).unwrap();
    apply(&mut world, Step::Decide(0)).unwrap();
    apply(&mut world, Step::Hear(0)).unwrap();
    for host in [2, 3] {
        apply(&mut world, Step::Look(host)).unwrap();
        settle(&mut world, |s| matches!(s, Step::Link(_))).unwrap();
    }
    settle(&mut world, |s| {
        matches!(
            s,
            Step::Connect(_) | Step::Bridge(_) | Step::Down(_) | Step::Link(_)
        )
    })
    .unwrap();
    assert!(world.hosts[1].bridge.is_some());
    let tail = world.standby(3).unwrap();
    assert_eq!(tail.machine.acked().map(|epoch| epoch.0), Some(4));
    // The ack of it reaches the new head, 2, while that is frozen.
    apply(&mut world, Step::Ask(2)).unwrap();
    apply(&mut world, Step::Forget(0)).unwrap();
    let up = |s: &Step| matches!(s, Step::Up(link) if link.from == 2);
    settle(&mut world, up).unwrap();
    apply(&mut world, Step::GiveUp(2)).unwrap();
    settle(&mut world, all).unwrap();
    world
}

#[test]
fn an_ack_that_is_missed_while_frozen_mutes_no_new_owner() {
    let mut world = bridged_to_a_head_that_was_frozen(Mutant::None);
    let owner = world.hosts[1].owner.as_ref().unwrap();
    assert!(owner.connected() && world.hosts[1].bridge.is_none());
    apply(&mut world, Step::Run(1)).unwrap();
    settle(&mut world, all).unwrap();
    assert_eq!(world.visible.len(), 5);
    let world = bridged_to_a_head_that_was_frozen(Mutant::AcksNotAsked);
    let owner = world.hosts[1].owner.as_ref().unwrap();
    assert!(
        !owner.connected() && world.hosts[1].bridge.is_some(),
        "it is mute"
    );
}

/// A tail fails, and says so just when its predecessor ends their connection to ask it for what it missed while frozen.
fn failed_while_its_predecessor_asks_again(mutant: Mutant) -> World {
    let mut world = protected(mutant);
    let doom = Step::Doom {
        host: 2,
        damaged: false,
    };
    apply(&mut world, doom).unwrap();
    apply(&mut world, Step::Run(0)).unwrap();
    settle(&mut world, |s| matches!(s, Step::Down(_))).unwrap();
    assert!(world.standby(2).unwrap().machine.failed().is_some());
    apply(&mut world, Step::Ask(1)).unwrap();
    apply(&mut world, Step::Forget(0)).unwrap();
    apply(&mut world, Step::GiveUp(1)).unwrap();
    for _ in 0..20 {
        settle(&mut world, |s| all(s) && !matches!(s, Step::Link(_))).unwrap();
        if world.can_link(1) {
            apply(&mut world, Step::Link(1)).unwrap();
        }
    }
    world
}

#[test]
fn a_successor_that_cannot_be_asked_again_is_named() {
    let named = |world: &World| {
        let owner = world.hosts[0].owner.as_ref().unwrap();
        owner.troubles.contains(&2)
    };
    assert!(named(&failed_while_its_predecessor_asks_again(
        Mutant::None
    )));
    let mutant = Mutant::TroubleOnce;
    assert!(!named(&failed_while_its_predecessor_asks_again(mutant)));
}

/// A replica in the middle fails while its predecessor has nobody to tell it to.
fn failed_while_nobody_listened(mutant: Mutant) -> World {
    let mut world = world(mutant);
    wish(&mut world, Plan::Anew(vec![1, 2, 3])).unwrap();
    settle(&mut world, all).unwrap();
    for _ in 0..3 {
        apply(&mut world, Step::Run(0)).unwrap();
        settle(&mut world, all).unwrap();
    }
    let doom = Step::Doom {
        host: 2,
        damaged: false,
    };
    apply(&mut world, doom).unwrap();
    apply(&mut world, Step::Run(0)).unwrap();
    let to = |host| move |s: &Step| matches!(s, Step::Down(link) if link.to == host);
    settle(&mut world, to(1)).unwrap();
    let up = world.up_link(1).unwrap();
    apply(&mut world, Step::Cut(up)).unwrap();
    settle(&mut world, to(2)).unwrap();
    assert!(world.standby(2).unwrap().machine.failed().is_some());
    settle(&mut world, |s| matches!(s, Step::Up(_))).unwrap();
    settle(&mut world, |s| !matches!(s, Step::ListenToTail(_))).unwrap();
    world
}

#[test]
fn a_failure_that_nobody_heard_is_said_again() {
    let named = |world: &World| {
        let owner = world.hosts[0].owner.as_ref().unwrap();
        assert!(owner.connected(), "all of the chain takes its connection");
        owner.troubles.contains(&2)
    };
    assert!(named(&failed_while_nobody_listened(Mutant::None)));
    assert!(!named(&failed_while_nobody_listened(Mutant::FailedOnce)));
}

/// FIELD H16: while the first checkpoint is on its way output flows, so what has it cannot be resumed from; output is held from
/// the capture of the one on that is the first to be resumed from.
#[test]
fn h16_output_flows_until_the_first_checkpoint_is_acknowledged() {
    let mut world = world(Mutant::None);
    wish(&mut world, Plan::Anew(vec![1, 2])).unwrap();
    settle(&mut world, all).unwrap();
    let holding = |world: &World| world.hosts[0].owner.as_ref().unwrap().output.holds();
    // Nothing of this reaches the tail, and nothing keeps the VM from speaking.
    for epochs in 1..=2 {
        apply(&mut world, Step::Run(0)).unwrap();
        assert_eq!((world.visible.len(), holding(&world)), (epochs, false));
    }
    settle(&mut world, all).unwrap();
    for epochs in 3..=4 {
        for i in [1, 2] {
            let machine = &world.standby(i).unwrap().machine;
            assert_eq!(machine.state(), State::Syncing);
            assert!(!world.can_ask(i), "more has been seen, perhaps");
        }
        apply(&mut world, Step::Run(0)).unwrap();
        // What has left depends on nothing newer than what it may be resumed from.
        assert_eq!(
            (world.visible.len(), holding(&world)),
            (epochs, epochs == 4)
        );
        settle(&mut world, all).unwrap();
    }
    for i in [1, 2] {
        assert_eq!(world.standby(i).unwrap().machine.state(), State::Serving);
        assert!(world.can_ask(i));
    }
    apply(&mut world, Step::Run(0)).unwrap();
    assert_eq!(world.visible.len(), 4, "not acknowledged yet");
    settle(&mut world, all).unwrap();
    assert_eq!(world.visible.len(), 5);
}

/// The tail's store fails when it has copied everything but the rest to a joining replica: what it held is not to be
/// trusted, so nothing of it may become the joining replica's checkpoint.
#[test]
fn i3_a_failed_replica_does_not_fill_another() {
    let mut world = protected(Mutant::None);
    wish(&mut world, Plan::Join(3)).unwrap();
    settle(&mut world, |s| all(s) && !matches!(s, Step::Feed(_))).unwrap();
    // The rest waits for the end of a checkpoint, which fails.
    apply(&mut world, Step::Run(0)).unwrap();
    settle(
        &mut world,
        |s| matches!(s, Step::Down(link) if link.to == 1),
    )
    .unwrap();
    let begin = |s: &Step| matches!(s, Step::Down(link) if link.to == 2);
    let step = world.deliveries().into_iter().find(begin).unwrap();
    apply(&mut world, step).unwrap();
    settle(&mut world, |s| matches!(s, Step::Feed(_))).unwrap();
    let doom = Step::Doom {
        host: 2,
        damaged: true,
    };
    apply(&mut world, doom).unwrap();
    settle(&mut world, all).unwrap();
    assert_eq!(world.standby(2).unwrap().machine.state(), State::Failed);
    assert_eq!(world.standby(3).unwrap().machine.hist(), None);
}
