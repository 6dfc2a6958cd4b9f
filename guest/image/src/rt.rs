//! What `core` expects from a C library, for a target whose own has been left out: memory functions and the panic
//! handler. Also the report of a CPU exception.

use core::arch::{asm, naked_asm};
use core::panic::PanicInfo;

/// memcpy of the C library.
///
/// # Safety
/// As C's: both ranges valid for `n` bytes and not overlapping.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memcpy(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// memmove of the C library.
///
/// # Safety
/// As C's: both ranges valid for `n` bytes.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memmove(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx", // dst - src (unsigned) < n: dst is inside src, copy from the end
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret"
    )
}

/// memset of the C library.
///
/// # Safety
/// As C's: the range is valid for `n` bytes.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memset(dst: *mut u8, c: i32, n: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret"
    )
}

/// memcmp of the C library.
///
/// # Safety
/// As C's: both ranges valid for `n` bytes.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!(
        "xor eax, eax",
        "mov rcx, rdx",
        "cmp rcx, rcx", // n = 0 compares equal
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub eax, ecx",
        "2:",
        "ret"
    )
}

/// bcmp of the C library.
///
/// # Safety
/// As C's: both ranges valid for `n` bytes.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

/// strlen of the C library (core's CStr refers to it).
///
/// # Safety
/// As C's: `s` ends with a NUL.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn strlen(s: *const u8) -> usize {
    naked_asm!(
        "xor eax, eax",
        "2:",
        "cmp byte ptr [rdi + rax], 0",
        "je 3f",
        "inc rax",
        "jmp 2b",
        "3:",
        "ret"
    )
}

/// The precompiled `core` names it in its unwind tables; with panic=abort nothing calls it.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

/// Ends the machine: asks the keyboard controller for a reset (as Linux does), so that the VMM sees an event instead of a
/// silent guest; if nobody listens, sleeps for ever.
pub fn reset() -> ! {
    // SAFETY: port 0x64 command 0xFE pulses the reset line; no memory is touched.
    unsafe { asm!("out 0x64, al", in("al") 0xfeu8, options(nomem, nostack)) };
    loop {
        // SAFETY: ring 3 `hlt` is the request to sleep (boot.rs); it returns on the next interrupt.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    crate::log!("PANIC {info}");
    reset()
}

/// Where the exception stubs continue, in ring 3, interrupts off.
#[unsafe(no_mangle)]
pub extern "C" fn fault_entry() -> ! {
    // SAFETY: the stub has written the frame before it came here, and nothing runs beside this.
    let f = unsafe { (&raw const crate::boot::FAULT_FRAME).read_volatile() };
    crate::log!(
        "FAULT vector {} error {:#x} rip {:#x} cs {:#x} rflags {:#x} rsp {:#x} cr2 {:#x}",
        f[0],
        f[1],
        f[2],
        f[3],
        f[4],
        f[5],
        f[7]
    );
    reset()
}
