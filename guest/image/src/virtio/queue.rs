//! A split virtqueue (Virtual I/O Device specification 1.2, clause 2.7), driver side, in static memory.
//!
//! The device is trusted to be a device, not to be sane: ids it returns are checked before they are used as an index.

use core::sync::atomic::{Ordering, fence};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Descriptor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Ring of descriptors offered to the device.
#[repr(C, align(2))]
pub struct Avail<const N: usize> {
    flags: u16,
    idx: u16,
    ring: [u16; N],
    used_event: u16,
}

/// Ring of descriptors the device is done with.
#[repr(C, align(4))]
pub struct Used<const N: usize> {
    flags: u16,
    idx: u16,
    ring: [[u32; 2]; N],
    avail_event: u16,
}

/// The memory of a queue of N entries (a power of two), as the device sees it.
#[repr(C, align(4096))]
pub struct Rings<const N: usize> {
    pub(super) desc: [Desc; N],
    pub(super) avail: Avail<N>,
    pub(super) used: Used<N>,
}

impl<const N: usize> Rings<N> {
    /// Empty rings.
    pub const fn new() -> Rings<N> {
        Rings {
            desc: [Desc {
                addr: 0,
                len: 0,
                flags: 0,
                next: 0,
            }; N],
            avail: Avail {
                flags: NO_INTERRUPT,
                idx: 0,
                ring: [0; N],
                used_event: 0,
            },
            used: Used {
                flags: 0,
                idx: 0,
                ring: [[0; 2]; N],
                avail_event: 0,
            },
        }
    }
}

/// A part of a request: memory and whether the device writes it.
pub struct Part {
    /// Physical (= virtual) address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes here.
    pub writable: bool,
}

/// The driver's side of a queue.
pub struct Queue<const N: usize> {
    rings: &'static mut Rings<N>,
    avail: u16,
    published: u16,
    used: u16,
}

impl<const N: usize> Queue<N> {
    /// A queue over `rings`, which the device has been given or will be.
    pub fn new(rings: &'static mut Rings<N>) -> Queue<N> {
        const { assert!(N.is_power_of_two() && N <= 1024) };
        Queue {
            rings,
            avail: 0,
            published: 0,
            used: 0,
        }
    }

    /// Its rings, for [`super::Transport::set_queue`].
    pub fn rings(&self) -> &Rings<N> {
        self.rings
    }

    /// Offers a chain that takes the descriptors `head`, `head + 1`, ...: the caller owns these entries.
    /// It is seen by the device after [`Queue::publish`].
    pub fn offer(&mut self, head: usize, parts: &[Part]) {
        for (i, p) in parts.iter().enumerate() {
            let mut flags = if p.writable { F_WRITE } else { 0 };
            if i + 1 < parts.len() {
                flags |= F_NEXT;
            }
            let at = head + i;
            self.rings.desc[at] = Desc {
                addr: p.addr,
                len: p.len,
                flags,
                next: at as u16 + 1,
            };
        }
        self.rings.avail.ring[usize::from(self.avail) % N] = head as u16;
        self.avail = self.avail.wrapping_add(1);
    }

    /// Makes what was offered visible; true if the device must be notified.
    pub fn publish(&mut self) -> bool {
        if self.published == self.avail {
            return false;
        }
        self.published = self.avail;
        fence(Ordering::Release);
        // SAFETY: plain memory of ours; volatile because the device reads it at any time.
        unsafe { (&raw mut self.rings.avail.idx).write_volatile(self.avail) };
        fence(Ordering::SeqCst);
        // SAFETY: as above, the device writes it.
        unsafe { (&raw const self.rings.used.flags).read_volatile() & NO_NOTIFY == 0 }
    }

    /// Whether the device has returned something.
    pub fn has_used(&self) -> bool {
        // SAFETY: plain memory of ours; volatile because the device writes it.
        unsafe { (&raw const self.rings.used.idx).read_volatile() != self.used }
    }

    /// The next returned chain, without taking it: its head and the bytes written. An id that cannot be one is
    /// returned as None in its place.
    pub fn peek(&self) -> Option<(Option<usize>, usize)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        // SAFETY: as in `has_used`; the index is reduced modulo N.
        let [id, len] = unsafe {
            (&raw const self.rings.used.ring[usize::from(self.used) % N]).read_volatile()
        };
        Some((((id as usize) < N).then_some(id as usize), len as usize))
    }

    /// Takes what [`Queue::peek`] showed.
    pub fn pop(&mut self) {
        self.used = self.used.wrapping_add(1);
    }

    /// Asks for an interrupt with each chain returned, or for none. After asking, look again before sleeping.
    pub fn interrupts(&mut self, on: bool) {
        let flags = if on { 0 } else { NO_INTERRUPT };
        // SAFETY: plain memory of ours; volatile because the device reads it.
        unsafe { (&raw mut self.rings.avail.flags).write_volatile(flags) };
        fence(Ordering::SeqCst);
    }
}
