//! Loading a kernel by the 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).
//!
//! Any 64-bit ELF image can be started so, not just Linux: it is entered at its entry point in long mode, ring 0, with
//! interrupts off, flat segments, RAM identity-mapped and RSI pointing to `boot_params`.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::{self, AcpiError};
use crate::devices::MmioSlot;
use crate::layout::{
    ACPI, CMDLINE, CMDLINE_MAX, EBDA, HIGH_MEMORY, IDENTITY_MAP, PAGE, TSS, ZERO_PAGE,
};
use crate::memory::{GuestMemory, RamLayout};
use crate::paging;

/// Largest kernel file read, bytes: an uncompressed kernel with debug information is about half of it.
const KERNEL_FILE_MAX: u64 = 1 << 30;
/// Longest command line of an image that does not say, NUL excluded (a Linux for x86 takes 2047).
const CMDLINE_DEFAULT: usize = 2047;
/// Highest last byte of an initrd for an image that does not say (boot.rst, `initrd_addr_max`).
const INITRD_MAX_DEFAULT: u64 = 0x37FF_FFFF;
/// `boot_params.hdr.header`.
const HDRS: u32 = 0x5372_6448;
/// `xloadflags`: the 64-bit entry point exists.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point of a bzImage, from where it is loaded.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: one without a number.
const LOADER_UNDEFINED: u8 = 0xFF;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Where a kernel image comes from.
#[derive(Clone, Debug)]
pub enum KernelSource {
    /// A bzImage or 64-bit ELF file.
    Path(PathBuf),
    /// Such an image in memory.
    Bytes(Vec<u8>),
}

/// What a machine is to boot.
#[derive(Clone, Debug)]
pub struct BootSpec {
    /// The kernel.
    pub kernel: KernelSource,
    /// The initial RAM disk, if any.
    pub initrd: Option<PathBuf>,
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

    if let Some(path) = &spec.initrd {
        let (start, bytes) = load_initrd(path, &kernel, memory, layout)?;
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

/// A kernel file's bytes.
struct Image {
    name: String,
    bytes: Vec<u8>,
}

/// What is known once the kernel is in guest memory.
struct Kernel {
    header: setup_header,
    entry: u64,
    /// End of what it occupies, its uninitialised data and room to unpack itself included.
    end: u64,
    cmdline_max: usize,
    /// Highest address of an initrd's last byte.
    initrd_max: u64,
}

impl Image {
    fn read(source: &KernelSource) -> Result<Image, BootError> {
        match source {
            KernelSource::Bytes(bytes) => Ok(Image {
                name: "the kernel image".to_owned(),
                bytes: bytes.clone(),
            }),
            KernelSource::Path(path) => Ok(Image {
                name: path.display().to_string(),
                bytes: read_file("kernel", path, KERNEL_FILE_MAX)?,
            }),
        }
    }

    fn bad(&self, why: impl ToString) -> BootError {
        BootError::NotAKernel {
            name: self.name.clone(),
            why: why.to_string(),
        }
    }

    fn load(&self, memory: &GuestMemory, layout: &RamLayout) -> Result<Kernel, BootError> {
        let is_elf = self.bytes.starts_with(b"\x7fELF");
        let is_bzimage = self.bytes.get(0x202..0x206) == Some(&HDRS.to_le_bytes()[..]);
        match (is_elf, is_bzimage) {
            (true, _) => self.load_elf(memory, layout),
            (false, true) => self.load_bzimage(memory, layout),
            (false, false) => Err(self.bad("it is neither a bzImage nor an ELF file")),
        }
    }

    fn load_elf(&self, memory: &GuestMemory, layout: &RamLayout) -> Result<Kernel, BootError> {
        // The loader does not look at the class and machine, nor whether segments hit the boot structures.
        let end = self.check_elf().map_err(|why| self.bad(why))?;
        if end > layout.low_end() {
            return Err(BootError::MemoryTooSmall {
                needs: end,
                has: layout.low_end(),
            });
        }
        let mut file = Cursor::new(&self.bytes[..]);
        let loaded = Elf::load(memory, None, &mut file, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|e| self.bad(e))?;
        let header = setup_header {
            boot_flag: 0xAA55,
            header: HDRS,
            kernel_alignment: 0x100_0000,
            ..Default::default()
        };
        Ok(Kernel {
            header,
            entry: loaded.kernel_load.0,
            end,
            cmdline_max: CMDLINE_DEFAULT,
            initrd_max: INITRD_MAX_DEFAULT,
        })
    }

    /// Checks the ELF header and the segments; returns the end of the highest.
    fn check_elf(&self) -> Result<u64, String> {
        let field = |at: usize, len: usize| -> Result<u64, String> {
            let end = at
                .checked_add(len)
                .ok_or("its header points outside of it")?;
            let bytes = self.bytes.get(at..end).ok_or("the file is cut short")?;
            Ok(bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)))
        };
        if field(4, 1)? != 2 || field(5, 1)? != 1 || field(18, 2)? != 62 {
            return Err("it is an ELF file, but not for 64-bit x86".to_owned());
        }
        let (entry, table, entries) = (field(24, 8)?, field(32, 8)?, field(56, 2)?);
        let (mut highest, mut entered) = (0, false);
        for index in 0..entries {
            let at = index
                .checked_mul(56)
                .and_then(|offset| offset.checked_add(table))
                .and_then(|at| usize::try_from(at).ok())
                .ok_or("its header points outside of it")?;
            let at = |offset: usize| {
                at.checked_add(offset)
                    .ok_or("its header points outside of it")
            };
            let (kind, paddr, filesz, memsz) = (
                field(at(0)?, 4)?,
                field(at(24)?, 8)?,
                field(at(32)?, 8)?,
                field(at(40)?, 8)?,
            );
            if kind != 1 || memsz == 0 {
                continue;
            }
            if paddr < HIGH_MEMORY {
                return Err(format!(
                    "a segment is to be loaded at {paddr:#x}, below 1 MiB"
                ));
            }
            if filesz > memsz {
                return Err("a segment is larger in the file than in memory".to_owned());
            }
            let end = paddr.checked_add(memsz).ok_or("a segment wraps around")?;
            highest = highest.max(end);
            entered |= (paddr..end).contains(&entry);
        }
        if !entered {
            return Err(format!(
                "its entry point {entry:#x} is in none of its segments"
            ));
        }
        Ok(highest)
    }

