//! What a VM may use of a processor. A VM goes on with the CPUID that it booted with, so every host that is to resume it
//! has to have all of that (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; the kernel's Documentation/virt/kvm/x86/cpuid.rst).

use serde::{Deserialize, Serialize};

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Feature bits: one register of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FeatureWord {
    /// The leaf.
    pub function: u32,
    /// Its subleaf.
    pub index: u32,
    /// The register.
    pub register: Register,
    /// Bits that are set.
    pub bits: u32,
}

/// A processor, as far as it matters to a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// Its maker as CPUID leaf 0 says it, `GenuineIntel` for example; empty: nothing is known, and anything will do.
    pub vendor: String,
    /// Its features.
    pub words: Vec<FeatureWord>,
}

/// The registers that hold features, and which of their bits are none (what the operating system has switched on, topology).
pub const FEATURE_WORDS: [(u32, u32, Register, u32); 23] = [
    (0x1, 0, Register::Ecx, !(1 << 27)),
    (0x1, 0, Register::Edx, !(1 << 28)),
    (0x7, 0, Register::Ebx, !0),
    (0x7, 0, Register::Ecx, !(1 << 4)),
    (0x7, 0, Register::Edx, !0),
    (0x7, 1, Register::Eax, !0),
    (0x7, 1, Register::Ebx, !0),
    (0x7, 1, Register::Ecx, !0),
    (0x7, 1, Register::Edx, !0),
    (0x7, 2, Register::Edx, !0),
    (0xD, 0, Register::Eax, !0),
    (0xD, 0, Register::Edx, !0),
    (0xD, 1, Register::Eax, !0),
    (0xD, 1, Register::Ecx, !0),
    (0xD, 1, Register::Edx, !0),
    (0x8000_0001, 0, Register::Ecx, !(1 << 1)),
    (0x8000_0001, 0, Register::Edx, !0),
    (0x8000_0007, 0, Register::Ebx, !0),
    (0x8000_0007, 0, Register::Edx, !0),
    (0x8000_0008, 0, Register::Ebx, !0),
    (0x8000_000A, 0, Register::Edx, !0),
    (0x8000_0021, 0, Register::Eax, !0),
    (0x4000_0001, 0, Register::Eax, !0),
];

