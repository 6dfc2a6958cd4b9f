//! Loading a kernel by the 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).
//!
//! Any 64-bit ELF image can be started so, not just Linux: it is entered at its entry point in long mode, ring 0, with
//! interrupts off, flat segments, RAM identity-mapped and RSI pointing to `boot_params`.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::{self, AcpiError};
use crate::devices::MmioSlot;
use crate::kernel::{Image, Kernel};
use crate::layout::{
    ACPI, CMDLINE, CMDLINE_MAX, EBDA, HIGH_MEMORY, IDENTITY_MAP, PAGE, TSS, ZERO_PAGE,
};
use crate::memory::{GuestMemory, RamLayout};
use crate::paging;

/// `type_of_loader`: one without a number.
const LOADER_UNDEFINED: u8 = 0xFF;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// A file that a machine boots from. It is read whenever the machine boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFile {
    /// Where it is.
    pub path: PathBuf,
    /// The BLAKE3 that its content must have; none: whatever is there is booted.
    pub blake3: Option<[u8; 32]>,
}

impl<P: Into<PathBuf>> From<P> for BootFile {
    fn from(path: P) -> Self {
        Self {
            path: path.into(),
            blake3: None,
        }
    }
}

/// Where a kernel image comes from.
#[derive(Clone, Debug)]
pub enum KernelSource {
    /// A bzImage or 64-bit ELF file.
    File(BootFile),
    /// Such an image in memory.
    Bytes(Vec<u8>),
}

/// What a machine is to boot.
#[derive(Clone, Debug)]
pub struct BootSpec {
    /// The kernel.
    pub kernel: KernelSource,
    /// The initial RAM disk, if any.
    pub initrd: Option<BootFile>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Why a machine could not be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read the {what} {path}: {source}")]
    File {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file is absurdly large.
    #[error("the {what} {path} has {bytes} bytes, more than the {limit} it may have")]
    TooLarge {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A file has another content than it must have.
    #[error(
        "the {what} {path} is not the one that this machine boots: its content has another BLAKE3 than it must have (damaged, \
         or exchanged)"
    )]
    Changed {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Not an image that can be booted.
    #[error("{name} is not a kernel this machine can boot: {why}")]
    NotAKernel {
        /// The file, or "the kernel image".
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The kernel needs more memory.
    #[error(
        "the machine's memory is too small: the kernel needs {needs} bytes below 4 GiB, there are {has}"
    )]
    MemoryTooSmall {
        /// End of what the kernel needs.
        needs: u64,
        /// End of low RAM.
        has: u64,
    },
    /// The initrd does not fit.
    #[error(
        "the initrd of {bytes} bytes does not fit between the kernel, which ends at {from:#x}, and {to:#x}: give \
             the machine more memory"
    )]
    InitrdTooBig {
        /// Its size.
        bytes: u64,
        /// Where the kernel ends.
        from: u64,
        /// Where it must end.
        to: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes, the kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Bytes, NUL excluded.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The command line cannot be passed.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// Nobody has said what a reset boots.
    #[error("nothing is known to boot")]
    Nothing,
    /// The machine cannot be reset while a disk may still do what the guest had asked for.
    #[error("a disk has not ended what it was at within {} s", .0.as_secs())]
    DiskBusy(std::time::Duration),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A boot structure could not be written to guest memory.
    #[error("writing {what} to guest memory: {why}")]
    Write {
        /// Which.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// The machine itself refused (it runs, or KVM would not take the registers).
    #[error(transparent)]
    Vm(#[from] Box<crate::vm::VmError>),
}

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) rip: u64,
    pub(crate) rsi: u64,
}

