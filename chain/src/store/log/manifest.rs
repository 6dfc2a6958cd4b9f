//! The manifest: where the base image stands and where in the log the checkpoints after it begin. Small, in two slots
//! written in turn, each with a second copy that tells damage from a torn write (as the activation record has it).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::VmId;
use diskbuf::layer::{FileLayer, LayerFile};

use super::error::LogError;
use super::segment::Place;

const SLOT: u64 = 4096;
const SECOND: u64 = 2048;
const RECORD: usize = 128;
const MAGIC: &[u8; 4] = b"UMAN";
const VERSION: u16 = 2;
/// Highest number or offset believed.
pub(super) const NUMBER_MAX: u64 = 1 << 62;

/// What the files of the log are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Worth nothing: being filled, or never filled.
    Void = 1,
    /// The base image is at checkpoint `base`.
    Steady = 2,
    /// The base image is between `base` and `target`; the fold journal has all of what is missing.
    Folding = 3,
}

/// The manifest's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub phase: Phase,
    pub vm: VmId,
    /// Digest of the VM's memory layout.
    pub shape: u32,
    /// Number of the record.
    pub seq: u64,
    /// Frames of this filling bear it.
    pub salt: u64,
    /// Checkpoint of the base image.
    pub base: u64,
    /// Where it begins in the log.
    pub start: Place,
    /// Checkpoint that is being folded up to.
    pub target: u64,
    /// Where that one begins in the log.
    pub next: Place,
}

