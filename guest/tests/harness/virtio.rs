//! The simplest virtio-mmio devices: a network card on a tap and a disk in memory. No event index, no packed rings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use netbuf::{Port, Tap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory, shared with the device threads.
#[derive(Clone, Copy)]
pub struct Mem {
    /// Host address of guest address 0.
    pub at: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: the mapping lives as long as the process, and every access is checked and goes by raw copies.
unsafe impl Send for Mem {}
// SAFETY: as above.
unsafe impl Sync for Mem {}

impl Mem {
    /// Copies out `N` bytes.
    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut b = [0; N];
        self.read(at, &mut b);
        b
    }

    /// Copies out.
    pub fn read(&self, at: u64, to: &mut [u8]) {
        assert!(at as usize + to.len() <= self.len, "guest address {at:#x}");
        // SAFETY: bounds checked just above.
        unsafe { std::ptr::copy(self.at.add(at as usize), to.as_mut_ptr(), to.len()) };
    }

    /// Copies in.
    pub fn write(&self, at: u64, from: &[u8]) {
        assert!(
            at as usize + from.len() <= self.len,
            "guest address {at:#x}"
        );
        // SAFETY: bounds checked just above.
        unsafe { std::ptr::copy(from.as_ptr(), self.at.add(at as usize), from.len()) };
    }

    fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }
}

/// What is behind a slot.
pub enum Kind {
    /// A network card.
    Net(Arc<Tap>),
    /// A disk's bytes, and whether it fails every write.
    Disk(Vec<u8>, bool),
}

#[derive(Default, Clone, Copy)]
struct Queue {
    num: u16,
    ready: bool,
    at: [u64; 3],
    next: u16,
    used: u16,
}

/// One part of a request: address, length, device-writable.
type Part = (u64, u32, bool);

/// A virtio-mmio slot.
pub struct Slot {
    mem: Mem,
    /// The device.
    pub kind: Kind,
    irq: EventFd,
    select: [u32; 3],
    status: u32,
    queues: [Queue; 2],
    /// Times the guest notified.
    pub notified: u64,
    /// Returns of buffers with an id that cannot be one, to be made before the next honest one.
    pub lies: u32,
}

impl Slot {
    /// A slot in reset.
    pub fn new(mem: Mem, kind: Kind, irq: EventFd) -> Slot {
        Slot {
            mem,
            kind,
            irq,
            select: [0; 3],
            status: 0,
            queues: [Queue::default(); 2],
            notified: 0,
            lies: 0,
        }
    }

    /// Register read.
    pub fn read(&mut self, offset: u64) -> u32 {
        let features = |net: u64, disk: u64| match self.kind {
            Kind::Net(_) => net,
            Kind::Disk(..) => disk,
        };
        match offset {
            0x00 => u32::from_le_bytes(*b"virt"),
            0x04 => 2,
            0x08 => features(1, 2) as u32,
            0x10 => (features(1 << 32 | 1 << 5, 1 << 32 | 1 << 9) >> (32 * self.select[0])) as u32,
            0x34 => 256,
            0x44 => u32::from(self.queues[self.select[2] as usize & 1].ready),
            0x70 => self.status,
            0x100 => features(0x5678_1202, 0x100) as u32,
            0x104 => features(0x0100, 0) as u32,
            _ => 0,
        }
    }

    /// Register write.
    pub fn write(&mut self, offset: u64, v: u32) {
        let q = &mut self.queues[self.select[2] as usize & 1];
        match offset {
            0x14 => self.select[0] = v & 1,
            0x24 => self.select[1] = v & 1,
            0x30 => self.select[2] = v & 1,
            0x38 => q.num = v as u16,
            0x44 => q.ready = v == 1,
            0x50 => {
                self.notified += 1;
                match self.kind {
                    Kind::Net(_) if v == 1 => self.transmit(),
                    Kind::Disk(..) => self.serve_disk(),
                    Kind::Net(_) => {}
                }
            }
            0x70 => self.status = v,
            0x80 | 0x90 | 0xa0 => q.at[(offset as usize - 0x80) / 0x10] = u64::from(v),
            _ => {}
        }
    }

