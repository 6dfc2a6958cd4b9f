//! The network device (virtio 1.2, 5.1): one receive and one transmit queue, no offloads.
//!
//! A frame the backend has no room for stays in the guest's ring, so back-pressure reaches the guest's own queue and
//! a checkpoint finds the frame still to be sent. A frame is read from the backend only when the guest has a buffer
//! for it, so none is ever held in between.

pub mod tap_backend;

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use crate::backend::{MAX_FRAME, NET_HEADER, NetBackend, SendOutcome};
use crate::devices::ring::{Chain, Ring, RingError};
use crate::devices::virtio::{
    Io, Turn, VirtioDevice, WAKE_ALL, WAKE_QUEUE, WAKE_SOURCE0, WAKE_SOURCE1,
};
use crate::devices::{DeviceError, fd, state};

/// Receive queue.
const RX: usize = 0;
/// Transmit queue.
const TX: usize = 1;
/// Frames moved per direction and turn; a pause waits for one frame at most, other work for a turn.
const BATCH: usize = 32;
/// Offset of `num_buffers` in the header; 1 whenever `MRG_RXBUF` is not negotiated (5.1.6.4.1).
const NUM_BUFFERS: usize = 10;

/// What a checkpoint holds of a network device. Frames are in the guest's rings or in the backend, never here.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    mac: [u8; 6],
    tx_stopped: bool,
}

/// Frames that did not get through, since the machine began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetDrops {
    /// From the guest: too long, or refused by the backend.
    pub tx: u64,
    /// To the guest: longer than the buffer it offered, or shorter than a header.
    pub rx: u64,
}

/// The network device.
pub struct Net {
    name: String,
    mac: [u8; 6],
    /// `mac` and `status`.
    config: [u8; 8],
    backend: Box<dyn NetBackend>,
    frame: Vec<u8>,
    chain: Chain,
    /// The backend was full: wait for room.
    tx_stopped: bool,
    /// The guest has no receive buffers: wait for its notification.
    rx_starved: bool,
    /// The backend failed to read: wait for the guest or a restore before trying again.
    rx_failed: bool,
    drops: NetDrops,
}

