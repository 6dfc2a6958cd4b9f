//! A replica's memory image: the RAM of its standby, as memfds that the standby's process maps too.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use checkpoint::{PAGE_SIZE, Page, PageBitmap, PageEncoder, PageError, RamRange, records};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Whence, ftruncate, lseek};

/// Why an image could not be made or a checkpoint not applied to it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The operating system refused memory.
    #[error("{what} of {bytes} bytes for a replica's memory image: {source}")]
    Memory {
        /// Which call.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// Its answer.
        source: nix::Error,
    },
    /// A RAM layout that no VM has.
    #[error("impossible RAM layout: {0:?}")]
    Layout(Vec<RamRange>),
    /// A record.
    #[error(transparent)]
    Page(#[from] PageError),
    /// A page that one checkpoint has twice.
    #[error("frame {0:#x} comes twice in one checkpoint")]
    Twice(u64),
    /// Reading beside its owner.
    #[error("reading a replica's memory image: {0}")]
    Read(io::Error),
    /// A frame that is not RAM.
    #[error("frame {0:#x} is outside the VM's memory")]
    OutOfRange(u64),
}

#[derive(Debug)]
struct Region {
    fd: OwnedFd,
    base: NonNull<u8>,
    first: u64,
    pages: u64,
}

// SAFETY: `base` is a mapping owned by this value; access goes through `Image`'s methods.
unsafe impl Send for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Region::new` with this length; references into it do not outlive the image.
        let _ = unsafe { munmap(self.base.cast(), self.pages as usize * PAGE_SIZE) };
    }
}

impl Region {
    fn new(range: &RamRange) -> Result<Self, ImageError> {
        let error = |what| {
            move |source| ImageError::Memory {
                what,
                bytes: range.len,
                source,
            }
        };
        let layout = || ImageError::Layout(vec![*range]);
        if range.len == 0
            || !range.len.is_multiple_of(PAGE_SIZE as u64)
            || !range.start.is_multiple_of(PAGE_SIZE as u64)
        {
            return Err(layout());
        }
        let name = CString::new("understudy-ram").map_err(|_| layout())?;
        let fd = memfd_create(
            name.as_c_str(),
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .map_err(error("memfd_create"))?;
        ftruncate(&fd, i64::try_from(range.len).map_err(|_| layout())?)
            .map_err(error("ftruncate"))?;
        let length = usize::try_from(range.len)
            .ok()
            .and_then(|l| l.try_into().ok())
            .ok_or_else(layout)?;
        // SAFETY: a fresh shared mapping of our own file at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &fd,
                0,
            )
        }
        .map_err(error("mmap"))?;
        let (first, pages) = (range.start / PAGE_SIZE as u64, range.len / PAGE_SIZE as u64);
        Ok(Self {
            fd,
            base: base.cast(),
            first,
            pages,
        })
    }
}

/// The image, and the pages of the checkpoint being received, decoded and verified but not applied yet.
#[derive(Debug)]
pub struct Image {
    regions: Vec<Region>,
    staged_gfns: Vec<u64>,
    staged: Vec<Page>,
    seen: PageBitmap,
    /// Pages that have been looked at by whoever has the image.
    #[cfg(test)]
    looked: std::sync::atomic::AtomicU64,
}

impl Image {
    /// An all-zero image of `ram`.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn new(ram: &[RamRange]) -> Result<Self, ImageError> {
        if ram.is_empty()
            || ram.len() > 8
            || ram.iter().any(|r| r.start.checked_add(r.len).is_none())
            || ram.windows(2).any(|w| w[0].start + w[0].len > w[1].start)
        {
            return Err(ImageError::Layout(ram.to_vec()));
        }
        let regions = ram.iter().map(Region::new).collect::<Result<_, _>>()?;
        Ok(Self {
            regions,
            staged_gfns: Vec::new(),
            staged: Vec::new(),
            seen: PageBitmap::new(ram),
            #[cfg(test)]
            looked: Default::default(),
        })
    }

    #[cfg(test)]
    pub(crate) fn looked(&self) -> u64 {
        self.looked.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The RAM files, in layout order.
    #[must_use]
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.regions.iter().map(|r| r.fd.as_fd()).collect()
    }

    /// Back to all zero, and nothing staged; memory is given back.
    ///
    /// # Errors
    /// [`ImageError::Memory`].
    pub fn reset(&mut self) -> Result<(), ImageError> {
        self.discard();
        for region in &self.regions {
            let bytes = region.pages * PAGE_SIZE as u64;
            fallocate(
                &region.fd,
                FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                0,
                bytes as i64,
            )
            .map_err(|source| ImageError::Memory {
                what: "fallocate",
                bytes,
                source,
            })?;
        }
        Ok(())
    }

    fn page_ptr(&self, gfn: u64) -> Result<NonNull<Page>, ImageError> {
        let region = self
            .regions
            .iter()
            .find(|r| gfn >= r.first && gfn - r.first < r.pages)
            .ok_or(ImageError::OutOfRange(gfn))?;
        // SAFETY: `gfn` is inside the region, so the offset is inside its mapping.
        Ok(unsafe { region.base.add((gfn - region.first) as usize * PAGE_SIZE) }.cast())
    }

    /// The content of a page.
    ///
    /// # Errors
    /// [`ImageError::OutOfRange`].
    pub fn page(&self, gfn: u64) -> Result<&Page, ImageError> {
        #[cfg(test)]
        self.looked
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // SAFETY: inside the mapping, and nobody writes to the image while it is borrowed: the standby's vCPUs do not
        // run before the replica has been taken apart, and our own writes need `&mut self`.
        Ok(unsafe { self.page_ptr(gfn)?.as_ref() })
    }

    fn page_mut(&mut self, gfn: u64) -> Result<&mut Page, ImageError> {
        // SAFETY: as for `page`, and `&mut self` makes it unique.
        Ok(unsafe { self.page_ptr(gfn)?.as_mut() })
    }

    /// Decodes and verifies page records against the image without changing it. A checkpoint has each page at most once,
    /// which also bounds what is staged by the RAM's size.
    ///
    /// # Errors
    /// [`ImageError`]: the checkpoint is of no use, the image is untouched.
    pub fn stage(&mut self, buf: &[u8]) -> Result<(), ImageError> {
        for record in records(buf) {
            let record = record?;
            if self.seen.test(record.gfn) {
                return Err(ImageError::Twice(record.gfn));
            }
            // Decoded where it stays: each page is copied once here and once when it is applied.
            let count = self.staged_gfns.len();
            if self.staged.len() == count {
                self.staged.push([0; PAGE_SIZE]);
            }
            let mut staged = std::mem::take(&mut self.staged);
            let decoded = self
                .page(record.gfn)
                .and_then(|before| Ok(record.decode(before, &mut staged[count])?));
            self.staged = staged;
            decoded?;
            self.seen.set(record.gfn);
            self.staged_gfns.push(record.gfn);
        }
        Ok(())
    }

    /// Decodes page records straight into the image, which the caller has declared invalid.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn write(&mut self, buf: &[u8]) -> Result<(), ImageError> {
        for record in records(buf) {
            let record = record?;
            let mut out = [0; PAGE_SIZE];
            record.decode(self.page(record.gfn)?, &mut out)?;
            *self.page_mut(record.gfn)? = out;
        }
        Ok(())
    }

    /// Puts the staged pages into the image. Everything has been verified: this cannot fail halfway.
    pub fn apply(&mut self) {
        let gfns = std::mem::take(&mut self.staged_gfns);
        let pages = std::mem::take(&mut self.staged);
        for (gfn, page) in gfns.iter().zip(&pages) {
            if let Ok(target) = self.page_mut(*gfn) {
                *target = *page;
            }
        }
        // Keep the buffers: the next epoch's staging then takes no page faults.
        self.staged_gfns = gfns;
        self.staged = pages;
        self.discard();
    }

    /// The pages that [`Image::apply`] would change.
    pub fn staged(&self) -> impl Iterator<Item = u64> + '_ {
        self.staged_gfns.iter().copied()
    }

    /// Page records that put back the image's present content wherever the staged pages will change it.
    pub(crate) fn reverse(&self, encoder: &mut PageEncoder) -> Result<Vec<u8>, ImageError> {
        let mut out = Vec::new();
        for (gfn, page) in self.staged_gfns.iter().zip(&self.staged) {
            encoder.encode(*gfn, self.page(*gfn)?, Some(page), &mut out);
        }
        Ok(out)
    }

    /// Puts a page in place.
    pub(crate) fn put(&mut self, gfn: u64, page: &Page) -> Result<(), ImageError> {
        *self.page_mut(gfn)? = *page;
        Ok(())
    }

    /// Forgets what is staged.
    pub fn discard(&mut self) {
        self.staged_gfns.clear();
        self.seen.clear();
    }
}

/// Reads an image while checkpoints are applied to it, without its owner's lock: what is replaced meanwhile may be read
/// half old and half new. Memory that was never written is found by asking the kernel, and stays unallocated.
#[derive(Debug)]
pub(crate) struct Reader {
    files: Vec<(File, u64, u64)>,
}

impl Image {
    /// For reading beside the image's owner.
    pub(crate) fn reader(&self) -> io::Result<Reader> {
        let file = |r: &Region| Ok((File::from(r.fd.try_clone()?), r.first, r.pages));
        let files = self.regions.iter().map(file).collect::<io::Result<_>>()?;
        Ok(Reader { files })
    }
}

impl Reader {
    /// The first page from `gfn` on that may not be zero.
    pub(crate) fn next_data(&self, gfn: u64) -> io::Result<Option<u64>> {
        for (file, first, pages) in &self.files {
            let from = gfn.max(*first);
            if from >= first + pages {
                continue;
            }
            let at = (from - first) * PAGE_SIZE as u64;
            match lseek(file, at as i64, Whence::SeekData) {
                Ok(found) => return Ok(Some(first + found as u64 / PAGE_SIZE as u64)),
                Err(Errno::ENXIO) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(None)
    }

    /// Reads consecutive pages from `gfn` on, as many as fit into `pages` and lie in one range of RAM; how many.
    pub(crate) fn read(&self, gfn: u64, pages: &mut [Page]) -> io::Result<usize> {
        let inside = |(_, first, count): &&(File, u64, u64)| gfn >= *first && gfn - first < *count;
        let range = self.files.iter().find(inside);
        let (file, first, count) = range.ok_or(io::ErrorKind::InvalidInput)?;
        let left = usize::try_from(count - (gfn - first)).unwrap_or(usize::MAX);
        let n = pages.len().min(left);
        let at = (gfn - first) * PAGE_SIZE as u64;
        file.read_exact_at(pages[..n].as_flattened_mut(), at)?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::EncoderOptions;

    fn ram() -> Vec<RamRange> {
        vec![
            RamRange {
                start: 0,
                len: 16 * 4096,
            },
            RamRange {
                start: 1 << 32,
                len: 4 * 4096,
            },
        ]
    }

    fn record(gfn: u64, page: &Page, prev: Option<&Page>) -> Vec<u8> {
        let mut out = Vec::new();
        PageEncoder::new(EncoderOptions { lz4: true }).encode(gfn, page, prev, &mut out);
        out
    }

    #[test]
    fn i3_staging_leaves_the_image_alone_until_apply() {
        let mut image = Image::new(&ram()).unwrap();
        let (one, mut two) = ([1; PAGE_SIZE], [1; PAGE_SIZE]);
        two[9] = 9;
        image.stage(&record(1 << 20, &one, None)).unwrap();
        assert_eq!(image.page(1 << 20).unwrap(), &[0; PAGE_SIZE]);
        image.apply();
        assert_eq!(image.page(1 << 20).unwrap(), &one);
        image.stage(&record(1 << 20, &two, Some(&one))).unwrap();
        assert_eq!(image.page(1 << 20).unwrap(), &one);
        image.apply();
        assert_eq!(image.page(1 << 20).unwrap(), &two);
    }

    #[test]
    fn a_page_that_comes_twice_is_refused_so_that_staging_is_bounded() {
        let mut image = Image::new(&ram()).unwrap();
        image.stage(&record(2, &[1; PAGE_SIZE], None)).unwrap();
        assert!(matches!(
            image.stage(&record(2, &[2; PAGE_SIZE], None)),
            Err(ImageError::Twice(2))
        ));
    }

    #[test]
    fn an_impossible_layout_is_an_error() {
        let wraps = RamRange {
            start: u64::MAX - 4095,
            len: 8192,
        };
        for ram in [vec![], vec![wraps], vec![wraps, wraps]] {
            assert!(matches!(Image::new(&ram), Err(ImageError::Layout(_))));
        }
    }

    #[test]
    fn i3_a_bad_record_changes_nothing() {
        let mut image = Image::new(&ram()).unwrap();
        image.stage(&record(3, &[7; PAGE_SIZE], None)).unwrap();
        let mut bad = record(4, &[8; PAGE_SIZE], None);
        *bad.last_mut().unwrap() ^= 1;
        assert!(image.stage(&bad).is_err());
        image.discard();
        image.apply();
        assert_eq!(image.page(3).unwrap(), &[0; PAGE_SIZE]);
        assert!(
            image.stage(&record(99, &[8; PAGE_SIZE], None)).is_err(),
            "frame 99 is not RAM"
        );
    }

    #[test]
    fn a_reset_image_is_zero_again() {
        let mut image = Image::new(&ram()).unwrap();
        image.write(&record(3, &[7; PAGE_SIZE], None)).unwrap();
        assert_eq!(image.page(3).unwrap()[0], 7);
        image.reset().unwrap();
        assert_eq!(image.page(3).unwrap(), &[0; PAGE_SIZE]);
    }
}
