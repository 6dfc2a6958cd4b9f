//! virtio-net (clause 5.1) as smoltcp's device: one receive and one transmit queue, no offloads.

use core::sync::atomic::{Ordering, fence};

use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use super::queue::{Part, Queue, Rings};
use super::{Transport, Unusable};
use crate::cell::Once;

const QUEUE: usize = 128;
/// virtio_net_hdr_v1, present on every frame with VERSION_1.
const HEADER: usize = 12;
/// An Ethernet frame without VLAN tag and FCS.
const FRAME: usize = 1514;
const BUFFER: usize = 2048;
const F_MAC: u64 = 1 << 5;
const RX: u32 = 0;
const TX: u32 = 1;

type Buffers = [[u8; BUFFER]; QUEUE];

static RX_RINGS: Once<Rings<QUEUE>> = Once::new(Rings::new());
static TX_RINGS: Once<Rings<QUEUE>> = Once::new(Rings::new());
static RX_BUFFERS: Once<Buffers> = Once::new([[0; BUFFER]; QUEUE]);
static TX_BUFFERS: Once<Buffers> = Once::new([[0; BUFFER]; QUEUE]);

/// The receive queue and its buffers: buffer i is descriptor i.
pub struct RxRing {
    queue: Queue<QUEUE>,
    buffers: &'static mut Buffers,
}

/// The transmit queue, its buffers, and which of them are free.
pub struct TxRing {
    queue: Queue<QUEUE>,
    buffers: &'static mut Buffers,
    free: [u8; QUEUE],
    free_len: usize,
}

/// The network device.
pub struct Net {
    transport: Transport,
    /// The device's Ethernet address.
    pub mac: [u8; 6],
    rx: RxRing,
    tx: TxRing,
}

impl Net {
    /// Sets the device up; receive buffers are with it afterwards.
    pub fn new(transport: Transport) -> Result<Net, Unusable> {
        let agreed = transport.negotiate(F_MAC)?;
        let mut mac = [0x02, 0, 0, 0, 0, 0x01];
        if agreed & F_MAC != 0 {
            mac[..4].copy_from_slice(&transport.config(0).to_le_bytes());
            mac[4..].copy_from_slice(&transport.config(4).to_le_bytes()[..2]);
        }
        let mut rx = RxRing {
            queue: Queue::new(RX_RINGS.take()),
            buffers: RX_BUFFERS.take(),
        };
        let mut free = [0; QUEUE];
        for (i, f) in free.iter_mut().enumerate() {
            *f = i as u8;
        }
        let tx = TxRing {
            queue: Queue::new(TX_RINGS.take()),
            buffers: TX_BUFFERS.take(),
            free,
            free_len: QUEUE,
        };
        transport.set_queue(RX, rx.queue.rings())?;
        transport.set_queue(TX, tx.queue.rings())?;
        for i in 0..QUEUE {
            rx.offer(i);
        }
        transport.go();
        rx.queue.publish();
        transport.notify(RX);
        Ok(Net {
            transport,
            mac,
            rx,
            tx,
        })
    }

    /// A frame has come in and can be dealt with: smoltcp takes none in while it could not answer, so that with all
    /// transmit buffers held back by the host there is nothing to do but wait.
    pub fn pending(&self) -> bool {
        self.rx.queue.has_used() && (self.tx.free_len > 0 || self.tx.queue.has_used())
    }

    /// Publishes what was queued, one notification for all of it.
    pub fn kick(&mut self) {
        if self.tx.queue.publish() {
            self.transport.notify(TX);
        }
        if self.rx.queue.publish() {
            self.transport.notify(RX);
        }
    }

    /// Interrupts for received frames. Transmit completions never interrupt: buffers are collected when needed.
    pub fn interrupts(&mut self, on: bool) {
        self.rx.queue.interrupts(on);
        // With every transmit buffer taken, smoltcp waits for one: then its return has to wake us.
        self.tx.queue.interrupts(on && self.tx.free_len == 0);
    }

    /// See [`Transport::acknowledge`].
    pub fn acknowledge(&self) {
        self.transport.acknowledge();
    }
}

impl RxRing {
    fn offer(&mut self, i: usize) {
        let addr = self.buffers[i].as_ptr() as u64;
        self.queue.offer(
            i,
            &[Part {
                addr,
                len: BUFFER as u32,
                writable: true,
            }],
        );
    }
}

impl TxRing {
    fn collect(&mut self) {
        while let Some((head, _)) = self.queue.peek() {
            self.queue.pop();
            if let Some(i) = head
                && self.free_len < QUEUE
            {
                self.free[self.free_len] = i as u8;
                self.free_len += 1;
            }
        }
    }
}

impl Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        // Frames that are no frames go straight back.
        let (i, len) = loop {
            let (head, written) = self.rx.queue.peek()?;
            match head {
                Some(i) if (HEADER + 14..=HEADER + FRAME).contains(&written) => {
                    break (i, written - HEADER);
                }
                Some(i) => {
                    self.rx.queue.pop();
                    self.rx.offer(i);
                }
                None => self.rx.queue.pop(),
            }
        };
        self.tx.collect();
        if self.tx.free_len == 0 {
            return None;
        }
        Some((
            RxToken {
                ring: &mut self.rx,
                i,
                len,
            },
            TxToken { ring: &mut self.tx },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.tx.collect();
        (self.tx.free_len > 0).then_some(TxToken { ring: &mut self.tx })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        c.medium = Medium::Ethernet;
        c.max_transmission_unit = FRAME;
        c
    }
}

/// A received frame, still in its buffer.
pub struct RxToken<'a> {
    ring: &'a mut RxRing,
    i: usize,
    len: usize,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        fence(Ordering::Acquire);
        let r = f(&self.ring.buffers[self.i][HEADER..HEADER + self.len]);
        self.ring.queue.pop();
        self.ring.offer(self.i);
        r
    }
}

/// Leave to send one frame: at least one buffer is free.
pub struct TxToken<'a> {
    ring: &'a mut TxRing,
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let ring = self.ring;
        ring.free_len -= 1;
        let i = usize::from(ring.free[ring.free_len]);
        let len = len.min(BUFFER - HEADER);
        let buffer = &mut ring.buffers[i][..HEADER + len];
        buffer[..HEADER].fill(0);
        let r = f(&mut buffer[HEADER..]);
        let part = Part {
            addr: buffer.as_ptr() as u64,
            len: buffer.len() as u32,
            writable: false,
        };
        ring.queue.offer(i, &[part]);
        r
    }
}
