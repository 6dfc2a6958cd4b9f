//! Stand-ins for what lies behind the devices: wiring, a disk that can be stopped, a wire with limited room.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use vmm::backend::{BlockBackend, NET_HEADER, NetBackend, SendOutcome};
use vmm::devices::Wiring;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Keeps the interrupt lines, so that tests can see edges.
#[derive(Default)]
pub struct Wires {
    lines: Mutex<HashMap<u32, EventFd>>,
    pub notifications: Mutex<Vec<(u64, u32)>>,
}

impl Wires {
    /// Edges on `gsi` since the last call.
    pub fn edges(&self, gsi: u32) -> u64 {
        self.lines.lock().unwrap()[&gsi].read().unwrap_or(0)
    }
}

impl Wiring for Wires {
    fn irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        self.lines.lock().unwrap().insert(gsi, fd.try_clone()?);
        Ok(())
    }

    fn ioeventfd(&self, _fd: &EventFd, addr: u64, value: u32) -> io::Result<()> {
        self.notifications.lock().unwrap().push((addr, value));
        Ok(())
    }
}

/// What a disk was asked, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    Read(u64, usize),
    Write(u64, usize),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64),
}

/// A disk in memory which records what it is asked and can be made to hang.
pub struct TestDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub asked: Mutex<Vec<Asked>>,
    held: Mutex<bool>,
    let_go: Condvar,
    /// Requests begun, hanging ones included.
    pub begun: AtomicUsize,
}

impl TestDisk {
    pub fn new(size: usize) -> Arc<TestDisk> {
        Arc::new(TestDisk {
            bytes: Mutex::new(vec![0; size]),
            asked: Mutex::new(Vec::new()),
            held: Mutex::new(false),
            let_go: Condvar::new(),
            begun: AtomicUsize::new(0),
        })
    }

    pub fn with(bytes: Vec<u8>) -> Arc<TestDisk> {
        let disk = TestDisk::new(0);
        *disk.bytes.lock().unwrap() = bytes;
        disk
    }

    /// Makes requests hang from now on, or lets them all go.
    pub fn hang(&self, on: bool) {
        *self.held.lock().unwrap() = on;
        self.let_go.notify_all();
    }

    fn enter(&self, asked: Asked) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let mut held = self.held.lock().unwrap();
        while *held {
            held = self.let_go.wait(held).unwrap();
        }
        drop(held);
        self.asked.lock().unwrap().push(asked);
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl BlockBackend for TestDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.enter(Asked::Read(offset, buf.len()));
        let at = offset as usize;
        // Out of bounds panics: the device must have refused it.
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.enter(Asked::Write(offset, data.len()));
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.enter(Asked::Flush);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.enter(Asked::Discard(offset, len));
        self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0xdd);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.enter(Asked::WriteZeroes(offset, len));
        self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn id(&self) -> [u8; 20] {
        *b"a-disk-of-the-tests\0"
    }
}

/// A wire: frames to the guest, frames from it, and room for so many of those.
pub struct TestWire {
    state: Mutex<Wire>,
    rx: EventFd,
    room: EventFd,
}

struct Wire {
    inbound: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    room: usize,
    refused: usize,
    read: usize,
}

impl TestWire {
    pub fn new() -> Arc<TestWire> {
        Arc::new(TestWire {
            state: Mutex::new(Wire {
                inbound: VecDeque::new(),
                sent: Vec::new(),
                room: usize::MAX,
                refused: 0,
                read: 0,
            }),
            rx: EventFd::new(EFD_NONBLOCK).unwrap(),
            room: EventFd::new(EFD_NONBLOCK).unwrap(),
        })
    }

    /// A frame for the guest: a header of rubbish, as a careless backend's, and `payload`.
    pub fn inject(&self, payload: &[u8]) {
        let mut frame = vec![0xff; NET_HEADER];
        frame.extend_from_slice(payload);
        self.state.lock().unwrap().inbound.push_back(frame);
        self.rx.write(1).unwrap();
    }

    /// Takes `frames` more, then is full.
    pub fn set_room(&self, frames: usize) {
        self.state.lock().unwrap().room = frames;
        if frames > 0 {
            self.room.write(1).unwrap();
        }
    }

    pub fn sent(&self) -> Vec<Vec<u8>> {
        self.state.lock().unwrap().sent.clone()
    }

    /// How often a frame was refused for want of room.
    pub fn refused(&self) -> usize {
        self.state.lock().unwrap().refused
    }

    /// Frames the device has read.
    pub fn read(&self) -> usize {
        self.state.lock().unwrap().read
    }
}

pub struct End(pub Arc<TestWire>);

impl NetBackend for End {
    fn send(&mut self, frame: &[u8]) -> io::Result<SendOutcome> {
        let mut wire = self.0.state.lock().unwrap();
        if wire.room == 0 {
            wire.refused += 1;
            return Ok(SendOutcome::Full);
        }
        wire.room -= 1;
        wire.sent.push(frame.to_vec());
        Ok(SendOutcome::Sent)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut wire = self.0.state.lock().unwrap();
        let Some(frame) = wire.inbound.pop_front() else {
            let _ = self.0.rx.read();
            return Ok(None);
        };
        wire.read += 1;
        let len = frame.len().min(buf.len());
        buf[..len].copy_from_slice(&frame[..len]);
        Ok(Some(len))
    }

    fn rx_fd(&self) -> RawFd {
        self.0.rx.as_raw_fd()
    }

    fn room_fd(&self) -> Option<RawFd> {
        Some(self.0.room.as_raw_fd())
    }
}

/// The console's output.
#[derive(Clone, Default)]
pub struct Output(pub Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
