//! Appending checkpoints to the log.

use checkpoint::{CheckpointEnd, Page, records};

use super::entry::Entry;
use super::error::LogError;
use super::frame::{Commit, Head, Kind, PAYLOAD_MAX};
use super::manifest::{Manifest, Phase};
use super::segment::{self, Place, Segment};
use super::{Frames, Log};
use crate::mark::Mark;

/// A checkpoint being appended.
pub(super) struct Open {
    lsn: u64,
    full: bool,
    /// Where the log ended before it.
    from: Place,
    /// Its first frame.
    start: Option<Place>,
    frames: u32,
    bytes: u64,
    digest: u32,
}

/// Pieces of what takes disk writes back, in bytes.
const UNDO_PIECE: usize = 1 << 20;
/// While filling, the base image is synced about this often, in pages.
const FILL_SYNC: u64 = 16 << 10;

impl Log {
    /// Begins a checkpoint. A half appended one is cut off. `full`: whatever there is is worth nothing from here on, and
    /// the checkpoint's memory goes to the base image.
    pub(crate) fn begin(&mut self, full: bool) -> Result<(), LogError> {
        self.guard(|log| {
            if let Some(open) = log.open.take()
                && !full
            {
                log.cut(open.from)?;
            }
            if full {
                log.clear()?;
            }
            let last = log.frames.segments.last();
            let from = last.map_or(Place::default(), |s| Place {
                segment: s.number,
                offset: s.len,
            });
            log.open = Some(Open {
                lsn: log.entries.back().map_or(0, |e| e.lsn) + 1,
                full,
                from,
                start: None,
                frames: 0,
                bytes: 0,
                digest: 0,
            });
            Ok(())
        })
    }

    /// Declares everything void, and begins anew with one empty segment.
    fn clear(&mut self) -> Result<(), LogError> {
        // Whatever a fold under way comes to is of no account.
        let _ = self.folder.wait();
        let salt = draw().map_err(LogError::io("drawing a number for", &self.dir))?;
        let numbers = segment::list(&*self.layer, &self.dir)?;
        let before = self.manifest.latest().map_or(0, |m| m.start.segment);
        let number = before.max(numbers.last().copied().unwrap_or(0)) + 1;
        let start = Place {
            segment: number,
            offset: segment::FIRST,
        };
        self.manifest.write(Manifest {
            phase: Phase::Void,
            vm: self.vm,
            shape: self.shape,
            seq: 0,
            salt,
            base: 0,
            start,
            target: 0,
            next: Place::default(),
        })?;
        self.entries.clear();
        self.folding = 0;
        self.frames.segments.clear();
        for number in numbers {
            let path = segment::path(&self.dir, number);
            let gone = self.layer.remove(&path);
            gone.map_err(LogError::io("removing", &path))?;
        }
        let synced = self.layer.sync_dir(&self.dir);
        synced.map_err(LogError::io("syncing", &self.dir))?;
        self.base.clear()?;
        self.filled.clear();
        self.unsynced = 0;
        self.frames.salt = salt;
        self.new_segment(number)
    }

    fn new_segment(&mut self, number: u64) -> Result<(), LogError> {
        let segment = Segment::create(
            &*self.layer,
            &self.dir,
            self.vm,
            self.frames.salt,
            number,
            self.options.mutants.no_dir_sync,
        )?;
        self.frames.segments.push(segment);
        Ok(())
    }

    /// Cuts the log off at `from`, durably. The newest file goes first, so that no gap can be left.
    pub(super) fn cut(&mut self, from: Place) -> Result<(), LogError> {
        while let Some(last) = self.frames.segments.pop_if(|s| s.number > from.segment) {
            let path = segment::path(&self.dir, last.number);
            let gone = self.layer.remove(&path);
            gone.map_err(LogError::io("removing", &path))?;
            let synced = self.layer.sync_dir(&self.dir);
            synced.map_err(LogError::io("syncing", &self.dir))?;
        }
        if let Some(last) = self.frames.segments.last_mut()
            && last.len > from.offset
        {
            let path = segment::path(&self.dir, last.number);
            let cut = last.file.set_len(from.offset);
            cut.map_err(LogError::io("cutting", &path))?;
            last.file.sync().map_err(LogError::io("syncing", &path))?;
            last.len = from.offset;
        }
        Ok(())
    }

    /// Takes page records of the checkpoint as received. Not those of a full one: see [`Log::base_page`].
    pub(crate) fn pages(&mut self, payload: &[u8]) -> Result<(), LogError> {
        self.append(Kind::Pages, payload)
    }

    /// Takes disk records as received.
    pub(crate) fn disk(&mut self, payload: &[u8]) -> Result<(), LogError> {
        self.append(Kind::Disk, payload)
    }

    /// Takes a piece of the machine state as received.
    pub(crate) fn machine(&mut self, payload: &[u8]) -> Result<(), LogError> {
        self.append(Kind::Machine, payload)
    }

