//! KVM's dirty log of one memory slot, with or without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (kvm/api.rst, 4.8, 4.117, 7.18).
//!
//! Without it, reading the log protects every page in it again. With it, reading changes nothing, and pages are protected by
//! name: what is only looked at costs the guest no write faults.

use std::io;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

const PAGE: usize = 4096;

/// How a VM's log is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protects {
    /// Reading it protects what is in it.
    ByReading,
    /// Only [`clear`] does.
    ByName,
}

/// Asks for pages to be protected by name, if this KVM can do so.
pub(crate) fn protect_by_name(vm: &VmFd) -> Protects {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let enable = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    let can = u32::try_from(vm.check_extension_raw(cap.into())).is_ok_and(|can| can & enable != 0);
    let request = kvm_enable_cap {
        cap,
        args: [enable.into(), 0, 0, 0],
        ..Default::default()
    };
    match can && vm.enable_cap(&request).is_ok() {
        true => Protects::ByName,
        false => Protects::ByReading,
    }
}

/// The log of a slot of `bytes`: bit n is its page n.
pub(crate) fn read(vm: &VmFd, slot: u32, bytes: usize) -> io::Result<Vec<u64>> {
    Ok(vm.get_dirty_log(slot, bytes)?)
}

/// Protects the pages of `log`, what [`read`] returned for this slot, and takes them out of it. Only for
/// [`Protects::ByName`].
///
/// # Errors
/// KVM's refusal.
pub(crate) fn clear(vm: &VmFd, slot: u32, bytes: usize, log: &mut [u64]) -> io::Result<()> {
    let pages = bytes / PAGE;
    // Only what the words have bits for, up to the slot's end: the kernel reads one bit for each page.
    let Some(first) = log.iter().position(|word| *word != 0) else {
        return Ok(());
    };
    let end = log
        .iter()
        .rposition(|word| *word != 0)
        .map_or(0, |at| at + 1);
    let first_page = first * 64;
    let num_pages = (end * 64).min(pages) - first_page;
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(num_pages).map_err(io::Error::other)?,
        first_page: first_page as u64,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: log[first..end].as_mut_ptr().cast(),
        },
    };
    // SAFETY: `vm` is a VM's descriptor, and the bitmap has a bit for each of `num_pages`: `end - first` words, of which the
    // last may reach beyond the slot. The kernel only reads it, and keeps no reference.
    match unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
