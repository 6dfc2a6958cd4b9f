//! Opening /dev/kvm and checking that it can do what a protected machine needs.

use std::ffi::CStr;
use std::path::PathBuf;

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// The API version every KVM since Linux 2.6.22 reports.
const API_VERSION: i32 = 12;

/// Why this host's KVM cannot be used; each message names the remedy.
#[derive(Debug, Error)]
pub enum KvmError {
    /// No such device node.
    #[error(
        "there is no {0}: this host has no KVM. Load kvm-intel or kvm-amd (and enable virtualisation in the \
         firmware), or run the command inside the emulated KVM host: scripts/kvm-host COMMAND"
    )]
    Missing(PathBuf),
    /// The device node may not be opened.
    #[error(
        "no permission to open {0}: add the user to the group that owns it (usually kvm), or run as root"
    )]
    Permission(PathBuf),
    /// Opening failed otherwise.
    #[error(
        "cannot open {path}: {source}. If the device is not a working KVM, scripts/kvm-host COMMAND gives one"
    )]
    Open {
        /// The device node.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another API.
    #[error("KVM API version {0} found, {API_VERSION} needed: the kernel is too old")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error(
        "this host's KVM lacks {0}, which checkpointing a machine needs: a newer kernel has it"
    )]
    Lacks(&'static str),
}

/// What capture and restore cannot do without.
const NEEDED: &[(Cap, &str)] = &[
    (
        Cap::Irqchip,
        "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)",
    ),
    (Cap::UserMemory, "user memory regions (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Opens `/dev/kvm` and checks version and capabilities.
///
/// # Errors
/// [`KvmError`], naming the remedy.
pub fn open() -> Result<Kvm, KvmError> {
    open_at(c"/dev/kvm")
}

/// As [`open`], with another device node.
///
/// # Errors
/// [`KvmError`], naming the remedy.
pub fn open_at(path: &CStr) -> Result<Kvm, KvmError> {
    let shown = || PathBuf::from(path.to_string_lossy().into_owned());
    let kvm = Kvm::new_with_path(path).map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing(shown()),
        libc::EACCES | libc::EPERM => KvmError::Permission(shown()),
        _ => KvmError::Open {
            path: shown(),
            source: e.into(),
        },
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::ApiVersion(version));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(*cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_names_the_remedy() {
        let error = open_at(c"/dev/no-such-kvm").expect_err("there is no such device");
        assert!(matches!(error, KvmError::Missing(_)));
        assert!(error.to_string().contains("scripts/kvm-host"));
    }

    #[test]
    fn something_else_is_not_kvm() {
        // Answers no ioctl: the version check must catch it.
        assert!(matches!(
            open_at(c"/dev/null"),
            Err(KvmError::ApiVersion(_))
        ));
    }

    #[test]
    fn the_group_is_named() {
        assert!(
            KvmError::Permission("/dev/kvm".into())
                .to_string()
                .contains("kvm)")
        );
    }
}
