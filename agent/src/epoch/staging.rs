//! Copies of guest pages: the staging buffer that a pause fills, and the shadow that deltas are computed against.

use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;

use checkpoint::{PAGE_SIZE, Page, PageBitmap, RamRange};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::unistd::{Whence, lseek};
use vm_memory::{Address, FileOffset, GuestMemoryBackend, GuestMemoryRegion};

/// Why memory for copies could not be had, or guest memory is not as expected.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// mmap failed.
    #[error(
        "cannot map {bytes} bytes for the shadow image: {source} (a protected VM needs as much memory again as its guest has \
         written to)"
    )]
    Map {
        /// Size asked for.
        bytes: usize,
        /// The operating system's answer.
        source: nix::Error,
    },
    /// A guest frame number outside the VM's RAM.
    #[error("guest frame {0:#x} is outside the VM's memory")]
    OutOfRange(u64),
}

/// Pages copied at one instant (or, during the first synchronisation, while the guest runs).
#[derive(Debug, Default)]
pub struct Staging {
    gfns: Vec<u64>,
    bytes: Vec<u8>,
}

impl Staging {
    /// Forgets the contents and keeps the memory, so that the next pause takes no page faults.
    pub fn clear(&mut self) {
        self.gfns.clear();
        self.bytes.clear();
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.gfns.len()
    }

    /// Bytes of pages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Bytes of memory kept for pages.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.bytes.capacity() as u64
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gfns.is_empty()
    }

    /// The pages with their guest frame numbers, in the order copied.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.gfns
            .iter()
            .copied()
            .zip(self.bytes.as_chunks::<PAGE_SIZE>().0)
    }
}

/// Direct access to guest RAM for copying whole pages.
#[derive(Debug)]
pub struct RamView {
    regions: Vec<Region>,
    // Keeps the mapping alive for as long as the pointers are in use.
    memory: vmm::GuestMemory,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    first_gfn: u64,
    pages: u64,
    host: NonNull<u8>,
    shadow_offset: usize,
}

// SAFETY: the pointers refer to guest RAM, which is shared memory mapped for as long as `memory` lives; reads through
// them tolerate concurrent writers (a torn page is always followed by another copy of it, see `copy`).
unsafe impl Send for RamView {}
// SAFETY: as above; no method mutates through the pointers.
unsafe impl Sync for RamView {}

impl RamView {
    /// A view of all of `memory`.
    #[must_use]
    pub fn new(memory: &vmm::GuestMemory) -> Self {
        let mut regions = Vec::new();
        let mut shadow_offset = 0;
        for region in memory.iter() {
            let host = NonNull::new(region.as_ptr()).expect("a mapped region is not at null");
            let pages = region.len() / PAGE_SIZE as u64;
            regions.push(Region {
                first_gfn: region.start_addr().raw_value() / PAGE_SIZE as u64,
                pages,
                host,
                shadow_offset,
            });
            shadow_offset += pages as usize * PAGE_SIZE;
        }
        Self {
            regions,
            memory: memory.clone(),
        }
    }

