//! Guest RAM: ranges, the memfds that hold it, and its mapping.
//!
//! RAM lives in memfds so that it can be handed between processes without a copy: a replica's image becomes the
//! machine's memory as it is. Every write through [`GuestMemory`] is marked in its bitmap; KVM's log covers the guest's.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd, OwnedFd};

use checkpoint::machine::RamRange;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::layout::{HIGH_RAM_START, LOW_RAM_MAX, MAX_RAM, MIN_RAM, PAGE};

/// Guest memory, mapped; clones share the mapping. One region per RAM range, in the same order.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// Why guest RAM could not be laid out, made or mapped.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Less than [`MIN_RAM`].
    #[error("memory of {0} bytes is too small: a machine needs at least {MIN_RAM} bytes (2 MiB)")]
    TooSmall(u64),
    /// More than [`MAX_RAM`].
    #[error("memory of {0} bytes is too large: at most {MAX_RAM} bytes (1 TiB)")]
    TooLarge(u64),
    /// Not whole pages.
    #[error("memory of {0} bytes is not a multiple of 4096")]
    Unaligned(u64),
    /// The end of low RAM is not usable.
    #[error(
        "low memory may end at a multiple of 4096 from {MIN_RAM:#x} to {LOW_RAM_MAX:#x}, not at {0:#x}"
    )]
    LowEnd(u64),
    /// Ranges that [`RamLayout::new`] could not have made.
    #[error("memory ranges {0:?} are not those of a machine: one from 0, and the rest from 4 GiB")]
    Ranges(Vec<RamRange>),
    /// As many files as ranges are needed.
    #[error("{files} memory files for {ranges} memory ranges")]
    FileCount {
        /// Files given.
        files: usize,
        /// Ranges to be mapped.
        ranges: usize,
    },
    /// A file does not have its range's length.
    #[error("memory file {index} has {has} bytes, its range {wants}")]
    FileSize {
        /// Index of the range.
        index: usize,
        /// The file's length.
        has: u64,
        /// The range's length.
        wants: u64,
    },
    /// The operating system refused.
    #[error("{what}: {source}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The mapping could not be made.
    #[error("mapping guest memory: {0}")]
    Map(String),
}

/// The RAM ranges of a machine, ascending: one from 0, and if that is not enough, one from 4 GiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout(Vec<RamRange>);

impl RamLayout {
    /// Lays out `mem_bytes` of RAM. What does not fit below 3 GiB, or below `low_end` if given (to have two memory
    /// slots with little memory), goes to 4 GiB and up.
    ///
    /// # Errors
    /// [`MemoryError`] if the size or `low_end` is not whole pages within the limits.
    pub fn new(mem_bytes: u64, low_end: Option<u64>) -> Result<RamLayout, MemoryError> {
        if !mem_bytes.is_multiple_of(PAGE) {
            return Err(MemoryError::Unaligned(mem_bytes));
        }
        if mem_bytes < MIN_RAM {
            return Err(MemoryError::TooSmall(mem_bytes));
        }
        if mem_bytes > MAX_RAM {
            return Err(MemoryError::TooLarge(mem_bytes));
        }
        let low_end = low_end.unwrap_or(LOW_RAM_MAX);
        if !low_end.is_multiple_of(PAGE) || !(MIN_RAM..=LOW_RAM_MAX).contains(&low_end) {
            return Err(MemoryError::LowEnd(low_end));
        }
        let low = mem_bytes.min(low_end);
        let mut ranges = vec![RamRange { start: 0, len: low }];
        if mem_bytes > low {
            ranges.push(RamRange {
                start: HIGH_RAM_START,
                len: mem_bytes - low,
            });
        }
        Ok(RamLayout(ranges))
    }

    /// Takes over the ranges of another machine, e.g. of a checkpoint.
    ///
    /// # Errors
    /// [`MemoryError::Ranges`] if [`RamLayout::new`] cannot have made them.
    pub fn from_ranges(ranges: &[RamRange]) -> Result<RamLayout, MemoryError> {
        let bad = || MemoryError::Ranges(ranges.to_vec());
        let low = ranges.first().ok_or_else(bad)?;
        let total = ranges
            .iter()
            .try_fold(0u64, |sum, r| sum.checked_add(r.len))
            .ok_or_else(bad)?;
        let layout = RamLayout::new(total, Some(low.len)).map_err(|_| bad())?;
        if layout.0 == ranges {
            Ok(layout)
        } else {
            Err(bad())
        }
    }

