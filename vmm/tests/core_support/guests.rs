//! Making tiny guests; also for tests of whole systems, which boot one as a kernel.
#![allow(dead_code, reason = "each test binary uses a part")]

/// Where the code of a guest is loaded and entered.
pub const CODE: u64 = 0x10_0000;
/// An ELF file whose one segment is `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    for half in [2u16, 62] {
        put(&half.to_le_bytes());
    }
    put(&1u32.to_le_bytes());
    for word in [CODE, 64, 0] {
        put(&word.to_le_bytes());
    }
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    for word in [1u32, 7] {
        put(&word.to_le_bytes());
    }
    let len = code.len() as u64;
    // What follows the code in its page is empty.
    for word in [120, CODE, CODE, len, len.max(4096), 4096] {
        put(&word.to_le_bytes());
    }
    put(code);
    file
}

/// The bytes between two labels of a `global_asm!` block.
#[macro_export]
macro_rules! guest_code {
    ($start:ident, $end:ident, $($line:expr),+ $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata",
            concat!(".global ", stringify!($start)),
            concat!(stringify!($start), ":"),
            $($line,)+
            concat!(".global ", stringify!($end)),
            concat!(stringify!($end), ":"),
            ".popsection",
            options(att_syntax)
        );
        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }
    };
}

/// The bytes from `start` to `end`.
///
/// # Safety
/// Both must be labels of one block of `guest_code!`.
pub unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: the caller says that this is one block of initialised, read-only, static data.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

// Enables the power button's event, says `r`, waits for the button, takes note of it, and, if the register says that it has, says
// `o` and switches itself off.
guest_code!(
    heeds_start,
    heeds_end,
    "movl $0x602, %edx",
    "movl $0x100, %eax",
    "outw %ax, %dx",
    "movl $0x3f8, %edx",
    "movl $0x72, %eax",
    "outb %al, %dx",
    "2: movl $0x600, %edx",
    "xorl %eax, %eax",
    "inw %dx, %ax",
    "testl $0x100, %eax",
    "jz 2b",
    "movl $0x100, %eax",
    "outw %ax, %dx",
    "inw %dx, %ax",
    "testl $0x100, %eax",
    "jnz 3f",
    "movl $0x3f8, %edx",
    "movl $0x6f, %eax",
    "outb %al, %dx",
    "movl $0x604, %edx",
    "movl $0x3400, %eax",
    "outw %ax, %dx",
    "3: jmp 3b",
);

/// A guest that switches itself off when its power button is pressed.
pub fn heeds_its_power_button() -> &'static [u8] {
    // SAFETY: the two labels of the block above.
    unsafe { between(&raw const heeds_start, &raw const heeds_end) }
}
