//! Ring 0: from the VMM's entry point to ring 3, and the interrupt stubs. Everything here is assembly on purpose.
//!
//! On a KVM without hardware virtualisation ring 0 is emulated instruction by instruction, and only part of the
//! instruction set is. So ring 0 does as little as can be, with plain instructions: tables, CR3, one iretq.
//! All the rest, device drivers included, is ring 3 code on user-accessible pages.
//!
//! What was found to work on such a KVM: lgdt, lidt, ltr, mov to CR0/CR3/CR4, wrmsr, iretq, sti+hlt, interrupts and
//! exceptions out of ring 3. What was not: `int n` in ring 3 (#UD), IOPL (dropped by iretq; the TSS's I/O bitmap
//! works). So ports go by the bitmap, and ring 3 sleeps by executing `hlt`: its #GP is the system call.

use core::arch::global_asm;
use core::sync::atomic::AtomicU8;

/// Set to 1 by every interrupt; ring 3 clears it before it looks for work and sleeps. The #GP stub does not halt
/// while it is set, which closes the race between looking and sleeping.
#[unsafe(no_mangle)]
pub static WAKE: AtomicU8 = AtomicU8::new(0);

/// Per virtio-mmio slot: its interrupt came and has not been acknowledged to the device.
#[unsafe(no_mangle)]
pub static IRQ_PENDING: [AtomicU8; 8] = [const { AtomicU8::new(0) }; 8];

/// Vector of the local APIC timer.
pub const TIMER_VECTOR: u8 = 0x40;
/// Vector of virtio-mmio slot 0; slot i has this + i.
pub const DEVICE_VECTOR: u8 = 0x50;

/// What the stub of an unexpected exception leaves for [`crate::fault_entry`]: vector, error code, RIP, CS, RFLAGS,
/// RSP, SS, CR2.
#[unsafe(no_mangle)]
pub static mut FAULT_FRAME: [u64; 8] = [0; 8];

unsafe extern "C" {
    /// The kvmclock page: 32 bytes in the layout of pvclock_vcpu_time_info (Linux, asm/pvclock-abi.h).
    pub static KVMCLOCK: [u32; 8];
    /// 1 if the host offers kvmclock and the page was registered.
    pub static HAVE_KVMCLOCK: u8;
    /// Third level of the page tables: entry i maps GiB i. The first four are filled in.
    pub static mut PDPT: [u64; 512];
}

global_asm!(
    r#"
    .section .boot, "ax"
    .globl _start
_start:
    cli
    cld
    mov r15, rsi                     # boot_params
    lea rsp, [rip + ring0_stack_top]

    # The PIC still has its reset state and LINT0 may be open: nothing may come from there.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al

    # The TSS's base goes into its descriptor, the stubs' addresses into the IDT: bytes the linker cannot scatter.
    lea rax, [rip + TSS]
    lea rdi, [rip + gdt + 0x28]
    mov [rdi + 2], ax
    shr rax, 16
    mov [rdi + 4], al
    mov [rdi + 7], ah
    shr rax, 16
    mov [rdi + 8], eax

    lea rsi, [rip + stubs]
    lea rdi, [rip + IDT]
    mov ecx, 0x60
2:  mov rax, rsi
    mov [rdi], ax
    mov dword ptr [rdi + 2], 0x8E000008   # selector 8, no IST, present interrupt gate DPL 0
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], rax
    add rdi, 16
    add rsi, 16
    dec ecx
    jnz 2b

    lgdt [rip + gdtr]
    lidt [rip + idtr]
    mov ax, 0x28
    ltr ax

    lea rax, [rip + pml4]
    mov cr3, rax
    # PAE, OSFXSR, OSXMMEXCPT; no SMEP and SMAP: ring 0 runs on user pages here.
    mov eax, 0x620
    mov cr4, rax
    # PE, MP, ET, NE, PG; no EM, TS, WP, AM: SSE is on, caches are.
    mov eax, 0x80000033
    mov cr0, rax
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax

    # kvmclock (MSR 0x4b564d01), if this is KVM and it has it (leaf 0x40000001, EAX bit 3).
    mov eax, 0x40000000
    cpuid
    cmp ebx, 0x4b4d564b
    jne 3f
    mov eax, 0x40000001
    cpuid
    test eax, 8
    jz 3f
    lea rax, [rip + KVMCLOCK]
    or eax, 1
    xor edx, edx
    mov ecx, 0x4b564d01
    wrmsr
    mov byte ptr [rip + HAVE_KVMCLOCK], 1
