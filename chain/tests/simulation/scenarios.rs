//! Interleavings told step by step: rare ones, and those that showed something once.

use chain::replica::State;

use crate::cluster::{Grain, Mutant, Plan, Rules, Step, World};

fn world(mutant: Mutant) -> World {
    World::new(Rules {
        hosts: 4,
        in_flight: 3,
        wanted: 2,
        slow_disks: false,
        grain: Grain::Frame,
        mutant,
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

/// The owner 0 is protected by 1 and 2, which hold its first checkpoint.
fn protected(mutant: Mutant) -> World {
    let mut world = world(mutant);
    wish(&mut world, Plan::Anew(vec![1, 2])).unwrap();
    settle(&mut world, all).unwrap();
    apply(&mut world, Step::Run(0)).unwrap();
    settle(&mut world, all).unwrap();
    assert_eq!(world.visible.len(), 1);
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
    assert_eq!(held, [Some(3), Some(1)]);
    apply(&mut world, Step::ListenToTail(0))?;
    settle(&mut world, |s| matches!(s, Step::Up(_)))?;
    Ok(world)
}

#[test]
fn i5_a_tail_that_is_not_complete_acknowledges_nothing_of_before() {
    let world = ahead_of_its_predecessor(Mutant::None).unwrap();
    assert_eq!(world.visible.len(), 1);
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
    assert_eq!(world.visible.len(), 1, "nobody has said so");
    apply(&mut world, crash).unwrap();
    apply(&mut world, Step::Back(2)).unwrap();
    settle(&mut world, all).unwrap();
    let tail = world.standby(2).unwrap();
    assert_eq!(tail.machine.hist().map(|mark| mark.epoch.0), Some(2));
    assert_eq!(tail.machine.state(), State::Serving);
    assert_eq!(world.visible.len(), 2, "acknowledged after all");
}

/// A checkpoint that arrives while a replica is frozen for a takeover that is not granted: an owner that waits for its
/// acknowledgement sends no other one that would show the hole.
#[test]
fn i7_what_is_lost_while_frozen_is_owned_up_to_without_another_checkpoint() {
    let mut world = protected(Mutant::None);
    apply(&mut world, Step::Ask(2)).unwrap();
    apply(&mut world, Step::Forget(0)).unwrap();
    apply(&mut world, Step::Run(0)).unwrap();
    settle(&mut world, |s| matches!(s, Step::Down(_))).unwrap();
    apply(&mut world, Step::GiveUp(2)).unwrap();
    let tail = world.standby(2).unwrap();
    assert_eq!(tail.machine.state(), State::Failed);
    settle(&mut world, all).unwrap();
    let owner = world.hosts[0].owner.as_ref().unwrap();
    assert!(owner.troubles.contains(&2), "the owner has heard");
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
