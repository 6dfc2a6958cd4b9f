//! One vCPU's state: read while it is stopped, put into a fresh vCPU.
//!
//! The order of the reads and writes is part of their meaning; each place where it matters says why.

use checkpoint::codec;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::msrs::{self, MsrError};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Layout of [`VcpuState`] in a blob; a change of the struct raises it.
const VERSION: u16 = 1;
/// Most bytes of one vCPU's blob: XSAVE areas are up to 12 KiB, the rest well below.
pub(crate) const BLOB_LIMIT: usize = 256 << 10;
/// Bytes of the fixed part of an XSAVE area in KVM's interface.
const XSAVE_BASE: usize = size_of::<kvm_xsave>();
/// Offset of the timer's LVT entry in the local APIC's registers; bits 17-18 are its mode.
const LAPIC_LVT_TIMER: usize = 0x320;
/// Timer mode: TSC deadline.
const LVT_TSC_DEADLINE: u32 = 2;

/// Why a vCPU's state could not be read or restored.
#[derive(Debug, Error)]
pub enum VcpuStateError {
    /// KVM refused one part.
    #[error("{what}: {source}")]
    Kvm {
        /// Which ioctl.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The model-specific registers.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// The blob is not one of ours.
    #[error("vCPU state: {0}")]
    Codec(#[from] codec::CodecError),
    /// The blob's layout is of another version.
    #[error("vCPU state of version {0}, this program reads {VERSION}")]
    Version(u16),
    /// The saved CPU has more extended state than this host's.
    #[error("the guest uses {saved} bytes of extended processor state, this host has {here}")]
    Xsave {
        /// Bytes saved.
        saved: usize,
        /// Bytes KVM has here.
        here: usize,
    },
    /// More CPUID entries than KVM takes.
    #[error("{0} CPUID entries")]
    Cpuid(usize),
}

pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |e| VcpuStateError::Kvm {
        what,
        source: e.into(),
    }
}

/// What this host's vCPUs have, found once per machine: it cannot change while the machine exists.
#[derive(Clone, Debug)]
pub(crate) struct VcpuTraits {
    /// MSRs to save.
    pub(crate) msrs: Vec<u32>,
    /// Bytes of an XSAVE area, [`XSAVE_BASE`] or more.
    pub(crate) xsave_bytes: usize,
    /// Whether there are extended control registers: not on a host whose processor has no XSAVE.
    pub(crate) xcrs: bool,
}

/// Everything KVM knows of one vCPU.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    version: u16,
    tsc_khz: u32,
    tsc_offset: Option<u64>,
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u8>,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    msrs: Vec<(u32, u64)>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Whether it waits for an interrupt: standing still costs it nothing (kvm/api.rst, 4.38: KVM_MP_STATE_HALTED).
    pub(crate) fn is_halted(&self) -> bool {
        self.mp_state.mp_state == KVM_MP_STATE_HALTED
    }

