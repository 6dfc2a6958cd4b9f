//! A VM's disk as its devices see it: attached late, watched, and what follows if this host's storage fails it.
//!
//! A write that the owner's own disk refuses is what backups are for: whoever takes over does it again, on a disk that
//! works, and the guest never hears of it (FIELD H4). A disk that does not answer is the same, later (H5).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::DiskRecord;
use diskbuf::{DiskSink, Mirror, OwnerDisk};
use vmm::backend::BlockBackend;

use crate::config::OnDiskError;
use crate::epoch::owner::Owner;
use crate::epoch::queue::ShipQueue;
use crate::fault::{self, Fault};

/// Between two tries of a request that waits for its disk.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two looks at whether disks answer.
const LOOK: Duration = Duration::from_millis(250);
/// While a backup is to take the VM over.
const WAIT: Duration = Duration::from_millis(100);
/// A chain whose oldest checkpoint waits for longer might not be able to.
const COMMITS: Duration = Duration::from_secs(1);

/// Hears of a disk that is in trouble, or is not any more; in words.
pub type Say = Box<dyn Fn(String) + Send + Sync>;

/// What a VM's disks have in common.
pub struct Care {
    policy: OnDiskError,
    /// None: they have all the time there is.
    patience: Option<Duration>,
    owner: Arc<OnceLock<Arc<Owner>>>,
    say: OnceLock<Say>,
    /// What is wrong with disks now, by their numbers.
    troubles: Mutex<BTreeMap<u16, String>>,
}

impl Care {
    /// By `policy`; a request may take `patience`.
    #[must_use]
    pub fn new(
        policy: OnDiskError,
        patience: Option<Duration>,
        owner: Arc<OnceLock<Arc<Owner>>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            policy,
            patience,
            owner,
            say: OnceLock::new(),
            troubles: Mutex::default(),
        })
    }

    /// To whom troubles are told; the first one counts.
    pub fn tell(&self, say: Say) {
        let _ = self.say.set(say);
    }

    fn say(&self, text: String) {
        if let Some(say) = self.say.get() {
            say(text);
        }
    }

    fn troubles(&self) -> MutexGuard<'_, BTreeMap<u16, String>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wrong with disks now, in words.
    #[must_use]
    pub fn now(&self) -> Vec<String> {
        self.troubles().values().cloned().collect()
    }

    fn trouble(&self, disk: u16, text: String) {
        tracing::error!("{text}");
        self.troubles().insert(disk, text.clone());
        self.say(text);
    }

    fn well_again(&self, disk: u16) {
        self.troubles().remove(&disk);
        let text = format!("disk {disk} is well again");
        tracing::info!("{text}");
        self.say(text);
    }

    /// Gives the VM up, if a backup has everything and takes it then.
    fn give_up(&self, why: String) -> Option<&Arc<Owner>> {
        let owner = self.owner.get()?;
        let commits = owner
            .waiting_for_commit()
            .is_none_or(|waits| waits < COMMITS);
        if self.policy != OnDiskError::Failover || !owner.is_protected() || !commits {
            return None;
        }
        owner.give_up(why);
        Some(owner)
    }
}

/// What a disk is at.
#[derive(Debug, Default)]
struct At {
    /// A request is with the mirror, since then.
    since: Option<Instant>,
    /// Somebody has been told that it is in trouble.
    said: bool,
}

/// Shared by a disk, its stream of writes and who watches it.
#[derive(Clone, Debug, Default)]
struct Busy(Arc<Mutex<At>>);

impl Busy {
    fn at(&self) -> MutexGuard<'_, At> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, busy: bool) {
        self.at().since = busy.then(Instant::now);
    }

    /// True if it was not said before.
    fn mark(&self, said: bool) -> bool {
        std::mem::replace(&mut self.at().said, said) != said
    }
}

/// A disk whose mirror is known only at activation: a standby is instantiated while its replica still applies to it.
pub struct LateDisk {
    size: u64,
    index: u16,
    disk: OnceLock<OwnerDisk>,
    care: Arc<Care>,
    busy: Busy,
}

impl LateDisk {
    /// Disk number `index`, of `size` bytes.
    #[must_use]
    pub fn new(index: u16, size: u64, care: Arc<Care>) -> Arc<Self> {
        Arc::new(Self {
            size,
            index,
            disk: OnceLock::new(),
            care,
            busy: Busy::default(),
        })
    }