/// Names of some, as Linux has them in /proc/cpuinfo.
const NAMES: &[(u32, u32, Register, u8, &str)] = &[
    (0x1, 0, Register::Ecx, 0, "sse3"),
    (0x1, 0, Register::Ecx, 1, "pclmulqdq"),
    (0x1, 0, Register::Ecx, 9, "ssse3"),
    (0x1, 0, Register::Ecx, 12, "fma"),
    (0x1, 0, Register::Ecx, 13, "cx16"),
    (0x1, 0, Register::Ecx, 17, "pcid"),
    (0x1, 0, Register::Ecx, 19, "sse4_1"),
    (0x1, 0, Register::Ecx, 20, "sse4_2"),
    (0x1, 0, Register::Ecx, 21, "x2apic"),
    (0x1, 0, Register::Ecx, 22, "movbe"),
    (0x1, 0, Register::Ecx, 23, "popcnt"),
    (0x1, 0, Register::Ecx, 24, "tsc_deadline_timer"),
    (0x1, 0, Register::Ecx, 25, "aes"),
    (0x1, 0, Register::Ecx, 26, "xsave"),
    (0x1, 0, Register::Ecx, 28, "avx"),
    (0x1, 0, Register::Ecx, 29, "f16c"),
    (0x1, 0, Register::Ecx, 30, "rdrand"),
    (0x7, 0, Register::Ebx, 0, "fsgsbase"),
    (0x7, 0, Register::Ebx, 1, "tsc_adjust"),
    (0x7, 0, Register::Ebx, 3, "bmi1"),
    (0x7, 0, Register::Ebx, 4, "hle"),
    (0x7, 0, Register::Ebx, 5, "avx2"),
    (0x7, 0, Register::Ebx, 7, "smep"),
    (0x7, 0, Register::Ebx, 8, "bmi2"),
    (0x7, 0, Register::Ebx, 9, "erms"),
    (0x7, 0, Register::Ebx, 10, "invpcid"),
    (0x7, 0, Register::Ebx, 11, "rtm"),
    (0x7, 0, Register::Ebx, 16, "avx512f"),
    (0x7, 0, Register::Ebx, 17, "avx512dq"),
    (0x7, 0, Register::Ebx, 18, "rdseed"),
    (0x7, 0, Register::Ebx, 19, "adx"),
    (0x7, 0, Register::Ebx, 20, "smap"),
    (0x7, 0, Register::Ebx, 21, "avx512ifma"),
    (0x7, 0, Register::Ebx, 23, "clflushopt"),
    (0x7, 0, Register::Ebx, 24, "clwb"),
    (0x7, 0, Register::Ebx, 28, "avx512cd"),
    (0x7, 0, Register::Ebx, 29, "sha_ni"),
    (0x7, 0, Register::Ebx, 30, "avx512bw"),
    (0x7, 0, Register::Ebx, 31, "avx512vl"),
    (0x7, 0, Register::Ecx, 1, "avx512vbmi"),
    (0x7, 0, Register::Ecx, 2, "umip"),
    (0x7, 0, Register::Ecx, 3, "pku"),
    (0x7, 0, Register::Ecx, 6, "avx512_vbmi2"),
    (0x7, 0, Register::Ecx, 8, "gfni"),
    (0x7, 0, Register::Ecx, 9, "vaes"),
    (0x7, 0, Register::Ecx, 10, "vpclmulqdq"),
    (0x7, 0, Register::Ecx, 11, "avx512_vnni"),
    (0x7, 0, Register::Ecx, 12, "avx512_bitalg"),
    (0x7, 0, Register::Ecx, 14, "avx512_vpopcntdq"),
    (0x7, 0, Register::Ecx, 16, "la57"),
    (0x7, 0, Register::Ecx, 22, "rdpid"),
    (0x7, 0, Register::Edx, 4, "fsrm"),
    (0x7, 0, Register::Edx, 10, "md_clear"),
    (0x7, 0, Register::Edx, 22, "amx_bf16"),
    (0x7, 0, Register::Edx, 23, "avx512_fp16"),
    (0x7, 0, Register::Edx, 24, "amx_tile"),
    (0x7, 0, Register::Edx, 25, "amx_int8"),
    (0x7, 0, Register::Edx, 26, "spec_ctrl"),
    (0x7, 0, Register::Edx, 27, "intel_stibp"),
    (0x7, 0, Register::Edx, 28, "flush_l1d"),
    (0x7, 0, Register::Edx, 29, "arch_capabilities"),
    (0x7, 0, Register::Edx, 31, "ssbd"),
    (0xD, 1, Register::Eax, 0, "xsaveopt"),
    (0xD, 1, Register::Eax, 1, "xsavec"),
    (0xD, 1, Register::Eax, 3, "xsaves"),
    (0x8000_0001, 0, Register::Ecx, 5, "abm"),
    (0x8000_0001, 0, Register::Ecx, 6, "sse4a"),
    (0x8000_0001, 0, Register::Ecx, 8, "3dnowprefetch"),
    (0x8000_0001, 0, Register::Edx, 20, "nx"),
    (0x8000_0001, 0, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Register::Edx, 27, "rdtscp"),
    (0x8000_0001, 0, Register::Edx, 29, "lm"),
    (0x8000_0007, 0, Register::Edx, 8, "constant_tsc"),
    (0x4000_0001, 0, Register::Eax, 3, "kvmclock"),
    (0x4000_0001, 0, Register::Eax, 5, "kvm steal time"),
    (0x4000_0001, 0, Register::Eax, 6, "kvm pv eoi"),
    (0x4000_0001, 0, Register::Eax, 14, "kvm async page faults"),
];

/// As many features are named in a message.
const NAMED: usize = 8;