    /// Reads the state of a stopped vCPU.
    ///
    /// # Errors
    /// [`VcpuStateError`] naming the part KVM refused.
    pub(crate) fn capture(vcpu: &VcpuFd, traits: &VcpuTraits) -> Result<VcpuState, VcpuStateError> {
        // First: reading it makes KVM process a pending INIT or SIPI, which changes everything else.
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        let xsave = get_xsave(vcpu, traits.xsave_bytes)?;
        let xcrs = match traits.xcrs {
            true => Some(vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?),
            false => None,
        };
        let debug_regs = vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?;
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_CPUID2"))?;
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let tsc_offset = get_tsc_offset(vcpu);
        // Before the local APIC: a timer that fires between the two is then in both (and ticks twice) rather than in
        // neither (and never again).
        let msrs = msrs::read(vcpu, &traits.msrs)?;
        let lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        // Last: the reads above may turn pending exceptions into injected ones.
        let events = vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            version: VERSION,
            tsc_khz,
            tsc_offset,
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            msrs,
            lapic,
            events,
        })
    }

    /// Puts the state into a fresh vCPU, or, `fresh` being false, that of power-on into one that has run, which keeps its
    /// features. `clock` is the machine's time-stamp counter, the same for all its vCPUs.
    ///
    /// # Errors
    /// [`VcpuStateError`] naming the part KVM refused; the vCPU must then not run.
    pub(crate) fn apply(
        &self,
        vcpu: &VcpuFd,
        traits: &VcpuTraits,
        clock: &mut TscClock,
        fresh: bool,
    ) -> Result<(), VcpuStateError> {
        if fresh {
            self.apply_features(vcpu)?;
        }
        // A fresh vCPU is uninitialised, unless it is the first.
        if !fresh || self.mp_state.mp_state != KVM_MP_STATE_UNINITIALIZED {
            vcpu.set_mp_state(self.mp_state)
                .map_err(kvm("KVM_SET_MP_STATE"))?;
        }
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        set_xsave(vcpu, traits.xsave_bytes, &self.xsave)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(kvm("KVM_SET_DEBUGREGS"))?;
        // Before the MSRs: the timer's mode decides whether a deadline is taken.
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        let mut plain = self.msrs.clone();
        plain.retain(|(index, _)| !matches!(*index, msrs::TSC | msrs::TSC_DEADLINE));
        msrs::write(vcpu, &plain)?;
        clock.apply(vcpu, self)?;
        // After the counter it is compared with.
        if let Some(deadline) = self.deadline() {
            msrs::write(vcpu, &[(msrs::TSC_DEADLINE, deadline)])?;
        }
        vcpu.set_vcpu_events(&self.events)
            .map_err(kvm("KVM_SET_VCPU_EVENTS"))?;
        // Tells the guest's watchdogs that it was stopped. EINVAL: it does not use the paravirtual clock.
        if let Err(e) = vcpu.kvmclock_ctrl()
            && e.errno() != libc::EINVAL
        {
            return Err(kvm("KVM_KVMCLOCK_CTRL")(e));
        }
        Ok(())
    }

    /// The counter's rate and the features.
    fn apply_features(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        if self.tsc_khz != 0 && vcpu.get_tsc_khz().ok() != Some(self.tsc_khz) {
            // Hosts without TSC scaling refuse. The guest then sees another rate: it knows (kvmclock) or drifts.
            if let Err(e) = vcpu.set_tsc_khz(self.tsc_khz) {
                tracing::warn!(
                    "this host cannot give the guest its {} kHz time-stamp counter: {e}",
                    self.tsc_khz
                );
            }
        }
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| VcpuStateError::Cpuid(self.cpuid.len()))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))
    }

    /// The blob of this state.
    ///
    /// # Errors
    /// [`VcpuStateError::Codec`] if it exceeds [`BLOB_LIMIT`].
    pub(crate) fn to_blob(&self) -> Result<Vec<u8>, VcpuStateError> {
        Ok(codec::to_bytes(self, BLOB_LIMIT)?)
    }

    /// Reads a blob back.
    ///
    /// # Errors
    /// [`VcpuStateError`] if it is not one of ours.
    pub(crate) fn from_blob(blob: &[u8]) -> Result<VcpuState, VcpuStateError> {
        let state: VcpuState = codec::from_bytes(blob, BLOB_LIMIT)?;
        if state.version != VERSION {
            return Err(VcpuStateError::Version(state.version));
        }
        Ok(state)
    }

    fn msr(&self, index: u32) -> Option<u64> {
        self.msrs
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, value)| *value)
    }

    /// The deadline to arm. A timer that expired while the vCPU was being stopped reads as zero, which would disarm
    /// it for good if its interrupt was not yet in the APIC: an already passed deadline fires at once instead. A
    /// kernel copes with a tick too many, not with one too few.
    fn deadline(&self) -> Option<u64> {
        let lvt: [u8; 4] = std::array::from_fn(|i| self.lapic.regs[LAPIC_LVT_TIMER + i] as u8);
        let mode = (u32::from_le_bytes(lvt) >> 17) & 3;
        match self.msr(msrs::TSC_DEADLINE) {
            Some(0) if mode == LVT_TSC_DEADLINE => self.msr(msrs::TSC).map(|now| now.max(1)),
            other => other,
        }
    }
}

/// The machine's time-stamp counter during a restore. Writing each vCPU's own counter one after the other would make
/// them drift apart by the time between the writes: the first vCPU's is written, and its offset given to the others.
#[derive(Debug, Default)]
pub(crate) struct TscClock {
    first: Option<First>,
}

#[derive(Debug)]
struct First {
    tsc: Option<u64>,
    saved_offset: Option<u64>,
    new_offset: Option<u64>,
}

impl TscClock {
    fn apply(&mut self, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
        let Some(first) = &self.first else {
            let tsc = state.msr(msrs::TSC);
            if let Some(tsc) = tsc {
                msrs::write(vcpu, &[(msrs::TSC, tsc)])?;
            }
            let new_offset = get_tsc_offset(vcpu);
            self.first = Some(First {
                tsc,
                saved_offset: state.tsc_offset,
                new_offset,
            });
            return Ok(());
        };
        if let (Some(was_first), Some(was_this), Some(new_first)) =
            (first.saved_offset, state.tsc_offset, first.new_offset)
        {
            // A guest may have set its counters apart on purpose: keep the difference.
            let mut offset = new_first.wrapping_add(was_this.wrapping_sub(was_first));
            return tsc_offset_ioctl(vcpu, KVM_SET_DEVICE_ATTR(), &mut offset).map_err(|source| {
                VcpuStateError::Kvm {
                    what: "setting the TSC offset",
                    source,
                }
            });
        }
        // Without the attribute KVM itself matches equal values written within a second.
        if let Some(tsc) = first.tsc {
            msrs::write(vcpu, &[(msrs::TSC, tsc)])?;
        }
        Ok(())
    }
}

