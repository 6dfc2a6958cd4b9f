//! The probe guest's image. See docs/probe-guest.md.
#![no_std]
#![no_main]

mod boot;
mod rt;
mod serial;

/// Ring 3 begins here. `params` is the physical address of Linux's boot_params.
#[unsafe(no_mangle)]
pub extern "C" fn rust_main(params: *const u8) -> ! {
    log!("ring 3, boot_params at {params:?}");
    loop {
        // SAFETY: ring 3 `hlt` is the request to sleep (boot.rs).
        unsafe { core::arch::asm!("hlt", options(nomem, nostack)) };
    }
}
