//! What the guest's CPUs say they are: the host's features as KVM offers them, with a flat topology of our own.

use checkpoint::cpu::{CpuFeatures, FEATURE_WORDS, FeatureWord, Register};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm_caps;
use crate::vm_error::{VmError, create};

/// `kvm_cpuid_entry2.flags`: the entry is one of several told apart by ECX.
const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// The CPUID of vCPU `id` of `vcpus`, made from what KVM supports here: one package of single-threaded cores, APIC id
/// = vCPU id, a hypervisor present (KVM's own leaves are kept), neither nested virtualisation nor Intel's PMU (their
/// state is not part of a checkpoint). No more features than those of `most`.
///
/// # Errors
/// KVM's refusal.
pub(crate) fn for_vcpu(
    kvm: &Kvm,
    id: u8,
    vcpus: u8,
    most: &CpuFeatures,
) -> Result<CpuId, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::new();
    for entry in supported.as_slice() {
        // Topology leaves are written anew below.
        if !matches!(entry.function, 0xB | 0x1F) {
            entries.push(*entry);
        }
    }
    let max_leaf = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    for entry in &mut entries {
        adjust(entry, id, vcpus, deadline);
        limit(entry, most);
    }
    for leaf in [0xB, 0x1F] {
        if max_leaf >= leaf {
            entries.extend(topology(leaf, id, vcpus));
        }
    }
    CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

fn limit(entry: &mut kvm_cpuid_entry2, most: &CpuFeatures) {
    if most.vendor.is_empty() {
        return;
    }
    for (function, index, name, mask) in FEATURE_WORDS {
        if (entry.function, entry.index) == (function, index) {
            *register(entry, name) &= !mask | most.bits(function, index, name);
        }
    }
}

/// What a VM that boots on this host may use of its processor.
///
/// # Errors
/// [`VmError`] if there is no usable KVM.
pub fn host_cpu() -> Result<CpuFeatures, VmError> {
    let kvm = kvm_caps::open()?;
    let cpuid = for_vcpu(&kvm, 0, 1, &CpuFeatures::default())
        .map_err(create("reading the host's CPUID"))?;
    Ok(features(cpuid.as_slice()))
}

fn features(entries: &[kvm_cpuid_entry2]) -> CpuFeatures {
    let vendor = entries.iter().find(|e| e.function == 0).map(|e| {
        let bytes = [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes);
        String::from_utf8_lossy(bytes.as_flattened()).into_owned()
    });
    let words = FEATURE_WORDS
        .iter()
        .filter_map(|(function, index, name, mask)| {
            let is = |e: &&kvm_cpuid_entry2| (e.function, e.index) == (*function, *index);
            let mut entry = *entries.iter().find(is)?;
            let bits = *register(&mut entry, *name) & mask;
            (bits != 0).then_some(FeatureWord {
                function: *function,
                index: *index,
                register: *name,
                bits,
            })
        });
    CpuFeatures {
        vendor: vendor.unwrap_or_default(),
        words: words.collect(),
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, id: u8, vcpus: u8, deadline: bool) {
    let set = |reg: &mut u32, bit: u32, on: bool| *reg = *reg & !(1 << bit) | u32::from(on) << bit;
    match entry.function {
        0x1 => {
            // EBX: initial APIC id, logical processors per package; CLFLUSH size and brand stay.
            entry.ebx = entry.ebx & 0xFFFF | u32::from(vcpus) << 16 | u32::from(id) << 24;
            set(&mut entry.ecx, 5, false); // VMX
            set(&mut entry.ecx, 24, deadline); // TSC deadline timer
            set(&mut entry.ecx, 31, true); // a hypervisor is present
            set(&mut entry.edx, 28, vcpus > 1); // EBX[23:16] is valid
        }
        // Caches: level 3 is shared by all, others private; cores of the package.
        0x4 if entry.eax & 0x1F != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 {
                u32::from(vcpus.next_power_of_two()) - 1
            } else {
                0
            };
            let cores = u32::from(vcpus.next_power_of_two()) - 1;
            entry.eax = entry.eax & 0x3FFF | sharing << 14 | cores << 26;
        }
        // Intel's performance counters.
        0xA => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            set(&mut entry.ecx, 2, false); // SVM
            set(&mut entry.ecx, 1, vcpus > 1); // CmpLegacy: 0x80000008 counts cores
            set(&mut entry.ecx, 22, false); // topology extensions: 0x8000001E below is not kept
        }
        // AMD: cores of the package less one, and the bits of the APIC id they take.
        0x8000_0008 => {
            let bits = u32::from(vcpus).next_power_of_two().trailing_zeros();
            entry.ecx = entry.ecx & !0xF0FF | (u32::from(vcpus) - 1) | bits << 12;
        }
        0x8000_001D | 0x8000_001E => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Leaf 0xB or 0x1F: threads (one per core), cores, and the end of the list.
fn topology(function: u32, id: u8, vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    let bits = u32::from(vcpus).next_power_of_two().trailing_zeros();
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: u32::from(id),
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, bits, u32::from(vcpus), 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, fill: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: fill,
            ebx: fill,
            ecx: fill,
            edx: fill,
            ..Default::default()
        }
    }

    #[test]
    fn a_machine_has_no_more_features_than_it_is_given() {
        let here = host_cpu().expect("these tests need /dev/kvm");
        assert!(
            !here.words.is_empty() && here.vendor.len() == 12,
            "{here:?}"
        );
        let kvm = kvm_caps::open().unwrap();
        for (vcpus, id) in [(1, 0), (4, 3)] {
            let all = for_vcpu(&kvm, id, vcpus, &here).unwrap();
            assert_eq!(features(all.as_slice()), here, "whichever vCPU");
            let mut less = here.clone();
            less.words.retain(|word| word.function != 7);
            let few = for_vcpu(&kvm, id, vcpus, &less).unwrap();
            assert_eq!(features(few.as_slice()), less);
            assert_eq!(here.lacking(&less).is_some(), here != less);
            // What is no feature stays as it is.
            let size = |cpuid: &CpuId| {
                let leaf = cpuid.as_slice().iter().find(|e| e.function == 1);
                leaf.map(|e| (e.eax, e.ebx))
            };
            assert_eq!(size(&few), size(&all));
        }
    }

    #[test]
    fn leaf_1_names_the_apic_and_hides_vmx() {
        let mut one = entry(1, u32::MAX);
        adjust(&mut one, 3, 4, false);
        assert_eq!(one.ebx, 0x0304_FFFF);
        assert_eq!(one.ecx & (1 << 5 | 1 << 24 | 1 << 31), 1 << 31);
        assert_eq!(one.edx & 1 << 28, 1 << 28);
        let mut alone = entry(1, 0);
        adjust(&mut alone, 0, 1, true);
        assert_eq!((alone.ecx, alone.edx), (1 << 24 | 1 << 31, 0));
    }

    #[test]
    fn topology_is_flat() {
        let leaves = topology(0xB, 2, 3);
        assert!(leaves.iter().all(|l| l.edx == 2));
        assert_eq!((leaves[1].eax, leaves[1].ebx, leaves[1].ecx), (2, 3, 0x201));
        assert_eq!((leaves[2].ebx, leaves[2].ecx), (0, 2));
        let mut amd = entry(0x8000_0008, 0);
        adjust(&mut amd, 0, 8, true);
        assert_eq!(amd.ecx, 7 | 3 << 12);
    }
}