    /// Takes a page of a full checkpoint, decoded.
    pub(crate) fn base_page(&mut self, gfn: u64, page: &Page) -> Result<(), LogError> {
        self.guard(|log| {
            let again = log.filled.test(gfn);
            if !again && page.iter().all(|b| *b == 0) {
                // It is zero, and takes no room that way.
                return Ok(());
            }
            log.filled.set(gfn);
            log.base.write(gfn, page)?;
            log.unsynced += 1;
            if log.unsynced >= FILL_SYNC {
                // On the way, so that the sync at the end is short.
                log.unsynced = 0;
                log.base.sync()?;
            }
            Ok(())
        })
    }

    fn append(&mut self, kind: Kind, payload: &[u8]) -> Result<(), LogError> {
        if payload.len() > PAYLOAD_MAX {
            return Err(LogError::TooLong(payload.len()));
        }
        if payload.is_empty() {
            return Ok(());
        }
        self.guard(|log| log.put(kind, payload))
    }

    fn put(&mut self, kind: Kind, payload: &[u8]) -> Result<(), LogError> {
        let limit = self.options.segment_bytes;
        if let Some(last) = self.frames.segments.last()
            && last.len >= limit
        {
            let number = last.number;
            sync(&self.frames, last, self.options.mutants.no_sync)?;
            self.new_segment(number + 1)?;
        }
        let (Some(open), Some(last)) = (&mut self.open, self.frames.segments.last_mut()) else {
            return Err(LogError::damaged(&self.dir, "no checkpoint is open"));
        };
        let head = Head {
            kind,
            salt: self.frames.salt,
            lsn: open.lsn,
            durable: open.lsn - 1,
            index: open.frames,
            len: 0,
            crc: 0,
        };
        let at = Place {
            segment: last.number,
            offset: last.len,
        };
        open.start.get_or_insert(at);
        write(&self.frames.dir, last, &head.frame(payload))?;
        if kind != Kind::Commit {
            open.frames += 1;
            open.bytes += payload.len() as u64;
            let crc = crc32c::crc32c(payload);
            open.digest = crc32c::crc32c_append(open.digest, &crc.to_le_bytes());
        }
        Ok(())
    }

    /// The checkpoint is whole: makes it durable. `undo`: disk records that take its disk writes back, `None` if that
    /// would be too much to keep.
    pub(crate) fn commit(
        &mut self,
        mark: Mark,
        end: &CheckpointEnd,
        undo: Option<&[u8]>,
    ) -> Result<(), LogError> {
        self.guard(|log| {
            for piece in undo.unwrap_or_default().chunks(UNDO_PIECE) {
                log.put(Kind::Undo, piece)?;
            }
            let Some(open) = &log.open else {
                return Err(LogError::damaged(&log.dir, "no checkpoint is open"));
            };
            let (lsn, full) = (open.lsn, open.full);
            let commit = Commit {
                mark,
                prev: log.latest(),
                frames: open.frames,
                undo: undo.is_some(),
                bytes: open.bytes,
                pages: if full { 0 } else { end.pages },
                digest: open.digest,
            };
            if full {
                // Before the manifest says that it is there.
                log.base.sync()?;
            }
            log.put(Kind::Commit, &commit.to_bytes())?;
            let Some(last) = log.frames.segments.last() else {
                return Err(LogError::damaged(&log.dir, "the newest segment is gone"));
            };
            sync(&log.frames, last, log.options.mutants.no_sync)?;
            let (number, len) = (last.number, last.len);
            let start = log.open.take().and_then(|open| open.start);
            log.entries.push_back(Entry {
                lsn,
                commit,
                start: start.unwrap_or_default(),
                end: Place {
                    segment: number,
                    offset: len,
                },
            });
            if full && let Some(latest) = log.manifest.latest() {
                log.manifest.write(Manifest {
                    phase: Phase::Steady,
                    base: lsn,
                    start: start.unwrap_or_default(),
                    ..latest
                })?;
            }
            log.vouch(lsn)
        })
    }

    /// Says in the log that checkpoint `lsn` is durable. Not synced: if it is lost, the next checkpoint's frames say so.
    pub(super) fn vouch(&mut self, lsn: u64) -> Result<(), LogError> {
        let head = Head {
            kind: Kind::Voucher,
            salt: self.frames.salt,
            lsn,
            durable: lsn,
            index: 0,
            len: 0,
            crc: 0,
        };
        match self.frames.segments.last_mut() {
            Some(last) => write(&self.frames.dir, last, &head.frame(&[])),
            None => Ok(()),
        }
    }
}

fn write(dir: &std::path::Path, segment: &mut Segment, frame: &[u8]) -> Result<(), LogError> {
    let written = segment.file.write_at(segment.len, frame);
    written.map_err(LogError::io("writing", &segment::path(dir, segment.number)))?;
    segment.len += frame.len() as u64;
    Ok(())
}

fn sync(frames: &Frames, segment: &Segment, mutant: bool) -> Result<(), LogError> {
    if mutant {
        return Ok(());
    }
    let path = segment::path(&frames.dir, segment.number);
    segment.file.sync().map_err(LogError::io("syncing", &path))
}

/// A number that a guest cannot guess.
fn draw() -> std::io::Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the pointer and the length are those of `bytes`, which outlives the call.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n == 8 {
        Ok(u64::from_le_bytes(bytes))
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The frames that page records are of.
pub(crate) fn gfns(payload: &[u8]) -> impl Iterator<Item = u64> {
    records(payload).filter_map(|r| r.ok().map(|r| r.gfn))
}
