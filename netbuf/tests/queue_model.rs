//! EpochQueue against a model that keeps every frame ever pushed with its fate: order, output commit (I1), the bound,
//! idempotent release, fencing.

use checkpoint::Epoch;
use netbuf::queue::FRAME_OVERHEAD;
use netbuf::{EpochQueue, Pushed, QueueError};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Push(usize),
    Seal(u64),
    /// Seals an epoch that is not newer.
    SealOld(u64),
    /// Releases the epoch this far below the newest sealed one.
    Release(u64),
    /// Releases one this far above it.
    ReleaseUnsealed(u64),
    Hold(bool),
    Fence,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0usize..300).prop_map(Step::Push),
        5 => (1u64..4).prop_map(Step::Seal),
        1 => (0u64..4).prop_map(Step::SealOld),
        4 => (0u64..4).prop_map(Step::Release),
        1 => (1u64..4).prop_map(Step::ReleaseUnsealed),
        1 => prop::bool::weighted(0.8).prop_map(Step::Hold),
        1 => prop::bool::weighted(0.2).prop_map(|b| if b { Step::Fence } else { Step::Hold(true) }),
    ]
}

/// A frame in the queue according to the model.
struct Held {
    frame: Vec<u8>,
    epoch: Option<Epoch>,
}

#[derive(Default)]
struct Model {
    held: Vec<Held>,
    newest: Option<Epoch>,
    hold: bool,
    fenced: bool,
    limit: usize,
    serial: u64,
}

impl Model {
    fn bytes(&self) -> usize {
        self.held
            .iter()
            .map(|h| h.frame.len() + FRAME_OVERHEAD)
            .sum()
    }

    /// Every frame is unlike every other, so that order and identity can be compared.
    fn frame(&mut self, len: usize) -> Vec<u8> {
        self.serial += 1;
        let mut f = self.serial.to_le_bytes().to_vec();
        f.resize(8 + len, 0);
        f
    }

    fn push(&mut self, q: &mut EpochQueue, len: usize) -> Result<(), TestCaseError> {
        let frame = self.frame(len);
        let room =
            self.held.is_empty() || self.bytes() + frame.len() + FRAME_OVERHEAD <= self.limit;
        prop_assert_eq!(
            q.has_room_for(frame.len()),
            room || !self.hold || self.fenced
        );
        let want = if self.fenced {
            Pushed::Dropped
        } else if !self.hold {
            Pushed::SendNow(frame.clone())
        } else if room {
            self.held.push(Held {
                frame: frame.clone(),
                epoch: None,
            });
            Pushed::Held
        } else {
            Pushed::Full(frame.clone())
        };
        prop_assert_eq!(q.push(frame), want);
        Ok(())
    }

    fn release(&mut self, q: &mut EpochQueue, epoch: Epoch) -> Result<(), TestCaseError> {
        let got = q.release(epoch);
        if self.newest.is_none_or(|n| epoch > n) {
            prop_assert_eq!(
                got,
                Err(QueueError::NotSealed {
                    epoch,
                    last: self.newest
                })
            );
            return Ok(());
        }
        let got = got.expect("a sealed epoch");
        // I1, said without the model's bookkeeping: everything that came out was sealed in an epoch up to this one.
        for frame in &got {
            let of = self.held.iter().find(|h| h.frame == *frame);
            prop_assert!(
                of.is_some_and(|h| h.epoch.is_some_and(|e| e <= epoch)),
                "released early, or twice"
            );
        }
        let (out, rest): (Vec<_>, Vec<_>) = self
            .held
            .drain(..)
            .partition(|h| h.epoch.is_some_and(|e| e <= epoch));
        self.held = rest;
        let want: Vec<_> = out.into_iter().map(|h| h.frame).collect();
        prop_assert_eq!(got, want, "all of them, in the order they were pushed");
        prop_assert_eq!(q.release(epoch), Ok(vec![]), "released again: nothing");
        Ok(())
    }

    fn apply(&mut self, q: &mut EpochQueue, step: Step) -> Result<(), TestCaseError> {
        let newest = self.newest.map_or(0, |e| e.0);
        match step {
            Step::Push(len) => self.push(q, len)?,
            Step::Seal(by) => {
                let epoch = Epoch(newest + by);
                prop_assert_eq!(q.seal(epoch), Ok(()));
                self.newest = Some(epoch);
                for h in self.held.iter_mut().filter(|h| h.epoch.is_none()) {
                    h.epoch = Some(epoch);
                }
            }
            Step::SealOld(by) => {
                if let Some(last) = self.newest {
                    let epoch = Epoch(last.0.saturating_sub(by));
                    prop_assert_eq!(q.seal(epoch), Err(QueueError::SealedBefore { epoch, last }));
                }
            }
            Step::Release(below) => self.release(q, Epoch(newest.saturating_sub(below)))?,
            Step::ReleaseUnsealed(above) => self.release(q, Epoch(newest + above))?,
            Step::Hold(on) => {
                let got = q.set_hold(on);
                self.hold = on;
                let want: Vec<_> = if on {
                    vec![]
                } else {
                    self.held.drain(..).map(|h| h.frame).collect()
                };
                prop_assert_eq!(got, want);
            }
            Step::Fence => {
                prop_assert_eq!(q.fence(), self.held.len());
                self.held.clear();
                self.fenced = true;
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_queue_does_what_the_model_does(
        limit in 0usize..2000,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut q = EpochQueue::new(limit);
        let mut m = Model { limit, ..Model::default() };
        m.apply(&mut q, Step::Hold(true))?;
        for s in steps {
            m.apply(&mut q, s)?;
            prop_assert_eq!(q.held_frames(), m.held.len());
            prop_assert_eq!(q.held_bytes(), m.bytes());
            prop_assert!(q.held_frames() <= 1 || q.held_bytes() <= limit, "the bound");
            prop_assert_eq!(q.last_sealed(), m.newest);
            prop_assert_eq!(q.is_fenced(), m.fenced);
        }
    }
}

#[test]
fn an_oversized_frame_is_taken_when_nothing_else_is_held() {
    let mut q = EpochQueue::new(10);
    assert!(q.set_hold(true).is_empty());
    assert_eq!(q.push(vec![1; 1500]), Pushed::Held);
    assert_eq!(q.push(vec![2]), Pushed::Full(vec![2]));
    q.seal(Epoch(1)).expect("first epoch");
    assert_eq!(q.release(Epoch(1)), Ok(vec![vec![1; 1500]]));
    assert_eq!(q.push(vec![2]), Pushed::Held);
}

#[test]
fn nothing_sealed_means_nothing_released() {
    let mut q = EpochQueue::new(1000);
    assert!(q.set_hold(true).is_empty());
    assert_eq!(q.push(vec![1]), Pushed::Held);
    let e = q.release(Epoch(0)).expect_err("nothing was sealed");
    assert_eq!(
        e.to_string(),
        "epoch 0 cannot be released: it is not sealed (newest sealed: none)"
    );
    assert_eq!(q.held_frames(), 1);
}