/// Writes everything a kernel needs into fresh guest memory.
///
/// # Errors
/// [`BootError`]; guest memory may then be half written.
pub(crate) fn load(
    spec: &BootSpec,
    memory: &GuestMemory,
    layout: &RamLayout,
    vcpus: u8,
    slots: &[MmioSlot],
) -> Result<Entry, BootError> {
    let image = Image::read(&spec.kernel)?;
    let kernel = image.load(memory, layout)?;
    let mut params = boot_params {
        hdr: kernel.header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;

    let cmdline = spec.cmdline.as_bytes();
    if cmdline.contains(&0) {
        return Err(BootError::CmdlineNul);
    }
    let limit = kernel.cmdline_max.min(CMDLINE_MAX - 1);
    if cmdline.len() > limit {
        return Err(BootError::CmdlineTooLong {
            len: cmdline.len(),
            limit,
        });
    }
    put(memory, "the command line", CMDLINE, cmdline)?;
    put(
        memory,
        "the command line",
        CMDLINE + cmdline.len() as u64,
        &[0],
    )?;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;

    if let Some(file) = &spec.initrd {
        let (start, bytes) = load_initrd(file, &kernel, memory, layout)?;
        // Below 4 GiB, by `initrd_max`.
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }

    put(
        memory,
        "the ACPI tables",
        ACPI,
        &acpi::tables(vcpus, slots)?,
    )?;
    params.acpi_rsdp_addr = ACPI;
    e820(&mut params, layout);
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(|e| BootError::Write {
        what: "boot_params",
        why: e.to_string(),
    })?;
    paging::write_tables(memory, layout).map_err(|e| BootError::Write {
        what: "the page tables",
        why: e.to_string(),
    })?;
    Ok(Entry {
        rip: kernel.entry,
        rsi: ZERO_PAGE,
    })
}

fn put(memory: &GuestMemory, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|e| BootError::Write {
            what,
            why: e.to_string(),
        })
}

fn e820(params: &mut boot_params, layout: &RamLayout) {
    let low_end = layout.low_end();
    let mut map = vec![
        (0, EBDA, E820_RAM),
        (ACPI, HIGH_MEMORY - ACPI, E820_RESERVED),
        (HIGH_MEMORY, low_end - HIGH_MEMORY, E820_RAM),
        (IDENTITY_MAP, TSS + 3 * PAGE - IDENTITY_MAP, E820_RESERVED),
    ];
    map.extend(
        layout.ranges()[1..]
            .iter()
            .map(|r| (r.start, r.len, E820_RAM)),
    );
    let mut table = params.e820_table;
    for (entry, (addr, size, kind)) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
}

/// Reads a file of at most `limit` bytes, and looks whether it is the right one.
///
/// # Errors
/// [`BootError::File`], [`BootError::TooLarge`] or [`BootError::Changed`].
pub(crate) fn read_file(
    what: &'static str,
    file: &BootFile,
    limit: u64,
) -> Result<Vec<u8>, BootError> {
    let path = &file.path;
    let error = |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let opened = File::open(path).map_err(error)?;
    let meta = opened.metadata().map_err(error)?;
    if !meta.is_file() {
        return Err(error(std::io::Error::other("it is not a regular file")));
    }
    if meta.len() > limit {
        return Err(BootError::TooLarge {
            what,
            path: path.to_owned(),
            bytes: meta.len(),
            limit,
        });
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    opened.take(limit).read_to_end(&mut bytes).map_err(error)?;
    // What was read is looked at, and nothing else booted: the file may be exchanged at any moment.
    let wanted = file.blake3;
    if wanted.is_some_and(|wanted| *blake3::hash(&bytes).as_bytes() != wanted) {
        return Err(BootError::Changed {
            what,
            path: path.to_owned(),
        });
    }
    Ok(bytes)
}

/// Puts the initrd as high as it may be; returns its start and size.
fn load_initrd(
    file: &BootFile,
    kernel: &Kernel,
    memory: &GuestMemory,
    layout: &RamLayout,
) -> Result<(u64, u64), BootError> {
    let to = layout.low_end().min(kernel.initrd_max.saturating_add(1)) & !(PAGE - 1);
    let from = kernel.end.next_multiple_of(PAGE);
    let room = to.saturating_sub(from);
    let fit = |bytes| BootError::InitrdTooBig { bytes, from, to };
    let bytes = match read_file("initrd", file, room) {
        Err(BootError::TooLarge { bytes, .. }) => return Err(fit(bytes)),
        other => other?,
    };
    let size = bytes.len() as u64;
    let start = to.checked_sub(size).ok_or_else(|| fit(size))? & !(PAGE - 1);
    if start < from {
        return Err(fit(size));
    }
    put(memory, "the initrd", start, &bytes)?;
    Ok((start, size))
}