    /// The ranges, ascending by address.
    pub fn ranges(&self) -> &[RamRange] {
        &self.0
    }

    /// Bytes of RAM.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|r| r.len).sum()
    }

    /// End of RAM below 4 GiB (exclusive).
    pub fn low_end(&self) -> u64 {
        self.0[0].len
    }
}

/// The memfds holding guest RAM, one per range.
#[derive(Debug)]
pub struct RamFiles(Vec<File>);

impl RamFiles {
    /// Makes zeroed memfds for `layout`, sealed against changes of their size.
    ///
    /// # Errors
    /// [`MemoryError::Os`] if the system gives none.
    pub fn create(layout: &RamLayout) -> Result<RamFiles, MemoryError> {
        let mut files = Vec::new();
        for range in layout.ranges() {
            // SAFETY: the name is a NUL-terminated literal; the result is checked before it becomes an owner.
            let fd = unsafe {
                libc::memfd_create(
                    c"guest-ram".as_ptr(),
                    libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
                )
            };
            if fd < 0 {
                return Err(MemoryError::Os {
                    what: "memfd_create for guest memory",
                    source: io::Error::last_os_error(),
                });
            }
            // SAFETY: `fd` was just returned by the kernel and belongs to nobody else.
            let file = unsafe { File::from_raw_fd(fd) };
            file.set_len(range.len).map_err(|source| MemoryError::Os {
                what: "sizing guest memory",
                source,
            })?;
            seal(&file)?;
            files.push(file);
        }
        Ok(RamFiles(files))
    }

    /// Takes over memfds made elsewhere, in the order of their ranges. Their sizes are sealed and, at
    /// [`map`], checked: a peer that shrinks one later would otherwise kill this process with SIGBUS.
    ///
    /// # Errors
    /// [`MemoryError::Os`] if one cannot be sealed (not a memfd, or its seals are closed without the size sealed).
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<RamFiles, MemoryError> {
        let files: Vec<File> = fds.into_iter().map(File::from).collect();
        for file in &files {
            seal(file)?;
        }
        Ok(RamFiles(files))
    }

    /// The files, in the order of the ranges.
    pub fn files(&self) -> &[File] {
        &self.0
    }

    /// Second handles on the same memory.
    ///
    /// # Errors
    /// [`MemoryError::Os`] if descriptors run out.
    pub fn try_clone(&self) -> Result<RamFiles, MemoryError> {
        let files: Result<Vec<File>, io::Error> = self.0.iter().map(File::try_clone).collect();
        files.map(RamFiles).map_err(|source| MemoryError::Os {
            what: "duplicating a memory file",
            source,
        })
    }
}

fn seal(file: &File) -> Result<(), MemoryError> {
    let wanted = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let os = |errno: nix::Error| MemoryError::Os {
        what: "sealing the size of a memory file",
        source: errno.into(),
    };
    let has = fcntl(file, FcntlArg::F_GET_SEALS).map_err(os)?;
    if SealFlag::from_bits_truncate(has).contains(wanted) {
        return Ok(());
    }
    fcntl(file, FcntlArg::F_ADD_SEALS(wanted)).map_err(os)?;
    Ok(())
}