    /// RAM size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.regions
            .iter()
            .map(|r| r.pages as usize * PAGE_SIZE)
            .sum()
    }

    /// The RAM ranges, ascending.
    #[must_use]
    pub fn ranges(&self) -> Vec<RamRange> {
        self.regions
            .iter()
            .map(|r| RamRange {
                start: r.first_gfn * PAGE_SIZE as u64,
                len: r.pages * PAGE_SIZE as u64,
            })
            .collect()
    }

    fn region(&self, gfn: u64) -> Result<Region, StagingError> {
        self.regions
            .iter()
            .copied()
            .find(|r| gfn >= r.first_gfn && gfn - r.first_gfn < r.pages)
            .ok_or(StagingError::OutOfRange(gfn))
    }

    /// Copies `count` pages from `first` on into `staging`. The guest is paused, or the caller copies the pages again
    /// later because the dirty log is on.
    ///
    /// # Errors
    /// [`StagingError::OutOfRange`] if any of the pages is not RAM.
    pub fn copy(&self, first: u64, count: u64, staging: &mut Staging) -> Result<(), StagingError> {
        let region = self.region(first)?;
        let index = first - region.first_gfn;
        if count > region.pages - index {
            return Err(StagingError::OutOfRange(region.first_gfn + region.pages));
        }
        let length = count as usize * PAGE_SIZE;
        staging.bytes.reserve(length);
        let old = staging.bytes.len();
        // SAFETY: source: `index + count <= pages`, so the range is inside the mapped region. Destination: `reserve`
        // made room for `length` more bytes, which the copy initialises before `set_len`. They cannot overlap: one is
        // guest RAM, the other our heap. A device's read still in flight may write the source meanwhile; its bytes are
        // then a mix, but that page is marked dirty after the write and copied again in the next epoch.
        unsafe {
            std::ptr::copy_nonoverlapping(
                region.host.as_ptr().add(index as usize * PAGE_SIZE),
                staging.bytes.as_mut_ptr().add(old),
                length,
            );
            staging.bytes.set_len(old + length);
        }
        staging.gfns.extend(first..first + count);
        Ok(())
    }

    /// Copies every page set in `dirty`, neighbouring pages in one go.
    ///
    /// # Errors
    /// As [`RamView::copy`].
    pub fn copy_dirty(
        &self,
        dirty: &PageBitmap,
        staging: &mut Staging,
    ) -> Result<(), StagingError> {
        self.copy_some(&mut dirty.iter(), usize::MAX, staging)
    }

    /// Copies the next `count` pages of `gfns`, ascending, neighbouring ones in one go.
    ///
    /// # Errors
    /// As [`RamView::copy`].
    pub fn copy_some(
        &self,
        gfns: &mut dyn Iterator<Item = u64>,
        count: usize,
        staging: &mut Staging,
    ) -> Result<(), StagingError> {
        let mut run: Option<(u64, u64)> = None;
        for gfn in gfns.take(count) {
            run = match run {
                Some((first, count))
                    if gfn == first + count
                        && self.region(first)?.first_gfn == self.region(gfn)?.first_gfn =>
                {
                    Some((first, count + 1))
                }
                Some((first, count)) => {
                    self.copy(first, count, staging)?;
                    Some((gfn, 1))
                }
                None => Some((gfn, 1)),
            };
        }
        if let Some((first, count)) = run {
            self.copy(first, count, staging)?;
        }
        Ok(())
    }

    /// A copy of everything that may hold something.
    ///
    /// # Errors
    /// As [`RamView::copy`].
    pub fn whole(&self) -> Result<Staging, StagingError> {
        let mut staging = Staging::default();
        for range in self.touched() {
            self.copy(range.start, range.end - range.start, &mut staging)?;
        }
        Ok(staging)
    }

    /// The frames that may hold something: the others were never touched, by anybody, and are zero. Looking touches none.
    ///
    /// What is written later is not in it: the dirty log has to be on.
    #[must_use]
    pub fn touched(&self) -> Vec<Range<u64>> {
        let regions = self.regions.iter().zip(self.memory.iter());
        regions
            .flat_map(|(region, mapped)| match mapped.file_offset() {
                Some(at) => data(at, region),
                // Memory without a file behind it, of which nobody can say.
                None => {
                    std::iter::once(region.first_gfn..region.first_gfn + region.pages).collect()
                }
            })
            .collect()
    }
}

/// The frames of a region whose file has pages. Guest memory is a memfd; pages that are swapped out count as there.
fn data(at: &FileOffset, region: &Region) -> Vec<Range<u64>> {
    let page = PAGE_SIZE as u64;
    let (start, end) = (at.start(), at.start() + region.pages * page);
    let mut ranges = Vec::new();
    let mut from = start;
    while from < end {
        let first = match seek(at.file(), from, Whence::SeekData) {
            Ok(first) if first < end => first,
            Ok(_) | Err(Errno::ENXIO) => break,
            // Not a file that knows: all of it.
            Err(_) => from,
        };
        let hole = seek(at.file(), first, Whence::SeekHole).unwrap_or(end);
        let hole = hole.clamp(first + 1, end);
        let frame = |offset: u64| region.first_gfn + (offset - start) / page;
        ranges.push(frame(first)..frame(hole.next_multiple_of(page).min(end)));
        from = hole;
    }
    ranges
}

fn seek(file: &File, from: u64, whence: Whence) -> nix::Result<u64> {
    let from = i64::try_from(from).map_err(|_| Errno::EINVAL)?;
    lseek(file, from, whence).map(|at| u64::try_from(at).unwrap_or_default())
}

/// What the replicas' memory image looks like once everything sent so far is processed: the reference for deltas and
/// for leaving out unchanged pages. Address space as large as the VM's RAM; only pages ever sent take memory.
#[derive(Debug)]
pub struct Shadow {
    base: NonNull<u8>,
    bytes: usize,
    view: Vec<Region>,
    /// The pages whose content is known; none: all are.
    known: Option<PageBitmap>,
}

