//! Which pages changed: KVM's dirty log for the guest's writes, the memory's own bitmap for the VMM's.
//!
//! Neither alone is enough. KVM marks what vCPUs write (and what KVM itself writes for them, e.g. the paravirtual
//! clock); used rings, received frames and disk reads are written by this process and never reach its log.

use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::bitmap::PageBitmap;
use checkpoint::machine::RamRange;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::dirty_log::{self, Protects};
use crate::memory::GuestMemory;

/// Why dirty pages could not be tracked.
#[derive(Debug, Error)]
#[error("{what} of memory slot {slot}: {source}")]
pub struct DirtyError {
    what: &'static str,
    slot: u32,
    source: std::io::Error,
}

/// Knows which pages of guest memory changed since they were last asked for.
pub trait DirtyTracker: Send + Sync {
    /// Begins tracking. What was written before the return is not reported: copy all of memory after it.
    ///
    /// # Errors
    /// KVM's refusal; tracking is then off.
    fn start(&self) -> Result<(), DirtyError>;

    /// ORs into `out` every page written since the last harvest (or start), and forgets it. A consistent set needs
    /// the machine paused and its state captured before (reading vCPU state may make KVM write guest memory).
    ///
    /// # Errors
    /// KVM's refusal. What is in `out` by then is no longer known here: keep it, or give it to
    /// [`DirtyTracker::merge_back`].
    fn harvest(&self, out: &mut PageBitmap) -> Result<(), DirtyError>;

    /// As [`DirtyTracker::harvest`], but the pages of `hot` stay writable unnoticed, if KVM can leave them so: once one of them
    /// has been written, each harvest reports it, whether it was written again or not, until one whose `hot` it is not in.
    ///
    /// # Errors
    /// As [`DirtyTracker::harvest`].
    fn harvest_but(&self, out: &mut PageBitmap, hot: &PageBitmap) -> Result<(), DirtyError> {
        let _ = hot;
        self.harvest(out)
    }

    /// ORs into `out` what the next harvest will report at least, and forgets nothing. The guest may run. Where KVM can, this
    /// costs it no write faults.
    ///
    /// # Errors
    /// KVM's refusal.
    fn peek(&self, out: &mut PageBitmap) -> Result<(), DirtyError> {
        self.harvest(out)?;
        self.merge_back(out);
        Ok(())
    }

    /// Takes pages back whose checkpoint failed: the next harvest reports them again.
    fn merge_back(&self, pages: &PageBitmap);

    /// Ends tracking and forgets what was not harvested.
    ///
    /// # Errors
    /// KVM's refusal.
    fn stop(&self) -> Result<(), DirtyError>;
}

/// [`DirtyTracker`] over KVM's dirty bitmap, one memory slot per region of guest memory.
pub struct BitmapTracker {
    vm: Arc<VmFd>,
    protects: Protects,
    memory: GuestMemory,
    ranges: Vec<RamRange>,
    /// Pages given back, to be reported again.
    returned: Mutex<Option<PageBitmap>>,
}

impl BitmapTracker {
    /// Tracks `memory`, whose region i is memory slot i of `vm` and range i of `ranges`.
    pub(crate) fn new(vm: Arc<VmFd>, memory: GuestMemory, ranges: Vec<RamRange>) -> BitmapTracker {
        BitmapTracker {
            protects: dirty_log::protect_by_name(&vm),
            vm,
            memory,
            ranges,
            returned: Mutex::new(None),
        }
    }

    fn failed(what: &'static str, slot: u32) -> impl Fn(std::io::Error) -> DirtyError {
        move |source| DirtyError { what, slot, source }
    }

    /// The log of a slot; pages in it stay there, unless reading it takes them out.
    fn read(&self, slot: u32, bytes: usize) -> Result<Vec<u64>, DirtyError> {
        let log = dirty_log::read(&self.vm, slot, bytes);
        log.map_err(Self::failed("reading the dirty log", slot))
    }

    /// A harvest that leaves `hot` as it is.
    fn take(&self, out: &mut PageBitmap, hot: Option<&PageBitmap>) -> Result<(), DirtyError> {
        if let Some(pages) = self
            .returned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            out.or_assign(&pages);
        }
        for (index, region) in self.memory.iter().enumerate() {
            let (slot, bytes) = (index as u32, region.len() as usize);
            let mut log = self.read(slot, bytes)?;
            out.or_words(index, &log);
            if self.protects == Protects::ByName {
                // The others stay in the log, and so in what comes next.
                let hot = hot.map_or(&[][..], |hot| hot.words(index));
                log.iter_mut().zip(hot).for_each(|(log, hot)| *log &= !hot);
                let cleared = dirty_log::clear(&self.vm, slot, bytes, &mut log);
                cleared.map_err(Self::failed("clearing the dirty log", slot))?;
            }
            out.or_words(index, &region.get_mmap().bitmap().get_and_reset());
        }
        Ok(())
    }

    fn set_logging(&self, on: bool) -> Result<(), DirtyError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        set_slots(&self.vm, &self.memory, flags).map_err(|(slot, source)| DirtyError {
            what: if on {
                "turning on the dirty log"
            } else {
                "turning off the dirty log"
            },
            slot,
            source,
        })
    }
}

impl DirtyTracker for BitmapTracker {
    fn start(&self) -> Result<(), DirtyError> {
        if let Err(error) = self.set_logging(true) {
            // Half of the slots may be logging already; without the other half that only costs write faults.
            let _ = self.set_logging(false);
            return Err(error);
        }
        for region in self.memory.iter() {
            region.get_mmap().bitmap().reset();
        }
        *self.returned.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    fn harvest(&self, out: &mut PageBitmap) -> Result<(), DirtyError> {
        self.take(out, None)
    }

    fn harvest_but(&self, out: &mut PageBitmap, hot: &PageBitmap) -> Result<(), DirtyError> {
        self.take(out, Some(hot))
    }

    fn peek(&self, out: &mut PageBitmap) -> Result<(), DirtyError> {
        let mut taken = PageBitmap::new(&self.ranges);
        for (index, region) in self.memory.iter().enumerate() {
            let log = self.read(index as u32, region.len() as usize)?;
            match self.protects {
                Protects::ByName => out.or_words(index, &log),
                Protects::ByReading => taken.or_words(index, &log),
            }
            taken.or_words(index, &region.get_mmap().bitmap().get_and_reset());
        }
        self.merge_back(&taken);
        let returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(returned) = &*returned {
            out.or_assign(returned);
        }
        Ok(())
    }

    fn merge_back(&self, pages: &PageBitmap) {
        let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
        returned
            .get_or_insert_with(|| PageBitmap::new(&self.ranges))
            .or_assign(pages);
    }

    fn stop(&self) -> Result<(), DirtyError> {
        *self.returned.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.set_logging(false)
    }
}

/// Makes (or changes the flags of) the memory slots of `memory`: slot i is region i.
///
/// # Errors
/// The slot refused and KVM's reason.
pub(crate) fn set_slots(
    vm: &VmFd,
    memory: &GuestMemory,
    flags: u32,
) -> Result<(), (u32, std::io::Error)> {
    for (index, region) in memory.iter().enumerate() {
        let slot = index as u32;
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|e| (slot, std::io::Error::other(e)))?;
        let wanted = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a live mapping of exactly this length, and the owner of this VM (`machine::Vm`) keeps
        // `memory` for as long as the VM exists. Regions do not overlap, so neither do slots.
        unsafe { vm.set_user_memory_region(wanted) }.map_err(|e| (slot, e.into()))?;
    }
    Ok(())
}
