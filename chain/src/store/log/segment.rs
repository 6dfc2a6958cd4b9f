//! Segments: the log's files, numbered without gaps, each begun only once the one before it is durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::VmId;
use diskbuf::layer::{FileLayer, LayerFile};

use super::error::LogError;
use super::frame::{HEADER, Head};
use super::manifest::NUMBER_MAX;

const MAGIC: &[u8; 4] = b"USEG";
const VERSION: u16 = 2;
/// Where a segment's first frame is.
pub(super) const FIRST: u64 = HEADER as u64;

/// Where a frame is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub segment: u64,
    pub offset: u64,
}

/// One file.
#[derive(Clone)]
pub(super) struct Segment {
    pub number: u64,
    pub file: Arc<dyn LayerFile>,
    pub len: u64,
}

/// A segment's path.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("seg-{number:016x}.log"))
}

/// The numbers of the segments in `dir`, in order.
pub(super) fn list(layer: &dyn FileLayer, dir: &Path) -> Result<Vec<u64>, LogError> {
    let names = layer.list(dir).map_err(LogError::io("listing", dir))?;
    let number = |name: &std::ffi::OsString| {
        let digits = name.to_str()?.strip_prefix("seg-")?.strip_suffix(".log")?;
        let number = u64::from_str_radix(digits, 16).ok()?;
        (path(dir, number).file_name() == Some(name)).then_some(number)
    };
    let numbers = names.iter().filter_map(number);
    let mut numbers: Vec<u64> = numbers.filter(|n| *n <= NUMBER_MAX).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// A segment's header.
fn header(vm: VmId, salt: u64, number: u64) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..4].copy_from_slice(MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    let (low, high) = vm.halves();
    for (i, word) in [low, salt, number, high].iter().enumerate() {
        out[8 + i * 8..16 + i * 8].copy_from_slice(&word.to_le_bytes());
    }
    let crc = crc32c::crc32c(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

impl Segment {
    /// Makes a new one; durable, its name included.
    pub(super) fn create(
        layer: &dyn FileLayer,
        dir: &Path,
        vm: VmId,
        salt: u64,
        number: u64,
        no_dir_sync: bool,
    ) -> Result<Self, LogError> {
        let path = path(dir, number);
        let io = |what| LogError::io(what, &path);
        let file = layer.open(&path, true).map_err(io("making"))?;
        if file.len().map_err(io("reading"))? > 0 {
            file.set_len(0).map_err(io("emptying"))?;
        }
        let header = header(vm, salt, number);
        file.write_at(0, &header).map_err(io("writing"))?;
        file.sync().map_err(io("syncing"))?;
        if !no_dir_sync {
            layer.sync_dir(dir).map_err(LogError::io("syncing", dir))?;
        }
        Ok(Self {
            number,
            file,
            len: FIRST,
        })
    }

    /// Opens one that is there; `None` if its header is not as it should be.
    pub(super) fn open(
        layer: &dyn FileLayer,
        dir: &Path,
        vm: VmId,
        salt: u64,
        number: u64,
    ) -> Result<Option<Self>, LogError> {
        let path = path(dir, number);
        let io = |what| LogError::io(what, &path);
        let file = layer.open(&path, false).map_err(io("opening"))?;
        let len = file.len().map_err(io("reading"))?;
        if len < FIRST {
            return Ok(None);
        }
        let mut found = [0; HEADER];
        file.read_at(0, &mut found).map_err(io("reading"))?;
        Ok((found == header(vm, salt, number)).then_some(Self { number, file, len }))
    }
}

/// Frames of one filling, as a reader sees them: the segments in order.
#[derive(Clone)]
pub(super) struct Frames {
    pub dir: PathBuf,
    pub salt: u64,
    pub segments: Vec<Segment>,
    /// Mutant for tests: believe payloads without looking at their checksums.
    pub no_crc: bool,
}

impl Frames {
    /// The frame at `place`, or at the start of the next segment if this one ends there; where it lies and where the
    /// next one does. `None` if there is no good one.
    pub(super) fn read(
        &self,
        mut place: Place,
        payload: &mut Vec<u8>,
    ) -> Result<Option<(Head, Place, Place)>, LogError> {
        loop {
            let Some(segment) = self.segments.iter().find(|s| s.number == place.segment) else {
                return Ok(None);
            };
            if place.offset >= segment.len {
                place = Place {
                    segment: place.segment + 1,
                    offset: FIRST,
                };
                continue;
            }
            let path = path(&self.dir, segment.number);
            let left = segment.len - place.offset;
            if left < HEADER as u64 {
                return Ok(None);
            }
            let mut header = [0; HEADER];
            let read = segment.file.read_at(place.offset, &mut header);
            read.map_err(LogError::io("reading", &path))?;
            // The padding may be cut off; the payload may not.
            let Some(head) = Head::parse(&header, self.salt)
                .filter(|h| HEADER as u64 + u64::from(h.len) <= left)
            else {
                return Ok(None);
            };
            payload.resize(head.len as usize, 0);
            let read = segment.file.read_at(place.offset + HEADER as u64, payload);
            read.map_err(LogError::io("reading", &path))?;
            if crc32c::crc32c(payload) != head.crc && !self.no_crc {
                return Ok(None);
            }
            let next = Place {
                segment: place.segment,
                offset: place.offset + head.span(),
            };
            return Ok(Some((head, place, next)));
        }
    }

    /// Calls `see` with every good header from `place` on, wherever it lies; whatever is between is passed over.
    pub(super) fn scan(
        &self,
        place: Place,
        see: &mut dyn FnMut(&Head, Place),
    ) -> Result<(), LogError> {
        const WINDOW: u64 = 64 << 10;
        let mut window = vec![0; WINDOW as usize];
        for segment in self.segments.iter().filter(|s| s.number >= place.segment) {
            let path = path(&self.dir, segment.number);
            let mut at = if segment.number == place.segment {
                place.offset.next_multiple_of(HEADER as u64)
            } else {
                FIRST
            };
            while at + HEADER as u64 <= segment.len {
                let n = (segment.len - at).min(WINDOW) as usize;
                let read = segment.file.read_at(at, &mut window[..n]);
                read.map_err(LogError::io("reading", &path))?;
                for (i, bytes) in window[..n].chunks(HEADER).enumerate() {
                    if let Some(head) = Head::parse(bytes, self.salt) {
                        let place = Place {
                            segment: segment.number,
                            offset: at + (i * HEADER) as u64,
                        };
                        see(&head, place);
                    }
                }
                at += n as u64;
            }
        }
        Ok(())
    }
}
