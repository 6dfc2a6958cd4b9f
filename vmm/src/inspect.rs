//! What each vCPU of a machine is at, for whoever has to find out why a guest makes no progress.

use std::fmt;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::msrs;
use crate::vcpu_state::{VcpuStateError, get_tsc_offset, kvm};

/// Offsets of the local APIC's registers (Intel SDM vol. 3, table 11-1).
const ISR: usize = 0x100;
const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;

/// One vCPU at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuReport {
    /// Number.
    pub id: u8,
    /// Exits that this program has served since the machine was made (port, MMIO and interrupted runs; exits that KVM
    /// serves itself are not among them).
    pub exits: u64,
    /// Running, halted, waiting to be started.
    pub state: String,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags; bit 9: interrupts are allowed.
    pub rflags: u64,
    /// Code segment's selector; its low two bits are the privilege level.
    pub cs: u16,
    /// Address of the last page fault.
    pub cr2: u64,
    /// Page table's root.
    pub cr3: u64,
    /// The guest's time-stamp counter.
    pub tsc: u64,
    /// Its distance from the host's, where KVM tells it.
    pub tsc_offset: Option<u64>,
    /// When its timer fires, by that counter; zero: not armed, or not in this mode.
    pub tsc_deadline: u64,
    /// The local APIC timer's vector and mode, as the guest wrote them (`LVT`).
    pub timer_lvt: u32,
    /// The timer's initial and current count (modes other than TSC deadline).
    pub timer_count: (u32, u32),
    /// Vectors that the local APIC has accepted and not yet delivered.
    pub requested: Vec<u8>,
    /// Vectors that the guest is serving.
    pub in_service: Vec<u8>,
    /// The interrupt that KVM delivers at the next entry.
    pub injected: Option<u8>,
    /// The exception that KVM delivers at the next entry.
    pub exception: Option<u8>,
    /// Whether the last instruction holds interrupts off for one more.
    pub shadow: bool,
}

impl VcpuReport {
    /// Reads a vCPU that stands still.
    pub(crate) fn read(id: u8, exits: u64, vcpu: &VcpuFd) -> Result<VcpuReport, VcpuStateError> {
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        let values = msrs::read(vcpu, &[msrs::TSC, msrs::TSC_DEADLINE])?;
        let msr = |index| values.iter().find(|(i, _)| *i == index).map_or(0, |v| v.1);
        let lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        let events = vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuReport {
            id,
            exits,
            state: mp_state_name(mp_state.mp_state).into(),
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags,
            cs: sregs.cs.selector,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            tsc: msr(msrs::TSC),
            tsc_offset: get_tsc_offset(vcpu),
            tsc_deadline: msr(msrs::TSC_DEADLINE),
            timer_lvt: register(&lapic, LVT_TIMER),
            timer_count: (
                register(&lapic, TIMER_INITIAL),
                register(&lapic, TIMER_CURRENT),
            ),
            requested: vectors(&lapic, IRR),
            in_service: vectors(&lapic, ISR),
            injected: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
            exception: (events.exception.injected != 0 || events.exception.pending != 0)
                .then_some(events.exception.nr),
            shadow: events.interrupt.shadow != 0,
        })
    }
}

impl fmt::Display for VcpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interrupts = match self.rflags & 0x200 {
            0 => "off",
            _ => "on",
        };
        let mode = match (self.timer_lvt >> 17) & 3 {
            0 => "one-shot",
            1 => "periodic",
            2 => "TSC deadline",
            _ => "reserved mode",
        };
        let masked = match self.timer_lvt & 0x1_0000 {
            0 => "",
            _ => ", masked",
        };
        writeln!(
            f,
            "vCPU {}: {}, {} exits to the VMM\n  rip {:#x} cs {:#x} rsp {:#x} rflags {:#x} (interrupts {interrupts}) \
             cr2 {:#x} cr3 {:#x}",
            self.id,
            self.state,
            self.exits,
            self.rip,
            self.cs,
            self.rsp,
            self.rflags,
            self.cr2,
            self.cr3
        )?;
        write!(
            f,
            "  timer: vector {}, {mode}{masked}, count {} of {}, deadline {:#x}, TSC {:#x}",
            self.timer_lvt & 0xFF,
            self.timer_count.1,
            self.timer_count.0,
            self.tsc_deadline,
            self.tsc
        )?;
        if self.tsc_deadline != 0 {
            let left = self.tsc_deadline.wrapping_sub(self.tsc) as i64;
            write!(f, " ({left} to go)")?;
        }
        if let Some(offset) = self.tsc_offset {
            write!(f, ", offset {offset:#x}")?;
        }
        write!(
            f,
            "\n  vectors requested {:?}, in service {:?}, injected {:?}, exception {:?}{}",
            self.requested,
            self.in_service,
            self.injected,
            self.exception,
            if self.shadow {
                ", interrupt shadow"
            } else {
                ""
            }
        )
    }
}

fn mp_state_name(state: u32) -> &'static str {
    match state {
        KVM_MP_STATE_RUNNABLE => "running",
        KVM_MP_STATE_UNINITIALIZED => "not started",
        KVM_MP_STATE_INIT_RECEIVED => "waiting to be started",
        KVM_MP_STATE_HALTED => "halted",
        KVM_MP_STATE_SIPI_RECEIVED => "starting",
        _ => "in an unknown state",
    }
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[offset + i] as u8))
}

/// The vectors set in a 256-bit register: eight words, 16 bytes apart.
fn vectors(lapic: &kvm_lapic_state, offset: usize) -> Vec<u8> {
    (0..=255u8)
        .filter(|vector| {
            let word = register(lapic, offset + usize::from(vector / 32) * 16);
            word >> (vector % 32) & 1 != 0
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_found_in_their_words() {
        let mut lapic = kvm_lapic_state::default();
        // Vector 0xEC is bit 12 of word 7; vector 33 bit 1 of word 1.
        lapic.regs[IRR + 0x71] = 0x10;
        lapic.regs[IRR + 0x10] = 0x02;
        lapic.regs[ISR + 0x73] = i8::MIN;
        assert_eq!(vectors(&lapic, IRR), [33, 0xEC]);
        assert_eq!(vectors(&lapic, ISR), [255]);
    }

    #[test]
    fn a_report_says_what_matters() {
        let text = VcpuReport {
            state: "halted".into(),
            rflags: 0x202,
            tsc: 1000,
            tsc_deadline: 900,
            timer_lvt: 0x4_00EC,
            requested: vec![0xEC],
            ..VcpuReport::default()
        }
        .to_string();
        for wanted in [
            "halted",
            "interrupts on",
            "vector 236, TSC deadline,",
            "(-100 to go)",
            "requested [236]",
        ] {
            assert!(text.contains(wanted), "no {wanted:?} in {text}");
        }
    }
}
