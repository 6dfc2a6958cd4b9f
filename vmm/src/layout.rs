//! Where everything lies in the guest's physical address space.
//!
//! RAM starts at 0 and continues at 4 GiB: the addresses between belong to devices. What the loader leaves for a
//! kernel (64-bit Linux boot protocol, Documentation/arch/x86/boot.rst) lies below 1 MiB.

/// Bytes per page.
pub const PAGE: u64 = 4096;
/// RAM below 4 GiB ends here at most (3 GiB); above are the devices.
pub const LOW_RAM_MAX: u64 = 0xC000_0000;
/// RAM that does not fit below starts here (4 GiB).
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// Least RAM of a machine and least RAM below the hole, bytes (2 MiB): the boot structures and something to boot.
pub const MIN_RAM: u64 = 2 << 20;
/// Most RAM of a machine, bytes (1 TiB).
pub const MAX_RAM: u64 = 1 << 40;

/// The boot GDT: null, unused, 64-bit code, data.
pub const GDT: u64 = 0x500;
/// `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; the page below is free.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables: PML4, PDPT, then one page directory per mapped GiB.
pub const PML4: u64 = 0x9000;
/// End of the page tables (exclusive).
pub const PAGE_TABLES_END: u64 = 0x2_0000;
/// The command line, NUL included.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of a command line, its NUL included, whatever the kernel says.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of conventional memory: from here on the BIOS data area would be.
pub const EBDA: u64 = 0x9_FC00;
/// ACPI tables, the RSDP first; a kernel that ignores `acpi_rsdp_addr` searches here.
pub const ACPI: u64 = 0xE_0000;
/// End of the ACPI tables (exclusive).
pub const ACPI_END: u64 = 0x10_0000;
/// First byte for a kernel.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The in-kernel IOAPIC.
pub const IOAPIC: u32 = 0xFEC0_0000;
/// The in-kernel local APICs.
pub const LOCAL_APIC: u32 = 0xFEE0_0000;
/// One page for the identity map Intel hosts need for real mode.
pub const IDENTITY_MAP: u64 = 0xFEFF_C000;
/// Three pages for the TSS Intel hosts need for real mode.
pub const TSS: u64 = 0xFEFF_D000;

/// GSI of ACPI's system control interrupt.
pub const SCI_GSI: u8 = 9;
/// ACPI PM1 event block: status (2 bytes), enable (2 bytes).
pub const PM1_EVENT_PORT: u16 = 0x600;
/// ACPI PM1 control block (2 bytes).
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// Sleep type of ACPI state S5 (off) in the PM1 control register.
pub const S5_SLEEP_TYPE: u8 = 5;
/// Keyboard controller command port: 0xfe there pulses the reset line.
pub const RESET_PORT: u16 = 0x64;

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 8;
