//! A port without a network, for tests here and in the layers below.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::port::Port;
use crate::wake::Wake;

/// A port that keeps what it is given: outbound frames are collected, inbound ones come from a list; its descriptor is an eventfd that is always writable.
#[doc(hidden)]
#[derive(Debug)]
pub struct MemoryPort {
    /// Frames sent, in order.
    pub sent: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Errors to answer the next sends with, then success.
    pub refuse: Arc<Mutex<VecDeque<io::Error>>>,
    /// Whether it is deaf now. What is deaf here keeps its frames, as a device that refuses the filter does.
    pub deaf: Arc<AtomicBool>,
    inbound: Mutex<VecDeque<Vec<u8>>>,
    wake: Wake,
}

impl MemoryPort {
    /// A port with these frames to be received.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new(inbound: Vec<Vec<u8>>) -> io::Result<MemoryPort> {
        let wake = Wake::new()?;
        if !inbound.is_empty() {
            wake.raise();
        }
        Ok(MemoryPort {
            sent: Arc::default(),
            refuse: Arc::default(),
            deaf: Arc::default(),
            inbound: Mutex::new(inbound.into()),
            wake,
        })
    }
}

impl Port for MemoryPort {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let refused = self
            .refuse
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        if let Some(e) = refused {
            return Err(e);
        }
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(frame.to_vec());
        Ok(())
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let next = self
            .inbound
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        Ok(next.map(|f| {
            let n = f.len().min(buf.len());
            buf[..n].copy_from_slice(&f[..n]);
            n
        }))
    }

    fn fd(&self) -> RawFd {
        self.wake.fd()
    }

    fn set_deaf(&self, deaf: bool) -> io::Result<()> {
        self.deaf.store(deaf, Ordering::SeqCst);
        Ok(())
    }
}
