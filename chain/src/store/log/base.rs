//! The base image: the VM's memory at one checkpoint, on the disk, each page with its checksum.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::{PAGE_SIZE, Page, RamRange};
use diskbuf::layer::{FileLayer, LayerFile};

use super::error::LogError;
use crate::image::Image;

/// Says in a page's entry that it was written; an entry of zero is that of a page never written, which is zero.
const WRITTEN: u64 = 1 << 32;
/// Pages read at a time.
const CHUNK: u64 = 256;

/// The base image's file.
#[derive(Clone)]
pub(super) struct Base {
    file: Arc<dyn LayerFile>,
    path: PathBuf,
    /// First frame and number of pages of each range.
    ranges: Vec<(u64, u64)>,
    pages: u64,
}

impl Base {
    /// Opens the file, making it if there is none.
    pub(super) fn open(
        layer: &dyn FileLayer,
        dir: &Path,
        ram: &[RamRange],
    ) -> Result<Self, LogError> {
        let path = dir.join("base.img");
        let file = layer
            .open(&path, true)
            .map_err(LogError::io("opening", &path))?;
        let ranges: Vec<(u64, u64)> = ram
            .iter()
            .map(|r| (r.start / PAGE_SIZE as u64, r.len / PAGE_SIZE as u64))
            .collect();
        let pages = ranges.iter().map(|r| r.1).sum();
        Ok(Self {
            file,
            path,
            ranges,
            pages,
        })
    }

    fn len(&self) -> u64 {
        self.pages * (PAGE_SIZE as u64 + 8)
    }

    /// All zero.
    pub(super) fn clear(&self) -> Result<(), LogError> {
        let io = |what| LogError::io(what, &self.path);
        self.file.set_len(0).map_err(io("emptying"))?;
        self.file.set_len(self.len()).map_err(io("extending"))
    }

    /// Whether the file has its size.
    pub(super) fn check(&self) -> Result<(), LogError> {
        let len = self
            .file
            .len()
            .map_err(LogError::io("reading", &self.path))?;
        if len == self.len() {
            return Ok(());
        }
        let what = format!("{len} bytes instead of {}", self.len());
        Err(LogError::damaged(&self.path, what))
    }

    fn index(&self, gfn: u64) -> Result<u64, LogError> {
        let mut before = 0;
        for (first, pages) in &self.ranges {
            if gfn >= *first && gfn - first < *pages {
                return Ok(before + gfn - first);
            }
            before += pages;
        }
        let what = format!("frame {gfn:#x} is outside of the VM's memory");
        Err(LogError::damaged(&self.path, what))
    }

    fn verify(&self, page: &Page, entry: u64, gfn: u64) -> Result<(), LogError> {
        let good = match entry {
            0 => page.iter().all(|b| *b == 0),
            _ => entry == WRITTEN | u64::from(crc32c::crc32c(page)),
        };
        if good {
            return Ok(());
        }
        let what = format!("frame {gfn:#x} does not match its checksum");
        Err(LogError::damaged(&self.path, what))
    }

    /// A page.
    pub(super) fn read(&self, gfn: u64, page: &mut Page) -> Result<(), LogError> {
        let io = |what| LogError::io(what, &self.path);
        let index = self.index(gfn)?;
        let mut entry = [0; 8];
        self.file
            .read_at(index * PAGE_SIZE as u64, page)
            .map_err(io("reading"))?;
        self.file
            .read_at(self.pages * PAGE_SIZE as u64 + index * 8, &mut entry)
            .map_err(io("reading"))?;
        self.verify(page, u64::from_le_bytes(entry), gfn)
    }

    /// Writes a page; durable after [`Base::sync`].
    pub(super) fn write(&self, gfn: u64, page: &Page) -> Result<(), LogError> {
        let io = |what| LogError::io(what, &self.path);
        let index = self.index(gfn)?;
        let entry = WRITTEN | u64::from(crc32c::crc32c(page));
        self.file
            .write_at(index * PAGE_SIZE as u64, page)
            .map_err(io("writing"))?;
        self.file
            .write_at(
                self.pages * PAGE_SIZE as u64 + index * 8,
                &entry.to_le_bytes(),
            )
            .map_err(io("writing"))
    }

    /// Makes it durable.
    pub(super) fn sync(&self) -> Result<(), LogError> {
        self.file
            .sync()
            .map_err(LogError::io("syncing", &self.path))
    }

    /// Puts all of it into an image.
    pub(super) fn load(&self, into: &mut Image) -> Result<(), LogError> {
        let io = |what| LogError::io(what, &self.path);
        let outside = |e: crate::image::ImageError| LogError::damaged(&self.path, e.to_string());
        into.reset().map_err(outside)?;
        let mut content = vec![0; CHUNK as usize * PAGE_SIZE];
        let mut sums = vec![0; CHUNK as usize * 8];
        let mut before = 0;
        for (first, pages) in &self.ranges {
            let mut at = 0;
            while at < *pages {
                let n = CHUNK.min(pages - at) as usize;
                let (content, sums) = (&mut content[..n * PAGE_SIZE], &mut sums[..n * 8]);
                let index = before + at;
                self.file
                    .read_at(index * PAGE_SIZE as u64, content)
                    .map_err(io("reading"))?;
                self.file
                    .read_at(self.pages * PAGE_SIZE as u64 + index * 8, sums)
                    .map_err(io("reading"))?;
                let entries = sums.as_chunks::<8>().0.iter();
                let pages = content.as_chunks::<PAGE_SIZE>().0.iter();
                for ((page, entry), gfn) in pages.zip(entries).zip(first + at..) {
                    let entry = u64::from_le_bytes(*entry);
                    self.verify(page, entry, gfn)?;
                    if page.iter().any(|b| *b != 0) {
                        into.put(gfn, page).map_err(outside)?;
                    }
                }
                at += n as u64;
            }
            before += pages;
        }
        Ok(())
    }
}
