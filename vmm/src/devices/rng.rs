//! The entropy device (virtio 1.2, 5.4): the host's random bytes.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::devices::ring::{Chain, Ring, RingError};
use crate::devices::virtio::{Io, Turn, VirtioDevice};
use crate::devices::{DeviceError, state};

/// Most bytes given for one request; a driver asks again for more.
const MOST: u64 = 4096;
/// Requests answered per turn.
const BATCH: usize = 16;

/// The entropy device.
pub struct Rng {
    name: String,
    chain: Chain,
}

impl Rng {
    /// An entropy device called `rng<index>`.
    pub fn new(index: usize) -> Rng {
        Rng {
            name: format!("rng{index}"),
            chain: Chain::default(),
        }
    }
}

/// Fills `buf` with random bytes; returns how many.
fn random(buf: &mut [u8]) -> usize {
    // SAFETY: the pointer and length are of a live, exclusively borrowed buffer, which the kernel fills at most.
    let n = unsafe { libc::getrandom(buf.as_mut_ptr().cast(), buf.len(), 0) };
    usize::try_from(n).unwrap_or(0)
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn reset(&mut self) {}

    fn service(&mut self, io: &mut Io<'_>, _wake: u32) -> Result<Turn, RingError> {
        if !io.queues[0].ready() {
            return Ok(Turn::Done);
        }
        let mut answered = 0;
        let turn = loop {
            if answered == BATCH || io.must_yield() {
                break Turn::More;
            }
            let Some(head) = io.queues[0].pop(io.mem)? else {
                break Turn::Done;
            };
            io.queues[0].walk(io.mem, head, &mut self.chain)?;
            if !self.chain.read.is_empty() {
                return Err(RingError::Direction);
            }
            let mut bytes = [0u8; MOST as usize];
            let wanted = self.chain.writable().min(MOST) as usize;
            let got = random(&mut bytes[..wanted]);
            let written = self.chain.scatter(io.mem, 0, &bytes[..got])?;
            io.queues[0].push_used(io.mem, head, written as u32)?;
            answered += 1;
        };
        if answered > 0 {
            io.interrupt_for(0)?;
        }
        if turn == Turn::Done && io.queues[0].listen(io.mem)? {
            return Ok(Turn::More);
        }
        Ok(turn)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _queues: &[Ring], saved: &[u8]) -> Result<(), DeviceError> {
        if saved.is_empty() {
            Ok(())
        } else {
            // The device has no state of its own.
            state::from_bytes(&self.name, saved)
        }
    }
}