// SAFETY: the mapping is private to this value and only reached through `&mut self`.
unsafe impl Send for Shadow {}

impl Shadow {
    /// An all-zero shadow for the RAM of `view`, as a fresh image is.
    ///
    /// # Errors
    /// [`StagingError::Map`] when there is no address space or memory.
    pub fn new(view: &RamView) -> Result<Self, StagingError> {
        let bytes = view.bytes();
        let length = bytes.try_into().map_err(|_| StagingError::Map {
            bytes,
            source: nix::Error::EINVAL,
        })?;
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }
        .map_err(|source| StagingError::Map { bytes, source })?
        .cast::<u8>();
        Ok(Self {
            base,
            bytes,
            view: view.regions.clone(),
            known: None,
        })
    }

    /// A shadow of an image whose content is not known here: a page becomes known when it is sent.
    ///
    /// # Errors
    /// As [`Shadow::new`].
    pub fn unknown(view: &RamView) -> Result<Self, StagingError> {
        let mut shadow = Self::new(view)?;
        shadow.known = Some(PageBitmap::new(&view.ranges()));
        Ok(shadow)
    }

    /// Whether the page of `gfn` is known to be what the image has.
    #[must_use]
    pub fn is_known(&self, gfn: u64) -> bool {
        self.known.as_ref().is_none_or(|known| known.test(gfn))
    }

    /// From here on it is.
    pub fn learn(&mut self, gfn: u64) {
        if let Some(known) = &mut self.known {
            known.set(gfn);
        }
    }

    /// The page of `gfn`.
    ///
    /// # Errors
    /// [`StagingError::OutOfRange`] if it is not RAM.
    pub fn page_mut(&mut self, gfn: u64) -> Result<&mut Page, StagingError> {
        let region = self
            .view
            .iter()
            .find(|r| gfn >= r.first_gfn && gfn - r.first_gfn < r.pages)
            .ok_or(StagingError::OutOfRange(gfn))?;
        let offset = region.shadow_offset + (gfn - region.first_gfn) as usize * PAGE_SIZE;
        // SAFETY: `offset + PAGE_SIZE <= self.bytes` by the region's bounds; `&mut self` makes the reference unique;
        // any bytes are a valid `Page`.
        Ok(unsafe { &mut *self.base.as_ptr().add(offset).cast::<Page>() })
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> vmm::GuestMemory {
        vmm::GuestMemory::from_ranges(&[
            (GuestAddress(0), 0x4000),
            (GuestAddress(0x1_0000), 0x2000),
        ])
        .unwrap()
    }

    #[test]
    fn dirty_pages_of_all_regions_are_copied_in_order() {
        let memory = memory();
        let view = RamView::new(&memory);
        for gfn in [0u64, 1, 3, 0x10, 0x11] {
            memory
                .write_obj(gfn + 100, GuestAddress(gfn * 4096))
                .unwrap();
        }
        let mut dirty = PageBitmap::new(&view.ranges());
        for gfn in [0u64, 1, 3, 0x10, 0x11] {
            dirty.set(gfn);
        }
        let mut staging = Staging::default();
        view.copy_dirty(&dirty, &mut staging).unwrap();
        let got: Vec<(u64, u64)> = staging
            .pages()
            .map(|(gfn, page)| (gfn, u64::from_le_bytes(page[..8].try_into().unwrap())))
            .collect();
        assert_eq!(
            got,
            [(0, 100), (1, 101), (3, 103), (0x10, 0x74), (0x11, 0x75)]
        );
    }

    #[test]
    fn a_page_outside_ram_is_an_error() {
        let memory = memory();
        let view = RamView::new(&memory);
        let mut staging = Staging::default();
        assert!(view.copy(4, 1, &mut staging).is_err());
        assert!(view.copy(3, 2, &mut staging).is_err());
        assert!(Shadow::new(&view).unwrap().page_mut(0x12).is_err());
    }

    #[test]
    fn a_shadow_begins_as_zero_and_keeps_pages_apart() {
        let memory = memory();
        let mut shadow = Shadow::new(&RamView::new(&memory)).unwrap();
        shadow.page_mut(3).unwrap().fill(3);
        shadow.page_mut(0x10).unwrap().fill(4);
        assert_eq!(shadow.page_mut(3).unwrap()[0], 3);
        assert_eq!(shadow.page_mut(0x10).unwrap()[4095], 4);
        assert_eq!(shadow.page_mut(0x11).unwrap(), &[0; 4096]);
    }
}
