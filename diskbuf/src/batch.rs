//! A batch: journalled writes on their way into the mirrors. Done by a thread of its own, so that no epoch waits.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use checkpoint::{DiskOp, DiskRecord, DiskRecordError, disk_records};

use crate::error::DiskbufError;
use crate::journal::Entry;
use crate::layer::LayerFile;
use crate::mirror::Mirror;
use crate::record::{RecordFile, Stored};

/// What is to be done, in this order: sync the journal and say so in it, write the mirrors, sync the mirrors, replace the record.
pub(crate) struct Batch {
    /// The journal file that holds the entries, if it is not synced yet.
    pub journal: Option<Arc<dyn LayerFile>>,
    /// Says in the journal that the entries are synced: the file, where, and what.
    pub voucher: Option<(Arc<dyn LayerFile>, u64, Entry)>,
    /// The entries; whoever reads the disks meanwhile looks at them too.
    pub entries: Arc<Vec<Entry>>,
    /// All mirrors.
    pub mirrors: Arc<Vec<Mirror>>,
    /// The mirrors' writes need a sync even without entries (after the first filling).
    pub sync_all: bool,
    /// The record's file.
    pub file: Arc<RecordFile>,
    /// The record to write at the end, if any.
    pub record: Option<Stored>,
}

impl Batch {
    /// Does the next step; false if all is done.
    pub(crate) fn step(&mut self) -> Result<bool, DiskbufError> {
        if let Some(journal) = self.journal.take() {
            journal.sync().map_err(DiskbufError::Journal)?;
            return Ok(true);
        }
        if let Some((journal, at, voucher)) = self.voucher.take() {
            journal
                .write_at(at, voucher.bytes())
                .map_err(DiskbufError::Journal)?;
            return Ok(true);
        }
        if !self.entries.is_empty() {
            let mut touched = vec![self.sync_all; self.mirrors.len()];
            for entry in self.entries.iter() {
                apply_all(&self.mirrors, entry.payload(), &mut touched)?;
            }
            self.entries = Arc::default();
            self.sync_all = false;
            for (mirror, _) in self.mirrors.iter().zip(touched).filter(|(_, t)| *t) {
                mirror
                    .flush()
                    .map_err(|e| DiskbufError::mirror(mirror, e))?;
            }
            return Ok(true);
        }
        if std::mem::take(&mut self.sync_all) {
            for mirror in self.mirrors.iter() {
                mirror
                    .flush()
                    .map_err(|e| DiskbufError::mirror(mirror, e))?;
            }
            return Ok(true);
        }
        if let Some(record) = self.record.take() {
            self.file.write(record)?;
        }
        Ok(false)
    }

    /// Does all steps.
    pub(crate) fn run(mut self) -> Result<(), DiskbufError> {
        while self.step()? {}
        Ok(())
    }
}

/// Checks every record of `payload` against the disks, so that what is journalled can be applied.
pub(crate) fn check_all(mirrors: &[Mirror], payload: &[u8]) -> Result<(), DiskbufError> {
    for record in disk_records(payload) {
        check(mirrors, &record?)?;
    }
    Ok(())
}

/// Checks that `record` lies within a disk there is.
pub(crate) fn check<'a>(
    mirrors: &'a [Mirror],
    record: &DiskRecord<'_>,
) -> Result<&'a Mirror, DiskbufError> {
    match mirrors.get(usize::from(record.disk)) {
        Some(mirror) if mirror.contains(record.offset, u64::from(record.len)) => Ok(mirror),
        _ => Err(DiskbufError::OutOfRange {
            disk: record.disk,
            offset: record.offset,
            len: record.len,
        }),
    }
}

/// Does what `record` says to its mirror.
pub(crate) fn apply(mirrors: &[Mirror], record: &DiskRecord<'_>) -> Result<(), DiskbufError> {
    let mirror = check(mirrors, record)?;
    let len = u64::from(record.len);
    match record.op {
        DiskOp::Write => mirror.write_at(record.offset, record.data),
        DiskOp::Discard => mirror.discard(record.offset, len),
        DiskOp::WriteZeroes => mirror.write_zeroes(record.offset, len),
    }
    .map_err(|e| DiskbufError::mirror(mirror, e))
}

