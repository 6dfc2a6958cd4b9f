//! Log lines on COM1 (port 0x3f8). A virtual UART always takes the next byte, so its status is not asked: each port
//! access is an exit from the guest.

use core::arch::asm;
use core::fmt::{self, Write};

/// COM1 as a `fmt::Write`.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes() {
            if b == b'\n' {
                put(b'\r');
            }
            put(b);
        }
        Ok(())
    }
}

fn put(b: u8) {
    // SAFETY: writes one byte to the UART's transmit register; no memory is touched.
    unsafe { asm!("out dx, al", in("dx") 0x3f8u16, in("al") b, options(nomem, nostack)) };
}

/// Writes one log line, "probe: " in front.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        let _ = core::write!($crate::serial::Serial, "probe: {}\n", core::format_args!($($arg)*));
    }};
}
