//! Which MSRs are a vCPU's state, and how they are read and put back.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use thiserror::Error;

/// Time-stamp counter.
pub(crate) const TSC: u32 = 0x10;
/// TSC value at which the local APIC's timer fires; zero: not armed.
pub(crate) const TSC_DEADLINE: u32 = 0x6E0;

/// Those KVM keeps but does not list: memory-type ranges (SDM vol. 4, table 2-2).
const UNLISTED: &[u32] = &[
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20A, 0x20B, 0x20C,
    0x20D, 0x20E, 0x20F, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E,
    0x26F, 0x2FF,
];

/// Listed, but describing the processor rather than the guest's doings: some KVMs do not let them be set. A machine
/// goes on without them.
const READ_ONLY: &[(u32, &str)] = &[
    (0x8B, "IA32_UCODE_REV"),
    (0xCE, "PLATFORM_INFO"),
    (0xCF, "CORE_CAPABILITIES"),
    (0x10A, "ARCH_CAPABILITIES"),
    (0x345, "PERF_CAPABILITIES"),
];

/// Most MSRs in one ioctl.
const BATCH: usize = kvm_bindings::KVM_MAX_MSR_ENTRIES;

/// Why MSRs could not be read or put back.
#[derive(Debug, Error)]
pub enum MsrError {
    /// The list or a read was refused.
    #[error("reading MSRs: {0}")]
    Read(std::io::Error),
    /// An MSR could not be put back, and is not one a guest can do without.
    #[error("MSR {index:#x} cannot be set to {value:#x} on this host")]
    Set {
        /// Number of the MSR.
        index: u32,
        /// The saved value.
        value: u64,
    },
    /// The kernel refused the call itself.
    #[error("writing MSRs: {0}")]
    Write(std::io::Error),
}

/// The MSRs worth saving on this host: those KVM lists and the memory-type ranges, as far as `vcpu` (its CPUID set)
/// answers for them.
///
/// # Errors
/// [`MsrError::Read`] if KVM gives no list.
pub(crate) fn discover(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, MsrError> {
    let listed = kvm
        .get_msr_index_list()
        .map_err(|e| MsrError::Read(e.into()))?;
    let mut wanted = listed.as_slice().to_vec();
    wanted.extend(UNLISTED);
    wanted.sort_unstable();
    wanted.dedup();
    Ok(read(vcpu, &wanted)?
        .into_iter()
        .map(|(index, _)| index)
        .collect())
}

/// Reads `indices` with one ioctl per 256; one that KVM refuses (its feature is hidden from the guest) is left out.
///
/// # Errors
/// [`MsrError::Read`] if the call fails.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, MsrError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(BATCH)];
        let entries: Vec<kvm_msr_entry> = now
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut batch = wrap(&entries).map_err(MsrError::Read)?;
        // The kernel stops at the first it refuses and says how many came before.
        let done = vcpu
            .get_msrs(&mut batch)
            .map_err(|e| MsrError::Read(e.into()))?
            .min(now.len());
        values.extend(batch.as_slice()[..done].iter().map(|e| (e.index, e.data)));
        rest = &rest[if done < now.len() { done + 1 } else { done }..];
    }
    Ok(values)
}

/// Writes `values` in order. One that is refused may be read-only ([`READ_ONLY`]) or already have its value.
///
/// # Errors
/// [`MsrError::Set`] for any other.
pub(crate) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), MsrError> {
    let mut rest = values;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(BATCH)];
        let entries: Vec<kvm_msr_entry> = now
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let batch = wrap(&entries).map_err(MsrError::Write)?;
        let done = vcpu
            .set_msrs(&batch)
            .map_err(|e| MsrError::Write(e.into()))?
            .min(now.len());
        rest = &rest[done..];
        if done < now.len() {
            let (index, value) = rest[0];
            if let Some((_, name)) = READ_ONLY.iter().find(|(known, _)| *known == index) {
                tracing::debug!("{name} ({index:#x}) cannot be set here; left as it is");
            } else if read(vcpu, &[index])? != [(index, value)] && value != 0 {
                return Err(MsrError::Set { index, value });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs, std::io::Error> {
    Msrs::from_entries(entries).map_err(|e| std::io::Error::other(format!("{e:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_set_is_told_from_what_need_not() {
        let kvm = crate::kvm_caps::open().unwrap_or_else(|e| panic!("this test needs KVM: {e}"));
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(
            &crate::cpuid::for_vcpu(&kvm, 0, 1, &checkpoint::CpuFeatures::default()).unwrap(),
        )
        .unwrap();
        let all = discover(&kvm, &vcpu).unwrap();
        for wanted in [TSC, 0x277, 0x2FF, 0xC000_0081, 0xC000_0082] {
            assert!(
                all.contains(&wanted),
                "MSR {wanted:#x} is part of a vCPU's state"
            );
        }
        // LSTAR before and after one that does not exist, one that may be read-only, and one with its value.
        let bogus = 0xDEAD_0000;
        let lstar = 0xC000_0082;
        assert_eq!(read(&vcpu, &[bogus, lstar]).unwrap(), [(lstar, 0)]);
        let error = write(&vcpu, &[(bogus, 5), (lstar, 0x1000)]).unwrap_err();
        assert!(matches!(error, MsrError::Set { index, value: 5 } if index == bogus));
        assert_eq!(read(&vcpu, &[lstar]).unwrap(), [(lstar, 0)]);
        write(&vcpu, &[(bogus, 0), (0x10A, u64::MAX), (lstar, 0x2000)]).unwrap();
        assert_eq!(read(&vcpu, &[lstar]).unwrap(), [(lstar, 0x2000)]);
    }
}
