//! Whether the chain keeps up: what it was sent and has not acknowledged, how fast it takes it, and how long the guest had
//! to wait for it. Plain: the caller says what time it is, counted from any moment.

use std::collections::VecDeque;
use std::time::Duration;

use checkpoint::Epoch;

use super::figures::Throttled;

/// Length of a slot of time.
const SLOT: Duration = Duration::from_secs(1);
/// Slots looked at.
const SLOTS: u64 = 10;
/// An owner is throttled if checkpoints waited for the chain for this share of the time, in percent.
const SHARE: u64 = 10;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    number: u64,
    sent: u64,
    epochs_waited: Duration,
    vcpus_waited: Duration,
}

/// The meter.
#[derive(Debug, Default)]
pub struct Meter {
    slots: VecDeque<Slot>,
    /// Bytes sent and not acknowledged, by epoch.
    sent: VecDeque<(Epoch, u64)>,
    unacknowledged: u64,
    moved: Duration,
}

impl Meter {
    /// A chain begins: nothing of an earlier one counts.
    pub fn begin(&mut self, now: Duration) {
        *self = Self {
            moved: now,
            ..Self::default()
        };
    }

    fn slot(&mut self, now: Duration) -> &mut Slot {
        let number = (now.as_millis() / SLOT.as_millis()) as u64;
        while self
            .slots
            .front()
            .is_some_and(|slot| slot.number + SLOTS <= number)
        {
            self.slots.pop_front();
        }
        if self.slots.back().is_none_or(|slot| slot.number < number) {
            self.slots.push_back(Slot {
                number,
                ..Slot::default()
            });
        }
        // One was pushed just now if there was none.
        let last = self.slots.len() - 1;
        &mut self.slots[last]
    }

    /// The link has taken `bytes` of `epoch`.
    pub fn sent(&mut self, epoch: Epoch, bytes: u64, now: Duration) {
        self.slot(now).sent += bytes;
        self.unacknowledged += bytes;
        match self.sent.back_mut() {
            Some((last, total)) if *last == epoch => *total += bytes,
            _ => self.sent.push_back((epoch, bytes)),
        }
        self.moved = now;
    }

    /// Every checkpoint up to `epoch` is committed.
    pub fn committed(&mut self, epoch: Epoch, now: Duration) {
        while let Some((_, bytes)) = self.sent.pop_front_if(|(sent, _)| *sent <= epoch) {
            self.unacknowledged -= bytes;
        }
        self.moved = now;
    }

    /// The chain has said something that shows progress.
    pub fn moved(&mut self, now: Duration) {
        self.moved = now;
    }

    /// A checkpoint that was due could not be captured for so long.
    pub fn epoch_waited(&mut self, time: Duration, now: Duration) {
        self.slot(now).epochs_waited += time;
    }

    /// The guest stood still for so long because its pages found no room.
    pub fn vcpus_waited(&mut self, time: Duration, now: Duration) {
        self.slot(now).vcpus_waited += time;
    }

    /// How long the chain has neither taken nor acknowledged anything.
    #[must_use]
    pub fn still_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.moved)
    }

    /// Whether, and how much, the guest waits for the chain; `queued` bytes have not been sent yet.
    #[must_use]
    pub fn throttled(&self, queued: u64, now: Duration) -> Option<Throttled> {
        let number = (now.as_millis() / SLOT.as_millis()) as u64;
        let slots = || self.slots.iter().filter(|s| s.number + SLOTS > number);
        let epochs: Duration = slots().map(|slot| slot.epochs_waited).sum();
        let vcpus: Duration = slots().map(|slot| slot.vcpus_waited).sum();
        let window = SLOT.as_millis() as u64 * SLOTS;
        let waited = (epochs + vcpus).as_millis() as u64;
        (waited * 100 >= window * SHARE).then(|| Throttled {
            window_ms: window,
            waited_ms: waited,
            vcpus_ms: vcpus.as_millis() as u64,
            unacknowledged: self.unacknowledged + queued,
            bytes_per_second: slots().map(|slot| slot.sent).sum::<u64>() * 1000 / window,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn c8_a_chain_that_is_waited_for_is_named_with_its_rate_and_what_it_owes() {
        let mut meter = Meter::default();
        meter.begin(ms(500));
        meter.sent(Epoch(1), 4 << 20, ms(1000));
        meter.sent(Epoch(2), 6 << 20, ms(2000));
        meter.epoch_waited(ms(900), ms(2500));
        assert_eq!(meter.throttled(0, ms(2500)), None, "it happens");
        meter.vcpus_waited(ms(100), ms(3100));
        let throttled = meter.throttled(1 << 20, ms(3100)).unwrap();
        let wanted = Throttled {
            window_ms: 10_000,
            waited_ms: 1000,
            vcpus_ms: 100,
            unacknowledged: 11 << 20,
            bytes_per_second: 1 << 20,
        };
        assert_eq!(throttled, wanted);
        meter.committed(Epoch(1), ms(3200));
        assert_eq!(
            meter.throttled(0, ms(3200)).unwrap().unacknowledged,
            6 << 20
        );
        assert_eq!(meter.throttled(0, ms(12_500)), None, "it is over");
    }

    #[test]
    fn whatever_the_chain_takes_or_says_is_progress() {
        let mut meter = Meter::default();
        meter.begin(ms(1000));
        assert_eq!(meter.still_for(ms(1500)), ms(500));
        meter.sent(Epoch(1), 1, ms(2000));
        assert_eq!(meter.still_for(ms(2000)), ms(0));
        meter.moved(ms(3000));
        meter.epoch_waited(ms(500), ms(3500));
        assert_eq!(meter.still_for(ms(4000)), ms(1000), "waiting is none");
        meter.committed(Epoch(1), ms(5000));
        assert_eq!(meter.still_for(ms(5000)), ms(0));
    }
}