    fn pop(&mut self, i: usize) -> Option<(u16, Vec<Part>)> {
        let q = &mut self.queues[i];
        if !q.ready || q.next == self.mem.u16(q.at[1] + 2) {
            return None;
        }
        let head = self.mem.u16(q.at[1] + 4 + 2 * u64::from(q.next % q.num));
        q.next = q.next.wrapping_add(1);
        let (mut parts, mut id) = (Vec::new(), head);
        loop {
            let d: [u8; 16] = self.mem.get(q.at[0] + 16 * u64::from(id));
            let flags = u16::from_le_bytes([d[12], d[13]]);
            let addr = u64::from_le_bytes(d[..8].try_into().expect("8 bytes"));
            let len = u32::from_le_bytes(d[8..12].try_into().expect("4 bytes"));
            parts.push((addr, len, flags & 2 != 0));
            if flags & 1 == 0 {
                return Some((head, parts));
            }
            id = u16::from_le_bytes([d[14], d[15]]);
        }
    }

    fn push(&mut self, i: usize, id: u32, len: u32) {
        let q = &mut self.queues[i];
        let at = q.at[2] + 4 + 8 * u64::from(q.used % q.num);
        self.mem.write(at, &id.to_le_bytes());
        self.mem.write(at + 4, &len.to_le_bytes());
        std::sync::atomic::fence(Ordering::SeqCst);
        q.used = q.used.wrapping_add(1);
        self.mem.write(q.at[2] + 2, &q.used.to_le_bytes());
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.mem.u16(q.at[1]) & 1 == 0 {
            self.irq.write(1).expect("irqfd");
        }
    }

    fn transmit(&mut self) {
        while let Some((head, parts)) = self.pop(1) {
            let mut frame = Vec::new();
            for (addr, len, _) in parts {
                let mut b = vec![0; len as usize];
                self.mem.read(addr, &mut b);
                frame.extend(b);
            }
            if let Kind::Net(tap) = &self.kind {
                tap.send(&frame).expect("tap");
            }
            self.push(1, u32::from(head), 0);
        }
    }

    /// Puts a frame (with its 12-byte header) into the guest's next receive buffer; false if there is none.
    pub fn receive(&mut self, frame: &[u8], claimed_len: u32) -> bool {
        let Some((head, parts)) = self.pop(0) else {
            return false;
        };
        assert!(parts[0].2 && parts[0].1 as usize >= frame.len());
        self.mem.write(parts[0].0, frame);
        for _ in 0..std::mem::take(&mut self.lies) {
            self.push(0, 0xdead_beef, 64);
        }
        self.push(0, u32::from(head), claimed_len);
        true
    }

    fn serve_disk(&mut self) {
        while let Some((head, parts)) = self.pop(0) {
            let header: [u8; 16] = self.mem.get(parts[0].0);
            let at = u64::from_le_bytes(header[8..].try_into().expect("8 bytes")) as usize * 512;
            let Kind::Disk(bytes, broken) = &mut self.kind else {
                unreachable!("a disk")
            };
            let (addr, len, _) = parts[1];
            let mut status = 0;
            match header[0] {
                0 => self.mem.write(addr, &bytes[at..at + len as usize]),
                1 if *broken => status = 1,
                1 => self.mem.read(addr, &mut bytes[at..at + len as usize]),
                4 => {}
                _ => status = 2,
            }
            let last = parts[parts.len() - 1];
            assert!(last.2 && last.1 == 1, "the status byte");
            self.mem.write(last.0, &[status]);
            self.push(0, u32::from(head), 1);
        }
    }
}

/// Locks a slot.
pub fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().expect("no device thread has panicked")
}

/// A thread that brings frames from the tap to the guest until `stop` is set.
pub fn feed(slot: Arc<Mutex<Slot>>, tap: Arc<Tap>, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut frame = [0; 2048];
        while !stop.load(Ordering::Relaxed) {
            match tap.recv(&mut frame) {
                Ok(Some(len)) => {
                    while !lock(&slot).receive(&frame[..len], len as u32)
                        && !stop.load(Ordering::Relaxed)
                    {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    })
}
