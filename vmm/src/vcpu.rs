//! A vCPU's thread: runs the guest, serves its exits, stands still when told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::control::{self, Control, Want};
use crate::events::VmEvent;
use crate::reset::ResetLine;

/// What a vCPU's thread works on.
pub(crate) struct VcpuThread {
    pub(crate) id: u8,
    pub(crate) vcpu: Arc<Mutex<VcpuFd>>,
    pub(crate) control: Arc<Control>,
    pub(crate) bus: Arc<Bus>,
    /// How the guest's run ends.
    pub(crate) reset: Arc<ResetLine>,
    /// Returns of `KVM_RUN`, counted for [`crate::VcpuReport`].
    pub(crate) exits: Arc<AtomicU64>,
}

/// Why the guest is left.
enum Leave {
    /// It is to stand still.
    Told,
    /// It ended, unless it is to be restarted.
    Ended(VmEvent),
}

impl VcpuThread {
    /// The thread's body.
    pub(crate) fn main(self) {
        control::unblock_signal();
        while self.control.park() {
            // Held while in the guest, free while parked: whoever captures or restores takes it then.
            let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            // A fault in serving an exit ends the guest, not the process that could report it.
            let run = std::panic::AssertUnwindSafe(|| self.run(&mut vcpu));
            let leave = std::panic::catch_unwind(run).unwrap_or_else(|_| {
                let reason = "serving it failed: a fault of the machine, see its log".to_owned();
                Leave::Ended(VmEvent::Crashed {
                    vcpu: self.id,
                    reason,
                })
            });
            match leave {
                Leave::Told => {}
                Leave::Ended(event) => self.reset.happened(event),
            }
        }
    }

    /// Runs the guest until it must stop. Returns only after `KVM_RUN` said EINTR (or the guest ended): a port or
    /// memory access served here is completed by the next `KVM_RUN`, so by then none is half done.
    fn run(&self, vcpu: &mut VcpuFd) -> Leave {
        loop {
            let exit = vcpu.run();
            self.exits.fetch_add(1, Ordering::Relaxed);
            match exit {
                Ok(VcpuExit::MmioRead(addr, data)) => self.bus.mmio_read(addr, data),
                Ok(VcpuExit::MmioWrite(addr, data)) => self.bus.mmio_write(addr, data),
                Ok(VcpuExit::IoIn(port, data)) => {
                    let (data, len) = (data.as_mut_ptr(), data.len());
                    let size = io_size(vcpu);
                    // SAFETY: the slice `run` returned, in the vCPU's mapped run page; nothing else refers to it now.
                    let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
                    for one in data.chunks_mut(size) {
                        self.bus.pio_read(port, one);
                    }
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    let (data, len) = (data.as_ptr(), data.len());
                    let size = io_size(vcpu);
                    // SAFETY: as for `IoIn`.
                    let data = unsafe { std::slice::from_raw_parts(data, len) };
                    for one in data.chunks(size) {
                        if self.bus.pio_write(port, one) {
                            return Leave::Ended(VmEvent::Shutdown);
                        }
                    }
                }
                // With the interrupt controller in the kernel a halted vCPU waits there.
                Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => {}
                Ok(VcpuExit::Intr) => {
                    if self.control.want() != Want::Run {
                        return Leave::Told;
                    }
                }
                Ok(VcpuExit::Shutdown) => {
                    return self.crash(vcpu, "triple fault (KVM_EXIT_SHUTDOWN)".to_owned());
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    return Leave::Ended(VmEvent::Shutdown);
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                    return Leave::Ended(VmEvent::Reset);
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => {
                    return self.crash(vcpu, format!("system event {kind}"));
                }
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let reason = format!(
                        "the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}"
                    );
                    return self.crash(vcpu, reason);
                }
                Ok(VcpuExit::InternalError) => {
                    let reason = internal_error(vcpu);
                    return self.crash(vcpu, reason);
                }
                Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                    return self.crash(vcpu, format!("memory fault on {size} bytes at {gpa:#x}"));
                }
                Ok(other) => {
                    let reason = format!("unexpected exit {other:?}");
                    return self.crash(vcpu, reason);
                }
                Err(e) => match e.errno() {
                    // EAGAIN: a waiting processor was started.
                    libc::EINTR | libc::EAGAIN => {
                        if self.control.want() != Want::Run {
                            return Leave::Told;
                        }
                    }
                    _ => return self.crash(vcpu, format!("KVM_RUN: {}", std::io::Error::from(e))),
                },
            }
        }
    }

    fn crash(&self, vcpu: &VcpuFd, reason: String) -> Leave {
        let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
        let event = VmEvent::Crashed {
            vcpu: self.id,
            reason: format!("{reason}, at rip {rip:#x}"),
        };
        Leave::Ended(event)
    }
}

/// Bytes of one of the port accesses of a `KVM_EXIT_IO`: string instructions bring several at once.
fn io_size(vcpu: &mut VcpuFd) -> usize {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return 1;
    }
    // SAFETY: the exit reason says that this member of the union was written.
    usize::from(unsafe { run.__bindgen_anon_1.io }.size).max(1)
}

/// What KVM says about a `KVM_EXIT_INTERNAL_ERROR`.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return "KVM internal error".to_owned();
    }
    // SAFETY: the exit reason says that this member of the union was written.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let data = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
    if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return format!("KVM internal error {}, data {data:x?}", internal.suberror);
    }
    // data[0] is a set of flags; bit 0: an instruction length (1 byte) and up to 15 bytes of it follow.
    let bytes: Vec<u8> = data
        .iter()
        .skip(1)
        .flat_map(|word| word.to_le_bytes())
        .collect();
    match (data.first(), bytes.split_first()) {
        (Some(flags), Some((len, insn))) if flags & 1 != 0 => {
            let insn = &insn[..usize::from(*len).min(insn.len())];
            format!("KVM cannot emulate the instruction {insn:02x?}")
        }
        _ => "KVM cannot emulate an instruction".to_owned(),
    }
}