impl Manifest {
    fn encode(&self) -> [u8; RECORD] {
        let mut out = [0; RECORD];
        out[..4].copy_from_slice(MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = self.phase as u8;
        out[8..12].copy_from_slice(&self.shape.to_le_bytes());
        let (low, high) = self.vm.halves();
        let words = [
            low,
            self.seq,
            self.salt,
            self.base,
            self.start.segment,
            self.start.offset,
            self.target,
            self.next.segment,
            self.next.offset,
            high,
        ];
        for (i, word) in words.iter().enumerate() {
            out[16 + i * 8..24 + i * 8].copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[..RECORD - 4]);
        out[RECORD - 4..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(b: &[u8; RECORD]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let long = |i: usize| u64::from(word(16 + i * 8)) | u64::from(word(20 + i * 8)) << 32;
        let version = u16::from_le_bytes([b[4], b[5]]);
        if b[..4] != *MAGIC || version != VERSION || crc32c::crc32c(&b[..RECORD - 4]) != word(124) {
            return None;
        }
        let place = |i: usize| Place {
            segment: long(i),
            offset: long(i + 1),
        };
        // Numbers that no VM lives to see: all arithmetic with them is safe.
        if (1..9).filter(|i| *i != 2).any(|i| long(i) > NUMBER_MAX) {
            return None;
        }
        Some(Self {
            phase: match b[6] {
                1 => Phase::Void,
                2 => Phase::Steady,
                3 => Phase::Folding,
                _ => return None,
            },
            shape: word(8),
            vm: VmId::from_halves(long(0), long(9)),
            seq: long(1),
            salt: long(2),
            base: long(3),
            start: place(4),
            target: long(6),
            next: place(7),
        })
    }
}

/// The manifest's file.
pub(super) struct ManifestFile {
    file: Arc<dyn LayerFile>,
    path: PathBuf,
    latest: Mutex<Option<Manifest>>,
}

impl ManifestFile {
    /// Opens it, making it if there is none. `reset`: whatever it says is of no account.
    pub(super) fn open(layer: &dyn FileLayer, dir: &Path, reset: bool) -> Result<Self, LogError> {
        let path = dir.join("manifest");
        let io = |what| LogError::io(what, &path);
        let file = layer.open(&path, true).map_err(io("opening"))?;
        let latest = match read(&*file, &path) {
            Err(LogError::Damaged { .. }) if reset => {
                file.set_len(0).map_err(io("emptying"))?;
                None
            }
            other => other?,
        };
        // What was read may be in the page cache only, and not be lost once it has been acted upon. Written again, as a
        // sync alone does nothing for pages that an earlier, failed one left marked as clean.
        if let Some(latest) = &latest {
            let at = latest.seq % 2 * SLOT;
            file.write_at(at, &latest.encode()).map_err(io("writing"))?;
        }
        file.sync().map_err(io("syncing"))?;
        Ok(Self {
            file,
            latest: Mutex::new(latest),
            path,
        })
    }

    /// The newest durable record.
    pub(super) fn latest(&self) -> Option<Manifest> {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the record and waits until that is durable; the number is assigned here.
    pub(super) fn write(&self, mut manifest: Manifest) -> Result<Manifest, LogError> {
        let io = |what| LogError::io(what, &self.path);
        manifest.seq = self.latest().map_or(1, |l| l.seq + 1);
        let at = manifest.seq % 2 * SLOT;
        let bytes = manifest.encode();
        self.file.write_at(at, &bytes).map_err(io("writing"))?;
        self.file.sync().map_err(io("syncing"))?;
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(manifest);
        // Durable with the next record; says then that this one was.
        let second = self.file.write_at(at + SECOND, &bytes);
        second.map_err(io("writing"))?;
        Ok(manifest)
    }
}

/// The version of an intact record that this program does not read.
fn other_version(b: &[u8; RECORD]) -> Option<u16> {
    let version = u16::from_le_bytes([b[4], b[5]]);
    let intact = crc32c::crc32c(&b[..RECORD - 4]).to_le_bytes() == b[RECORD - 4..];
    (b[..4] == *MAGIC && intact && version != VERSION).then_some(version)
}

/// The record in force.
fn read(file: &dyn LayerFile, path: &Path) -> Result<Option<Manifest>, LogError> {
    let len = file.len().map_err(LogError::io("reading", path))?;
    let at = |offset: u64| -> Result<Option<Manifest>, LogError> {
        if offset + RECORD as u64 > len {
            return Ok(None);
        }
        let mut bytes = [0; RECORD];
        file.read_at(offset, &mut bytes)
            .map_err(LogError::io("reading", path))?;
        if let Some(version) = other_version(&bytes) {
            return Err(LogError::Other {
                path: path.into(),
                found: format!(
                    "another version of understudy (format {version}, this program keeps {VERSION})"
                ),
            });
        }
        Ok(Manifest::decode(&bytes))
    };
    let newest = |a: Option<Manifest>, b: Option<Manifest>| match (a, b) {
        (Some(a), Some(b)) => Some(if a.seq > b.seq { a } else { b }),
        (a, b) => a.or(b),
    };
    let first = newest(at(0)?, at(SLOT)?);
    let second = newest(at(SECOND)?, at(SLOT + SECOND)?);
    let torn = second.is_none_or(|s| first.is_some_and(|f| f.seq >= s.seq));
    // Slot 0 is written after slot 1 was durable.
    let lost = first.is_none() && len > 0 && {
        let mut slot = vec![0; len.min(RECORD as u64) as usize];
        file.read_at(0, &mut slot)
            .map_err(LogError::io("reading", path))?;
        slot.iter().any(|b| *b != 0)
    };
    if !torn || lost {
        return Err(LogError::damaged(
            path,
            "a record that was durable is broken",
        ));
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use diskbuf::layer::OsLayer;

    #[test]
    fn i1_an_older_manifest_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let layer = OsLayer;
        let manifest = Manifest {
            phase: Phase::Steady,
            vm: VmId(u128::MAX - 7),
            shape: 1,
            seq: 0,
            salt: 2,
            base: 3,
            start: Place::default(),
            target: 0,
            next: Place::default(),
        };
        let file = ManifestFile::open(&layer, dir.path(), false).unwrap();
        let written = file.write(manifest).unwrap();
        drop(file);
        let file = ManifestFile::open(&layer, dir.path(), false).unwrap();
        assert_eq!(file.latest(), Some(written), "the whole id comes back");
        drop(file);
        let path = dir.path().join("manifest");
        let mut bytes = std::fs::read(&path).unwrap();
        for at in [0, SECOND as usize, SLOT as usize, (SLOT + SECOND) as usize] {
            if bytes.len() < at + RECORD || bytes[at..at + 4] != *MAGIC {
                continue;
            }
            let record = &mut bytes[at..at + RECORD];
            record[4] = 1;
            let crc = crc32c::crc32c(&record[..RECORD - 4]);
            record[RECORD - 4..].copy_from_slice(&crc.to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let said = match ManifestFile::open(&layer, dir.path(), false) {
            Ok(_) => panic!("it must be refused"),
            Err(e) => e.to_string(),
        };
        assert!(
            said.contains("format 1") && said.contains("remove"),
            "{said}"
        );
    }
}
