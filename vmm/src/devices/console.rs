//! The thread that feeds the serial port's input from a descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::fd;
use crate::devices::gate::Gated;
use crate::devices::serial::Serial;

const INPUT: u64 = 0;
const CONTROL: u64 = 1;
const DRAINED: u64 = 2;

/// Starts the thread; it ends after [`Gated::stop`] and a write to `control`, or at the end of the input.
///
/// # Errors
/// No epoll descriptor, or no thread.
pub fn spawn(
    serial: Arc<Gated<Serial>>,
    input: OwnedFd,
    drained: EventFd,
    control: EventFd,
) -> io::Result<JoinHandle<()>> {
    let epoll = Epoll::new()?;
    let listen = |op, fd: i32, token| epoll.ctl(op, fd, EpollEvent::new(EventSet::IN, token));
    listen(ControlOperation::Add, control.as_raw_fd(), CONTROL)?;
    listen(ControlOperation::Add, drained.as_raw_fd(), DRAINED)?;
    // A regular file, which epoll refuses, has no input to wait for.
    let mut listening = listen(ControlOperation::Add, input.as_raw_fd(), INPUT).is_ok();
    std::thread::Builder::new()
        .name("serial".to_owned())
        .spawn(move || {
            let mut over = !listening;
            loop {
                let mut events = [EpollEvent::default(); 3];
                let n = epoll.wait(-1, &mut events).unwrap_or(0);
                let mut readable = false;
                for event in &events[..n] {
                    match event.data() {
                        INPUT => readable = true,
                        CONTROL => fd::clear(control.as_raw_fd()),
                        _ => fd::clear(drained.as_raw_fd()),
                    }
                }
                let Some(mut port) = serial.enter() else {
                    return;
                };
                if readable && port.room() > 0 {
                    let mut bytes = [0u8; 64];
                    let room = port.room().min(bytes.len());
                    match read(&input, &mut bytes[..room]) {
                        Some(0) => over = true,
                        Some(n) => {
                            port.input(&bytes[..n]);
                        }
                        None => {}
                    }
                }
                // A full port stops listening until the guest has read it empty.
                let wanted = !over && port.room() > 0;
                drop(port);
                if wanted != listening {
                    let op = if wanted {
                        ControlOperation::Add
                    } else {
                        ControlOperation::Delete
                    };
                    let event = EpollEvent::new(EventSet::IN, INPUT);
                    if epoll.ctl(op, input.as_raw_fd(), event).is_ok() {
                        listening = wanted;
                    }
                }
            }
        })
}

/// Reads what is there; `Some(0)` at the end of the input or when it fails for good, `None` for nothing now.
fn read(input: &OwnedFd, buf: &mut [u8]) -> Option<usize> {
    match nix::unistd::read(input, buf) {
        Ok(n) => Some(n),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => None,
        Err(_) => Some(0),
    }
}