3:
    # To ring 3, interrupts on.
    lea rdi, [rip + ring3_stack_top]
    push 0x23
    push rdi
    push 0x202
    push 0x1b
    lea rax, [rip + ring3_start]
    push rax
    iretq

ring3_start:
    mov rdi, r15
    xor ebp, ebp
    call rust_main
    ud2

    # 16 bytes a stub. Exceptions 8, 10-14, 17, 21, 29, 30 push an error code themselves.
    .balign 16
stubs:
    .set v, 0
    .rept 0x60
    .if v == 13
    jmp on_gp
    .elseif (v == 8) || (v >= 10 && v <= 14) || (v == 17) || (v == 21) || (v == 29) || (v == 30)
    push v
    jmp on_fault
    .elseif v < 32
    push 0
    push v
    jmp on_fault
    .elseif v >= 0x50
    mov byte ptr [rip + IRQ_PENDING + v - 0x50], 1
    jmp on_irq
    .else
    nop
    jmp on_irq
    .endif
    .balign 16
    .set v, v + 1
    .endr

on_irq:
    push rax
    mov byte ptr [rip + WAKE], 1
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0           # EOI
    pop rax
    iretq

    # #GP: ring 3's `hlt` is a request to sleep. On the stack: error code, RIP, CS, ...
on_gp:
    push rax
    cmp qword ptr [rsp + 24], 0x1b
    jne 4f
    mov rax, [rsp + 16]
    cmp byte ptr [rax], 0xf4
    jne 4f
    cmp byte ptr [rip + WAKE], 0
    jne 5f
    sti
    hlt
    cli
5:  inc qword ptr [rsp + 16]
    pop rax
    add rsp, 8
    iretq
4:  pop rax
    push 13

    # Vector, error code, RIP, CS, RFLAGS, RSP, SS on the stack: keep them, and go on in ring 3 with the report.
on_fault:
    cld
    lea rdi, [rip + FAULT_FRAME]
    mov rsi, rsp
    mov ecx, 7
6:  mov rax, [rsi]
    mov [rdi], rax
    add rsi, 8
    add rdi, 8
    dec ecx
    jnz 6b
    mov rax, cr2
    mov [rdi], rax
    lea rdi, [rip + fault_stack_top - 8]
    push 0x23
    push rdi
    push 2                           # interrupts off for good
    push 0x1b
    lea rax, [rip + fault_entry]
    push rax
    iretq

    .section .data
    .balign 16
gdtr:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 16
idtr:
    .word 0x60 * 16 - 1
    .quad IDT
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff         # 08 ring 0 code
    .quad 0x00cf93000000ffff         # 10 ring 0 data
    .quad 0x00affb000000ffff         # 18 ring 3 code
    .quad 0x00cff3000000ffff         # 20 ring 3 data
    .quad 0x0000890000002068         # 28 TSS: 0x68 bytes + the I/O bitmap
    .quad 0
gdt_end:
    .globl HAVE_KVMCLOCK
HAVE_KVMCLOCK:
    .byte 0
    .balign 64
    .globl KVMCLOCK
KVMCLOCK:
    .skip 64

    # Identity map of 4 GiB in 2 MiB pages, user-accessible, accessed and dirty already set so that the tables never
    # change under the guest; the last GiB (devices) uncached.
    .balign 4096
pml4:
    .quad PDPT + 0x27
    .skip 4088
    .globl PDPT
PDPT:
    .quad pd + 0x27, pd + 0x1027, pd + 0x2027, pd + 0x3027
    .skip 4064
pd:
    .set a, 0
    .rept 1536
    .quad a + 0xe7
    .set a, a + 0x200000
    .endr
    .rept 512
    .quad a + 0xff
    .set a, a + 0x200000
    .endr
    # I/O map base right behind the TSS's 0x68 bytes; a clear bit lets ring 3 use the port.
    .balign 4096
TSS:
    .long 0
    .quad ring0_stack_top
    .skip 0x66 - 12
    .word 0x68
    .skip 0x2000
    .byte 0xff

    .section .bss
    .balign 4096
IDT:
    .skip 0x60 * 16
    .balign 4096
    .skip 0x4000
ring0_stack_top:
    .skip 0x4000
fault_stack_top:
    .skip 0x40000
ring3_stack_top:
    "#
);
