//! How long frames were held: the latency that output commit costs.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use checkpoint::Epoch;
use serde::Serialize;

/// Releases whose figures are kept.
const RECENT: usize = 4096;
/// Sub-buckets per power of two of the histogram: values are kept to within 1/32.
const SUB: usize = 32;
/// Powers of two covered: 2^36 us is 19 hours.
const POWERS: usize = 37;

/// Hold times of the frames one release let out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct EpochHold {
    /// The epoch released (and any sealed before it that still waited).
    pub epoch: Epoch,
    /// Frames let out.
    pub frames: usize,
    /// Median time between a frame's sending by the guest and its release, microseconds.
    pub p50_us: u64,
    /// 99th percentile, microseconds.
    pub p99_us: u64,
    /// Longest, microseconds.
    pub max_us: u64,
}

/// Hold times of all frames released since the start or the last reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HoldStats {
    /// Frames released.
    pub frames: u64,
    /// Median hold time, microseconds, within 1/32.
    pub p50_us: u64,
    /// 99th percentile, microseconds, within 1/32.
    pub p99_us: u64,
    /// Longest, microseconds, exact.
    pub max_us: u64,
}

/// Push times of the frames held now, and what became of earlier ones.
#[derive(Debug)]
pub(crate) struct HoldClock {
    held: VecDeque<Instant>,
    recent: VecDeque<EpochHold>,
    buckets: Vec<u64>,
    frames: u64,
    max_us: u64,
}

impl HoldClock {
    pub(crate) fn new() -> HoldClock {
        HoldClock {
            held: VecDeque::new(),
            recent: VecDeque::new(),
            buckets: vec![0; SUB * POWERS],
            frames: 0,
            max_us: 0,
        }
    }

    /// A frame begins to be held. Frames leave in the order they come, so the times are one queue.
    pub(crate) fn pushed(&mut self, now: Instant) {
        self.held.push_back(now);
    }

    /// The oldest `n` frames are let out by the release of `epoch`.
    pub(crate) fn released(&mut self, epoch: Epoch, n: usize, now: Instant) {
        let mut us: Vec<u64> = self
            .held
            .drain(..n.min(self.held.len()))
            .map(|t| micros(now.saturating_duration_since(t)))
            .collect();
        if us.is_empty() {
            return;
        }
        us.sort_unstable();
        let max_us = us[us.len() - 1];
        for v in &us {
            self.buckets[bucket(*v)] += 1;
        }
        self.frames += us.len() as u64;
        self.max_us = self.max_us.max(max_us);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(EpochHold {
            epoch,
            frames: us.len(),
            p50_us: us[rank(us.len() as u64, 50) as usize],
            p99_us: us[rank(us.len() as u64, 99) as usize],
            max_us,
        });
    }

    /// Everything held is gone without a release.
    pub(crate) fn forget(&mut self) {
        self.held.clear();
    }

    pub(crate) fn totals(&self) -> HoldStats {
        HoldStats {
            frames: self.frames,
            p50_us: self.percentile(50),
            p99_us: self.percentile(99),
            max_us: self.max_us,
        }
    }

    pub(crate) fn recent(&self) -> Vec<EpochHold> {
        self.recent.iter().copied().collect()
    }

    /// Forgets the figures, not the frames held now.
    pub(crate) fn reset(&mut self) {
        self.recent.clear();
        self.buckets.fill(0);
        self.frames = 0;
        self.max_us = 0;
    }

    fn percentile(&self, p: u64) -> u64 {
        if self.frames == 0 {
            return 0;
        }
        let want = rank(self.frames, p);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen > want {
                return bucket_floor(i).min(self.max_us);
            }
        }
        self.max_us
    }
}

/// Index of percentile `p` among `n` > 0 sorted values (nearest rank).
fn rank(n: u64, p: u64) -> u64 {
    (n * p).div_ceil(100).saturating_sub(1)
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// Log-linear: below 32 exact, above it 32 buckets for each power of two.
fn bucket(us: u64) -> usize {
    if us < SUB as u64 {
        return us as usize;
    }
    let power = us.ilog2() as usize;
    let sub = (us >> (power - 5)) as usize & (SUB - 1);
    ((power - 4) * SUB + sub).min(SUB * POWERS - 1)
}

fn bucket_floor(i: usize) -> u64 {
    let (group, sub) = (i / SUB, (i % SUB) as u64);
    if group == 0 {
        return sub;
    }
    (SUB as u64 + sub) << (group - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_their_floors_agree() {
        for us in (0..100_000u64).chain((17..40).map(|p| (1 << p) + 12_345)) {
            let floor = bucket_floor(bucket(us));
            assert!(
                floor <= us && us - floor <= us / 32,
                "{us} landed at {floor}"
            );
        }
        assert_eq!(bucket(u64::MAX), SUB * POWERS - 1);
    }

    #[test]
    fn figures_are_of_the_frames_released() {
        let mut c = HoldClock::new();
        let t0 = Instant::now();
        for i in 0..100 {
            c.pushed(t0 + Duration::from_micros(i));
        }
        c.released(Epoch(1), 99, t0 + Duration::from_micros(100));
        let first = c.recent()[0];
        assert_eq!((first.frames, first.max_us), (99, 100));
        assert_eq!((first.p50_us, first.p99_us), (51, 100));
        c.released(Epoch(2), 5, t0 + Duration::from_micros(1099));
        assert_eq!(c.recent()[1].frames, 1, "only one was still held");
        assert_eq!((c.totals().frames, c.totals().max_us), (100, 1000));
        c.released(Epoch(3), 1, t0);
        assert_eq!(c.recent().len(), 2, "an empty release leaves no figures");
    }
}
