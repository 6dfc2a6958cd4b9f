//! Folding: old checkpoints go into the base image. Pages are put together first, all of them go to a journal, and only
//! when the manifest says that the journal is durable are they written in place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use checkpoint::{PAGE_SIZE, Page, records};
use diskbuf::layer::{FileLayer, LayerFile};

use super::Kind;
use super::base::Base;
use super::entry::Entry;
use super::error::LogError;
use super::manifest::{Manifest, ManifestFile, Phase};
use super::segment::Frames;

const MAGIC: &[u8; 4] = b"UFLD";
const VERSION: u16 = 1;
const HEADER: usize = 64;
/// A page in the journal: its frame number and its content.
const ITEM: usize = 8 + PAGE_SIZE;

/// The journal's file.
#[derive(Clone)]
pub(super) struct Journal {
    file: Arc<dyn LayerFile>,
    path: PathBuf,
}

fn header(manifest: &Manifest, count: u64, items: u32) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..4].copy_from_slice(MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    let words = [manifest.salt, manifest.base, manifest.target, count];
    for (i, word) in words.iter().enumerate() {
        out[8 + i * 8..16 + i * 8].copy_from_slice(&word.to_le_bytes());
    }
    out[40..44].copy_from_slice(&items.to_le_bytes());
    let crc = crc32c::crc32c(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

impl Journal {
    /// Opens the file, making it if there is none.
    pub(super) fn open(layer: &dyn FileLayer, dir: &Path) -> Result<Self, LogError> {
        let path = dir.join("fold");
        let file = layer
            .open(&path, true)
            .map_err(LogError::io("opening", &path))?;
        Ok(Self { file, path })
    }

    fn write(&self, manifest: &Manifest, pages: &BTreeMap<u64, Box<Page>>) -> Result<(), LogError> {
        let io = |what| LogError::io(what, &self.path);
        let (mut crc, mut at) = (0, HEADER as u64);
        let mut item = vec![0; ITEM];
        for (gfn, page) in pages {
            item[..8].copy_from_slice(&gfn.to_le_bytes());
            item[8..].copy_from_slice(&page[..]);
            crc = crc32c::crc32c_append(crc, &item);
            self.file.write_at(at, &item).map_err(io("writing"))?;
            at += ITEM as u64;
        }
        let header = header(manifest, pages.len() as u64, crc);
        self.file.write_at(0, &header).map_err(io("writing"))?;
        self.file.sync().map_err(io("syncing"))
    }

    /// Shows the pages of the fold that `manifest` says is under way.
    fn each(
        &self,
        manifest: &Manifest,
        see: &mut dyn FnMut(u64, &Page) -> Result<(), LogError>,
    ) -> Result<(), LogError> {
        let io = |what| LogError::io(what, &self.path);
        let damaged = || {
            LogError::damaged(
                &self.path,
                "it is needed to complete the base image, and is broken",
            )
        };
        let len = self.file.len().map_err(io("reading"))?;
        let mut found = [0; HEADER];
        if len < HEADER as u64 {
            return Err(damaged());
        }
        self.file.read_at(0, &mut found).map_err(io("reading"))?;
        let mut words = [0; 12];
        words.copy_from_slice(&found[32..44]);
        let count = u64::from_le_bytes(*words.first_chunk().unwrap_or(&[0; 8]));
        let sum = u32::from_le_bytes(*words.last_chunk().unwrap_or(&[0; 4]));
        let room = (len - HEADER as u64) / ITEM as u64;
        if found != header(manifest, count, sum) || count > room {
            return Err(damaged());
        }
        let mut item = vec![0; ITEM];
        let mut crc = 0;
        for i in 0..count {
            let at = HEADER as u64 + i * ITEM as u64;
            self.file.read_at(at, &mut item).map_err(io("reading"))?;
            crc = crc32c::crc32c_append(crc, &item);
            let gfn = u64::from_le_bytes(*item.first_chunk().unwrap_or(&[0; 8]));
            let page: &Page = item.last_chunk().unwrap_or(&[0; PAGE_SIZE]);
            see(gfn, page)?;
        }
        if crc == sum { Ok(()) } else { Err(damaged()) }
    }

    /// Completes the fold that was under way. That its journal is durable is known from the manifest.
    pub(super) fn redo(&self, base: &Base, file: &ManifestFile) -> Result<Manifest, LogError> {
        let Some(manifest) = file.latest() else {
            return Err(LogError::damaged(&self.path, "there is no manifest"));
        };
        // All of it is looked at before any of it is used.
        self.each(&manifest, &mut |_, _| Ok(()))?;
        self.each(&manifest, &mut |gfn, page| base.write(gfn, page))?;
        base.sync()?;
        file.write(done(&manifest))
    }
}

/// What the manifest says once a fold is complete.
fn done(manifest: &Manifest) -> Manifest {
    Manifest {
        phase: Phase::Steady,
        base: manifest.target,
        start: manifest.next,
        ..*manifest
    }
}

/// A fold: everything it needs, so that a thread can do it.
pub(super) struct Fold {
    pub frames: Frames,
    pub base: Base,
    pub journal: Journal,
    pub file: Arc<ManifestFile>,
    /// The checkpoints to fold, from the one after the base image's on.
    pub entries: Vec<Entry>,
    /// As it is to be while folding.
    pub manifest: Manifest,
    pub pages: BTreeMap<u64, Box<Page>>,
    pub stage: u8,
    pub no_journal: bool,
    /// Nobody wants it any more.
    pub stop: Arc<AtomicBool>,
}

impl Fold {
    /// Does the next step; the manifest in force once all is done.
    fn step(&mut self) -> Result<Option<Manifest>, LogError> {
        self.check()?;
        self.stage += 1;
        match self.stage {
            1 => self.collect()?,
            2 if !self.no_journal => self.journal.write(&self.manifest, &self.pages)?,
            3 if !self.no_journal => {
                self.manifest = self.file.write(self.manifest)?;
            }
            4 => {
                for (gfn, page) in &self.pages {
                    self.check()?;
                    self.base.write(*gfn, page)?;
                }
            }
            5 => self.base.sync()?,
            6 => return self.file.write(done(&self.manifest)).map(Some),
            _ => {}
        }
        Ok(None)
    }

    fn check(&self) -> Result<(), LogError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(LogError::Poisoned("folding was called off".into())),
            false => Ok(()),
        }
    }

    fn run(mut self) -> Result<Manifest, LogError> {
        loop {
            if let Some(done) = self.step()? {
                return Ok(done);
            }
        }
    }

    /// Puts together what the pages come to.
    fn collect(&mut self) -> Result<(), LogError> {
        let (pages, base) = (&mut self.pages, &self.base);
        for entry in &self.entries {
            entry.read(&self.frames, &mut |kind, payload| {
                if kind != Kind::Pages {
                    return Ok(());
                }
                for record in records(payload) {
                    let bad =
                        |e: checkpoint::PageError| entry.damaged(&self.frames, &e.to_string());
                    let record = record.map_err(bad)?;
                    let mut prev = [0; PAGE_SIZE];
                    match pages.get(&record.gfn) {
                        Some(page) => prev = **page,
                        None => base.read(record.gfn, &mut prev)?,
                    }
                    let mut page = Box::new([0; PAGE_SIZE]);
                    record.decode(&prev, &mut page).map_err(bad)?;
                    pages.insert(record.gfn, page);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Who folds, and the flag that ends it.
pub(super) struct Folder {
    worker: Worker,
    pub stop: Arc<AtomicBool>,
}

/// At most one fold is under way.
enum Worker {
    /// A thread.
    Thread {
        jobs: Option<Sender<Fold>>,
        done: Receiver<Result<Manifest, LogError>>,
        busy: bool,
        handle: Option<JoinHandle<()>>,
    },
    /// The caller, one step at each [`Folder::poll`]: for tests.
    Stepped(Option<Box<Fold>>),
}

impl Folder {
    /// With a thread, or without.
    pub(super) fn new(stepped: bool) -> std::io::Result<Self> {
        Ok(Self {
            worker: Worker::new(stepped)?,
            stop: Arc::default(),
        })
    }

    /// Calls off what is under way.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether a fold is under way.
    pub(super) fn busy(&self) -> bool {
        match &self.worker {
            Worker::Thread { busy, .. } => *busy,
            Worker::Stepped(fold) => fold.is_some(),
        }
    }

    /// Begins a fold; only if not [`Folder::busy`].
    pub(super) fn submit(&mut self, fold: Fold) -> Result<(), LogError> {
        self.worker.submit(fold)
    }

    /// Notices a fold that has ended, without waiting.
    pub(super) fn poll(&mut self) -> Result<Option<Manifest>, LogError> {
        self.worker.poll()
    }

    /// Waits until none is under way.
    pub(super) fn wait(&mut self) -> Result<Option<Manifest>, LogError> {
        self.worker.wait()
    }
}

impl Worker {
    fn new(stepped: bool) -> std::io::Result<Self> {
        if stepped {
            return Ok(Self::Stepped(None));
        }
        let (jobs, todo) = mpsc::channel::<Fold>();
        let (tell, done) = mpsc::channel();
        let handle = std::thread::Builder::new()
            .name("log-fold".into())
            .spawn(move || {
                for fold in todo {
                    if tell.send(fold.run()).is_err() {
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

    fn submit(&mut self, fold: Fold) -> Result<(), LogError> {
        match self {
            Self::Thread { jobs, busy, .. } => {
                *busy = jobs.as_ref().is_some_and(|jobs| jobs.send(fold).is_ok());
                if *busy { Ok(()) } else { Err(gone()) }
            }
            Self::Stepped(slot) => {
                *slot = Some(Box::new(fold));
                Ok(())
            }
        }
    }

    fn poll(&mut self) -> Result<Option<Manifest>, LogError> {
        match self {
            Self::Thread { busy: false, .. } => Ok(None),
            Self::Thread { done, busy, .. } => match done.try_recv() {
                Ok(result) => {
                    *busy = false;
                    result.map(Some)
                }
                Err(TryRecvError::Empty) => Ok(None),
                Err(TryRecvError::Disconnected) => Err(gone()),
            },
            Self::Stepped(slot) => {
                let Some(fold) = slot else { return Ok(None) };
                let done = fold.step()?;
                if done.is_some() {
                    *slot = None;
                }
                Ok(done)
            }
        }
    }

    fn wait(&mut self) -> Result<Option<Manifest>, LogError> {
        match self {
            Self::Thread { busy: false, .. } => Ok(None),
            Self::Thread { done, busy, .. } => {
                let result = done.recv().map_err(|_| gone())?;
                *busy = false;
                result.map(Some)
            }
            Self::Stepped(slot) => slot.take().map(|fold| fold.run()).transpose(),
        }
    }
}

fn gone() -> LogError {
    LogError::Poisoned("the thread that folds old checkpoints has ended".into())
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.stop();
        if let Worker::Thread { jobs, handle, .. } = &mut self.worker {
            *jobs = None;
            if let Some(handle) = handle.take() {
                let _ = handle.join();
            }
        }
    }
}
