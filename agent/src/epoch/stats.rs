//! Figures about epochs, gathered by the owner's loop and read by `status` and the benches.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::meter::Meter;

/// Samples kept of each series: enough for minutes of epochs, bounded for ever.
const KEEP: usize = 1 << 16;

/// Percentiles of one series.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Percentiles {
    /// How many samples.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Largest.
    pub max: u64,
    /// Arithmetic mean.
    pub mean: u64,
}

impl Percentiles {
    /// Of `samples`, in any order.
    #[must_use]
    pub fn of(mut samples: Vec<u64>) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        samples.sort_unstable();
        let at = |percent| crate::rank::nearest(&samples, percent).unwrap_or_default();
        Self {
            count: samples.len() as u64,
            p50: at(50),
            p99: at(99),
            max: samples[samples.len() - 1],
            mean: samples.iter().sum::<u64>() / samples.len() as u64,
        }
    }
}

/// A bounded series of samples: the newest [`KEEP`].
#[derive(Clone, Debug, Default)]
pub struct Series {
    samples: Vec<u64>,
    next: usize,
}

impl Series {
    /// Adds one.
    pub fn push(&mut self, sample: u64) {
        if self.samples.len() < KEEP {
            self.samples.push(sample);
        } else {
            self.samples[self.next] = sample;
        }
        self.next = (self.next + 1) % KEEP;
    }

    /// Percentiles of what is kept.
    #[must_use]
    pub fn percentiles(&self) -> Percentiles {
        Percentiles::of(self.samples.clone())
    }
}

/// One measurement's figures.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct EpochStats {
    /// What the output may do: unprotected, syncing, protected, fenced.
    pub mode: String,
    /// Generation.
    pub generation: u64,
    /// The open epoch.
    pub open_epoch: u64,
    /// The newest committed checkpoint.
    pub committed_epoch: u64,
    /// Length of the measurement in microseconds.
    pub elapsed_us: u64,
    /// Epochs captured (or, harvest only, harvested) in it.
    pub epochs: u64,
    /// Guest paused, microseconds per epoch.
    pub pause_us: Percentiles,
    /// Part of it: until all vCPUs and devices stood still.
    pub stop_us: Percentiles,
    /// Part of it: reading vCPU and device state.
    pub state_us: Percentiles,
    /// Part of it: the dirty log.
    pub harvest_us: Percentiles,
    /// Part of it: copying pages to staging.
    pub copy_us: Percentiles,
    /// Encoding and sending, per epoch, while the guest runs.
    pub ship_us: Percentiles,
    /// Dirty pages per epoch.
    pub dirty_pages: Percentiles,
    /// Of these, pages that had been left writable, changed or not.
    #[serde(default)]
    pub hot_pages: Percentiles,
    /// Bytes sent per epoch.
    pub sent_bytes: Percentiles,
    /// From capture to commit, microseconds.
    pub commit_us: Percentiles,
    /// Output held, microseconds per released epoch with frames.
    pub held_us: Percentiles,
    /// Pages by encoding.
    pub pages_unchanged: u64,
    /// Zero pages.
    pub pages_zero: u64,
    /// Deltas.
    pub pages_delta: u64,
    /// LZ4.
    pub pages_lz4: u64,
    /// Raw.
    pub pages_raw: u64,
    /// Times a capture waited for the chain: the pipeline or the queue to it was full.
    pub back_pressure: u64,
}

/// The recorder behind [`EpochStats`].
#[derive(Debug, Default)]
pub struct Recorder {
    /// Epochs so far.
    pub epochs: u64,
    /// See [`EpochStats::pause_us`].
    pub pause: Series,
    /// See [`EpochStats::stop_us`].
    pub stop: Series,
    /// See [`EpochStats::state_us`].
    pub state: Series,
    /// See [`EpochStats::hot_pages`].
    pub hot: Series,
    /// See [`EpochStats::harvest_us`].
    pub harvest: Series,
    /// See [`EpochStats::copy_us`].
    pub copy: Series,
    /// See [`EpochStats::ship_us`].
    pub ship: Series,
    /// See [`EpochStats::dirty_pages`].
    pub dirty: Series,
    /// See [`EpochStats::sent_bytes`].
    pub sent: Series,
    /// See [`EpochStats::commit_us`].
    pub commit: Series,
    /// Pages by encoding: unchanged, zero, delta, LZ4, raw.
    pub encodings: [u64; 5],
    /// See [`EpochStats::back_pressure`].
    pub back_pressure: u64,
}

impl Recorder {
    /// The figures so far; the caller fills in what the recorder cannot know.
    #[must_use]
    pub fn stats(&self) -> EpochStats {
        let [
            pages_unchanged,
            pages_zero,
            pages_delta,
            pages_lz4,
            pages_raw,
        ] = self.encodings;
        EpochStats {
            epochs: self.epochs,
            pause_us: self.pause.percentiles(),
            stop_us: self.stop.percentiles(),
            state_us: self.state.percentiles(),
            harvest_us: self.harvest.percentiles(),
            hot_pages: self.hot.percentiles(),
            copy_us: self.copy.percentiles(),
            ship_us: self.ship.percentiles(),
            dirty_pages: self.dirty.percentiles(),
            sent_bytes: self.sent.percentiles(),
            commit_us: self.commit.percentiles(),
            pages_unchanged,
            pages_zero,
            pages_delta,
            pages_lz4,
            pages_raw,
            back_pressure: self.back_pressure,
            ..EpochStats::default()
        }
    }
}

/// What the epoch loop and the shipping thread measure.
#[derive(Debug)]
pub struct Measures {
    origin: Instant,
    recorder: Mutex<Recorder>,
    meter: Mutex<Meter>,
}

impl Default for Measures {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            recorder: Mutex::default(),
            meter: Mutex::default(),
        }
    }
}

impl Measures {
    /// The recorder.
    pub fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The meter.
    pub fn meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now, as the meter counts time.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let p = Percentiles::of((1..=100).rev().collect());
        assert_eq!(
            (p.count, p.p50, p.p99, p.max, p.mean),
            (100, 50, 99, 100, 50)
        );
        assert_eq!(Percentiles::of(vec![7]).p99, 7);
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
    }
}
