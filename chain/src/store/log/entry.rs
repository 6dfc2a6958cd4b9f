//! One checkpoint in the log: finding out whether all of it is there, and reading it.

use super::Kind;
use super::error::LogError;
use super::frame::{Commit, Head};
use super::segment::{Frames, Place, path};

/// A whole checkpoint in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub lsn: u64,
    pub commit: Commit,
    /// Its first frame.
    pub start: Place,
    /// Behind its last.
    pub end: Place,
}

/// What to do with a checkpoint's frames.
pub(super) type See<'a> = &'a mut dyn FnMut(Kind, &[u8]) -> Result<(), LogError>;

/// Reads checkpoint `lsn`, which begins at `at`, and shows its frames. `Ok(Err(_))`: it is not whole, and what is missing.
/// `sloppy`: the mutant that looks for its end only.
pub(super) fn walk(
    frames: &Frames,
    lsn: u64,
    mut at: Place,
    sloppy: bool,
    see: See<'_>,
) -> Result<Result<Entry, &'static str>, LogError> {
    let mut payload = Vec::new();
    let mut start = None;
    let (mut count, mut bytes, mut digest) = (0u32, 0u64, 0u32);
    loop {
        let mut found = frames.read(at, &mut payload)?;
        let fits = |h: &Head| h.kind == Kind::Voucher || h.lsn == lsn && h.index == count;
        if sloppy && !found.as_ref().is_some_and(|(head, ..)| fits(head)) {
            let mut end = None;
            frames.scan(at, &mut |head, place| {
                if head.kind == Kind::Commit && head.lsn == lsn {
                    end = Some(place);
                }
            })?;
            if let Some(end) = end {
                found = frames.read(end, &mut payload)?;
            }
        }
        let Some((head, here, next)) = found else {
            return Ok(Err("a frame is missing or broken"));
        };
        at = next;
        if head.kind == Kind::Voucher {
            continue;
        }
        if !(fits(&head) || sloppy && head.kind == Kind::Commit && head.lsn == lsn) {
            return Ok(Err("a frame is missing"));
        }
        let start = *start.get_or_insert(here);
        if head.kind != Kind::Commit {
            see(head.kind, &payload)?;
            count += 1;
            bytes += u64::from(head.len);
            digest = crc32c::crc32c_append(digest, &head.crc.to_le_bytes());
            continue;
        }
        let Some(commit) = Commit::from_bytes(&payload) else {
            return Ok(Err("its end does not decode"));
        };
        if (commit.frames, commit.bytes, commit.digest) != (count, bytes, digest) && !sloppy {
            return Ok(Err("it is not what its end says"));
        }
        return Ok(Ok(Entry {
            lsn,
            commit,
            start,
            end: next,
        }));
    }
}

impl Entry {
    /// Shows the frames of a checkpoint that is known to be whole.
    pub(super) fn read(&self, frames: &Frames, see: See<'_>) -> Result<(), LogError> {
        let sloppy = false;
        match walk(frames, self.lsn, self.start, sloppy, see)? {
            Ok(found) if found == *self => Ok(()),
            Ok(_) => Err(self.damaged(frames, "it has changed")),
            Err(what) => Err(self.damaged(frames, what)),
        }
    }

    /// The damage that this checkpoint has taken.
    pub(super) fn damaged(&self, frames: &Frames, what: &str) -> LogError {
        let path = path(&frames.dir, self.start.segment);
        LogError::damaged(&path, format!("checkpoint {}: {what}", self.commit.mark))
    }

    /// Its payloads of one kind, one buffer for each frame.
    pub(super) fn payloads(&self, frames: &Frames, wanted: Kind) -> Result<Vec<Vec<u8>>, LogError> {
        let mut out = Vec::new();
        self.read(frames, &mut |kind, payload| {
            if kind == wanted {
                out.push(payload.to_vec());
            }
            Ok(())
        })?;
        Ok(out)
    }
}
