//! virtio-blk (clause 5.2): one request at a time, without waiting for it.

use core::sync::atomic::{Ordering, fence};

use super::queue::{Part, Queue, Rings};
use super::{Transport, Unusable};
use crate::cell::Once;
use crate::proto::DISK_BLOCK;

const QUEUE: usize = 8;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;

static RINGS: Once<Rings<QUEUE>> = Once::new(Rings::new());
static REQUEST: Once<Request> = Once::new(Request {
    header: [0; 16],
    status: 0,
    data: [0; DISK_BLOCK],
});

/// The memory of a request, as the device sees it.
#[repr(C, align(4096))]
struct Request {
    data: [u8; DISK_BLOCK],
    header: [u8; 16],
    status: u8,
}

/// The block device. Requests are for the block at offset 0.
pub struct Blk {
    transport: Transport,
    queue: Queue<QUEUE>,
    request: &'static mut Request,
    busy: bool,
    /// Capacity in 512-byte sectors.
    pub sectors: u64,
    /// The device refuses writes.
    pub read_only: bool,
    /// The device has a cache that can be flushed.
    pub can_flush: bool,
}

/// What can be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Read the block.
    Read,
    /// Write the block.
    Write,
    /// Flush what was written.
    Flush,
}

impl Blk {
    /// Sets the device up.
    pub fn new(transport: Transport) -> Result<Blk, Unusable> {
        let agreed = transport.negotiate(F_RO | F_FLUSH)?;
        let sectors = u64::from(transport.config(0)) | u64::from(transport.config(4)) << 32;
        let queue = Queue::new(RINGS.take());
        transport.set_queue(0, queue.rings())?;
        transport.go();
        let (read_only, can_flush) = (agreed & F_RO != 0, agreed & F_FLUSH != 0);
        Ok(Blk {
            transport,
            queue,
            request: REQUEST.take(),
            busy: false,
            sectors,
            read_only,
            can_flush,
        })
    }

    /// The block's bytes: filled before a write, valid after a read. Not to be touched while busy, so None then.
    pub fn block(&mut self) -> Option<&mut [u8; DISK_BLOCK]> {
        (!self.busy).then_some(&mut self.request.data)
    }

    /// Starts a request; does nothing if one is on its way.
    pub fn start(&mut self, ask: Ask) {
        if self.busy {
            return;
        }
        let kind = match ask {
            Ask::Read => T_IN,
            Ask::Write => T_OUT,
            Ask::Flush => T_FLUSH,
        };
        self.request.header = [0; 16];
        self.request.header[..4].copy_from_slice(&kind.to_le_bytes());
        self.request.status = 0xff;
        let header = Part {
            addr: (&raw const self.request.header) as u64,
            len: 16,
            writable: false,
        };
        let status = Part {
            addr: (&raw const self.request.status) as u64,
            len: 1,
            writable: true,
        };
        let addr = (&raw const self.request.data) as u64;
        let data = Part {
            addr,
            len: DISK_BLOCK as u32,
            writable: ask == Ask::Read,
        };
        match ask {
            Ask::Flush => self.queue.offer(0, &[header, status]),
            _ => self.queue.offer(0, &[header, data, status]),
        }
        self.busy = true;
        if self.queue.publish() {
            self.transport.notify(0);
        }
    }

    /// The request on its way has ended: whether it succeeded.
    pub fn finished(&mut self) -> Option<bool> {
        if !self.busy {
            return None;
        }
        self.queue.peek()?;
        self.queue.pop();
        self.busy = false;
        fence(Ordering::Acquire);
        // SAFETY: our own memory, written by the device.
        Some(unsafe { (&raw const self.request.status).read_volatile() } == 0)
    }

    /// [`Blk::finished`] would say something.
    pub fn pending(&self) -> bool {
        self.queue.has_used()
    }

    /// Interrupts for ended requests.
    pub fn interrupts(&mut self, on: bool) {
        self.queue.interrupts(on);
    }

    /// See [`Transport::acknowledge`].
    pub fn acknowledge(&self) {
        self.transport.acknowledge();
    }
}