/// Maps `files` shared, as the ranges of `layout`, with a dirty bitmap of one bit per page.
///
/// # Errors
/// [`MemoryError`] if count or sizes differ or the mapping is refused.
pub fn map(layout: &RamLayout, files: &RamFiles) -> Result<GuestMemory, MemoryError> {
    if files.0.len() != layout.0.len() {
        return Err(MemoryError::FileCount {
            files: files.0.len(),
            ranges: layout.0.len(),
        });
    }
    let page = NonZeroUsize::new(PAGE as usize).expect("a page is not empty");
    let mut regions = Vec::new();
    for (index, (range, file)) in layout.0.iter().zip(&files.0).enumerate() {
        let os = |what| move |source| MemoryError::Os { what, source };
        let has = file
            .metadata()
            .map_err(os("reading the size of a memory file"))?
            .len();
        if has != range.len {
            return Err(MemoryError::FileSize {
                index,
                has,
                wants: range.len,
            });
        }
        let file = file.try_clone().map_err(os("duplicating a memory file"))?;
        let len = usize::try_from(range.len).map_err(|_| MemoryError::TooLarge(range.len))?;
        let region = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::new(len, page))
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| MemoryError::Map(e.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start))
            .ok_or_else(|| MemoryError::Map(format!("range at {:#x} wraps around", range.start)))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(|e| MemoryError::Map(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn layout_splits_at_the_hole() {
        let small = RamLayout::new(64 << 20, None).unwrap();
        assert_eq!(
            small.ranges(),
            &[RamRange {
                start: 0,
                len: 64 << 20
            }]
        );
        let big = RamLayout::new(4 << 30, None).unwrap();
        assert_eq!(big.ranges().len(), 2);
        assert_eq!(big.low_end(), LOW_RAM_MAX);
        assert_eq!(big.total(), 4 << 30);
        let holed = RamLayout::new(8 << 20, Some(2 << 20)).unwrap();
        assert_eq!(
            holed.ranges()[1],
            RamRange {
                start: HIGH_RAM_START,
                len: 6 << 20
            }
        );
        assert_eq!(RamLayout::from_ranges(holed.ranges()).unwrap(), holed);
    }

    #[test]
    fn layout_refuses_nonsense() {
        assert!(matches!(
            RamLayout::new(1 << 20, None),
            Err(MemoryError::TooSmall(_))
        ));
        assert!(matches!(
            RamLayout::new((4 << 20) + 1, None),
            Err(MemoryError::Unaligned(_))
        ));
        assert!(matches!(
            RamLayout::new(2 << 40, None),
            Err(MemoryError::TooLarge(_))
        ));
        assert!(matches!(
            RamLayout::new(8 << 20, Some(12)),
            Err(MemoryError::LowEnd(_))
        ));
        assert!(RamLayout::from_ranges(&[]).is_err());
        let r = |start, len| RamRange { start, len };
        assert!(RamLayout::from_ranges(&[r(4096, 4 << 20)]).is_err());
        assert!(RamLayout::from_ranges(&[r(0, 4 << 20), r(8 << 20, 4 << 20)]).is_err());
        assert!(RamLayout::from_ranges(&[r(0, u64::MAX), r(HIGH_RAM_START, 4096)]).is_err());
    }

    #[test]
    fn memory_is_the_file_and_writes_are_marked() {
        let layout = RamLayout::new(8 << 20, Some(4 << 20)).unwrap();
        let files = RamFiles::create(&layout).unwrap();
        let mem = map(&layout, &files).unwrap();
        mem.write_obj(0x1122_3344u32, GuestAddress(HIGH_RAM_START + 0x3000))
            .unwrap();
        let mut other = files.try_clone().unwrap().0.remove(1);
        let mut bytes = vec![0; 0x3004];
        other.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes[0x3000..], &0x1122_3344u32.to_le_bytes());
        let region = mem.find_region(GuestAddress(HIGH_RAM_START)).unwrap();
        assert!(region.get_mmap().bitmap().is_addr_set(0x3000));
        assert!(!region.get_mmap().bitmap().is_addr_set(0x2000));
    }

    #[test]
    fn files_cannot_be_resized_and_must_fit() {
        let layout = RamLayout::new(4 << 20, None).unwrap();
        let files = RamFiles::create(&layout).unwrap();
        assert!(files.files()[0].set_len(4096).is_err());
        let other = RamLayout::new(8 << 20, None).unwrap();
        assert!(matches!(
            map(&other, &files),
            Err(MemoryError::FileSize { .. })
        ));
        let holed = RamLayout::new(8 << 20, Some(4 << 20)).unwrap();
        assert!(matches!(
            map(&holed, &files),
            Err(MemoryError::FileCount { .. })
        ));
        let mut plain = tempfile::tempfile().unwrap();
        plain.write_all(&[0; 4096]).unwrap();
        assert!(RamFiles::from_fds(vec![plain.into()]).is_err());
    }
}
