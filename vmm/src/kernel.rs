//! Kernel images: telling bzImage from ELF, checking them and putting them into guest memory.

use std::io::Cursor;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::{BootError, KernelSource, read_file};
use crate::layout::HIGH_MEMORY;
use crate::memory::{GuestMemory, RamLayout};

/// `boot_params.hdr.header`.
const HDRS: u32 = 0x5372_6448;
/// `xloadflags`: the 64-bit entry point exists.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point of a bzImage, from where it is loaded.
const ENTRY_64: u64 = 0x200;
/// Longest command line of an image that does not say, NUL excluded (a Linux for x86 takes 2047).
const CMDLINE_DEFAULT: usize = 2047;
/// Highest last byte of an initrd for an image that does not say (boot.rst, `initrd_addr_max`).
const INITRD_MAX_DEFAULT: u64 = 0x37FF_FFFF;
/// Largest kernel file read, bytes: an uncompressed kernel with debug information is about half of it.
const KERNEL_FILE_MAX: u64 = 1 << 30;

/// A kernel file's bytes.
pub(crate) struct Image {
    name: String,
    bytes: Vec<u8>,
}

/// What is known once the kernel is in guest memory.
pub(crate) struct Kernel {
    pub(crate) header: setup_header,
    pub(crate) entry: u64,
    /// End of what it occupies, its uninitialised data and room to unpack itself included.
    pub(crate) end: u64,
    pub(crate) cmdline_max: usize,
    /// Highest address of an initrd's last byte.
    pub(crate) initrd_max: u64,
}

/// Where an ELF file's segments lie in guest memory.
struct Segments {
    /// End of the highest.
    end: u64,
    /// What is not in the file: start and bytes.
    empty: Vec<(u64, u64)>,
}

/// Zeroes a range of guest memory.
fn zero(memory: &GuestMemory, start: u64, len: u64) -> Result<(), GuestMemoryError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let end = start + len;
    for at in (start..end).step_by(ZEROS.len()) {
        let len = ZEROS.len().min((end - at) as usize);
        memory.write_slice(&ZEROS[..len], GuestAddress(at))?;
    }
    Ok(())
}

impl Image {
    /// Reads the image.
    ///
    /// # Errors
    /// [`BootError`] naming the file.
    pub(crate) fn read(source: &KernelSource) -> Result<Image, BootError> {
        match source {
            KernelSource::Bytes(bytes) => Ok(Image {
                name: "the kernel image".to_owned(),
                bytes: bytes.clone(),
            }),
            KernelSource::File(file) => Ok(Image {
                name: file.path.display().to_string(),
                bytes: read_file("kernel", file, KERNEL_FILE_MAX)?,
            }),
        }
    }

    fn bad(&self, why: impl ToString) -> BootError {
        BootError::NotAKernel {
            name: self.name.clone(),
            why: why.to_string(),
        }
    }

    /// Puts the kernel into guest memory.
    ///
    /// # Errors
    /// [`BootError`]: not a kernel, or too little memory for it.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        layout: &RamLayout,
    ) -> Result<Kernel, BootError> {
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
        let Segments { end, empty } = self.check_elf().map_err(|why| self.bad(why))?;
        if end > layout.low_end() {
            return Err(BootError::MemoryTooSmall {
                needs: end,
                has: layout.low_end(),
            });
        }
        let mut file = Cursor::new(&self.bytes[..]);
        let loaded = Elf::load(memory, None, &mut file, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|e| self.bad(e))?;
        // After a reset memory is not empty.
        for (start, len) in empty {
            zero(memory, start, len).map_err(|e| self.bad(e))?;
        }
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

    /// Checks the ELF header and the segments.
    fn check_elf(&self) -> Result<Segments, String> {
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
        let (mut highest, mut entered, mut empty) = (0, false, Vec::new());
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
            if filesz < memsz {
                empty.push((paddr + filesz, memsz - filesz));
            }
            entered |= (paddr..end).contains(&entry);
        }
        if !entered {
            return Err(format!(
                "its entry point {entry:#x} is in none of its segments"
            ));
        }
        Ok(Segments {
            end: highest,
            empty,
        })
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