    fn load_bzimage(&self, memory: &GuestMemory, layout: &RamLayout) -> Result<Kernel, BootError> {
        let mut file = Cursor::new(&self.bytes[..]);
        let room = layout.low_end();
        if HIGH_MEMORY + self.bytes.len() as u64 > room {
            return Err(BootError::MemoryTooSmall {
                needs: HIGH_MEMORY + self.bytes.len() as u64,
                has: room,
            });
        }
        let KernelLoaderResult {
            kernel_load,
            kernel_end,
            setup_header: Some(header),
            ..
        } = BzImage::load(memory, None, &mut file, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|e| self.bad(e))?
        else {
            return Err(self.bad("its setup header is missing"));
        };
        if header.version < 0x020C || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(self.bad("it has no 64-bit entry point"));
        }
        // It unpacks itself to the preferred address, upwards of itself if that is lower.
        let unpacked = header
            .pref_address
            .max(kernel_load.0)
            .checked_add(u64::from(header.init_size));
        let end = unpacked
            .ok_or_else(|| self.bad("its size wraps around"))?
            .max(kernel_end);
        if end > room {
            return Err(BootError::MemoryTooSmall {
                needs: end,
                has: room,
            });
        }
        Ok(Kernel {
            header,
            entry: kernel_load.0 + ENTRY_64,
            end,
            cmdline_max: header.cmdline_size as usize,
            initrd_max: u64::from(header.initrd_addr_max),
        })
    }
}

fn read_file(what: &'static str, path: &Path, limit: u64) -> Result<Vec<u8>, BootError> {
    let error = |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    let meta = file.metadata().map_err(error)?;
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
    file.take(limit).read_to_end(&mut bytes).map_err(error)?;
    Ok(bytes)
}

/// Puts the initrd as high as it may be; returns its start and size.
fn load_initrd(
    path: &Path,
    kernel: &Kernel,
    memory: &GuestMemory,
    layout: &RamLayout,
) -> Result<(u64, u64), BootError> {
    let to = layout.low_end().min(kernel.initrd_max.saturating_add(1)) & !(PAGE - 1);
    let from = kernel.end.next_multiple_of(PAGE);
    let room = to.saturating_sub(from);
    let fit = |bytes| BootError::InitrdTooBig { bytes, from, to };
    let bytes = match read_file("initrd", path, room) {
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