fn name(word: &FeatureWord, bit: u8) -> String {
    let is = |(function, index, register, at, _): &&(u32, u32, Register, u8, &str)| {
        (*function, *index, *register, *at) == (word.function, word.index, word.register, bit)
    };
    match NAMES.iter().find(is) {
        Some((.., name)) => (*name).into(),
        None => {
            let register = format!("{:?}", word.register).to_lowercase();
            match word.index {
                0 => format!("CPUID {:#x} {register} bit {bit}", word.function),
                n => format!("CPUID {:#x}.{n} {register} bit {bit}", word.function),
            }
        }
    }
}

impl CpuFeatures {
    /// The features of that register.
    #[must_use]
    pub fn bits(&self, function: u32, index: u32, register: Register) -> u32 {
        let is =
            |w: &&FeatureWord| (w.function, w.index, w.register) == (function, index, register);
        self.words.iter().find(is).map_or(0, |w| w.bits)
    }

    /// What of this `host` does not have, in words; `None` if it has everything.
    #[must_use]
    pub fn lacking(&self, host: &Self) -> Option<String> {
        if self.vendor.is_empty() {
            return None;
        }
        if self.vendor != host.vendor {
            let (is, wanted) = (&host.vendor, &self.vendor);
            return Some(format!("its processor is of {is}, not of {wanted}"));
        }
        let lacking = self.words.iter().flat_map(|word| {
            let there = host.bits(word.function, word.index, word.register);
            let missing = word.bits & !there;
            (0..32u8)
                .filter(move |bit| missing >> bit & 1 == 1)
                .map(move |bit| name(word, bit))
        });
        let all: Vec<String> = lacking.collect();
        let (first, more) = all.split_at(all.len().min(NAMED));
        match (first, more.len()) {
            ([], _) => None,
            (first, 0) => Some(format!("its processor lacks {}", first.join(", "))),
            (first, n) => Some(format!(
                "its processor lacks {} and {n} more",
                first.join(", ")
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: &str, words: &[(u32, u32, Register, u32)]) -> CpuFeatures {
        let words = words
            .iter()
            .map(|(function, index, register, bits)| FeatureWord {
                function: *function,
                index: *index,
                register: *register,
                bits: *bits,
            });
        CpuFeatures {
            vendor: vendor.into(),
            words: words.collect(),
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let ebx = |bits| (0x7, 0, Register::Ebx, bits);
        let vm = cpu(
            "GenuineIntel",
            &[ebx(1 << 5 | 1 << 16), (0x7, 1, Register::Eax, 1 << 4)],
        );
        assert_eq!(vm.lacking(&vm), None);
        let more = cpu("GenuineIntel", &[ebx(!0), (0x7, 1, Register::Eax, !0)]);
        assert_eq!(vm.lacking(&more), None, "more is no harm");
        let less = cpu("GenuineIntel", &[ebx(1 << 5)]);
        assert_eq!(
            vm.lacking(&less).unwrap(),
            "its processor lacks avx512f, CPUID 0x7.1 eax bit 4"
        );
        let other = cpu(
            "AuthenticAMD",
            &more
                .words
                .iter()
                .map(|w| (w.function, w.index, w.register, w.bits))
                .collect::<Vec<_>>(),
        );
        assert_eq!(
            vm.lacking(&other).unwrap(),
            "its processor is of AuthenticAMD, not of GenuineIntel"
        );
        let all = cpu("GenuineIntel", &[ebx(!0)]);
        let none = cpu("GenuineIntel", &[]);
        let said = all.lacking(&none).unwrap();
        assert!(
            said.contains("fsgsbase, ") && said.ends_with("and 24 more"),
            "{said}"
        );
        assert_eq!(
            CpuFeatures::default().lacking(&none),
            None,
            "nothing is known"
        );
    }

    #[test]
    fn names_are_of_words_that_are_compared() {
        for (function, index, register, bit, name) in NAMES {
            let word = FEATURE_WORDS
                .iter()
                .find(|w| (w.0, w.1, w.2) == (*function, *index, *register));
            let mask = word.unwrap_or_else(|| panic!("{name}")).3;
            assert!(mask >> bit & 1 == 1, "{name} is not compared");
        }
    }
}
