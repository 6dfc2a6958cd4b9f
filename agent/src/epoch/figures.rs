//! How an owner is doing, as `status` shows it.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// An owner's figures at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// The epoch that the guest is in.
    pub open_epoch: u64,
    /// The newest checkpoint that the chain has.
    pub committed_epoch: u64,
    /// Milliseconds that the oldest checkpoint under way has been waiting for its commit; 0: none is.
    pub lag_ms: u64,
    /// Milliseconds since the last commit, if there was one.
    pub since_commit_ms: Option<u64>,
    /// How long output was held, in microseconds: the highest of the epochs' 99th percentiles, of the last some hundred epochs.
    pub held_p99_us: u64,
    /// How far the first synchronisation of a chain is, during it.
    pub sync: Option<SyncFigures>,
    /// The guest writes more than the chain takes, and waits for it. It is protected all the same.
    #[serde(default)]
    pub throttled: Option<Throttled>,
}

/// How much a guest waits for its chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttled {
    /// Of so many milliseconds,
    pub window_ms: u64,
    /// for so many a checkpoint that was due could not be captured,
    pub waited_ms: u64,
    /// and for so many of these the guest's vCPUs stood still.
    pub vcpus_ms: u64,
    /// Bytes queued or sent and not acknowledged.
    pub unacknowledged: u64,
    /// Bytes that the chain took per second, encoded.
    pub bytes_per_second: u64,
}

impl Throttled {
    /// Percent of the time that checkpoints waited.
    #[must_use]
    pub fn percent(&self) -> u64 {
        (self.waited_ms * 100 / self.window_ms.max(1)).min(100)
    }

    /// In words, to follow `Protected, `.
    #[must_use]
    pub fn text(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "slow: the chain takes {:.1} MiB/s, the guest writes more ({:.0} MiB are not acknowledged; checkpoints waited \
             for {} % of the last {} s)",
            mib(self.bytes_per_second),
            mib(self.unacknowledged),
            self.percent(),
            self.window_ms / 1000
        )
    }
}

/// How far a first synchronisation is, in bytes. Memory that changes meanwhile is sent again, and not counted again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncFigures {
    /// Of the disks, compared and, where a replica differs, sent.
    pub disk_done: u64,
    /// Of that, what every replica held already.
    #[serde(default)]
    pub disk_equal: u64,
    /// Sizes of the disks.
    pub disk_total: u64,
    /// Of the memory.
    pub memory_done: u64,
    /// Its size.
    pub memory_total: u64,
}

impl SyncFigures {
    /// Percent, of disks and memory together.
    #[must_use]
    pub fn percent(&self) -> u64 {
        let total = self.disk_total + self.memory_total;
        (self.disk_done + self.memory_done) * 100 / total.max(1)
    }

    /// In words.
    #[must_use]
    pub fn text(&self) -> String {
        let mib = |bytes: u64| bytes >> 20;
        format!(
            "synchronising, {} % (disks {} of {} MiB, {} MiB of it there already; memory {} of {} MiB)",
            self.percent(),
            mib(self.disk_done),
            mib(self.disk_total),
            mib(self.disk_equal),
            mib(self.memory_done),
            mib(self.memory_total)
        )
    }
}

/// What the epoch loop notes of a first synchronisation.
#[derive(Debug, Default)]
pub struct Progress {
    disk_done: AtomicU64,
    disk_equal: AtomicU64,
    disk_total: AtomicU64,
    memory_done: AtomicU64,
    memory_total: AtomicU64,
}

impl Progress {
    /// One begins.
    pub fn begin(&self, disk: u64, memory: u64) {
        self.disk_done.store(0, Ordering::Relaxed);
        self.disk_equal.store(0, Ordering::Relaxed);
        self.memory_done.store(0, Ordering::Relaxed);
        self.disk_total.store(disk, Ordering::Relaxed);
        self.memory_total.store(memory, Ordering::Relaxed);
    }

    /// So many bytes more of the disks are done; `equal`: nothing had to be sent.
    pub fn disk(&self, bytes: u64, equal: bool) {
        self.disk_done.fetch_add(bytes, Ordering::Relaxed);
        if equal {
            self.disk_equal.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// So many bytes more of the memory are done.
    pub fn memory(&self, bytes: u64) {
        self.memory_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How far it is.
    pub fn read(&self) -> SyncFigures {
        SyncFigures {
            disk_done: self.disk_done.load(Ordering::Relaxed),
            disk_equal: self.disk_equal.load(Ordering::Relaxed),
            disk_total: self.disk_total.load(Ordering::Relaxed),
            memory_done: self.memory_done.load(Ordering::Relaxed),
            memory_total: self.memory_total.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c8_a_slow_chain_is_a_state_with_a_reason() {
        let throttled = Throttled {
            window_ms: 10_000,
            waited_ms: 8500,
            vcpus_ms: 100,
            unacknowledged: 300 << 20,
            bytes_per_second: 75 << 20,
        };
        assert_eq!(
            throttled.text(),
            "slow: the chain takes 75.0 MiB/s, the guest writes more (300 MiB are not acknowledged; checkpoints waited for \
             85 % of the last 10 s)"
        );
    }

    #[test]
    fn percent_is_of_disks_and_memory_together() {
        let progress = Progress::default();
        assert_eq!(progress.read().percent(), 0, "of nothing");
        progress.begin(300, 100);
        progress.disk(100, false);
        progress.disk(50, true);
        progress.memory(50);
        assert_eq!(progress.read().disk_equal, 50);
        assert_eq!(progress.read().percent(), 50);
        progress.begin(10, 10);
        assert_eq!(progress.read().percent(), 0, "another one begins");
    }
}
