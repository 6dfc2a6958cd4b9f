//! Making KVM's objects: interrupt controllers, timer, vCPUs.

use checkpoint::CpuFeatures;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::cpuid;
use crate::layout::{IDENTITY_MAP, TSS};
use crate::vm_error::{VmError, create};

/// Makes what the vCPUs share; before any of them.
///
/// # Errors
/// [`VmError::Create`].
pub(crate) fn create_platform(kvm: &Kvm, vm: &VmFd) -> Result<(), VmError> {
    // Before any vCPU. Only Intel hosts need it, none minds.
    vm.set_tss_address(TSS as usize)
        .map_err(create("setting the TSS address"))?;
    if kvm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(create("setting the identity map's address"))?;
    }
    vm.create_irq_chip()
        .map_err(create("creating the interrupt controllers"))?;
    // The speaker's port shares the timer's gate: kernels calibrate with it.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(create("creating the timer"))
}

/// Makes `count` vCPUs with their CPUID, no more features than those of `cpu`.
///
/// # Errors
/// [`VmError::Create`].
pub(crate) fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    cpu: &CpuFeatures,
) -> Result<Vec<VcpuFd>, VmError> {
    let mut fds = Vec::new();
    for id in 0..count {
        let fd = vm
            .create_vcpu(u64::from(id))
            .map_err(create("creating a vCPU"))?;
        let cpuid =
            cpuid::for_vcpu(kvm, id, count, cpu).map_err(create("reading the host's CPUID"))?;
        fd.set_cpuid2(&cpuid)
            .map_err(create("setting a vCPU's CPUID"))?;
        fds.push(fd);
    }
    Ok(fds)
}