impl Net {
    /// A network device called `net<index>`.
    pub fn new(index: usize, mac: [u8; 6], backend: Box<dyn NetBackend>) -> Net {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&mac);
        Net {
            name: format!("net{index}"),
            mac,
            config,
            backend,
            frame: vec![0; NET_HEADER + MAX_FRAME],
            chain: Chain::default(),
            tx_stopped: false,
            rx_starved: false,
            rx_failed: false,
            drops: NetDrops::default(),
        }
    }

    /// Frames dropped so far.
    pub fn drops(&self) -> NetDrops {
        self.drops
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        if self.tx_stopped || !io.queues[TX].ready() {
            return Ok(Turn::Done);
        }
        io.queues[TX].quiet(io.mem)?;
        let mut taken = 0;
        let turn = loop {
            if taken == BATCH || io.must_yield() {
                break Turn::More;
            }
            let Some(head) = io.queues[TX].pop(io.mem)? else {
                break Turn::Done;
            };
            if !self.transmit_one(io, head)? {
                // Not taken: it stays the next one to be sent, here or on whichever host resumes this machine.
                io.queues[TX].unpop();
                self.tx_stopped = true;
                break Turn::Done;
            }
            io.queues[TX].push_used(io.mem, head, 0)?;
            taken += 1;
        };
        if taken > 0 {
            io.interrupt_for(TX)?;
        }
        if turn == Turn::Done && !self.tx_stopped && io.queues[TX].listen(io.mem)? {
            return Ok(Turn::More);
        }
        Ok(turn)
    }

    /// Sends the frame in the chain at `head`; false if the backend has no room.
    fn transmit_one(&mut self, io: &mut Io<'_>, head: u16) -> Result<bool, RingError> {
        io.queues[TX].walk(io.mem, head, &mut self.chain)?;
        if !self.chain.write.is_empty() {
            return Err(RingError::Direction);
        }
        let len = self.chain.readable();
        if len <= NET_HEADER as u64 || len > self.frame.len() as u64 {
            self.drops.tx += 1;
            return Ok(true);
        }
        let frame = &mut self.frame[..len as usize];
        self.chain.gather(io.mem, 0, frame)?;
        // No offload was negotiated, so nothing the guest says in the header may reach the host's network stack.
        frame[..NET_HEADER].fill(0);
        match self.backend.send(frame) {
            Ok(SendOutcome::Sent) => Ok(true),
            Ok(SendOutcome::Full) => Ok(false),
            Err(error) => {
                // A wire loses frames too; the guest's transport protocols cope.
                tracing::debug!(device = self.name, %error, "frame from the guest dropped");
                self.drops.tx += 1;
                Ok(true)
            }
        }
    }

    fn receive(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        if !io.queues[RX].ready() || self.rx_failed {
            return Ok(Turn::Done);
        }
        self.rx_starved = false;
        let mut moved = 0;
        let turn = loop {
            if moved == BATCH || io.must_yield() {
                break Turn::More;
            }
            if !io.queues[RX].available(io.mem)? {
                if io.queues[RX].listen(io.mem)? {
                    continue;
                }
                self.rx_starved = true;
                break Turn::Done;
            }
            io.queues[RX].quiet(io.mem)?;
            let len = match self.backend.recv(&mut self.frame) {
                Ok(Some(len)) => len.min(self.frame.len()),
                Ok(None) => break Turn::Done,
                Err(error) => {
                    tracing::warn!(device = self.name, %error, "cannot read frames for the guest");
                    self.rx_failed = true;
                    break Turn::Done;
                }
            };
            // Counts against the batch even when dropped: a flood must not hold the lock.
            moved += 1;
            self.receive_one(io, len)?;
        };
        if moved > 0 {
            io.interrupt_for(RX)?;
        }
        Ok(turn)
    }

    fn receive_one(&mut self, io: &mut Io<'_>, len: usize) -> Result<(), RingError> {
        if len <= NET_HEADER {
            self.drops.rx += 1;
            return Ok(());
        }
        let Some(head) = io.queues[RX].pop(io.mem)? else {
            self.drops.rx += 1;
            return Ok(());
        };
        io.queues[RX].walk(io.mem, head, &mut self.chain)?;
        if !self.chain.read.is_empty() {
            return Err(RingError::Direction);
        }
        if self.chain.writable() < len as u64 {
            io.queues[RX].unpop();
            self.drops.rx += 1;
            self.backend.too_long();
            return Ok(());
        }
        let frame = &mut self.frame[..len];
        frame[..NET_HEADER].fill(0);
        frame[NUM_BUFFERS] = 1;
        let written = self.chain.scatter(io.mem, 0, frame)?;
        io.queues[RX].push_used(io.mem, head, written as u32)
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn reset(&mut self) {
        self.tx_stopped = false;
        self.rx_starved = false;
        self.rx_failed = false;
    }

    fn sources(&self) -> Vec<RawFd> {
        let mut fds = vec![self.backend.rx_fd()];
        fds.extend(self.backend.room_fd());
        fds
    }

    fn wants(&self, index: usize) -> bool {
        match index {
            0 => !self.rx_starved && !self.rx_failed,
            _ => self.tx_stopped,
        }
    }

    fn service(&mut self, io: &mut Io<'_>, wake: u32) -> Result<Turn, RingError> {
        if wake & WAKE_SOURCE1 != 0 && self.tx_stopped {
            // Cleared before sending again: room that appears after a second refusal then wakes us again.
            if let Some(room) = self.backend.room_fd() {
                fd::clear(room);
            }
            self.tx_stopped = false;
        }
        if wake == WAKE_ALL || self.backend.room_fd().is_none() {
            self.tx_stopped = false;
        }
        if wake & WAKE_QUEUE != 0 {
            self.rx_failed = false;
        }
        let sent = self.transmit(io)?;
        let received = if wake & (WAKE_QUEUE | WAKE_SOURCE0) != 0 {
            self.receive(io)?
        } else {
            Turn::Done
        };
        Ok(if sent == Turn::More || received == Turn::More {
            Turn::More
        } else {
            Turn::Done
        })
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        state::to_bytes(
            &self.name,
            &Saved {
                mac: self.mac,
                tx_stopped: self.tx_stopped,
            },
        )
    }

    fn restore(&mut self, _queues: &[Ring], saved: &[u8]) -> Result<(), DeviceError> {
        let saved: Saved = state::from_bytes(&self.name, saved)?;
        if saved.mac != self.mac {
            return Err(DeviceError::State {
                name: self.name.clone(),
                why: format!(
                    "has MAC address {:02x?}, this device {:02x?}",
                    saved.mac, self.mac
                ),
            });
        }
        // Whether this host's backend has room is found out by trying, whatever it was there.
        self.reset();
        Ok(())
    }
}
