//! The serial console COM1: vm-superio's 16550A with our state, and input from a descriptor.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::{DeviceError, DeviceState, state};

const NAME: &str = "serial";
const STATE_VERSION: u16 = 1;
/// Bytes of vm-superio's receive FIFO.
const FIFO: usize = 64;

/// The interrupt line: an irqfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input thread when the guest has emptied the receive FIFO.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

/// What a checkpoint holds of the port: the registers and the receive FIFO.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    registers: [u8; 9],
    input: Vec<u8>,
}

/// The serial port.
pub struct Serial {
    uart: Uart<Line, Drained, Out>,
    line: EventFd,
    drained: EventFd,
}

/// Where the guest's output goes.
type Out = Box<dyn Write + Send>;

impl Serial {
    /// A port that prints to `out`, interrupts through `line` and signals `drained` when its input was all read.
    ///
    /// # Errors
    /// A descriptor that cannot be duplicated.
    pub fn new(out: Out, line: EventFd, drained: EventFd) -> io::Result<Serial> {
        Ok(Serial {
            uart: Uart::with_events(Line(line.try_clone()?), Drained(drained.try_clone()?), out),
            line,
            drained,
        })
    }

    /// The guest's read of register `offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// The guest's write of register `offset`. Output that cannot be written is lost, as on a wire.
    pub fn write(&mut self, offset: u8, value: u8) {
        let _ = self.uart.write(offset, value);
    }

    /// Bytes of input the port can take now.
    pub fn room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Input for the guest; returns the bytes taken.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Raises the interrupt again if one is pending.
    pub fn raise_pending(&self) {
        // Bit 0 clear: some interrupt is pending.
        if self.uart.state().interrupt_identification & 1 == 0 {
            let _ = self.line.write(1);
        }
    }

    /// The port's state.
    ///
    /// # Errors
    /// [`DeviceError::State`].
    pub fn save(&self) -> Result<DeviceState, DeviceError> {
        let s = self.uart.state();
        let saved = Saved {
            registers: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            input: s.in_buffer,
        };
        state::encode(NAME, STATE_VERSION, &saved)
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`DeviceError::State`] if it is malformed or its FIFO too long; the port is then as new.
    pub fn restore(&mut self, saved: &DeviceState) -> Result<(), DeviceError> {
        let wrong = |why: String| DeviceError::State {
            name: NAME.to_owned(),
            why,
        };
        let saved: Saved = state::decode(saved, NAME, STATE_VERSION)?;
        let [low, high, ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let registers = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: saved.input,
        };
        let clone = |fd: &EventFd| {
            fd.try_clone()
                .map_err(|e| wrong(format!("cannot be restored: {e}")))
        };
        let (line, drained) = (Line(clone(&self.line)?), Drained(clone(&self.drained)?));
        if registers.in_buffer.len() > FIFO {
            return Err(wrong("has more input than the port's FIFO".to_owned()));
        }
        // vm-superio restores by making a new port, which takes the output over.
        let out = std::mem::replace(self.uart.writer_mut(), Box::new(io::sink()));
        self.uart =
            Uart::from_state(&registers, line, drained, out).map_err(|e| wrong(e.to_string()))?;
        Ok(())
    }
}
