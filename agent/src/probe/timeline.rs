//! When answers came: latencies, gaps, the first answer after something happened.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::rank;

/// Samples kept, 40 bytes each. A bench of 20,000 answers a second runs for 50 seconds before later ones are only counted.
pub const MAX_SAMPLES: usize = 1_000_000;

/// One answered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The request's number.
    pub seq: u64,
    /// The guest's counter in the answer (0 where there is none).
    pub counter: u64,
    /// When the request was handed to the socket.
    pub sent: Instant,
    /// When its answer was taken from the socket.
    pub received: Instant,
}

/// A stretch without answers: between two that followed each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The last answer before it.
    pub from: Instant,
    /// The first answer after it.
    pub to: Instant,
}

impl Gap {
    /// How long it was.
    pub fn len(&self) -> Duration {
        self.to.saturating_duration_since(self.from)
    }

    /// Whether the two answers came together.
    pub fn is_empty(&self) -> bool {
        self.len().is_zero()
    }
}

/// Round-trip times, microseconds. Percentiles are nearest-rank; all 0 if there was no answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Answers counted.
    pub count: usize,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Longest.
    pub max_us: u64,
}

impl Latency {
    /// The figures of these times.
    pub fn of(mut us: Vec<u64>) -> Latency {
        us.sort_unstable();
        let at = |percent| rank::nearest(&us, percent).unwrap_or(0);
        Latency {
            count: us.len(),
            p50_us: at(50),
            p99_us: at(99),
            max_us: at(100),
        }
    }
}

/// Answers in the order they came.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    samples: Vec<Sample>,
    uncounted: u64,
}

impl Timeline {
    /// Books an answer. The times of answers never go back.
    pub fn push(&mut self, s: Sample) {
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push(s);
        } else {
            self.uncounted += 1;
        }
    }

    /// The answers, oldest first.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Answers that came after [`MAX_SAMPLES`] and are in no figure.
    pub fn beyond_limit(&self) -> u64 {
        self.uncounted
    }

    /// When the first answer later than `t` came. One on its way at `t` counts: to measure an outage, see
    /// [`Timeline::longest_gap_after`].
    pub fn first_after(&self, t: Instant) -> Option<Instant> {
        let i = self.samples.partition_point(|s| s.received <= t);
        self.samples.get(i).map(|s| s.received)
    }

    /// The longest stretch without answers that ended after `t`. After a host was killed at `t`, its end is the first
    /// answer of the new owner.
    pub fn longest_gap_after(&self, t: Instant) -> Option<Gap> {
        self.pairs().filter(|g| g.to > t).max_by_key(Gap::len)
    }

    /// The longest stretch without answers.
    pub fn longest_gap(&self) -> Option<Gap> {
        self.pairs().max_by_key(Gap::len)
    }

    /// All stretches without answers longer than `than`.
    pub fn gaps(&self, than: Duration) -> Vec<Gap> {
        self.pairs().filter(|g| g.len() > than).collect()
    }

    /// Round-trip times of all answers.
    pub fn latency(&self) -> Latency {
        Latency::of(self.samples.iter().map(rtt).collect())
    }

    /// Round-trip times of the requests sent in `[from, to)`.
    pub fn latency_between(&self, from: Instant, to: Instant) -> Latency {
        Latency::of(
            self.samples
                .iter()
                .filter(|s| from <= s.sent && s.sent < to)
                .map(rtt)
                .collect(),
        )
    }

    fn pairs(&self) -> impl Iterator<Item = Gap> {
        self.samples.windows(2).map(|w| Gap {
            from: w[0].received,
            to: w[1].received,
        })
    }
}

fn rtt(s: &Sample) -> u64 {
    micros(s.received.saturating_duration_since(s.sent))
}

/// Whole microseconds of `d`.
pub(super) fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(received_ms: &[u64]) -> (Timeline, Instant) {
        let t0 = Instant::now();
        let mut t = Timeline::default();
        for (i, ms) in received_ms.iter().enumerate() {
            let received = t0 + Duration::from_millis(*ms);
            t.push(Sample {
                seq: i as u64,
                counter: 0,
                sent: received - Duration::from_millis(1),
                received,
            });
        }
        (t, t0)
    }

    #[test]
    fn gaps_and_first_answers_are_found() {
        let (t, t0) = timeline(&[10, 20, 21, 321, 331, 400]);
        let ms = |n| t0 + Duration::from_millis(n);
        assert_eq!(t.first_after(ms(20)), Some(ms(21)));
        assert_eq!(t.first_after(ms(22)), Some(ms(321)));
        assert_eq!(t.first_after(ms(400)), None);
        // Killed at 20: the answer at 21 was on its way, the outage ended at 321.
        let outage = t.longest_gap_after(ms(20)).expect("a gap");
        assert_eq!((outage.from, outage.to), (ms(21), ms(321)));
        assert_eq!(t.longest_gap_after(ms(330)).map(|g| g.to), Some(ms(400)));
        assert_eq!(t.longest_gap(), Some(outage));
        assert_eq!(t.gaps(Duration::from_millis(68)).len(), 2);
        assert_eq!(t.longest_gap_after(ms(400)), None);
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let l = Latency::of((1..=200).rev().collect());
        assert_eq!(
            (l.count, l.p50_us, l.p99_us, l.max_us),
            (200, 100, 198, 200)
        );
        assert_eq!(Latency::of(vec![7]).p99_us, 7);
        assert_eq!(Latency::of(vec![]), Latency::default());
        let (t, t0) = timeline(&[10, 20]);
        assert_eq!(t.latency().p50_us, 1000);
        let early = t.latency_between(t0, t0 + Duration::from_millis(10));
        assert_eq!(early.count, 1);
    }
}
