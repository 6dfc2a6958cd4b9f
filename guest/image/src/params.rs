//! What the VMM says through Linux's boot_params (Documentation/arch/x86/zero-page.rst): command line and memory map.
//! Whatever is senseless is reported, and the default stands.

use smoltcp::wire::{Ipv4Address, Ipv4Cidr};

use crate::log;

const CMDLINE_MAX: usize = 2048;
const E820_MAX: usize = 128;
const RAM_MAX: usize = 16;
const PAGE: u64 = 4096;

/// A piece of RAM, physical addresses, page-aligned.
#[derive(Clone, Copy, Default)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

/// The parameters in force.
pub struct Params {
    /// `ip=`: our address and prefix.
    pub ip: Option<Ipv4Cidr>,
    /// `gw=`: default gateway.
    pub gateway: Option<Ipv4Address>,
    /// `pages=`: pages dirtied per pass.
    pub pages: u64,
    /// `work=`: iterations of work after each page.
    pub work: u64,
    /// RAM that neither the image nor an initrd occupies, from 1 MiB up.
    pub free: [Range; RAM_MAX],
}

unsafe extern "C" {
    static __image_end: u8;
}

/// Reads `len` bytes at a physical address below 4 GiB (identity mapped).
///
/// # Safety
/// `at` must be RAM (or at least readable) for `size_of::<T>()` bytes.
unsafe fn read<T: Copy>(at: u64) -> T {
    // SAFETY: promised by the caller; alignment is not assumed.
    unsafe { (at as *const T).read_unaligned() }
}

impl Params {
    /// Reads boot_params at physical address `zero_page`.
    pub fn read(zero_page: u64) -> Params {
        let mut p = Params {
            ip: None,
            gateway: None,
            pages: 0,
            work: 0,
            free: [Range::default(); RAM_MAX],
        };
        if zero_page == 0 || zero_page > 0xc000_0000 {
            log!("no boot_params");
            return p;
        }
        // SAFETY: the boot protocol puts a readable 4 KiB structure there; below 3 GiB is RAM, mapped.
        let (cmdline, entries, initrd, initrd_len) = unsafe {
            (
                u64::from(read::<u32>(zero_page + 0x228)),
                usize::from(read::<u8>(zero_page + 0x1e8)).min(E820_MAX),
                u64::from(read::<u32>(zero_page + 0x218)),
                u64::from(read::<u32>(zero_page + 0x21c)),
            )
        };
        if cmdline != 0 && cmdline < 0xc000_0000 {
            // SAFETY: below 3 GiB is mapped RAM, or reads as all ones; the length is bounded.
            let bytes = unsafe { core::slice::from_raw_parts(cmdline as *const u8, CMDLINE_MAX) };
            let len = bytes.iter().position(|&b| b == 0).unwrap_or(CMDLINE_MAX);
            match core::str::from_utf8(&bytes[..len]) {
                Ok(line) => p.parse(line),
                Err(_) => log!("command line is not text"),
            }
        }
        let image_end = (&raw const __image_end) as u64;
        let initrd = Range {
            start: initrd,
            end: initrd.saturating_add(initrd_len),
        };
        let mut n = 0;
        for i in 0..entries {
            let at = zero_page + 0x2d0 + 20 * i as u64;
            // SAFETY: within boot_params: at most 128 entries of 20 bytes from 0x2d0.
            let (start, len, kind) =
                unsafe { (read::<u64>(at), read::<u64>(at + 8), read::<u32>(at + 16)) };
            if kind != 1 {
                continue;
            }
            let r = Range {
                start: start.max(image_end),
                end: start.saturating_add(len),
            };
            for r in without(r, initrd) {
                let r = Range {
                    start: r.start.next_multiple_of(PAGE),
                    end: r.end & !(PAGE - 1),
                };
                if r.start < r.end && n < RAM_MAX {
                    p.free[n] = r;
                    n += 1;
                }
            }
        }
        p
    }

    fn parse(&mut self, line: &str) {
        for word in line.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            let ok = match key {
                "ip" => set(&mut self.ip, value.parse().ok().map(Some)),
                "gw" => set(&mut self.gateway, value.parse().ok().map(Some)),
                "pages" => set(&mut self.pages, value.parse().ok()),
                "work" => set(&mut self.work, value.parse().ok()),
                _ => true,
            };
            if !ok {
                log!("cannot read {word:?}, ignored");
            }
        }
    }
}

fn set<T>(to: &mut T, value: Option<T>) -> bool {
    match value {
        Some(v) => {
            *to = v;
            true
        }
        None => false,
    }
}

/// `r` less `hole`: up to two pieces (empty ones have start >= end).
fn without(r: Range, hole: Range) -> [Range; 2] {
    if hole.end <= r.start || hole.start >= r.end || hole.start >= hole.end {
        return [r, Range::default()];
    }
    [
        Range {
            start: r.start,
            end: hole.start.min(r.end),
        },
        Range {
            start: hole.end.max(r.start),
            end: r.end,
        },
    ]
}