    /// Attaches the image; its writes are streamed into `queue`. False: it has one.
    pub fn attach(&self, mirror: Arc<Mirror>, queue: Arc<ShipQueue>) -> bool {
        let sink = QueueSink {
            queue,
            busy: self.busy.clone(),
        };
        let disk = OwnerDisk::new(self.index, mirror, Arc::new(sink));
        self.disk.set(disk).is_ok()
    }

    fn attempt(&self, mut act: impl FnMut(&OwnerDisk) -> io::Result<()>) -> io::Result<()> {
        let disk = self
            .disk
            .get()
            .ok_or_else(|| io::Error::other("the standby's disk is not activated yet"))?;
        loop {
            self.busy.set(true);
            let done = act(disk);
            self.busy.set(false);
            match done {
                Ok(()) => {
                    if self.busy.mark(false) {
                        self.care.well_again(self.index);
                    }
                    return Ok(());
                }
                // The guest's mistake, not the disk's.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Err(e),
                Err(e) => self.failed(e)?,
            }
        }
    }

    /// `Ok`: it is to be tried again.
    fn failed(&self, error: io::Error) -> io::Result<()> {
        let why = format!(
            "disk {}: this host's image of it fails: {error}",
            self.index
        );
        if self.busy.mark(true) {
            self.care.trouble(self.index, why.clone());
        }
        if self.care.policy == OnDiskError::Pause {
            std::thread::sleep(AGAIN);
            return Ok(());
        }
        if let Some(owner) = self.care.give_up(why) {
            // Whoever takes over does it again. The guest hears of it only if nobody can.
            while owner.gave_up() {
                std::thread::sleep(WAIT);
            }
        }
        Err(error)
    }
}

impl BlockBackend for LateDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.attempt(|disk| disk.read_at(offset, buf))
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.attempt(|disk| disk.write_at(offset, data))
    }
    fn flush(&self) -> io::Result<()> {
        self.attempt(OwnerDisk::flush)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.attempt(|disk| disk.discard(offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.attempt(|disk| disk.write_zeroes(offset, len))
    }
    fn id(&self) -> [u8; 20] {
        // The same on every host: a failover continues one machine.
        let mut id = [0u8; 20];
        let text = format!("understudy-{}", self.index);
        id[..text.len()].copy_from_slice(text.as_bytes());
        id
    }
}

/// Streams disk writes into the queue. Waiting for room there is not the disk's fault.
struct QueueSink {
    queue: Arc<ShipQueue>,
    busy: Busy,
}

impl DiskSink for QueueSink {
    fn disk_write(&self, record: &DiskRecord<'_>) {
        if fault::is(Fault::DiskStream) {
            return;
        }
        self.busy.set(false);
        self.queue.disk_write(record);
        self.busy.set(true);
    }
}

/// Watches that disks answer, until the process ends.
///
/// # Errors
/// When there is no thread.
pub fn watch(care: Arc<Care>, disks: Vec<Arc<LateDisk>>) -> io::Result<()> {
    let Some(patience) = care.patience.filter(|_| !disks.is_empty()) else {
        return Ok(());
    };
    let look = move || {
        loop {
            std::thread::sleep(LOOK);
            for disk in &disks {
                let waits = disk.busy.at().since.map(|since| since.elapsed());
                if waits.is_some_and(|waits| waits >= patience) && disk.busy.mark(true) {
                    let why = format!(
                        "disk {}: this host's image of it has not answered for {} s",
                        disk.index,
                        patience.as_secs()
                    );
                    care.trouble(disk.index, why.clone());
                    let _ = care.give_up(why);
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("disk-watch".into());
    thread.spawn(look).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h4_a_disk_in_trouble_is_named_until_it_is_well_again() {
        const SIZE: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
        let mirror = Arc::new(Mirror::open(&path).unwrap());
        let care = Care::new(OnDiskError::Report, None, Arc::default());
        let disk = LateDisk::new(3, SIZE, care.clone());
        assert!(disk.attach(mirror, Arc::new(ShipQueue::new(1 << 20))));
        let mut block = [0; 512];
        disk.read_at(0, &mut block).unwrap();
        assert_eq!(care.now(), Vec::<String>::new());
        // What lies behind the end of the file cannot be read.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(0).unwrap();
        disk.read_at(0, &mut block).unwrap_err();
        let said = care.now();
        assert!(
            said.len() == 1 && said[0].starts_with("disk 3: "),
            "{said:?}"
        );
        file.set_len(SIZE).unwrap();
        disk.read_at(0, &mut block).unwrap();
        assert_eq!(care.now(), Vec::<String>::new());
    }
}