/// The vCPU's TSC offset, if this KVM tells it (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    tsc_offset_ioctl(vcpu, KVM_GET_DEVICE_ATTR(), &mut offset)
        .ok()
        .map(|()| offset)
}

fn tsc_offset_ioctl(
    vcpu: &VcpuFd,
    request: libc::c_ulong,
    offset: &mut u64,
) -> Result<(), std::io::Error> {
    let attr = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(offset) as u64,
    };
    // SAFETY: both requests take a `kvm_device_attr`; this attribute is a u64 read from or written to `addr`, which
    // points to one that lives until the call returns.
    let result = unsafe { ioctl_with_ref(vcpu, request, &attr) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

fn xsave_buffer(bytes: usize) -> Result<Xsave, VcpuStateError> {
    let extra = bytes.saturating_sub(XSAVE_BASE).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|e| VcpuStateError::Kvm {
        what: "allocating an XSAVE area",
        source: std::io::Error::other(format!("{e:?}")),
    })
}

fn get_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, VcpuStateError> {
    let mut area = xsave_buffer(bytes)?;
    if bytes > XSAVE_BASE {
        // SAFETY: the area has the size KVM_CAP_XSAVE2 reports for this VM, which is what the kernel writes.
        unsafe { vcpu.get_xsave2(&mut area) }.map_err(kvm("KVM_GET_XSAVE2"))?;
    } else {
        let base = vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?;
        // SAFETY: only the fixed part is replaced; the length of the flexible part stays.
        unsafe { area.as_mut_fam_struct().xsave = base };
    }
    let fixed = area.as_fam_struct_ref().xsave.region.iter();
    Ok(fixed
        .chain(area.as_slice())
        .flat_map(|word| word.to_le_bytes())
        .collect())
}

fn set_xsave(vcpu: &VcpuFd, here: usize, saved: &[u8]) -> Result<(), VcpuStateError> {
    let mut area = xsave_buffer(here)?;
    let room = XSAVE_BASE + size_of_val(area.as_slice());
    if saved.len() > room || saved.len() < XSAVE_BASE {
        return Err(VcpuStateError::Xsave {
            saved: saved.len(),
            here: room,
        });
    }
    let (words, _) = saved.as_chunks::<4>();
    let (base, extra) = words.split_at(XSAVE_BASE / size_of::<u32>());
    for (to, from) in area.as_mut_slice().iter_mut().zip(extra) {
        *to = u32::from_le_bytes(*from);
    }
    // SAFETY: only the fixed part is written; the length of the flexible part stays.
    let fixed = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (to, from) in fixed.iter_mut().zip(base) {
        *to = u32::from_le_bytes(*from);
    }
    // SAFETY: the area has the size KVM_CAP_XSAVE2 reports for this VM, which is the most the kernel reads.
    unsafe { vcpu.set_xsave2(&area) }.map_err(kvm("KVM_SET_XSAVE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_deadline(mode: u32, deadline: Option<u64>) -> Option<u64> {
        let mut lapic = kvm_lapic_state::default();
        for (reg, byte) in lapic.regs[LAPIC_LVT_TIMER..]
            .iter_mut()
            .zip((mode << 17).to_le_bytes())
        {
            *reg = byte as _;
        }
        let mut msrs = vec![(msrs::TSC, 77)];
        msrs.extend(deadline.map(|d| (msrs::TSC_DEADLINE, d)));
        let state = VcpuState {
            version: VERSION,
            tsc_khz: 0,
            tsc_offset: None,
            cpuid: Vec::new(),
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Vec::new(),
            xcrs: None,
            debug_regs: Default::default(),
            msrs,
            lapic,
            events: Default::default(),
        };
        VcpuState::from_blob(&state.to_blob().unwrap())
            .unwrap()
            .deadline()
    }

    #[test]
    fn an_expired_deadline_fires_again_instead_of_never() {
        assert_eq!(with_deadline(LVT_TSC_DEADLINE, Some(0)), Some(77));
        assert_eq!(with_deadline(LVT_TSC_DEADLINE, Some(99)), Some(99));
        // In the other modes there is no deadline to arm.
        assert_eq!(with_deadline(1, Some(0)), Some(0));
        assert_eq!(with_deadline(LVT_TSC_DEADLINE, None), None);
    }

    #[test]
    fn another_version_is_refused() {
        assert!(matches!(
            VcpuState::from_blob(&[]),
            Err(VcpuStateError::Codec(_))
        ));
        let mut blob = vec![0; 8192];
        blob[0] = 9;
        assert!(VcpuState::from_blob(&blob).is_err());
    }
}