/// Does what the records of `payload` say, and marks the disks in `touched`.
pub(crate) fn apply_all(
    mirrors: &[Mirror],
    payload: &[u8],
    touched: &mut [bool],
) -> Result<(), DiskbufError> {
    for record in disk_records(payload) {
        let record: DiskRecord<'_> = record.map_err(|e: DiskRecordError| e)?;
        apply(mirrors, &record)?;
        if let Some(touched) = touched.get_mut(usize::from(record.disk)) {
            *touched = true;
        }
    }
    Ok(())
}

/// Who does the batches. At most one is under way.
pub(crate) enum Worker {
    /// A thread.
    Thread {
        jobs: Option<Sender<Batch>>,
        done: Receiver<Result<(), DiskbufError>>,
        busy: bool,
        handle: Option<JoinHandle<()>>,
    },
    /// The caller, one step at each [`Worker::poll`]: every interleaving is the test's choice.
    #[cfg_attr(not(test), allow(dead_code))]
    Stepped(Option<Batch>),
}

impl Worker {
    /// Starts the thread.
    pub(crate) fn thread() -> Result<Self, std::io::Error> {
        let (jobs, todo) = mpsc::channel::<Batch>();
        let (tell, done) = mpsc::channel();
        let handle = std::thread::Builder::new()
            .name("disk-batches".into())
            .spawn(move || {
                for batch in todo {
                    if tell.send(batch.run()).is_err() {
                        break;
                    }
                }
            })?;
        Ok(Self::Thread {
            jobs: Some(jobs),
            done,
            busy: false,
            handle: Some(handle),
        })
    }

    /// Whether a batch is under way.
    pub(crate) fn busy(&self) -> bool {
        match self {
            Self::Thread { busy, .. } => *busy,
            Self::Stepped(batch) => batch.is_some(),
        }
    }

    /// Begins a batch; only if not [`Worker::busy`].
    pub(crate) fn submit(&mut self, batch: Batch) -> Result<(), DiskbufError> {
        match self {
            Self::Thread { jobs, busy, .. } => {
                let sent = jobs.as_ref().is_some_and(|jobs| jobs.send(batch).is_ok());
                *busy = sent;
                if sent { Ok(()) } else { Err(gone()) }
            }
            Self::Stepped(slot) => {
                *slot = Some(batch);
                Ok(())
            }
        }
    }

    /// Notices a batch that has ended, without waiting.
    pub(crate) fn poll(&mut self) -> Result<(), DiskbufError> {
        match self {
            Self::Thread { busy: false, .. } => Ok(()),
            Self::Thread { done, busy, .. } => match done.try_recv() {
                Ok(result) => {
                    *busy = false;
                    result
                }
                Err(TryRecvError::Empty) => Ok(()),
                Err(TryRecvError::Disconnected) => Err(gone()),
            },
            Self::Stepped(slot) => {
                if let Some(batch) = slot
                    && !batch.step()?
                {
                    *slot = None;
                }
                Ok(())
            }
        }
    }

    /// Waits until no batch is under way.
    pub(crate) fn wait(&mut self) -> Result<(), DiskbufError> {
        match self {
            Self::Thread { busy: false, .. } => Ok(()),
            Self::Thread { done, busy, .. } => {
                let result = done.recv().map_err(|_| gone())?;
                *busy = false;
                result
            }
            Self::Stepped(slot) => slot.take().map_or(Ok(()), Batch::run),
        }
    }
}

fn gone() -> DiskbufError {
    DiskbufError::Poisoned("the thread that writes the mirrors has ended".into())
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Self::Thread { jobs, handle, .. } = self {
            *jobs = None;
            if let Some(handle) = handle.take() {
                let _ = handle.join();
            }
        }
    }
}
